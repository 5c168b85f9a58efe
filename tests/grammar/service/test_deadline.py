"""The time limit of a compilation counts what its thread does, not what the machine does meanwhile."""

from __future__ import annotations

import time

import pytest

from ramet.grammar import deadline
from ramet.grammar.deadline import OutOfTime, time_limit


def work(seconds: float) -> None:
    """Use the processor for so long, asking each time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        deadline.check("/properties/a")


def test_work_beyond_the_limit_names_the_place_and_the_limit() -> None:
    with (
        pytest.raises(OutOfTime, match=r"longer than 0\.02 s, at /properties/a; simplify it") as raised,
        time_limit(0.02),
    ):
        work(5)
    assert raised.value.pointer == "/properties/a"
    deadline.check()  # the limit is gone


def test_time_in_which_others_had_the_processor_does_not_count() -> None:
    with time_limit(0.05):
        for _ in range(4):
            time.sleep(0.03)
            work(0.002)


def test_the_sooner_of_two_limits_holds() -> None:
    with time_limit(0.01), pytest.raises(OutOfTime, match=r"longer than 0\.01 s"), time_limit(60):
        work(5)
    with time_limit(60):
        with pytest.raises(OutOfTime, match=r"longer than 0\.01 s"), time_limit(0.01):
            work(5)
        work(0.01)
