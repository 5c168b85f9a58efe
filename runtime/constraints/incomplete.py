"""The message for a constrained text that `max_tokens` ended before it was complete."""

from __future__ import annotations


def cut_off(max_tokens: int, shortest: int) -> str:
    """Return why the text is incomplete. shortest: tokens of the grammar's shortest text, as far as it is known."""
    cut = f"it was cut by max_tokens ({max_tokens:,}) before it was complete"
    if shortest <= max_tokens:
        return f"{cut}; raise max_tokens"
    return f"{cut}: the shortest text found for its constraint takes {shortest:,} tokens; raise max_tokens to that"
