"""What two prompts look like in the place where they differ: a value that changes between calls, as a date or an id.

Such a value at the start of a prompt prevents sharing of everything after it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SHOWN = 60  # characters of context on either side
REORDERED_KEY = "a reordered key"
_VALUES = (
    ("a date and time", r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:?\d{2})?"),
    ("an id (UUID)", r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"),
    ("a date", r"\d{4}-\d{2}-\d{2}|\d{1,2}[./]\d{1,2}[./]\d{2,4}"),
    ("a time", r"\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?"),
    ("a time in seconds", r"\b1\d{9}(?:\d{3})?(?:\.\d+)?\b"),
    ("an id (hexadecimal)", r"\b(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{8,}\b"),
    ("a number", r"\b\d{4,}\b"),
)
_KEY = r'"([^"\\\n]{1,60})"\s*:'


class Volatile(NamedTuple):
    """`kind`: what both texts have in the place where they differ. `mine`, `theirs`: these parts of the texts."""

    kind: str
    mine: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.mine!r}, there {self.theirs!r}"


def volatile(before: str, text: str, other: str) -> Volatile | None:
    """Return the volatile value at the place where `text` and `other` go on differently after `before`; None if there
    is none, or only in one of them.
    """
    at = len(before)
    for kind, pattern in _VALUES:
        mine, theirs = _at(pattern, before + text, at), _at(pattern, before + other, at)
        if mine is not None and theirs is not None:
            return Volatile(kind, mine.group(), theirs.group())
    mine, theirs = _at(_KEY, before + text, at), _at(_KEY, before + other, at)
    if mine is None or theirs is None:
        return None
    # The key of one of them comes later in the other: an object whose keys stand in another order.
    is_later = f'"{mine[1]}"' in other or f'"{theirs[1]}"' in text
    return Volatile(REORDERED_KEY, mine[1], theirs[1]) if is_later and mine[1] != theirs[1] else None


def _at(pattern: str, text: str, place: int) -> re.Match[str] | None:
    """Return the first match that has the character at `place`."""
    return next((m for m in re.finditer(pattern, text) if m.start() <= place < m.end()), None)
