"""Reads the items of a list in JSON that is still being written, each as soon as it is closed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder()


class ListItems:
    """The items of the list to which `path` leads: names of fields, from the whole value. Owner: whoever follows it."""

    def __init__(self, path: Sequence[str]) -> None:
        self._path = path
        self._text = ""
        self._at: int | None = None  # behind the last item, or behind the list's bracket; None: it has not begun

    def push(self, piece: str) -> list[Any]:  # Any: JSON
        """Take the next piece of the text; return the items that it closes."""
        self._text += piece
        found: list[Any] = []
        try:
            if self._at is None:
                self._at = self._begin()
            while self._text[(at := self._skip(self._at, ","))] != "]":
                item, self._at = self._value(at)
                found.append(item)
        except (IndexError, ValueError, RecursionError):  # the text ends here; what follows comes with the next piece
            pass
        return found

    def _begin(self) -> int:
        """Return the place behind the list's opening bracket. Raises IndexError, ValueError if it is not there yet."""
        at = 0
        for name in self._path:
            at = self._behind(at, "{")
            while True:
                key, at = self._value(self._skip(at, ","))
                at = self._skip(self._behind(at, ":"), "")
                if key == name:
                    break
                _, at = self._value(at)
        return self._behind(at, "[")

    def _behind(self, at: int, char: str) -> int:
        at = self._skip(at, "")
        if self._text[at] != char:
            raise ValueError(f"{self._text[at]!r} stands where {char!r} should")
        return at + 1

    def _skip(self, at: int, more: str) -> int:
        while self._text[at] in _SPACE + more:
            at += 1
        return at

    def _value(self, at: int) -> tuple[Any, int]:
        """Return the value at a place, and the place behind it. Raises if it is not closed."""
        value, end = _DECODER.raw_decode(self._text, at)
        if self._text[end - 1] not in '"]}' and self._text[end] not in _SPACE + ",]}":
            raise ValueError("a number may go on")
        return value, end
