"""Reasoning parts, `<think> ... </think>` before the answer: told apart from it while the text comes in, and counted.

Text may come in any pieces; the result is the same. White space around the tags belongs to neither part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Literal

from ramet.runtime.text.detokenizer import Detokenizer

OPEN, CLOSE = "<think>", "</think>"

Position = Literal["before", "inside", "behind"]


def position_after(prompt: str) -> Position:
    """Where an answer begins that follows this prompt: before any reasoning, inside it, or behind it."""
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return "inside"
    return "behind" if end.endswith(CLOSE) else "before"


class _Part(Enum):
    START = 0  # white space, or the beginning of the opening tag
    REASONING = 1
    AFTER = 2  # white space behind the closing tag
    CONTENT = 3


_FIRST_PARTS = {"before": _Part.START, "inside": _Part.REASONING, "behind": _Part.CONTENT}


class ReasoningSplitter:
    """Reads one answer. `push` and `finish` return (reasoning, content) that have become certain."""

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
        """Nothing but white space and the beginning of a tag has come."""
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
        """The answer has ended: what was held back."""
        held, self._held = self._held, ""
        return (held, "") if self._part is _Part.REASONING else ("", held)


def _overlap(text: str) -> int:
    """Length of the longest end of `text` that begins the closing tag."""
    return next((n for n in range(min(len(CLOSE), len(text)), 0, -1) if text.endswith(CLOSE[:n])), 0)


class ReasoningCounter:
    """Counts the tokens of an answer's reasoning, tags included, however its tokens come in."""

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
