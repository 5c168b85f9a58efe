"""Ramet's grammar engine for `maskbench.py`: `PYTHONPATH=benchmarks maskbench.py run --engine
maskbench_adapter:Engine`.

White space is "any", so both of the forms of json.dumps are allowed; all else is the letter of the schema.
The harness gives no tokenizer that splits a text, so masks allow every tokenisation (`tokenization="any"`).
"""

from __future__ import annotations

import gc
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ramet.grammar import Matcher, Vocabulary, compile_grammar
from ramet.grammar.ir import JsonOptions, JsonSchema
from ramet.grammar.service.warm_up import warm_up
from ramet.runtime.server.link.process import postpone_full_collections


class Tok(Protocol):
    """What the harness gives."""

    token_bytes: list[bytes]
    eos_id: int
    special_ids: list[int]
    vocab_size: int


class Engine:
    """Any order of properties, everything that the schema allows."""

    name, package = "ramet", "ramet"

    def __init__(self, tok: Tok) -> None:
        self.vocabulary = Vocabulary(tok.token_bytes, [tok.eos_id], tok.special_ids, tok.vocab_size)
        warm_up(self.vocabulary)
        postpone_full_collections()  # as a server does; it makes them when it is idle, here each 1,000th schema does
        self.num_compiled = 0
        self.options = JsonOptions("any")

    def compile(self, schema: Any) -> Cursor:  # a decoded JSON document
        self.num_compiled += 1
        if self.num_compiled % 1000 == 0:
            gc.collect()
        return Cursor(Matcher(compile_grammar(JsonSchema(schema, self.options), self.vocabulary)))


class Cursor:
    """One matcher in the harness's words."""

    def __init__(self, matcher: Matcher) -> None:
        self.matcher = matcher
        self.mask = matcher.mask
        self.advance = matcher.advance

    def accepts_eos(self) -> bool:
        return self.matcher.is_accepting

    def reset(self) -> None:
        self.matcher.reset()

    def error(self) -> str:
        return ""


__all__ = ["Cursor", "Engine", "NDArray", "np"]
