"""A time limit for loops whose number of steps can explode, and turns for the threads that run such loops.

The limit holds for the thread (the context) that set it, so that shared loops deep inside a compilation need no
argument for it. It limits the thread's own time, because a busy machine does not make a schema too large. Those who
wait for a compilation limit the wall-clock time (`service`).

A thread may also work in turns (`in_turns`). At the end of its turn, the next check does not return until the thread is
given another turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from ramet.errors import GrammarTooLarge

# Returns the time (time.monotonic) at which the thread's turn ends. Blocks between turns.
Turn = Callable[[], float]


@dataclass(slots=True)
class _Limit:
    """Owner: the thread that set it."""

    seconds: float
    what: str
    end: float  # by the thread's time
    next_look: float  # by the wall clock: until then, neither the thread's time nor its turn can end
    turn: Turn | None


_limit: ContextVar[_Limit | None] = ContextVar("grammar deadline", default=None)


class OutOfTime(GrammarTooLarge):
    """The time limit was exceeded. The same work may succeed later, or on a faster machine."""


@contextmanager
def time_limit(seconds: float, what: str = "compiling") -> Iterator[None]:
    """Make `check` raise once this thread has worked for `seconds`, or earlier if an outer limit ends sooner.

    what: the work, for the message of the error.
    """
    end = time.thread_time() + seconds
    outer = _limit.get()
    if outer is not None and outer.end <= end:
        yield
        return
    look, turn = time.monotonic() + seconds, None
    if outer is not None:
        look, turn = min(look, outer.next_look), outer.turn
    token = _limit.set(_Limit(seconds, what, end, look, turn))
    try:
        yield
    finally:
        _limit.reset(token)


@contextmanager
def in_turns(turn: Turn) -> Iterator[None]:
    """Make `check` call `turn` once this thread's turn has ended."""
    token = _limit.set(_Limit(math.inf, "", math.inf, 0.0, turn))
    try:
        yield
    finally:
        _limit.reset(token)


def is_set() -> bool:
    """Return whether this thread has a limit."""
    return _limit.get() is not None


def check(name: str = "") -> None:
    """Check the limit, and wait for the next turn if this one has ended. About 0.1 µs.

    Raises: OutOfTime past the limit, with the `name` of the compiled part (a JSON pointer, or a pattern).
    """
    limit = _limit.get()
    if limit is None or (now := time.monotonic()) < limit.next_look:
        return
    turn_ends = math.inf
    if limit.turn is not None:
        turn_ends = limit.turn()
        now = time.monotonic()
    left = limit.end - time.thread_time()
    if left > 0:
        limit.next_look = min(now + left, turn_ends)
        return
    where = f", at {name}" if name else ""
    error = OutOfTime(f"{limit.what} took longer than {limit.seconds:g} s{where}; simplify it or raise the limit")
    error.pointer = name if name.startswith("/") else None
    raise error
