"""Separate reasoning, `<think> ... </think>` before the answer, from the answer's streamed text, and count its tokens.

The result does not depend on how the text is cut into pieces. White space around the tags belongs to neither part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Literal

from ramet.runtime.text.detokenizer import Detokenizer

OPEN, CLOSE = "<think>", "</think>"

Position = Literal["before", "inside", "behind"]


def position_after(prompt: str) -> Position:
    """The start of the answer after this prompt: before any reasoning, inside it, or after it."""
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return "inside"
    return "behind" if end.endswith(CLOSE) else "before"


class _Part(Enum):
    START = 0  # white space, or the beginning of the opening tag
    REASONING = 1
    AFTER = 2  # white space after the closing tag
    CONTENT = 3


_FIRST_PARTS = {"before": _Part.START, "inside": _Part.REASONING, "behind": _Part.CONTENT}


class ReasoningSplitter:
    """Reads one answer. `push` and `finish` return the (reasoning, content) that is certain by then."""

    __slots__ = ("_has_reasoning", "_held", "_part")

    def __init__(self, position: Position = "before") -> None:
        self._part = _FIRST_PARTS[position]
        self._held = ""
        self._has_reasoning = False

    @property
    def is_reasoning(self) -> bool:
        return self._part is _Part.REASONING

    @property
    def is_undecided(self) -> bool:
        """True while the text is only white space and the beginning of a tag."""
        return self._part is _Part.START

    def push(self, text: str) -> tuple[str, str]:
        if self._part is _Part.CONTENT:
            return "", text
        reasoning = ""
        held = self._held + text
        if self._part is _Part.START:
            begun = held.lstrip()
            if len(begun) < len(OPEN) and OPEN.startswith(begun):
                self._held = held
                return "", ""
            if not begun.startswith(OPEN):
                self._part, self._held = _Part.CONTENT, ""
                return "", held
            self._part, held = _Part.REASONING, begun[len(OPEN) :]
        if self._part is _Part.REASONING:
            before, tag, held = held.partition(CLOSE)
            if tag:
                reasoning = before.rstrip()
                self._part = _Part.AFTER
            else:
                border = len(before[: len(before) - _overlap(before)].rstrip())
                reasoning, held = before[:border], before[border:]
            if not self._has_reasoning:
                reasoning = reasoning.lstrip()
                self._has_reasoning = bool(reasoning)
                held = held if self._has_reasoning or tag else held.lstrip()
        if self._part is _Part.AFTER:
            held = held.lstrip()
            if held:
                self._part, self._held = _Part.CONTENT, ""
                return reasoning, held
        self._held = held
        return reasoning, ""

    def finish(self) -> tuple[str, str]:
        """Return the text held back, after the end of the answer."""
        held, self._held = self._held, ""
        return (held, "") if self._part is _Part.REASONING else ("", held)


def _overlap(text: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of the closing tag."""
    return next((n for n in range(min(len(CLOSE), len(text)), 0, -1) if text.endswith(CLOSE[:n])), 0)


class ReasoningCounter:
    """Counts the tokens of an answer's reasoning, tags included. Tokens may arrive in any groups."""

    __slots__ = ("_detokenizer", "_is_over", "_num_undecided", "_splitter", "count")

    def __init__(self, token_bytes: Sequence[bytes], position: Position) -> None:
        self._detokenizer = Detokenizer(token_bytes)
        self._splitter = ReasoningSplitter(position)
        self._is_over = position == "behind"
        self._num_undecided = 0
        self.count = 0

    def push(self, token_ids: Iterable[int]) -> None:
        for token in () if self._is_over else token_ids:
            was_reasoning = self._splitter.is_reasoning
            self._splitter.push(self._detokenizer.push([token]))
            if self._splitter.is_undecided:
                self._num_undecided += 1
            elif self._splitter.is_reasoning or was_reasoning:
                self.count += 1 + self._num_undecided
                self._num_undecided = 0
            self._is_over = not (self._splitter.is_undecided or self._splitter.is_reasoning)
