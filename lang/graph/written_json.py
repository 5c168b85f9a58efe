"""Reads JSON that is still being written: items of a list and values of fields, each as soon as it is closed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_SPACE = " \t\n\r"
_DECODER = json.JSONDecoder()
_NOT_YET = (IndexError, ValueError, RecursionError)  # the text ends there, or is no JSON


class WrittenJson:
    """A JSON value, as far as it is written. Owner: whoever follows it."""

    def __init__(self) -> None:
        self._text = ""
        self._at: int | None = None  # behind the last item, or behind the list's bracket; None: it has not begun

    def push(self, piece: str) -> None:
        """Take the next piece of the text."""
        self._text += piece

    def field(self, path: Sequence[str | int]) -> tuple[Any] | None:  # Any: JSON
        """Return the value of a field or an item, as the only one of a tuple, if it is closed."""
        try:
            return (self._value(self._place(path))[0],)
        except _NOT_YET:
            return None

    def next_items(self, path: Sequence[str | int]) -> list[Any]:
        """Return the items of a list that were closed since the last call, which had the same path."""
        found: list[Any] = []
        try:
            if self._at is None:
                self._at = self._behind(self._place(path), "[")
            while self._text[(at := self._skip(self._at, ","))] != "]":
                item, self._at = self._value(at)
                found.append(item)
        except _NOT_YET:
            pass  # what follows comes with the next piece
        return found

    def _place(self, path: Sequence[str | int]) -> int:
        """Return the place of a part's value. Raises what `_NOT_YET` has if it is not there yet."""
        at = 0
        for step in path:
            at = self._behind(at, "{" if isinstance(step, str) else "[")
            if isinstance(step, int):
                for _ in range(step):
                    _, at = self._value(self._skip(at, ","))
                at = self._skip(at, ",")
                continue
            while True:
                key, at = self._value(self._skip(at, ","))
                at = self._skip(self._behind(at, ":"), "")
                if key == step:
                    break
                _, at = self._value(at)
        return self._skip(at, "")

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
        """Return the value at a place, and the place behind it."""
        value, end = _DECODER.raw_decode(self._text, at)
        if self._text[end - 1] not in '"]}' and self._text[end] not in _SPACE + ",]}":
            raise ValueError("a number may go on")
        return value, end
