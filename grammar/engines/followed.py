"""Integer states over the matchers of other engines, which know nothing of states.

A state is a path of tokens. The matchers of recent states are kept. The matcher of an older state is rebuilt from the
nearest ancestor whose matcher is kept, so the number of matchers does not grow with the number of states.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarError
from ramet.grammar.machine import bitmask
from ramet.grammar.machine.ends import is_end_only, refused_by_first_byte
from ramet.grammar.machine.vocabulary import Vocabulary

_CLOSING = b'"]},:)tfn0{[1-'  # bytes that are tried first to complete a text, in this order
_MAX_SEARCHED = 4096
_MAX_KEPT = 128  # matchers


class FollowedGrammar:
    """A grammar with integer states over the matchers of another engine. Not thread-safe.

    A matcher stands at one place in a text, and is never changed once it is known.
    """

    is_closed = False
    before = b""

    def __init__(
        self,
        start: Any,  # a matcher
        vocabulary: Vocabulary,
        after: Callable[[Any, int], Any | None],
        fill: Callable[[Any, NDArray[np.int32]], None],
        forced: Callable[[Any], list[int]] = lambda matcher: [],
    ) -> None:
        """start: the matcher at the beginning. after: returns the matcher after a token, None if that is refused.

        fill: writes the mask, with the end tokens if the text may end. forced: the tokens that must follow, if known.
        """
        self.start, self.vocabulary = start, vocabulary
        self.after, self.fill, self._forced = after, fill, forced
        self._parents: list[tuple[int, int]] = [(-1, -1)]  # state -> (state before, token)
        self._after: dict[tuple[int, int], int | None] = {}
        self._kept: OrderedDict[int, Any] = OrderedDict()  # matchers by state

    def fill_mask(self, state: int, row: NDArray[np.int32]) -> None:
        row[:] = 0
        self.fill(self._matcher(state), row)

    def advance(self, state: int, token: int) -> int | None:
        vocabulary = self.vocabulary
        if token < 0 or token >= len(vocabulary.token_bytes) or token in vocabulary.special_ids:
            return None
        key = (state, token)
        if key not in self._after:
            matcher = self.after(self._matcher(state), token)
            self._after[key] = None if matcher is None else len(self._parents)
            if matcher is not None:
                self._parents.append(key)
                self._keep(len(self._parents) - 1, matcher)
        return self._after[key]

    def is_accepting(self, state: int) -> bool:
        return any(bitmask.is_allowed(self._mask(state), e) for e in self.vocabulary.eos_ids)

    def is_complete(self, state: int) -> bool:
        return is_end_only(self.vocabulary, self._mask(state))

    def ends(self, state: int) -> NDArray[np.int32] | None:
        return refused_by_first_byte(self.vocabulary, self._mask(state))

    def _mask(self, state: int) -> NDArray[np.int32]:
        row = np.zeros(self.vocabulary.num_words, dtype=np.int32)
        self.fill_mask(state, row)
        return row

    def is_free(self, state: int) -> bool:
        """Return False: no state allows all tokens."""
        return False

    def num_after(self, state: int, *, is_last: bool) -> int:
        """Return 0: all of the text is the value."""
        return 0

    def forced_tokens(self, state: int) -> list[int]:
        return self._forced(self._matcher(state))

    def joined_token(self, state: int, token: int) -> int:
        return token

    def closing_tokens(self, state: int) -> list[int]:
        """Return the first token of the completion."""
        return self.shortest_completion(state)[:1]

    def stays_in_string(self, state: int, token: int) -> bool:
        """Return False: these engines do not say where a text is."""
        return False

    def completion_bound(self, state: int) -> int:
        """Return the length of the completion itself. Not cheap: these engines know no bound."""
        return len(self.shortest_completion(state))

    def device_tables(self) -> None:
        return None

    def shortest_completion(self, state: int) -> list[int]:
        """Return some completion, not always the shortest. Searches depth first: closing marks before content.

        Raises: GrammarError if none is found soon. These engines do not know the way themselves.
        """
        by_bytes = self.vocabulary.tokens_of_bytes
        closing = [by_bytes[bytes((b,))] for b in _CLOSING if bytes((b,)) in by_bytes]
        row = np.zeros(self.vocabulary.num_words, dtype=np.int32)
        stack: list[tuple[int, list[int]]] = [(state, [])]
        for _ in range(_MAX_SEARCHED):
            if not stack:
                break
            here, way = stack.pop()
            self.fill_mask(here, row)
            if any(bitmask.is_allowed(row, e) for e in self.vocabulary.eos_ids):
                return way
            tokens = [t for t in closing if bitmask.is_allowed(row, t)]
            tokens += [t for t in bitmask.unpack(row).tolist()[:16] if t not in tokens]
            for token in reversed(tokens):
                following = self.advance(here, token)
                if following is not None:
                    stack.append((following, [*way, token]))
        raise GrammarError("this grammar backend finds no way to close the text; use the backend 'ramet'")

    def _matcher(self, state: int) -> Any:
        tokens: list[int] = []
        at = state
        while at > 0 and at not in self._kept:
            at, token = self._parents[at]
            tokens.append(token)
        if at > 0:
            self._kept.move_to_end(at)
        matcher = self.start if at == 0 else self._kept[at]
        for token in reversed(tokens):
            matcher = self.after(matcher, token)
            assert matcher is not None, (state, token)
        if tokens:
            self._keep(state, matcher)
        return matcher

    def _keep(self, state: int, matcher: Any) -> None:
        self._kept[state] = matcher
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
