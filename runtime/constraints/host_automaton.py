"""One sequence's automaton, walked by the host: its mask, its next state, and what keeps its text finishable.

A text must be whole within `max_tokens`. So a sampled token that would leave too few tokens to finish is replaced by
the first token of the shortest completion. Where a grammar allows one token only, the tokens that must follow need not
be decoded one by one: `forced_run` names them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramet.runtime.types import Grammar, Sequence


@dataclass(slots=True, eq=False)
class HostAutomaton:
    """Where a sequence's text stands in its grammar. Owner: GrammarStates.

    `state`: None once the text is past its end (the request ignores end tokens). `can_finish`: False once no whole
    text fits into `max_tokens`; it never will again, because a token shortens the way by one at most.
    """

    sequence: Sequence
    grammar: Grammar
    state: int | None = 0
    can_finish: bool = True

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Write the mask of the next token, int32 [W]; leave the row as it is where everything is allowed."""
        if self.state is not None:
            self.grammar.fill_mask(self.state, row)

    def take(self, token: int) -> int:
        """Advance by a sampled token, or by the one that must replace it. Returns the token that was taken.

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
        """The tokens that must follow `token`, which was taken last, as far as the request lets them be appended.

        None where the request looks at its tokens one by one: penalties, log-probabilities, stop strings. The run ends
        with the first stop token in it.
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
        """Tokens that the sequence may still have after the next one."""
        return self.sequence.request.max_tokens - len(self.sequence.output_ids) - 1

    def _fits(self, state: int) -> bool:
        """Whether the text can be finished from `state` after the next token. The cheap bound is asked first."""
        grammar, num_left = self.grammar, self._num_left
        return grammar.completion_bound(state) <= num_left or len(grammar.shortest_completion(state)) <= num_left

    def _finishing(self, state: int, token: int, after: int | None) -> tuple[int, int | None]:
        """The token that leads from `state` to the end within the budget, and the state behind it.

        It is `token` itself, which leads to `after`, where there is no such token.
        """
        request, completion = self.sequence.request, self.grammar.shortest_completion(state)
        if completion and len(completion) <= self._num_left + 1:
            return completion[0], self.grammar.advance(state, completion[0])
        if not completion and request.stop_ids and self.grammar.is_accepting(state):
            return min(request.stop_ids), after  # the text may end here, and after any other token it could not
        self.can_finish = False
        return token, after
