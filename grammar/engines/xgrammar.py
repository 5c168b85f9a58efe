"""xgrammar as a grammar engine (https://github.com/mlc-ai/xgrammar)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray

from ramet.errors import GrammarError
from ramet.grammar.engines.followed import FollowedGrammar
from ramet.grammar.machine.vocabulary import Vocabulary


def compiler() -> Callable[[str, Any, Vocabulary], FollowedGrammar]:
    """Return a compiler. Open objects are closed, as xgrammar's own default does it."""
    of_vocabulary = lru_cache(maxsize=4)(_compiler)

    def compile_source(kind: str, source: Any, vocabulary: Vocabulary) -> FollowedGrammar:
        own = of_vocabulary(vocabulary)
        try:
            if kind == "json_schema":
                schema = source if isinstance(source, str) else json.dumps(source)
                compiled = own.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))
            elif kind == "regex":
                compiled = own.compile_regex(source)
            else:
                texts = json.loads(source) if isinstance(source, str) else source
                compiled = own.compile_regex("|".join(re.escape(t) for t in texts))
            matcher = xgrammar.GrammarMatcher(compiled)
        except (RuntimeError, ValueError, TypeError) as error:
            raise GrammarError(f"xgrammar: {error}") from error
        return FollowedGrammar(matcher, vocabulary, _after, _fill)

    return compile_source


def _after(matcher: Any, token: int) -> Any | None:
    following = matcher.fork()
    return following if not following.is_terminated() and following.accept_token(token) else None


def _fill(matcher: Any, row: NDArray[np.int32]) -> None:
    matcher.fill_next_token_bitmask(row.reshape(1, -1))


def _compiler(vocabulary: Vocabulary) -> Any:  # GrammarCompiler
    texts = [b"" if i in vocabulary.special_ids else t for i, t in enumerate(vocabulary.token_bytes)]
    info = xgrammar.TokenizerInfo(
        texts, xgrammar.VocabType.RAW, vocab_size=vocabulary.vocab_size, stop_token_ids=list(vocabulary.eos_ids)
    )
    # its own cache is off, so that measured times are those of compiling
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
