"""Prepares what would otherwise make a request wait.

Loops are compiled once per computer, and what all grammars of a vocabulary share is made once per process. A loop is
compiled by calling it: small constraints of every kind call each loop with the types of arrays that it gets later. A
mark beside the compiled code says that this is done. Every process loads them in the same way before its first grammar,
which costs 0.1 s more than the loops of that grammar alone: nothing may interrupt a thread that loads or compiles one.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
from fractions import Fraction

import numpy as np

from ramet.grammar import ir
from ramet.grammar.json_schema.algebra.values import Strings
from ramet.grammar.json_schema.frames.tables import number_rows, string_rows
from ramet.grammar.json_schema.schema import formats
from ramet.grammar.machine import walker
from ramet.grammar.machine.automaton import Limits
from ramet.grammar.machine.vocabulary import Vocabulary
from ramet.grammar.regular.numbers import Numbers
from ramet.grammar.service.sources import compile_grammar, compile_parsed, parse_source
from ramet.loops import are_compiled, compiler, mark_of

logger = logging.getLogger(__name__)

_SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 9},
        "pattern": {"type": "string", "pattern": "^[a-z]+$"},
        "choice": {"enum": ["one", "two"]},
        "number": {"type": "integer", "minimum": 3},
        "list": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        "set": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    },
    "additionalProperties": {"type": "boolean"},
    "required": ["text"],
}
_CLOSED = {"properties": {"a": {}, "/": {}}, "patternProperties": {"^x": {}}, "additionalProperties": False}
SAMPLES = (
    ("json_schema", json.dumps(_SCHEMA), rb'{"text": "a", "pattern": "b", "other": true, "set": [1, 2]}'),
    ("json_schema", json.dumps(_CLOSED), b'{"a": 1, "/": 2}'),
    ("regex", "a[1-9]{1,3}b*", b"a12"),
    ("cfg", 'start: "(" start ")" | "x"', b"((x"),
)


_loading = threading.Lock()
_are_loaded = threading.Event()


def load_loops() -> None:
    """Load the loops into this process, and compile those that are not yet: 0.3 s, about 4 s on a new computer.

    numba keeps its locks and lists in disorder if an exception is thrown into a thread that does this.
    """
    with _loading:
        if compiler() and not _are_loaded.is_set():
            _run_samples()
            _are_loaded.set()


class _Bytes:
    """The tokenizer whose tokens are bytes."""

    def split(self, text: bytes) -> list[int]:
        return list(text)

    def rest_of_piece(self, before: bytes, text: bytes) -> int:
        return 0


def _run_samples() -> None:
    tokens = [bytes((i,)) for i in range(256)]
    vocabulary = Vocabulary(tokens, frozenset({0}), frozenset({0}), 256, _Bytes())
    for kind, source, text in SAMPLES:
        grammar = compile_parsed(parse_source(kind, source), vocabulary, limits=Limits(max_time_s=600.0))
        state: int | None = 0
        for byte in text:
            assert state is not None
            grammar.mask(state)
            state = grammar.advance(state, byte)
        assert state is not None
        grammar.ends(state)
        grammar.completion_bound(0)
        grammar.close(64)
    row = np.zeros(1, dtype=np.int32)
    walker.clear(row, np.zeros(1, dtype=np.int64))  # of these tokens, none is refused
    walker.row_digest(row)
    row.flags.writeable = False
    walker.row_digest(row)
    walker.rows_equal(row, row)  # as for rows that were interned before
    if are_compiled(walker.walk):
        return
    try:
        mark_of(walker.walk).touch()
    except OSError as error:
        logger.info("the next process will look again whether its loops are compiled: %s", error)


def warm_up(vocabulary: Vocabulary) -> None:
    """Make what all grammars of a vocabulary share, so that the first request does not wait for it. About a second.

    These are compiled loops (seconds in a fresh environment, else milliseconds), slices of the vocabulary, and the
    tables of string formats and of common numbers.
    """
    load_loops()
    vocabulary.warm_up()
    for name in sorted(formats.KNOWN):
        of_format = Strings(languages=frozenset(((0, True),)))
        string_rows(((of_format,),), (("format", name),), Limits().max_regular_states)
    for (integer, plain), low in itertools.product(
        ((None, None), (True, None), (True, True)), (None, Fraction(0), Fraction(1))
    ):
        number_rows(((Numbers(low, integer=integer, plain=plain),),))
    schema = {"properties": {"a": {"type": "string", "maxLength": 3}}}
    grammar = compile_grammar(ir.JsonSchema(schema, ir.JsonOptions(order="declared")), vocabulary)
    grammar.mask(0)
    in_key = grammar.advance_bytes(0, b'{"')
    if in_key is not None:
        grammar.mask(in_key)  # unnamed keys, in all grammars
