"""outlines-core as a grammar engine (https://github.com/dottxt-ai/outlines-core): a regex, indexed for a vocabulary."""

from __future__ import annotations

import json
import re
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray
from outlines_core import Index
from outlines_core import Vocabulary as OutlinesVocabulary
from outlines_core.json_schema import build_regex_from_schema

from ramet.errors import GrammarError
from ramet.grammar.machine import bitmask
from ramet.grammar.machine.ends import is_end_only, refused_by_first_byte
from ramet.grammar.machine.vocabulary import Vocabulary


class OutlinesBackend:
    name = "outlines"
    kinds = frozenset(("json_schema", "regex", "choice"))

    def __init__(self) -> None:
        self._vocabularies: dict[str, Any] = {}

    def compile(self, kind: str, source: Any, vocabulary: Vocabulary) -> IndexedGrammar:
        try:
            if kind == "json_schema":
                schema = source if isinstance(source, str) else json.dumps(source)
                pattern = build_regex_from_schema(schema, whitespace_pattern="")
            elif kind == "regex":
                pattern = source
            elif kind == "choice":
                texts = json.loads(source) if isinstance(source, str) else source
                pattern = "|".join(re.escape(t) for t in texts)
            else:
                raise GrammarError(f"outlines-core does not compile constraints of kind {kind!r}")
            index = Index(pattern, self._vocabulary(vocabulary))
        except (ValueError, TypeError, BaseException) as error:
            if isinstance(error, GrammarError) or not isinstance(error, Exception | _panic_type()):
                raise
            raise GrammarError(f"outlines-core: {error}") from error
        return IndexedGrammar(index, vocabulary)

    def _vocabulary(self, vocabulary: Vocabulary) -> Any:
        found = self._vocabularies.get(vocabulary.key)
        if found is None:
            ids: dict[bytes, list[int]] = {}
            for token in vocabulary.content_tokens:
                ids.setdefault(vocabulary.token_bytes[token], []).append(token)
            found = self._vocabularies[vocabulary.key] = OutlinesVocabulary(vocabulary.eos_ids[0], ids)
        return found


def _panic_type() -> type[BaseException]:
    """Return the exception that its Rust code raises if it gives up."""
    try:
        from pyo3_runtime import PanicException  # type: ignore[import-not-found]
    except ImportError:
        return Exception
    return PanicException  # type: ignore[no-any-return]


class IndexedGrammar:
    """A grammar over an index of states and tokens. States are numbered in the order in which they are reached."""

    is_closed = False
    before = b""

    def __init__(self, index: Any, vocabulary: Vocabulary) -> None:
        self.index = index
        self.vocabulary = vocabulary
        self._states: list[int] = [index.get_initial_state()]
        self._numbers: dict[int, int] = {self._states[0]: 0}

    def fill_mask(self, state: int, row: NDArray[np.int32]) -> None:
        allowed = self.index.get_allowed_tokens(self._states[state])
        row[:] = bitmask.pack(allowed or [], self.vocabulary.vocab_size)

    def advance(self, state: int, token: int) -> int | None:
        if token in self.vocabulary.special_ids:
            return None
        found = self.index.get_next_state(self._states[state], token)
        if found is None:
            return None
        if found not in self._numbers:
            self._numbers[found] = len(self._states)
            self._states.append(found)
        return self._numbers[found]

    def is_accepting(self, state: int) -> bool:
        return bool(self.index.is_final_state(self._states[state]))

    def is_complete(self, state: int) -> bool:
        return is_end_only(self.vocabulary, self._mask(state))

    def is_free(self, state: int) -> bool:
        """Return False: no state allows all tokens."""
        return False

    def num_after(self, state: int, *, is_last: bool) -> int:
        """Return 0: all of the text is the value."""
        return 0

    def ends(self, state: int) -> NDArray[np.int32] | None:
        return refused_by_first_byte(self.vocabulary, self._mask(state))

    def _mask(self, state: int) -> NDArray[np.int32]:
        row = np.zeros(self.vocabulary.num_words, dtype=np.int32)
        self.fill_mask(state, row)
        return row

    def forced_tokens(self, state: int) -> list[int]:
        return []

    def joined_token(self, state: int, token: int) -> int:
        return token

    def closing_tokens(self, state: int) -> list[int]:
        """Return the first token of the completion."""
        return self.shortest_completion(state)[:1]

    def stays_in_string(self, state: int, token: int) -> bool:
        """Return False: these engines do not say where a text is."""
        return False

    def completion_bound(self, state: int) -> int:
        """Return the length of the completion itself. Not cheap: this engine knows no bound."""
        return len(self.shortest_completion(state))

    def device_tables(self) -> None:
        return None

    def shortest_completion(self, state: int) -> list[int]:
        """Return the fewest tokens to an end. Searches the index breadth first.

        Raises: GrammarError if the vocabulary cannot write a completion.
        """
        seen = {state}
        queue: deque[tuple[int, list[int]]] = deque([(state, [])])
        while queue:
            here, way = queue.popleft()
            if self.is_accepting(here):
                return way
            for token in self.index.get_allowed_tokens(self._states[here]) or []:
                following = self.advance(here, token)
                if following is not None and following not in seen:
                    seen.add(following)
                    queue.append((following, [*way, token]))
        raise GrammarError("the vocabulary cannot close the text")
