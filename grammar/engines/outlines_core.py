"""outlines-core as a grammar engine (https://github.com/dottxt-ai/outlines-core): a regex, indexed for a vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
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


def compiler() -> Callable[[str, Any, Vocabulary], FollowedGrammar]:
    """Return a compiler."""
    of_vocabulary = lru_cache(maxsize=4)(_vocabulary)

    def compile_source(kind: str, source: Any, vocabulary: Vocabulary) -> FollowedGrammar:
        try:
            index = Index(_pattern(kind, source), of_vocabulary(vocabulary))
        except (ValueError, TypeError, BaseException) as error:
            if not isinstance(error, Exception | _panic_type()):
                raise
            raise GrammarError(f"outlines-core: {error}") from error
        return FollowedGrammar((index, index.get_initial_state()), vocabulary, _after, _fill)

    return compile_source


def _pattern(kind: str, source: Any) -> str:
    if kind == "json_schema":
        schema = source if isinstance(source, str) else json.dumps(source)
        return str(build_regex_from_schema(schema, whitespace_pattern=""))
    if kind == "regex":
        return str(source)
    return "|".join(re.escape(text) for text in (json.loads(source) if isinstance(source, str) else source))


def _after(matcher: tuple[Any, int], token: int) -> tuple[Any, int] | None:
    index, state = matcher
    found = index.get_next_state(state, token)
    return None if found is None else (index, found)


def _fill(matcher: tuple[Any, int], row: NDArray[np.int32]) -> None:
    index, state = matcher
    row[:] = bitmask.pack(index.get_allowed_tokens(state) or [], 32 * len(row))


def _vocabulary(vocabulary: Vocabulary) -> Any:
    ids: dict[bytes, list[int]] = {}
    for token in vocabulary.content_tokens:
        ids.setdefault(vocabulary.token_bytes[token], []).append(token)
    return OutlinesVocabulary(vocabulary.eos_ids[0], ids)


def _panic_type() -> type[BaseException]:
    """Return the exception that its Rust code raises if it gives up."""
    try:
        from pyo3_runtime import PanicException  # type: ignore[import-not-found]
    except ImportError:
        return Exception
    return PanicException  # type: ignore[no-any-return]
