"""The message for a constrained text that `max_tokens` ended before it was complete."""

from __future__ import annotations

from ramet.errors import GrammarError
from ramet.runtime.types import FinishReason, Grammar, Sequence


def why_incomplete(sequence: Sequence) -> str | None:
    """Return why a cut-off text does not match its grammar; None if it matches, or was not cut off.

    Walks through the output once. The first call for a grammar also finds its shortest text.
    """
    grammar = sequence.request.grammar
    if grammar is None or sequence.finish_reason is not FinishReason.LENGTH:
        return None
    state = state_after(grammar, sequence.output_ids)
    if state is None or grammar.is_accepting(state):
        return None
    limit = sequence.request.max_tokens
    cut = f"it was cut by max_tokens ({limit:,}) before it was complete"
    try:
        shortest = len(grammar.shortest_completion(0))
    except GrammarError:
        shortest = 0
    if shortest <= limit:
        return f"{cut}; raise max_tokens"
    return f"{cut}: the shortest text found for its constraint takes {shortest:,} tokens; raise max_tokens to that"


def state_after(grammar: Grammar, tokens: list[int]) -> int | None:
    """Return the state after a text; None past an end token, which a request may ignore."""
    state: int | None = 0
    for token in tokens:
        state = None if state is None else grammar.advance(state, token)
    return state
