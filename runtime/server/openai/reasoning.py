"""Separate reasoning, as `<think> ... </think>` before the answer, from the answer's streamed text; count its tokens.

The result does not depend on how the text is cut into pieces. White space around the tags belongs to neither part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from ramet.runtime.text.chat_template import THINK, ThinkingMarks
from ramet.runtime.text.detokenizer import Detokenizer

Position = Literal["before", "inside", "behind"]


def position_after(prompt: str, marks: ThinkingMarks = THINK) -> Position:
    """The start of the answer after this prompt: before any reasoning, inside it, or after it."""
    end = prompt.rstrip()
    if end.endswith(marks.open):
        return "inside"
    return "behind" if end.endswith(marks.close) else "before"


class ReasoningSplitter:
    """Reads one answer. `push` and `finish` return the (reasoning, content) that is certain by then."""

    __slots__ = ("_close", "_has_reasoning", "_held", "_open", "_part")

    def __init__(self, position: Position = "before", marks: ThinkingMarks = THINK) -> None:
        self._open, self._close = marks.open, marks.close
        # "before": white space, or the beginning of the opening tag. "between": white space after the closing tag.
        self._part: Position | Literal["between"] = position
        self._held = ""
        self._has_reasoning = False

    @property
    def is_reasoning(self) -> bool:
        return self._part == "inside"

    @property
    def is_undecided(self) -> bool:
        """True while the text is only white space and the beginning of a tag."""
        return self._part == "before"

    def push(self, text: str) -> tuple[str, str]:
        if self._part == "behind":
            return "", text
        reasoning = ""
        held = self._held + text
        if self._part == "before":
            begun = held.lstrip()
            if len(begun) < len(self._open) and self._open.startswith(begun):
                self._held = held
                return "", ""
            if not begun.startswith(self._open):
                self._part, self._held = "behind", ""
                return "", held
            self._part, held = "inside", begun[len(self._open) :]
        if self._part == "inside":
            before, tag, held = held.partition(self._close)
            if tag:
                reasoning = before.rstrip()
                self._part = "between"
            else:
                border = len(before[: len(before) - _overlap(before, self._close)].rstrip())
                reasoning, held = before[:border], before[border:]
            if not self._has_reasoning:
                reasoning = reasoning.lstrip()
                self._has_reasoning = bool(reasoning)
                held = held if self._has_reasoning or tag else held.lstrip()
        if self._part == "between":
            held = held.lstrip()
            if held:
                self._part, self._held = "behind", ""
                return reasoning, held
        self._held = held
        return reasoning, ""

    def finish(self) -> tuple[str, str]:
        """Return the text held back, after the end of the answer."""
        held, self._held = self._held, ""
        return (held, "") if self._part == "inside" else ("", held)


def _overlap(text: str, close: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of the closing tag."""
    return next((n for n in range(min(len(close), len(text)), 0, -1) if text.endswith(close[:n])), 0)


class ReasoningCounter:
    """Counts the tokens of an answer's reasoning, tags included. Tokens may arrive in any groups."""

    __slots__ = ("_detokenizer", "_is_over", "_num_undecided", "_splitter", "count")

    def __init__(self, token_bytes: Sequence[bytes], position: Position, marks: ThinkingMarks = THINK) -> None:
        self._detokenizer = Detokenizer(token_bytes)
        self._splitter = ReasoningSplitter(position, marks)
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
