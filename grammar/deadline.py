"""A time limit for compiling, checked by the loops that can explode.

The limit holds for the thread (the context) that set it, so that shared loops deep inside a compilation need no
argument for it. It limits the thread's own time, because a busy machine does not make a schema too large. Those who
wait for a compilation limit the wall-clock time (`service`).
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
    end: float  # by the thread's time
    next_look: float  # by the wall clock: the thread's time cannot run out before


_limit: ContextVar[_Limit | None] = ContextVar("grammar deadline", default=None)


class OutOfTime(GrammarTooLarge):
    """The time limit was exceeded. The same compilation may succeed later, or on a faster machine."""


class time_limit:
    """Make `check` raise once this thread has worked for `seconds`, or earlier if an outer limit ends sooner."""

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
    """Return whether this thread has a limit."""
    return _limit.get() is not None


def check(name: str = "") -> None:
    """Check the limit. About 0.1 µs.

    Raises: OutOfTime past the limit, with the `name` of the compiled part (a JSON pointer, or a pattern).
    """
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
