"""The parts of the loop's rounds, by a clock that the tests move."""

from __future__ import annotations

import logging

import pytest

from ramet.runtime.engine.step_watch import StepWatch


class Rounds:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.watch = StepWatch(lambda: self.now_s)

    def run(self, work: str = "", **parts: float) -> None:
        self.watch.begin()
        for part, seconds in parts.items():
            self.now_s += seconds
            self.watch.lap(part)
        self.watch.end(work)


def test_the_longest_round_and_the_longest_parts_are_kept() -> None:
    rounds = Rounds()
    rounds.run(launch=0.02, grammars=0.003)
    rounds.now_s += 50.0  # without work
    rounds.run(launch=0.01, grammars=0.005)
    stats = rounds.watch.stats()
    assert stats["longest_step_s"] == pytest.approx(0.023)
    assert stats["longest_step_launch_s"] == pytest.approx(0.02)
    assert stats["longest_step_grammars_s"] == pytest.approx(0.005)
    assert stats["longest_step_deliver_s"] == 0.0
    assert stats["num_long_steps"] == 0


def test_long_rounds_are_logged_once_in_a_while_with_the_longest_of_them(caplog: pytest.LogCaptureFixture) -> None:
    rounds = Rounds()
    with caplog.at_level(logging.INFO):
        rounds.run(launch=0.05)
        rounds.run("2 rows", launch=0.2, commands=0.1)
        rounds.run(commands=0.4)
        rounds.run("9 rows", launch=0.15)
        rounds.now_s += 20.0
        rounds.run(launch=0.11)
    first, second = caplog.messages
    assert first == "1 steps took 100 ms or more; the longest took 300 ms: launch 200 ms, commands 100 ms (2 rows)"
    assert second == "3 steps took 100 ms or more; the longest took 400 ms: commands 400 ms"
    assert rounds.watch.stats()["num_long_steps"] == 4
