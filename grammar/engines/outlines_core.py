"""outlines-core as a grammar engine (https://github.com/dottxt-ai/outlines-core): a regex, indexed for a vocabulary."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from outlines_core import Index
from outlines_core import Vocabulary as OutlinesVocabulary
from outlines_core.json_schema import build_regex_from_schema

from ramet.errors import GrammarError
from ramet.grammar.engines.followed import FollowedGrammar
from ramet.grammar.machine import bitmask
from ramet.grammar.machine.vocabulary import Vocabulary


class OutlinesBackend:
    name = "outlines"
    kinds = frozenset(("json_schema", "regex", "choice"))

    def __init__(self) -> None:
        self._vocabularies: dict[str, Any] = {}

    def compile(self, kind: str, source: Any, vocabulary: Vocabulary) -> FollowedGrammar:
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
        return FollowedGrammar(self, (index, index.get_initial_state()), vocabulary)

    def after(self, matcher: tuple[Any, int], token: int) -> tuple[Any, int] | None:
        index, state = matcher
        found = index.get_next_state(state, token)
        return None if found is None else (index, found)

    def fill(self, matcher: tuple[Any, int], row: NDArray[np.int32]) -> None:
        index, state = matcher
        row[:] = bitmask.pack(index.get_allowed_tokens(state) or [], 32 * len(row))

    def forced_tokens(self, matcher: tuple[Any, int]) -> list[int]:
        return []

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
