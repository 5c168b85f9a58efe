"""The tokens that end a text, against their definition, and texts that nothing can follow."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from ramet.grammar import CompiledGrammar, Vocabulary
from ramet.grammar.machine import bitmask
from ramet.grammar.service.sources import compile_constraint

EOS = 1000
PIECES = ["a", "b", "12", "3", " ", ",", ", ", '"', "[", "]", ".", "New", " York", "-", "é", "e5"]
CASES: list[tuple[str, Any]] = [
    ("regex", "[0-9]{1,3}"),
    ("regex", "[a-z]*(, [a-z]+)*"),
    ("regex", r"1\d{3}-\d\d(-\d\d)?"),
    ("regex", "(a(b|12))*"),
    ("regex", "(?s).*"),
    ("choice", ["New", "New York", "New Yorker", "a"]),
    ("json_schema", {"type": "number"}),
    ("json_schema", {"type": ["array", "integer"], "items": {"type": "string"}}),
    ("cfg", 'start: "a" start "b" | "a" | "12"'),
]


@pytest.fixture(scope="module", params=["all bytes", "few bytes"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    """Tokens of several pieces; with few single bytes, so that the beginnings of many tokens are no tokens."""
    rng = random.Random(5)
    joined = {"".join(rng.choices(PIECES, k=rng.randrange(2, 6))).encode(): None for _ in range(600)}
    bytes_ = range(256) if request.param == "all bytes" else b'ab135e,"]-'
    texts = [*(bytes((i,)) for i in bytes_), *(t for t in joined if len(t) > 1)]
    return Vocabulary([*texts, *[b""] * (EOS - len(texts)), b"<eos>"], [EOS], [EOS])


def ends(grammar: CompiledGrammar, state: int, text: bytes) -> bool:
    """Whether a token ends the text: it is refused, and so is every text that begins like it and is then whole."""
    if not grammar.is_accepting(state) or grammar.advance_bytes(state, text) is not None:
        return False
    begun = [grammar.advance_bytes(state, text[:size]) for size in range(1, len(text))]
    return not any(after is not None and grammar.is_accepting(after) for after in begun)


@pytest.mark.parametrize(("kind", "source"), CASES)
def test_the_tokens_that_end_a_text_are_those_of_the_definition(kind: str, source: Any, vocabulary: Vocabulary) -> None:
    grammar = compile_constraint(kind, source if kind != "json_schema" else json.loads(json.dumps(source)), vocabulary)
    texts, rng = vocabulary.token_bytes, random.Random(str(source))
    num_accepting = 0
    for _ in range(4):
        state = 0
        for _ in range(12):
            row = grammar.ends(state)
            found = [] if row is None else bitmask.unpack(row).tolist()
            assert found == sorted(t for t in vocabulary.content_tokens if ends(grammar, state, texts[t]))
            num_accepting += grammar.is_accepting(state)
            follows = [t for t in bitmask.unpack(grammar.mask(state)).tolist() if t != EOS]
            possible = [byte for byte in range(256) if grammar.advance_bytes(state, bytes((byte,))) is not None]
            assert grammar.is_complete(state) == (grammar.is_accepting(state) and not possible)
            after = grammar.advance(state, rng.choice(follows)) if follows else None
            if after is None:
                break
            state = after
    assert num_accepting


def test_ends_are_answered_again_after_their_rows_were_dropped(vocabulary: Vocabulary) -> None:
    grammar = compile_constraint("regex", "a{0,200}|b", vocabulary)
    state, rows = 0, []
    for _ in range(150):
        row = grammar.ends(state)
        rows.append(None if row is None else row.tobytes())
        following = grammar.advance_bytes(state, b"a")
        assert following is not None
        state = following
    state = 0
    for expected in rows:
        row = grammar.ends(state)
        assert (None if row is None else row.tobytes()) == expected
        state = grammar.advance_bytes(state, b"a") or 0
