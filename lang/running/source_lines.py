"""Finds the line of the user's own source that called the language or defined a function."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from greenlet import getcurrent


def caller_line() -> str:
    """Return `file:line` of the nearest caller outside of the language."""
    frame, stack = sys._getframe(1), getcurrent()
    while frame.f_globals.get("__name__", "").startswith(("ramet.lang.", "ramet.compat.", "contextlib")):
        back = frame.f_back
        if back is None and stack.parent is not None:  # a function that takes turns, on a stack of its own
            stack = stack.parent
            back = stack.gr_frame
        if back is None:
            break
        frame = back
    return f"{_shown(frame.f_code.co_filename)}:{frame.f_lineno}"


def line_of(function: Callable[..., Any]) -> str | None:
    """Return `file:line` of a function's definition, or None for one that is not written in Python."""
    code = getattr(function, "__code__", None)
    return None if code is None else f"{_shown(code.co_filename)}:{code.co_firstlineno}"


@lru_cache(maxsize=1024)
def _shown(filename: str) -> str:
    try:
        relative = os.path.relpath(filename)
    except ValueError:  # another drive
        return os.path.basename(filename)
    return os.path.basename(filename) if relative.startswith("..") else relative
