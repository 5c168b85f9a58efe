"""Masks against every token's own run, where configurations share them: texts remembered in maps, lists and nests."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest

from ramet.grammar import CompiledGrammar, Vocabulary, compile_grammar
from ramet.grammar.ir import AS_MODELS_WRITE, JsonOptions, JsonSchema
from ramet.grammar.json_schema.frames import arrays, objects
from ramet.grammar.json_schema.frames.arrays import ItemContext
from ramet.grammar.machine import bitmask
from ramet.grammar.machine.frame import REFUSE

PIECES = ["{", "}", "[", "]", '"', ":", ",", "a", "b", "/", "1", "é", "\\/", " ", "\n"]
EOS = 256 + 1500
SCHEMAS: dict[str, Any] = {
    "map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "map of maps": {"additionalProperties": {"type": "object", "additionalProperties": {"enum": ["a", 1]}}},
    "anything": {"type": "object"},
    "named and others": {"properties": {"a": {"type": "object"}, "ab": {"const": 1}}, "required": ["ab"]},
    "patterns": {"patternProperties": {"^a": {"type": "string", "maxLength": 2}}, "additionalProperties": {"const": 1}},
    "closed patterns": {"patternProperties": {"^a": {"maxLength": 2}}, "additionalProperties": False},
    "endless keys": {"patternProperties": {"^[ab]+$": {"const": 1}}, "additionalProperties": False},
    "few keys": {"patternProperties": {"^[ab]{1,2}$": {"const": 1}}, "additionalProperties": False},
    "endless keys and names": {
        "properties": {"a": {"const": 1}, "b": False, "/": {}},
        "patternProperties": {"^[ab]+$": {"enum": ["a", 1]}},
        "additionalProperties": False,
    },
    "bounded count": {"type": "object", "maxProperties": 2, "minProperties": 1},
    "two kinds": {"anyOf": [{"additionalProperties": {"type": "string"}}, {"additionalProperties": {"const": 1}}]},
    "list of maps": {"type": "array", "items": {"type": "object", "additionalProperties": {"type": "array"}}},
    "unique items": {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b", 1, 11]}},
    "unique objects": {
        "type": "array",
        "uniqueItems": True,
        "items": {"type": "object", "properties": {"a": {"const": 1}}},
    },
    "few objects": {
        "type": "array",
        "uniqueItems": True,
        "items": {"properties": {"a": {"enum": [1, "a"]}}, "type": "object", "additionalProperties": False},
    },
    "unique integers": {"type": "array", "uniqueItems": True, "items": {"type": "integer"}},
    "map of unique": {"additionalProperties": {"type": "array", "uniqueItems": True, "items": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """All bytes, and long tokens that span keys, values and what stands between them."""
    rng = random.Random(7)
    tokens = {"".join(rng.choices(PIECES, k=rng.randrange(2, 9))).encode(): None for _ in range(600)}
    for key in ("a", "b", "ab", "/", "é", ""):
        for end in ('"', '":', '":1', '":"', '":{', '":1,"', '":1,"a":', '":{"', '":1}', '":"a","b":1', '":["a","'):
            for begin in ("", '"', ',"', '","', '1,"', '},"', '{"', '"],"', '", "'):
                tokens[f"{begin}{key}{end}".encode()] = None
        for end in (
            '": 1',
            '": [',
            '": {"',
            '": 1, "a": ',
            '": "a", "b": 1',
            '": [\n',
            '": 1\n}',
            '": 1,\n "a"',
            '" :',
        ):
            for begin in ("", '{"', ' "', ', "', '1, "', '{\n "', '",\n "', ',\n  "'):
                tokens[f"{begin}{key}{end}".encode()] = None
    long = [t for t in tokens if len(t) > 1][: EOS - 256]
    texts = [bytes((i,)) for i in range(256)] + long
    return Vocabulary([*texts, *[b""] * (EOS - len(texts)), b"<eos>"], [EOS], [EOS])


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize(
    "options",
    [
        JsonOptions("compact"),
        JsonOptions("model", **AS_MODELS_WRITE),
        JsonOptions("any", additional_properties="closed"),
        JsonOptions("indent=1", order="declared"),
    ],
    ids=lambda options: options.whitespace,
)
def test_a_mask_allows_exactly_the_tokens_that_can_be_taken(
    name: str, options: JsonOptions, vocabulary: Vocabulary
) -> None:
    grammar = compile_grammar(JsonSchema(SCHEMAS[name], options), vocabulary)
    rng = random.Random(name)
    for _ in range(3):
        state = 0
        for _ in range(9):
            following = _check(grammar, state)
            inner = [t for t in following if len(vocabulary.token_bytes[t]) > 1] or list(following)
            if not inner:
                break
            state = following[rng.choice(inner)]


def _check(grammar: CompiledGrammar, state: int) -> dict[int, int]:
    """The state after each token that can be taken."""
    following = {
        t: after for t in grammar.vocabulary.content_tokens if (after := grammar.advance(state, t)) is not None
    }
    allowed = set(bitmask.unpack(grammar.mask(state)).tolist())
    assert (EOS in allowed) == grammar.is_accepting(state)
    allowed.discard(EOS)
    texts = grammar.vocabulary.token_bytes
    assert not [texts[t] for t in allowed - following.keys()], "allowed, but refused when taken"
    assert not [texts[t] for t in following.keys() - allowed], "can be taken, but not allowed"
    return following


@pytest.mark.parametrize("keys", ["^[A-C]+$", "^[éü]{1,3}$", "^[A-C]{1,2}$", "^[A-D]$", "^[\\u0001\\u0002]+$"])
def test_a_closing_writes_keys_that_were_not_there(keys: str, vocabulary: Vocabulary) -> None:
    values = {"patternProperties": {keys: {"const": 1}}, "additionalProperties": False}
    schema = {"type": "object", **values, "minProperties": 4}
    grammar = compile_grammar(JsonSchema(schema), vocabulary)
    text = b""
    for _ in range(6):  # close from inside the last key again and again
        state = grammar.advance_bytes(0, text)
        assert state is not None
        closing = b"".join(vocabulary.token_bytes[t] for t in grammar.shortest_completion(state))
        pairs = json.loads(text + closing, object_pairs_hook=list)
        assert len(dict(pairs)) == len(pairs) == 4
        assert all(re.search(keys, key) for key, _ in pairs)
        text = (text + closing)[: (text + closing).rindex(b'"')]


@pytest.mark.parametrize("options", [JsonOptions(), JsonOptions("any"), JsonOptions("indent=2")])
def test_grammars_of_a_vocabulary_share_the_mask_of_keys_without_names(options: JsonOptions) -> None:
    vocabulary = Vocabulary([*(bytes((i,)) for i in range(256)), b'":', b'x":{', b"<eos>"], [258], [258])
    rows = []
    for schema in ({"type": "object"}, {"properties": {"zz": {"type": "object"}}, "required": ["zz"]}):
        grammar = compile_grammar(JsonSchema(schema, options), vocabulary)
        state = grammar.advance_bytes(0, b'{\n  "xx' if options.whitespace == "indent=2" else b'{"xx')
        assert state is not None
        rows.append(grammar.mask(state))
    assert rows[0] is rows[1]


def test_what_may_follow_in_an_object_or_array_is_worked_out_once_for_all_its_places(vocabulary: Vocabulary) -> None:
    item = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    lists = {"a": {"$ref": "#/$defs/list"}, "b": {"$ref": "#/$defs/list"}}
    schema = {"type": "object", "properties": lists, "$defs": {"list": {"type": "array", "items": item}}}
    grammar = compile_grammar(JsonSchema(schema), vocabulary)
    for text in (b'{"a": [{"a": 1', b'{"b": [{"a": 1'):
        assert grammar.advance_bytes(0, text) is not None
    frames = grammar.machine.frames
    outer = [f.node for f in frames if isinstance(f, arrays.ArrayFrame) and f.is_open]
    opened = [f.node for f in frames if isinstance(f, objects.ObjectFrame) and f.is_open]
    for nodes in (outer, [node for node in opened if isinstance(node.context, ItemContext)]):
        assert len(nodes) == 2
        assert nodes[0].state is nodes[1].state


def test_kinds_of_value_that_cannot_stand_somewhere_are_no_exits_to_be_resolved(vocabulary: Vocabulary) -> None:
    schema = {"properties": {"a": {"type": "integer"}, "b": {"type": ["null", "array"]}}, "additionalProperties": False}
    grammar = compile_grammar(JsonSchema(schema), vocabulary)
    for text, starts in ((b"", b'"[{-0123456789tfn'), (b'{"a": ', b"-0123456789"), (b'{"b": ', b"[n")):
        state = grammar.advance_bytes(0, text)
        assert state is not None
        instance, local = divmod(grammar.packed(state), 1 << 32)
        table = grammar.machine.frames[instance].table
        assert np.flatnonzero(table.rows[local, table.byte_class] != REFUSE).tolist() == sorted(starts)


def test_what_was_asked_before_is_not_worked_out_again(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"type": "object", "properties": {"key": {"const": "value"}}, "required": ["key"]}
    grammar = compile_grammar(JsonSchema({**schema, "additionalProperties": False}), vocabulary)

    def follow() -> list[Any]:
        state, seen = 0, []
        for byte in b'{"key':
            following = grammar.advance(state, byte)
            assert following is not None
            bound, completion = grammar.completion_bound(following), grammar.shortest_completion(following)
            seen.append((following, bound, completion, grammar.forced_tokens(following)))
            completion.clear()  # the caller's own
            state = following
        return seen

    first = follow()
    for name in ("run", "closing_bytes", "closing_length"):
        monkeypatch.setattr(grammar.machine, name, None)
    monkeypatch.setattr(grammar, "mask", None)
    assert follow() == first
