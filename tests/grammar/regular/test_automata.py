"""Automata of numbers, patterns and strings against plain definitions; tries and compiled loops against slow ones."""

from __future__ import annotations

import inspect
import json
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.grammar import Vocabulary, compile_grammar, ir
from ramet.grammar.ir import JsonSchema
from ramet.grammar.json_schema.schema import formats, pattern
from ramet.grammar.machine import bitmask, walker
from ramet.grammar.machine.vocabulary import TextTrie
from ramet.grammar.regular import languages as regular
from ramet.grammar.regular import numbers as numeric
from ramet.grammar.regular.numbers import Numbers

F = Fraction
TEXTS = ["0", "-0", "0.0", "1", "-1", "1.0", "1.5", "1.50", "-20.00", "3", "10.25", "10.24", "7", "0.3", "0.6", "0.001",
         "1000000", "-3000000", "150", "300", "0.02", "0.019", "-0.5", "2.5", "5", "99.99"]  # fmt: skip


@pytest.mark.parametrize(
    "numbers",
    [
        Numbers(integer=True),
        Numbers(integer=False),
        Numbers(low=F("-1.5"), high=F("10.25"), high_open=True),
        Numbers(low=F(5), low_open=True, integer=True),
        Numbers(high=F("-0.5")),
        Numbers(multiples=frozenset({(F(3), True)})),
        Numbers(multiples=frozenset({(F("0.01"), True)})),
        Numbers(multiples=frozenset({(F("2.5"), True)})),
        Numbers(multiples=frozenset({(F(1000000), True)})),
        Numbers(multiples=frozenset({(F("0.3"), False)}), low=F(0)),
        Numbers(finite=frozenset({F(0), F("1.5"), F(-20)})),
        Numbers(excluded=frozenset({F(0), F("1.5")})),
    ],
)
def test_a_number_is_accepted_exactly_when_it_is_in_the_set(numbers: Numbers) -> None:
    dfa = numeric.automaton(numbers)
    for text in TEXTS:
        assert dfa.accepts(text.encode()) == numbers.contains(F(text)), text
        inverse = any(numeric.automaton(n).accepts(text.encode()) for n in numeric.complement(numbers))
        assert inverse != numbers.contains(F(text)), text


PATTERNS = [
    *(r"^[a-z]+$", "foo", "^foo|bar$", r"^\d{3}-\d{2,4}$", r"^(?!foo)\w*$", r"(a|^b)c$", "^$", "", r"^.{2,5}$"),
    *(r"^(?:(?!ab).)*$", r"^(?=.*\d)(?=.*[a-z]).{3,}$", r"^a*?b+$", r"^(?!.*(foo|bar)$).*$", r"[^\s]"),
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PATTERNS), st.lists(st.sampled_from([*"abcfor12 -.@", "foo", "bar", "123-12"]), max_size=6))
def test_patterns_are_searched_as_python_does(source: str, parts: list[str]) -> None:
    text = "".join(parts)
    assert regular.compile_chars(pattern.search(source)).accepts(map(ord, text)) == bool(re.search(source, text))


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("(?<=aa)b", "lookbehind"),
        (r"(a)?\1", "back reference to the group 1, which is not read exactly once"),
        (r"(?<q>a|b)\k<x>", "back reference to the group x before its end"),
        (r"\1(a)", "back reference to the group 1 before its end"),
        (r"(.)\1", "more than 256 texts"),
    ],
)
def test_unsupported_patterns_are_named(source: str, what: str) -> None:
    with pytest.raises(pattern.UnsupportedPattern, match=what):
        pattern.search(source)


