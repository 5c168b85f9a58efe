"""Where bytes are forced, masks allow the tokenizer's own tokens alone, and no text of a language is lost."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from ramet.grammar import CompiledGrammar, Vocabulary, compile_constraint
from ramet.grammar.ir import AS_MODELS_WRITE
from ramet.grammar.machine import bitmask

PIECES = [
    b"na", b"me", b"name", b'"n', b'":', b'": ', b', "', b'",', b' "', b'{"', b'"}', b"ote", b"no", b"not", b"tr",
    b"rue", b"ue}", b"al", b"alse", b"  ", b"00", b"2-", b"-0", "é".encode(), b"\xc3", b'"\xc3', "éa".encode(), b"me",
    b'e": t',
]  # fmt: skip
TOKENS = [*(bytes((i,)) for i in range(256)), *PIECES, b"<eos>"]
EOS = len(TOKENS) - 1

GRAMMARS: dict[str, tuple[str, Any, list[str]]] = {
    "a record": (
        "json_schema",
        {
            "type": "object",
            "properties": {"name": {"enum": ["no", "not", "é", "éa", "è"]}, "note": {"type": "boolean"}},
            "required": ["name", "note"],
            "additionalProperties": False,
        },
        ['{"name": "no", "note": true}', '{"name": "éa", "note": false}', '{"name": "è", "note": false}'],
    ),
    "optional keys": (
        "json_schema",
        {
            "properties": {"name": {"const": "name"}, "note": {"const": "name"}, "not": {"type": "integer"}},
            "additionalProperties": False,
        },
        ['{"note": "name", "not": -100}', "{}", '{"name": "name"}', '{"not": 0}'],
    ),
    "strings and any keys": (
        "json_schema",
        {"properties": {"name": {"type": "string"}}, "required": ["name"]},
        ['{"name": "me\\"00"}', '{"note": [true, "é"], "name": ""}', '{"name": "", "éa": {"no": 2}}'],
    ),
    "a date": ("regex", "name: 20[0-9]{2}-0[1-9](, note)?\\.", ["name: 2002-01.", "name: 2000-09, note."]),
    "choices": ("choice", ["name", "note", "not", "no", "é", "èé"], ["name", "not", "no", "é", "èé"]),
    "forced white space": ("regex", "  {5}name( {3}e)?", [" " * 6 + "name", " " * 6 + "name   e"]),
    "half characters": ("regex", "name(é|è|ê)e", ["nameée", "nameêe"]),
    "nested": ("cfg", 'start: "[" start "]" | "name"', ["name", "[[name]]"]),
}


Split = Callable[[bytes], list[int]]


@dataclass
class Splitter:
    """A tokenizer. `pieces`: where the first piece of a text ends, by the character before it."""

    split: Split
    pieces: dict[bytes, int] = field(default_factory=dict)

    def rest_of_piece(self, before: bytes, text: bytes) -> int:
        return self.pieces.get(before, 0)


def longest_first(text: bytes) -> list[int]:
    """The longest token at each place."""
    out, i = [], 0
    while i < len(text):
        token = max((t for t in range(EOS) if text.startswith(TOKENS[t], i)), key=lambda t: (len(TOKENS[t]), -t))
        out.append(token)
        i += len(TOKENS[token])
    return out


def arbitrary(seed: int) -> Split:
    """A split without rules: any tokens, different for each text and for each character before it."""

    def split(text: bytes) -> list[int]:
        rng = random.Random(repr((seed, text)))
        out, i = [], 0
        while i < len(text):
            token = rng.choice([t for t in range(EOS) if text.startswith(TOKENS[t], i)])
            out.append(token)
            i += len(TOKENS[token])
        return out

    return split


def merging(seed: int) -> Split:
    """Byte-pair encoding with merges in an order of its own: the best pair of neighbours becomes one token."""
    order = list(range(256, EOS))
    random.Random(seed).shuffle(order)
    rank = {TOKENS[t]: i for i, t in enumerate(order)}
    ids = {TOKENS[t]: t for t in range(EOS - 1, -1, -1)}

    def split(text: bytes) -> list[int]:
        parts = [bytes((b,)) for b in text]
        while True:
            pairs = [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank]
            if not pairs:
                return [ids[p] for p in parts]
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    return split


SPLITS = {"longest first": longest_first, "merging": merging(1), "merging otherwise": merging(2)}
SPLITS |= {f"arbitrary {seed}": arbitrary(seed) for seed in range(3)}


def compiled(name: str, split: Split | None) -> CompiledGrammar:
    kind, source, _ = GRAMMARS[name]
    splitter = None if split is None else Splitter(split)
    return compile_constraint(kind, source, Vocabulary(TOKENS, [EOS], [EOS], splitter=splitter))


def is_written(grammar: CompiledGrammar, text: bytes) -> bool:
    """Whether some way through the masks writes the text. Every mask on the way allows something."""
    states = {0: 0}  # place -> state
    for place in range(len(text)):
        if place not in states:
            continue
        allowed = grammar.allowed_tokens(states[place]).tolist()
        assert allowed, text[:place]
        for token in allowed:
            if token != EOS and text.startswith(TOKENS[token], place):
                after = grammar.advance(states[place], token)
                assert after is not None
                states.setdefault(place + len(TOKENS[token]), after)
    return len(text) in states and EOS in grammar.allowed_tokens(states[len(text)])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", GRAMMARS)
def test_every_text_of_the_language_can_be_written(name: str, split: str) -> None:
    grammar = compiled(name, SPLITS[split])
    for text in GRAMMARS[name][2]:
        assert is_written(grammar, text.encode()), text


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", GRAMMARS)
def test_masks_are_never_empty_and_allow_only_what_the_grammar_allows(name: str, split: str) -> None:
    grammar, plain = compiled(name, SPLITS[split]), compiled(name, None)
    rng = random.Random(name + split)
    for _ in range(4):
        state = free = 0
        for _ in range(40):
            allowed = grammar.allowed_tokens(state).tolist()
            assert allowed
            assert not np.any(grammar.mask(state) & ~plain.mask(free))
            token = rng.choice(allowed)
            if token == EOS:
                break
            after, after_free = grammar.advance(state, token), plain.advance(free, token)
            assert after is not None
            assert after_free is not None
            state, free = after, after_free


@pytest.mark.parametrize("split", ["merging", "merging otherwise"])
@pytest.mark.parametrize("name", GRAMMARS)
def test_the_own_split_of_a_whole_text_is_allowed_token_by_token(name: str, split: str) -> None:
    grammar = compiled(name, SPLITS[split])
    for text in GRAMMARS[name][2]:
        state: int | None = 0
        for token in SPLITS[split](text.encode()):
            assert state is not None
            assert token in grammar.allowed_tokens(state), (text, TOKENS[token])
            state = grammar.advance(state, token)


@pytest.mark.parametrize("name", GRAMMARS)
def test_forced_tokens_are_those_of_masks_with_one_token(name: str) -> None:
    grammar, other = compiled(name, longest_first), compiled(name, longest_first)
    rng = random.Random(name)
    for _ in range(4):
        state = 0
        for _ in range(30):
            run = []
            end = state
            while len(allowed := other.allowed_tokens(end).tolist()) == 1 and allowed != [EOS]:
                run += allowed
                after = other.advance(end, allowed[0])
                assert after is not None
                end = after
            found = grammar.forced_tokens(state)
            assert found == run
            allowed = grammar.allowed_tokens(state).tolist()
            token = rng.choice(allowed)
            if token == EOS:
                break
            following, same = grammar.advance(state, token), other.advance(state, token)
            assert following is not None
            assert following == same
            state = following


def test_forced_bytes_are_written_with_the_own_tokens_of_the_tokenizer() -> None:
    grammar = compiled("a record", longest_first)
    assert [TOKENS[t] for t in grammar.allowed_tokens(0)] == [b'{"']
    state = grammar.advance_bytes(0, b'{"')
    assert state is not None
    assert [TOKENS[t] for t in grammar.allowed_tokens(state)] == [b"name", b"not"]
    state = grammar.advance_bytes(0, b'{"name": "no",')
    assert state is not None
    assert {TOKENS[t] for t in grammar.allowed_tokens(state)} == {b' "'}
    # the last token is left to the model: longer ones may follow
    state = grammar.advance_bytes(0, b'{"name": ')
    assert state is not None
    assert {TOKENS[t] for t in grammar.allowed_tokens(state)} == {b'"', b'"n', b'"\xc3'}


def test_of_several_keys_the_pieces_of_one_are_refused() -> None:
    grammar = compiled("optional keys", merging(1))
    state = grammar.advance_bytes(0, b'{"name": "name", "')
    assert state is not None
    plain = compiled("optional keys", None)
    free = plain.advance_bytes(0, b'{"name": "name", "')
    assert free is not None
    now, before = ({TOKENS[t] for t in g.allowed_tokens(s)} for g, s in ((grammar, state), (plain, free)))
    assert {b"n", b"no", b"not"} <= before
    assert now < before


def test_in_strings_and_numbers_everything_stays_allowed() -> None:
    grammar, plain = compiled("strings and any keys", longest_first), compiled("strings and any keys", None)
    for text in (b'{"name": "', b'{"name": "a', b'{"note": 1', b'{"note": [', b'{"n'):
        state, free = grammar.advance_bytes(0, text), plain.advance_bytes(0, text)
        assert state is not None
        assert free is not None
        assert (grammar.mask(state) == plain.mask(free)).all()


def test_a_split_that_changes_the_text_is_not_used() -> None:
    def lowering(text: bytes) -> list[int]:
        return [*text.lower()]

    grammar = compile_constraint("choice", ["NAME"], Vocabulary(TOKENS, [EOS], [EOS], splitter=Splitter(lowering)))
    plain = compile_constraint("choice", ["NAME"], Vocabulary(TOKENS, [EOS], [EOS]))
    assert (grammar.mask(0) == plain.mask(0)).all()


def test_special_tokens_of_a_split_are_not_used() -> None:
    vocabulary = Vocabulary(TOKENS, [EOS], [EOS, 256], splitter=Splitter(lambda text: [256, *text[2:]]))
    grammar = compile_constraint("choice", ["name"], vocabulary)
    assert 256 not in grammar.allowed_tokens(0)
    assert ord("n") in grammar.allowed_tokens(0)


def test_the_character_before_a_text_may_decide_its_split() -> None:
    splitter = Splitter(longest_first, {b"}": 1})
    grammar = compile_constraint("choice", ['"name'], Vocabulary(TOKENS, [EOS], [EOS], splitter=splitter))
    assert {TOKENS[t] for t in grammar.allowed_tokens(0)} == {b'"n', b'"'}


def test_the_same_tokens_with_other_splits_are_another_vocabulary() -> None:
    keys = {
        Vocabulary(TOKENS, [EOS], [EOS], splitter=s and Splitter(s)).key
        for s in (None, longest_first, merging(1), merging(2))
    }
    assert len(keys) == 4


def test_a_vocabulary_without_splits_allows_every_tokenisation() -> None:
    vocabulary = Vocabulary(TOKENS, [EOS], [EOS], splitter=Splitter(longest_first))
    plain = Vocabulary(TOKENS, [EOS], [EOS])
    assert vocabulary.without_splits.key == plain.key != vocabulary.key
    assert plain.without_splits is plain
    source = json.dumps(["name"])
    masks = [compile_constraint("choice", source, v).mask(0) for v in (vocabulary.without_splits, plain)]
    assert (masks[0] == masks[1]).all()


def test_a_long_forced_text_is_looked_at_in_parts() -> None:
    asked: list[int] = []

    def split(text: bytes) -> list[int]:
        asked.append(len(text))
        return longest_first(text)

    text = "name" * 2000
    grammar = compile_constraint("choice", [text], Vocabulary(TOKENS, [EOS], [EOS], splitter=Splitter(split)))
    assert grammar.forced_tokens(0) == longest_first(text.encode())
    assert max(asked) < 200


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", GRAMMARS)
def test_a_joined_token_goes_on_with_bytes_that_must_follow(name: str, split: str) -> None:
    grammar = compiled(name, SPLITS[split])
    rng = random.Random(name + split)
    for _ in range(6):
        state = 0
        for _ in range(30):
            token = rng.choice(grammar.allowed_tokens(state).tolist())
            if token == EOS:
                break
            joined, after = grammar.joined_token(state, token), grammar.advance(state, token)
            assert after is not None
            assert TOKENS[joined].startswith(TOKENS[token])
            for byte in TOKENS[joined][len(TOKENS[token]) :]:
                assert not grammar.is_accepting(after)
                assert {TOKENS[t][0] for t in grammar.allowed_tokens(after)} == {byte}
                after = grammar.advance_bytes(after, bytes((byte,)))
                assert after is not None
            assert grammar.advance(state, joined) == after
            state = after


def test_the_end_of_a_string_is_joined_with_what_must_follow() -> None:
    properties = {"a": {"type": "string"}, "b": {"type": "string"}}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    vocabulary = Vocabulary(TOKENS, [EOS], [EOS], splitter=Splitter(longest_first))
    grammar = compile_constraint("json_schema", schema, vocabulary, **AS_MODELS_WRITE)
    texts = {}
    for text in (b'{"a": "x', b'{"a": "x", "b": "y'):
        state = grammar.advance_bytes(0, text)
        assert state is not None
        texts[text] = TOKENS[grammar.joined_token(state, ord('"'))]
        assert grammar.joined_token(state, ord("a")) == ord("a")
    assert texts == {b'{"a": "x': b'",', b'{"a": "x", "b": "y': b'"}'}


def test_a_token_that_gives_back_the_end_of_a_prompt_begins_a_split_of_both() -> None:
    grammar, plain = compiled("a record", longest_first), compiled("a record", None)
    for prefix, own in ((b" ", {b" "}), (b"", {b'{"'})):
        row, free = grammar.mask_after(0, prefix), plain.mask_after(0, prefix)
        assert not np.any(row & ~free)
        assert {TOKENS[t] for t in bitmask.unpack(row)} == own
    source = json.dumps(["name", "note"])
    grammar = compile_constraint("choice", source, Vocabulary(TOKENS, [EOS], [EOS], splitter=Splitter(longest_first)))
    assert {TOKENS[t] for t in bitmask.unpack(grammar.mask_after(0, b'"'))} == {b'"n'}
