"""Works in turns: none keeps the giver of turns waiting, short ones pass long ones, and all of them end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from ramet.grammar import deadline
from ramet.grammar.deadline import OutOfTime
from ramet.runtime.constraints.turns import GrammarWork, Turns


@pytest.fixture
def turns() -> Iterator[Turns]:
    turns = Turns()
    yield turns
    turns.close()


def endless() -> None:
    while True:
        deadline.check()


def until(event: threading.Event) -> Callable[[], None]:
    def wait() -> None:
        while not event.is_set():
            deadline.check()

    return wait


def all_of(turns: Turns) -> list[GrammarWork]:
    done = []
    while turns.has_work:
        done += turns.give(0.01)
    return done


def first_turns(turns: Turns) -> list[GrammarWork]:
    """Those of the new works that are done with one turn."""
    return turns.give(20.0, to_unfinished=False)


def test_works_are_done_and_their_errors_are_kept(turns: Turns) -> None:
    found: list[int] = []
    works = [GrammarWork(i, lambda i=i: found.append(1 // i)) for i in (1, 0, 1)]  # type: ignore[misc]
    for work in works:
        turns.add(work)
    assert set(all_of(turns)) == set(works)
    assert found == [1, 1]
    assert [type(work.error) for work in works] == [type(None), ZeroDivisionError, type(None)]


def test_a_long_work_is_passed_by_short_ones_and_goes_on_in_its_turns(turns: Turns) -> None:
    may_end = threading.Event()
    long, short = GrammarWork("a", until(may_end)), GrammarWork("b", lambda: None)
    turns.add(long)
    assert first_turns(turns) == []
    for _ in range(3):
        turns.add(short)
        assert first_turns(turns) == [short]
    may_end.set()
    assert all_of(turns) == [long]
    assert long.error is None


def test_works_of_one_owner_come_one_after_the_other(turns: Turns) -> None:
    order: list[str] = []
    may_end = threading.Event()

    def first() -> None:
        until(may_end)()
        order.append("first")

    turns.add(GrammarWork("a", first))
    turns.add(GrammarWork("a", lambda: order.append("second")))
    for _ in range(5):
        assert first_turns(turns) == []
    may_end.set()
    all_of(turns)
    assert order == ["first", "second"]


def test_a_thread_that_makes_no_check_holds_nobody_up(turns: Turns) -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    def wait() -> None:
        has_begun.set()
        may_end.wait(60)

    turns.add(stuck := GrammarWork("a", wait))
    while not has_begun.is_set():
        assert turns.give(0.001) == []
    turns.add(other := GrammarWork("b", lambda: None))
    assert first_turns(turns) == [other]
    may_end.set()
    assert all_of(turns) == [stuck]


def test_a_cancelled_work_ends_at_its_next_check(turns: Turns) -> None:
    turns.add(work := GrammarWork("a", endless))
    assert first_turns(turns) == []
    work.cancel()
    assert all_of(turns) == [work]
    assert isinstance(work.error, OutOfTime)


def test_many_endless_works_leave_room_for_new_ones_once_they_are_cancelled(turns: Turns) -> None:
    works = [GrammarWork(i, endless) for i in range(200)]
    for work in works:
        turns.add(work)
    assert first_turns(turns) == []
    for work in works:
        work.cancel()
    turns.add(GrammarWork("b", lambda: None))
    assert len(all_of(turns)) == 201


def test_the_threads_end_when_the_turns_are_closed() -> None:
    before = set(threading.enumerate())
    turns = Turns()
    turns.add(GrammarWork("a", endless))
    turns.add(GrammarWork("b", lambda: None))
    first_turns(turns)
    threads = set(threading.enumerate()) - before
    turns.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