FORMATS = {
    "date-time": (["2024-02-29T23:59:59.5+02:00", "2020-01-01t00:00:00z"], ["2023-02-29T00:00:00Z", "2020-01-01"]),
    "ipv6": (["::", "1::2", "::ffff:1.2.3.4"], ["1::2::3", ":::"]),
    "email": (["a.b@c.de"], ["a@", "@b"]),
    "uri": (["http://a.b/c?d#e", "urn:x:y", "http://[::1]:80/"], ["abc", "//a", "http://a b"]),
    "uuid": (["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    "duration": (["P1Y", "PT5M", "P3W"], ["P", "1Y", "PT"]),
    "json-pointer": (["", "/a~0"], ["a", "/~2"]),
    "regex": (["^[a-z]+$", "(a|b)*"], ["(", "[a"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_follow_their_definitions(name: str) -> None:
    dfa = regular.compile_chars(formats.format_node(name))
    for text in FORMATS[name][0]:
        assert dfa.accepts(map(ord, text)), text
    for text in FORMATS[name][1]:
        assert not dfa.accepts(map(ord, text)), text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=5), min_size=1, max_size=40))
def test_the_trie_holds_every_text(texts: list[bytes]) -> None:
    texts.sort()
    flat = np.frombuffer(b"".join(texts), dtype=np.uint8)
    lengths = np.array([len(t) for t in texts], dtype=np.int64)
    trie = TextTrie(flat, np.cumsum(lengths) - lengths, lengths, np.arange(len(texts), dtype=np.int32))
    path: list[int] = []
    found: dict[int, bytes] = {}
    for i, (byte, skip, first, depth) in enumerate(trie.nodes[:-1].tolist()):
        path[depth - 1 :] = [byte]
        for e in range(first, int(trie.nodes[i + 1, 2])):
            found[int(trie.values[e])] = bytes(path)
        assert trie.nodes[skip, 3] <= depth
        assert all(trie.nodes[j, 3] > depth for j in range(i + 1, skip))
    assert found == dict(enumerate(texts))


def test_the_loops_in_python_give_what_the_compiled_ones_give() -> None:
    tokens = [*(bytes((i,)) for i in range(256)), b'{"a', b'":', b'"x"', b"12", b"<eos>"]
    vocabulary = Vocabulary(tokens, [260], [260])
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 5}, "b": {"maxLength": 3}}}
    grammar = compile_grammar(JsonSchema(schema), vocabulary)
    machine, trie = grammar.machine, vocabulary.trie
    for text in (b"", b"{", b'{"', b'{"a', b'{"a":', b'{"a": 1', b'{"b": "x'):
        state = grammar.advance_bytes(0, text)
        assert state is not None
        rows = []
        for loop in (walker.walk, inspect.unwrap(walker.walk)):
            row = np.zeros(vocabulary.num_words, dtype=np.int32)
            scratch = np.zeros(8 + trie.max_depth, dtype=np.int64)
            unsure = np.zeros(1 + len(trie.values), dtype=np.int32)
            scratch[3] = grammar.packed(state)
            arguments = (trie.nodes, trie.values, row, scratch, unsure)
            while loop(machine.pool, machine.instances, machine.exits, *arguments) >= 0:
                machine.exit_target(int(scratch[1]), int(scratch[2]))
            rows.append(row)
        assert np.array_equal(rows[0], rows[1]), text
        assert set(bitmask.unpack(rows[0]).tolist()) == set(bitmask.unpack(grammar.mask(state)).tolist()) - {260}, text


def test_a_closed_automaton_has_the_masks_and_states_of_the_grammar() -> None:
    vocabulary = Vocabulary([*(bytes((i,)) for i in range(256)), b"<eos>"], [256], [256])
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yz"]}, "b": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    grammar = compile_grammar(JsonSchema(schema), vocabulary)
    assert grammar.close()
    tables = grammar.device_tables()
    assert tables is not None
    for state in range(len(tables.transitions)):
        allowed = {t for t in grammar.allowed_tokens(state).tolist() if t < 256}
        assert allowed == set(np.flatnonzero(tables.transitions[state][tables.byte_class] >= 0).tolist())
        assert bool(tables.accepting[state]) == grammar.is_accepting(state)
        for byte in allowed:
            assert grammar.advance(state, byte) == tables.transitions[state][tables.byte_class[byte]]
    open_grammar = compile_grammar(JsonSchema({"type": "object"}), vocabulary)
    assert not open_grammar.close()
    assert open_grammar.device_tables() is None


def test_complement_of_a_text_is_every_other_utf8_text() -> None:
    dfa = regular.compile_bytes(ir.Complement(ir.text("ab")))
    assert [dfa.accepts(t) for t in (b"", b"a", b"ab", b"abc", b"\xff")] == [True, True, False, True, False]


def test_completions_are_json() -> None:
    vocabulary = Vocabulary([*(bytes((i,)) for i in range(256)), b"<eos>"], [256], [256])
    grammar = compile_grammar(JsonSchema({"type": "array", "minItems": 2, "items": {"required": ["k"]}}), vocabulary)
    text = b"".join(vocabulary.token_bytes[t] for t in grammar.shortest_completion(0))
    assert len(json.loads(text)) == 2
