"""One sequence's automaton on the host: its mask, its next state, and the rule that its text can be finished.

A text must be complete within `max_tokens`. So a sampled token that would leave too few tokens to finish is replaced by
the first token of the shortest completion. If a grammar allows only one token, the forced tokens need not be decoded
one by one; `forced_run` returns them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramet.runtime.types import Grammar, Sequence


@dataclass(slots=True, eq=False)
class HostAutomaton:
    """The position of a sequence's text in its grammar. Owner: GrammarStates.

    `state`: None once the text is past its end (the request ignores end tokens). `can_finish`: False once no complete
    text fits into `max_tokens`. It stays False, because each token shortens the path to the end by at most one.
    """

    sequence: Sequence
    grammar: Grammar
    state: int | None = 0
    can_finish: bool = True

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Write the mask of the next token, int32 [W]. If every token is allowed, leave the row unchanged."""
        if self.state is not None:
            self.grammar.fill_mask(self.state, row)

    def take(self, token: int) -> int:
        """Advance by a sampled token, or by the token that must replace it. Return the token taken.

        The sequence's output does not have the token yet. An end token does not move the automaton.
        """
        state, request = self.state, self.sequence.request
        if state is None or (token in request.stop_ids and self.grammar.is_accepting(state)):
            return token
        after = self.grammar.advance(state, token)
        if self.can_finish and (after is None or not self._fits(after)):
            token, after = self._finishing(state, token, after)
        self.state = after
        return token

    def forced_run(self, token: int) -> list[int]:
        """Return the tokens that must follow `token`, which was taken last.

        The run is empty if the request needs its tokens one by one: for penalties, log-probabilities or stop strings.
        The run ends with its first stop token.
        """
        request, params = self.sequence.request, self.sequence.request.sampling
        is_watched = params.edits_logits or params.logprobs is not None or params.stop or token in request.stop_ids
        if self.state is None or is_watched:
            return []
        run = self.grammar.forced_tokens(self.state)[: self._num_left]
        end = next((i for i, forced in enumerate(run, 1) if forced in request.stop_ids), len(run))
        return run[:end]

    def append(self, run: list[int]) -> None:
        """Advance by a forced run."""
        for token in run:
            assert self.state is not None
            self.state = self.grammar.advance(self.state, token)

    @property
    def _num_left(self) -> int:
        """Return how many tokens the sequence may still add after the next one."""
        return self.sequence.request.max_tokens - len(self.sequence.output_ids) - 1

    def _fits(self, state: int) -> bool:
        """Return whether the text can be finished from `state` after the next token. The cheap bound comes first."""
        grammar, num_left = self.grammar, self._num_left
        return grammar.completion_bound(state) <= num_left or len(grammar.shortest_completion(state)) <= num_left

    def _finishing(self, state: int, token: int, after: int | None) -> tuple[int, int | None]:
        """Return the token that leads from `state` to the end within the budget, and the state after it.

        If there is no such token, return `token` and its state `after`.
        """
        request, completion = self.sequence.request, self.grammar.shortest_completion(state)
        if completion and len(completion) <= self._num_left + 1:
            return completion[0], self.grammar.advance(state, completion[0])
        if not completion and request.stop_ids and self.grammar.is_accepting(state):
            return min(request.stop_ids), after  # the text may end here, but not after any other token
        self.can_finish = False
        return token, after
