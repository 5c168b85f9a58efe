"""How models mark their thinking before an answer: the texts that begin and end it, by the chat template."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """The marks of one family. `opening`, `closing`: the marks with the white space that models write around them."""

    open: str
    close: str
    opening: str
    closing: str


THINK = ThinkingMarks("<think>", "</think>", "<think>\n", "</think>\n\n")  # Qwen3, QwQ, DeepSeek-R1, SmolLM3
_FAMILIES = (THINK, ThinkingMarks("[THINK]", "[/THINK]", "[THINK]", "[/THINK]"))  # the second: Magistral


def thinking_marks(source: str) -> ThinkingMarks | None:
    """Return the marks that a chat template's source mentions, or None."""
    return next((marks for marks in _FAMILIES if marks.open in source or marks.close in source), None)
