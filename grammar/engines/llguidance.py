"""llguidance as a grammar engine (https://github.com/guidance-ai/llguidance).

If a text is forced, its masks allow only the tokens that the tokenizer would write. `advance` also accepts the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarError
from ramet.grammar.engines.followed import FollowedGrammar
from ramet.grammar.machine.splits import is_text
from ramet.grammar.machine.vocabulary import Vocabulary

_COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


def compiler() -> Callable[[str, Any, Vocabulary], FollowedGrammar]:
    """Return a compiler."""
    of_vocabulary = lru_cache(maxsize=4)(_tokenizer)

    def compile_source(kind: str, source: Any, vocabulary: Vocabulary) -> FollowedGrammar:
        matcher = llguidance.LLMatcher(of_vocabulary(vocabulary), _grammar(kind, source), log_level=0)
        if matcher.is_error():
            raise GrammarError(f"llguidance: {matcher.get_error()}")
        return FollowedGrammar(matcher, vocabulary, _after, _fill, lambda at: list(at.compute_ff_tokens()))

    return compile_source


def _after(matcher: Any, token: int) -> Any | None:
    following = matcher.deep_copy()
    return following if following.validate_tokens([token]) == 1 and following.consume_token(token) else None


def _fill(matcher: Any, row: NDArray[np.int32]) -> None:
    matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    if matcher.is_error():
        raise GrammarError(f"llguidance: {matcher.get_error()}")


def _tokenizer(vocabulary: Vocabulary) -> Any:  # LLTokenizer, untyped across versions
    wrapped = llguidance.TokenizerWrapper(_Tokens(vocabulary))
    return llguidance.LLTokenizer(wrapped, n_vocab=vocabulary.vocab_size, eos_token=list(vocabulary.eos_ids))


def _grammar(kind: str, source: Any) -> str:
    matcher = llguidance.LLMatcher
    if kind == "json_schema":
        schema = source if isinstance(source, str) else json.dumps(source)
        if json.loads(schema) is True:
            schema = "{}"
        found = matcher.grammar_from_json_schema(schema, overrides=_COMPACT)
    elif kind == "regex":
        found = matcher.grammar_from_regex(source)
    elif kind == "cfg":
        found = matcher.grammar_from_lark(source)
    elif kind == "choice":
        texts = json.loads(source) if isinstance(source, str) else source
        found = matcher.grammar_from_lark("start: " + " | ".join(json.dumps(t, ensure_ascii=False) for t in texts))
    else:
        chunks = json.dumps({"substring_chars": source}, ensure_ascii=False)
        found = matcher.grammar_from_lark(f"start: SUB\nSUB: %regex {chunks}")
    return str(found)


class _Tokens:
    """The interface of a tokenizer that llguidance uses."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.eos_token_id = vocabulary.eos_ids[0]
        self.bos_token_id = None
        missing = vocabulary.vocab_size - len(vocabulary.token_bytes)
        texts = [*vocabulary.token_bytes, *([b""] * missing)]
        self.special_token_ids = sorted({*vocabulary.special_ids, *(i for i, t in enumerate(texts) if not t)})
        for i in self.special_token_ids:
            texts[i] = f"<|special_{i}|>".encode()
        self.tokens = texts

    def __call__(self, text: bytes) -> list[int]:
        splits = self.vocabulary.splits
        known = splits.tokens(text) if splits is not None and is_text(text) else ()
        return list(known) or self.vocabulary.fewest_tokens(text) or []
