"""Calls that take turns on one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from random import Random
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.errors import InvalidProgram
from ramet.lang.running.turns import Pause, together

T = TypeVar("T")
number: ContextVar[int] = ContextVar("number", default=-1)


class Clock:
    """Wakes all pauses when all functions wait, in an order of its own."""

    def __init__(self, order: Callable[[list[Pause]], None] = list.reverse) -> None:
        self.order = order
        self.waiting: list[Pause] = []

    def wait(self) -> None:
        self.waiting.append(pause := Pause())
        assert pause.wait(None, self.advance)

    def advance(self) -> None:
        pauses, self.waiting = self.waiting, []
        self.order(pauses)
        for pause in pauses:
            pause.wake()


def call(function: Callable[[], T]) -> T:
    return function()


@given(st.lists(st.integers(0, 4), max_size=6), st.randoms(use_true_random=False))
def test_functions_go_on_in_any_order_and_their_results_come_in_theirs(nums: list[int], random: Random) -> None:
    clock = Clock(random.shuffle)
    trace: list[tuple[int, int]] = []

    def body(index: int) -> int:
        for turn in range(nums[index]):
            trace.append((index, turn))
            clock.wait()
        return index

    assert together(body, range(len(nums))) == list(range(len(nums)))
    for index, num in enumerate(nums):
        assert [turn for i, turn in trace if i == index] == list(range(num))


def test_all_start_before_any_waits_and_what_all_need_is_asked_for_once() -> None:
    events: list[str] = []
    pauses: list[Pause] = []

    def ask() -> None:
        events.append("ask")
        for pause in pauses:
            pause.wake()
        pauses.clear()

    def body(name: str) -> None:
        events.append(name)
        pauses.append(pause := Pause())
        pause.wait(None, ask)

    together(body, "abc")
    assert events == ["a", "b", "c", "ask"]


def test_groups_within_groups_take_turns_together() -> None:
    clock = Clock()
    started: list[str] = []

    def leaf(name: str) -> str:
        started.append(name)
        clock.wait()
        return name

    def branch(name: str) -> list[str]:
        return together(leaf, [f"{name}{i}" for i in range(3)])

    found = together(branch, "ab")
    assert found == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
    assert started == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_an_error_is_raised_and_ends_the_others_where_they_wait() -> None:
    clock = Clock()
    ended: list[int] = []

    def body(index: int) -> None:
        try:
            clock.wait()
            if index == 1:
                raise KeyError(index)
        finally:
            ended.append(index)

    with pytest.raises(KeyError):
        together(body, range(4))
    assert sorted(ended) == [0, 1, 2, 3]


def test_an_error_of_asking_is_raised_in_one_that_asked() -> None:
    caught: list[str] = []

    def ask() -> None:
        raise ValueError("no")

    def body() -> str:
        try:
            Pause().wait(None, ask)
        except ValueError as error:
            caught.append(str(error))
        return "done"

    assert together(call, [body, lambda: "other"]) == ["done", "other"]
    assert caught == ["no"]


def test_a_time_limit_ends_the_wait_of_one_alone() -> None:
    late = Pause()

    def limited() -> bool:
        found = Pause().wait(0.01, lambda: None)
        late.wake()
        return found

    outer: list[Pause] = []

    def unlimited() -> bool:
        outer.append(Pause())
        return outer[0].wait(None, lambda: None)

    def limited_first() -> bool:
        found = Pause().wait(0.01, lambda: None)
        outer[0].wake()
        return found

    assert together(call, [unlimited, limited_first]) == [True, False]
    assert not limited()
    assert late.wait(None, lambda: None)


def test_other_threads_may_wake_at_any_time() -> None:
    def body(index: int) -> int:
        for _ in range(20):
            pause = Pause()
            threading.Thread(target=pause.wake).start()
            assert pause.wait(5, lambda: None)
        return index

    assert together(body, range(5)) == list(range(5))


def test_each_has_a_context_of_its_own() -> None:
    clock = Clock()

    def body(index: int) -> int:
        before = number.get()
        number.set(index)
        clock.wait()
        assert before == -7
        return number.get()

    token = number.set(-7)
    assert together(body, range(3)) == [0, 1, 2]
    assert number.get() == -7
    number.reset(token)


def test_an_async_function_is_refused_by_name() -> None:
    async def body() -> None:
        pass

    with pytest.raises(InvalidProgram, match=r"body is async.*asyncio\.gather"):
        together(call, [body])


def test_nothing_gives_nothing() -> None:
    assert together(call, []) == []


def test_an_interrupt_starts_no_further_function() -> None:
    started: list[str] = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together(call, [interrupted, lambda: started.append("other")])
    assert not started


def test_one_that_will_not_end_begins_no_other() -> None:
    begun: list[int] = []

    def stubborn() -> None:
        try:
            Pause().wait(None, lambda: None)
        except BaseException:
            begun.append(0)

    def wrong() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        together(call, [stubborn, wrong, lambda: begun.append(2)])
    assert begun == [0]
