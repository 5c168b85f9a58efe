"""A limit on the time that compiling may take, asked by the loops that can explode.

The limit holds for the thread (the context) that set it, so that loops far below a compilation, which are shared by
all, need no argument for it. It is a limit on the thread's own time: a schema is not too large because the machine
is busy. Who waits for a compilation bounds the wall clock (`service`).
"""

from __future__ import annotations

import time
from contextvars import ContextVar, Token
from dataclasses import dataclass

from ramet.errors import GrammarTooLarge


@dataclass(slots=True)
class _Limit:
    """Owner: the thread that set it."""

    seconds: float
    end: float  # of the thread's time
    next_look: float  # of the wall clock: the thread's time cannot have run out before


_limit: ContextVar[_Limit | None] = ContextVar("grammar deadline", default=None)


class OutOfTime(GrammarTooLarge):
    """The time limit was passed: on another day, or a faster machine, it might not have been."""


class time_limit:
    """Let `check` raise once this thread has worked for `seconds`, unless an outer limit ends sooner."""

    __slots__ = ("_seconds", "_token")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._token: Token[_Limit | None] | None = None

    def __enter__(self) -> None:
        end = time.thread_time() + self._seconds
        outer = _limit.get()
        if outer is None or end < outer.end:
            self._token = _limit.set(_Limit(self._seconds, end, time.monotonic() + self._seconds))

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            _limit.reset(self._token)


def is_set() -> bool:
    """Does this thread work under a limit?"""
    return _limit.get() is not None


def check(name: str = "") -> None:
    """Raises: OutOfTime past the limit, naming what was worked on (a JSON pointer, or a pattern). About 0.1 µs."""
    limit = _limit.get()
    if limit is None or (now := time.monotonic()) < limit.next_look:
        return
    left = limit.end - time.thread_time()
    if left > 0:
        limit.next_look = now + left
        return
    where = f", at {name}" if name else ""
    error = OutOfTime(f"compiling took longer than {limit.seconds:g} s{where}; simplify it or raise the limit")
    error.pointer = name if name.startswith("/") else None
    raise error
