"""A cursor over a compiled grammar: the state, and how to go back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.machine.compiled_grammar import CompiledGrammar


class Matcher:
    """Follows one text. The state is an integer, so a copy or a fork costs nothing (`fork`)."""

    __slots__ = ("_history", "grammar", "state")

    def __init__(self, grammar: CompiledGrammar, state: int = 0) -> None:
        self.grammar = grammar
        self.state = state
        self._history: list[int] = []

    def mask(self) -> NDArray[np.int32]:
        """int32 [W]; shared, not to be written to."""
        return self.grammar.mask(self.state)

    def advance(self, token: int) -> bool:
        """Take a token; False, and nothing changes, where it is refused."""
        following = self.grammar.advance(self.state, token)
        if following is None:
            return False
        self._history.append(self.state)
        self.state = following
        return True

    def rollback(self, num_tokens: int) -> None:
        """Undo the last tokens. Raises ValueError if fewer were taken."""
        if num_tokens < 0 or num_tokens > len(self._history):
            raise ValueError(f"cannot undo {num_tokens} tokens: {len(self._history)} were taken")
        if num_tokens:
            self.state = self._history[-num_tokens]
            del self._history[-num_tokens:]

    def reset(self) -> None:
        """Go back to before the first token."""
        self.rollback(len(self._history))

    def fork(self) -> Matcher:
        """A second cursor at the same place, without history."""
        return Matcher(self.grammar, self.state)

    @property
    def is_accepting(self) -> bool:
        return self.grammar.is_accepting(self.state)

    def forced_tokens(self) -> list[int]:
        return self.grammar.forced_tokens(self.state)
