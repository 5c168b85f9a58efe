"""xgrammar as a grammar engine (https://github.com/mlc-ai/xgrammar)."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import xgrammar
from numpy.typing import NDArray

from ramet.errors import GrammarError
from ramet.grammar.engines.followed import FollowedGrammar
from ramet.grammar.machine.vocabulary import Vocabulary


class XgrammarBackend:
    """xgrammar's compiler.

    strict_mode: False reads a schema as the specification says; True (xgrammar's default) closes open objects.
    """

    name = "xgrammar"
    kinds = frozenset(("json_schema", "regex", "choice"))

    def __init__(self, *, strict_mode: bool = True, max_threads: int = 1) -> None:
        self.strict_mode = strict_mode
        self.max_threads = max_threads
        self._compilers: dict[str, Any] = {}  # GrammarCompiler

    def compile(self, kind: str, source: Any, vocabulary: Vocabulary) -> FollowedGrammar:
        if kind not in self.kinds:
            raise GrammarError(f"xgrammar does not compile constraints of kind {kind!r}")
        compiler = self._compiler(vocabulary)
        try:
            if kind == "json_schema":
                schema = source if isinstance(source, str) else json.dumps(source)
                compiled = compiler.compile_json_schema(
                    schema, any_whitespace=False, separators=(",", ":"), strict_mode=self.strict_mode
                )
            elif kind == "regex":
                compiled = compiler.compile_regex(source)
            else:
                texts = json.loads(source) if isinstance(source, str) else source
                compiled = compiler.compile_regex("|".join(re.escape(t) for t in texts))
            matcher = xgrammar.GrammarMatcher(compiled)
        except (RuntimeError, ValueError, TypeError) as error:
            raise GrammarError(f"xgrammar: {error}") from error
        return FollowedGrammar(self, matcher, vocabulary)

    def after(self, matcher: Any, token: int) -> Any | None:
        following = matcher.fork()
        return following if not following.is_terminated() and following.accept_token(token) else None

    def fill(self, matcher: Any, row: NDArray[np.int32]) -> None:
        matcher.fill_next_token_bitmask(row.reshape(1, -1))

    def forced_tokens(self, matcher: Any) -> list[int]:
        return []

    def _compiler(self, vocabulary: Vocabulary) -> Any:
        found = self._compilers.get(vocabulary.key)
        if found is None:
            texts = [b"" if i in vocabulary.special_ids else t for i, t in enumerate(vocabulary.token_bytes)]
            info = xgrammar.TokenizerInfo(
                texts, xgrammar.VocabType.RAW, vocab_size=vocabulary.vocab_size, stop_token_ids=list(vocabulary.eos_ids)
            )
            # its own cache is off, so that measured times are those of compiling
            found = self._compilers[vocabulary.key] = xgrammar.GrammarCompiler(
                info, max_threads=self.max_threads, cache_enabled=False
            )
        return found
