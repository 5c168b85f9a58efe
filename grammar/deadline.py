"""A limit on the time that compiling may take, asked by the loops that can explode.

The limit holds for the thread (the context) that set it, so that loops far below a compilation, which are shared by
all, need no argument for it.
"""

from __future__ import annotations

import time
from contextvars import ContextVar, Token

from ramet.errors import GrammarTooLarge

_limit: ContextVar[tuple[float, float]] = ContextVar("grammar deadline", default=(float("inf"), float("inf")))


class OutOfTime(GrammarTooLarge):
    """The time limit was passed: on another day, or a faster machine, it might not have been."""


class time_limit:
    """Let `check` raise once `seconds` have passed, unless an outer limit ends sooner."""

    __slots__ = ("_seconds", "_token")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._token: Token[tuple[float, float]] | None = None

    def __enter__(self) -> None:
        end = time.monotonic() + self._seconds
        if end < _limit.get()[0]:
            self._token = _limit.set((end, self._seconds))

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            _limit.reset(self._token)


def check(name: str = "") -> None:
    """Raises: OutOfTime past the limit, naming what was worked on (a JSON pointer, or a pattern). About 0.1 µs."""
    end, seconds = _limit.get()
    if time.monotonic() > end:
        where = f", at {name}" if name else ""
        error = OutOfTime(f"compiling took longer than {seconds:g} s{where}; simplify it or raise the limit")
        error.pointer = name if name.startswith("/") else None
        raise error
