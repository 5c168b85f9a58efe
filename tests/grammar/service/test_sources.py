from __future__ import annotations

import json
import re
import time
from typing import Any

import numpy as np
import pytest

from ramet.errors import GrammarError, GrammarTooLarge, InvalidGrammar, InvalidRegex, InvalidSchema
from ramet.grammar import Limits, Vocabulary, compile_constraint

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b"ab", b"bc", "é!".encode(), b"<eos>"], [259], [259], 264)


def accepts(kind: str, source: Any, text: str, **options: Any) -> bool:
    grammar = compile_constraint(kind, source, BYTES, **options)
    state = grammar.advance_bytes(0, text.encode())
    return state is not None and grammar.is_accepting(state)


@pytest.mark.parametrize(
    ("kind", "source", "options", "good", "bad"),
    [
        ("regex", "a|b+", {}, "bbb", "ab"),
        ("regex", "A", {"flags": re.IGNORECASE}, "a", "b"),
        ("choice", '["ab","abc"]', {}, "abc", "a"),
        ("choice", ["ab", "é"], {}, "é", "e"),
        ("substring", "hello", {}, "ell", "hl"),
        ("substring", "so it goes", {"unit": "words"}, "it goes", "t goes"),
    ],
)
def test_each_kind_compiles_from_its_source(kind: str, source: Any, options: Any, good: str, bad: str) -> None:
    assert accepts(kind, source, good, **options)
    assert not accepts(kind, source, bad, **options)


def test_masks_of_regular_kinds_equal_brute_force_and_the_automaton_is_closed() -> None:
    grammar = compile_constraint("regex", r"(ab|é!?)*c?", BYTES)
    assert grammar.close()
    for state in range(grammar.num_states):
        row = np.unpackbits(grammar.mask(state).view(np.uint8), bitorder="little")
        for token in range(BYTES.vocab_size):
            if token in BYTES.eos_ids:
                expected = grammar.is_accepting(state)
            else:
                expected = grammar.advance(state, token) is not None
            assert row[token] == expected, (state, token)


def test_shortest_completion_of_a_closed_automaton_ends_the_text() -> None:
    grammar = compile_constraint("regex", "(ab){3}c*d", BYTES)
    state = grammar.advance_bytes(0, b"aba")
    assert state is not None
    text = b"".join(BYTES.token_bytes[t] for t in grammar.shortest_completion(state))
    assert text == b"babd"


def test_completions_are_the_shortest_from_every_state() -> None:
    grammar = compile_constraint("regex", "(?:ab){2,5}(?:xyz|q)*!|é{3}0", BYTES)
    assert grammar.close()
    tables = grammar.device_tables()
    assert tables is not None
    distance = dict.fromkeys(np.flatnonzero(tables.accepting).tolist(), 0)
    while len(distance) < len(tables.accepting):  # one level at a time
        distance |= {
            s: 1 + min(distance[t] for t in row if t in distance)
            for s, row in enumerate(tables.transitions.tolist())
            if s not in distance and any(t in distance for t in row)
        }
    for state in range(grammar.num_states):
        text = b"".join(BYTES.token_bytes[t] for t in grammar.shortest_completion(state))
        after = grammar.advance_bytes(state, text)
        assert after is not None
        assert grammar.is_accepting(after)
        assert grammar.completion_bound(state) == len(text) == distance[state]


def test_the_way_out_of_a_long_pattern_is_found_quickly() -> None:
    grammar = compile_constraint("regex", "[^a]{2000}", BYTES)
    begin = time.perf_counter()
    assert grammar.completion_bound(0) == 2000
    state = grammar.advance_bytes(0, b"b" * 10)
    assert state is not None
    assert grammar.completion_bound(state) == 1990
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize(
    ("kind", "source", "options", "error", "message"),
    [
        ("grammer", "x", {}, InvalidGrammar, "kinds are json_schema, regex, cfg, choice, substring, tools"),
        ("regex", "a", {"flag": 1}, InvalidGrammar, "no option 'flag'; it has: flags"),
        ("regex", "(", {}, InvalidRegex, "position 0"),
        ("regex", "(?!)", {}, GrammarError, "contradictory"),
        ("choice", "[1", {}, InvalidGrammar, "not JSON"),
        ("choice", '{"a": 1}', {}, InvalidGrammar, "a list of texts, not dict"),
        ("choice", "[" * 100_000, {}, GrammarTooLarge, "nested too deeply"),
        ("json_schema", "{", {}, InvalidSchema, "line 1 column 2"),
        ("substring", "x" * (17 << 20), {}, GrammarTooLarge, "the limit is 16,777,216"),
    ],
)
def test_bad_sources_raise_typed_errors(
    kind: str, source: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compile_constraint(kind, source, BYTES, **options)


def test_limits_reach_the_regular_part() -> None:
    with pytest.raises(GrammarTooLarge, match="more than 100 automaton states"):
        compile_constraint("regex", "(a|b)*a(a|b){12}", BYTES, limits=Limits(max_regular_states=100))


def test_wire_form_of_choices_is_json() -> None:
    assert accepts("choice", json.dumps(['say "é"'], ensure_ascii=False), 'say "é"')
