"""Schemas as people write them: old drafts, odd identifiers, large limits, combinations that a grammar could refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ramet.errors import UnsupportedSchema
from ramet.grammar import CompiledGrammar, Vocabulary, compile_grammar
from ramet.grammar.ir import JsonOptions, JsonSchema

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b""], [256])
DRAFT_4, DRAFT_7 = "http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-07/schema#"

CASES: list[tuple[str, Any, list[Any], list[Any]]] = [
    ("two divisors", {"multipleOf": 2, "divisibleBy": 3}, [6, 0], [2, 3]),
    (
        "two kinds of dependencies",
        {"dependentRequired": {"a": ["b"]}, "dependencies": {"b": ["c"]}},
        [{"c": 1}, {"a": 1, "b": 1, "c": 1}],
        [{"a": 1}, {"a": 1, "b": 1}, {"b": 1}],
    ),
    (
        "dependencies beside unevaluated",
        {"unevaluatedProperties": False, "properties": {"a": {}, "b": {}}, "dependencies": {"a": {"required": ["b"]}}},
        [{"a": 1, "b": 1}, {"b": 1}],
        [{"a": 1}, {"c": 1}],
    ),
    (
        "a type that is a schema",
        {"$schema": DRAFT_4, "type": ["string", {"type": "integer", "minimum": 5}], "maximum": 7},
        ["a", 6],
        [3, 8, None],
    ),
    (
        "maxItems big",
        {"type": "array", "maxItems": 100000, "minItems": 2, "items": {"type": "integer"}},
        [[1, 2]],
        [[1]],
    ),
    ("maxLength big", {"type": "string", "maxLength": 1000000}, ["a"], [1]),
    ("enum big", {"enum": [f"v{i}" for i in range(5000)]}, ["v4999"], ["v5000"]),
    ("enum num big", {"enum": list(range(3000))}, [2999, 2999.0], [3000]),
    (
        "deep allOf",
        {
            "allOf": [
                {
                    "allOf": [
                        {"allOf": [{"required": ["a"]}, {"properties": {"a": {"type": "string"}}}]},
                        {"not": {"required": ["b"]}},
                    ]
                },
                {"oneOf": [{"required": ["c"]}, {"required": ["d"]}]},
            ]
        },
        [{"a": "", "c": 1}],
        [{"a": "", "b": 1, "c": 1}, {"a": ""}, {"a": "x", "c": 1, "d": 1}],
    ),
    (
        "pp overlap",
        {
            "patternProperties": {"^a": {"type": "integer"}, "b$": {"minimum": 5}, "^.{3}$": {"maximum": 9}},
            "additionalProperties": False,
        },
        [{"ab": 6, "acb": 7}],
        [{"ab": 4}, {"acb": 10}, {"x": 1}],
    ),
    (
        "d4 exmin",
        {
            "$schema": DRAFT_4,
            "type": "integer",
            "minimum": 3,
            "exclusiveMinimum": True,
            "maximum": 5,
            "exclusiveMaximum": False,
        },
        [4, 5],
        [3],
    ),
    ("d4 integers", {"$schema": DRAFT_4, "type": "integer", "minimum": 0, "maximum": 500}, [0, 100], [1.0, 2.5, -1]),
    ("d4 no integers", {"$schema": DRAFT_4, "type": "number", "not": {"type": "integer"}}, [1.0, 2.5], [1]),
    ("d4 exmin no dialect", {"type": "integer", "minimum": 3, "exclusiveMinimum": True}, [4], [3]),
    (
        "ref siblings d7",
        {
            "$schema": DRAFT_7,
            "definitions": {"s": {"type": "string"}},
            "properties": {"a": {"$ref": "#/definitions/s", "maxLength": 1}},
        },
        [{"a": "xxx"}],
        [{"a": 1}],
    ),
    (
        "ref siblings 2020",
        {"$defs": {"s": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/s", "maxLength": 1}}},
        [{"a": "x"}],
        [{"a": "xx"}],
    ),
    (
        "id d4",
        {
            "$schema": DRAFT_4,
            "id": "http://x/y.json",
            "definitions": {"s": {"id": "#foo", "type": "string"}},
            "$ref": "#foo",
        },
        ["a"],
        [1],
    ),
    (
        "id prop",
        {"$schema": DRAFT_4, "properties": {"id": {"type": "string"}, "$id": {"type": "integer"}}},
        [{"id": "a", "$id": 1}],
        [{"id": 1}],
    ),
    (
        "$id rel",
        {
            "$id": "http://x/root.json",
            "$defs": {"a": {"$id": "sub/a.json", "type": "string", "$defs": {"b": {"type": "integer"}}}},
            "properties": {"p": {"$ref": "sub/a.json"}, "q": {"$ref": "sub/a.json#/$defs/b"}},
        },
        [{"p": "", "q": 1}],
        [{"q": ""}],
    ),
    (
        "remote id self",
        {
            "$schema": DRAFT_7,
            "$id": "https://example.com/s.json",
            "properties": {"a": {"$ref": "https://example.com/s.json#/definitions/x"}},
            "definitions": {"x": {"type": "null"}},
        },
        [{"a": None}],
        [{"a": 1}],
    ),
    (
        "contentEncoding",
        {"type": "string", "contentEncoding": "base64", "contentMediaType": "application/json"},
        ["xx"],
        [1],
    ),
    ("unknown", {"type": "string", "x-foo": {"type": "zzz"}, "nullable": True, "example": 1}, ["xx"], [1]),
    ("fmt unknown", {"type": "string", "format": "phone"}, ["xx"], [1]),
    ("fmt on int", {"type": "integer", "format": "int64"}, [3], ["a"]),
    ("required d3", {"properties": {"a": {"type": "string", "required": True}}}, [{"a": ""}], [{}]),
    ("type obj no type", {"properties": {"a": {"type": "string"}}, "required": ["a"]}, [{"a": ""}, 3], [{}]),
    ("const obj", {"const": {"a": [1, {"b": None}]}}, [{"a": [1, {"b": None}]}], [{"a": [1]}]),
    (
        "ref $defs escape",
        {
            "$defs": {"a/b": {"type": "integer"}, "c~d": {"type": "string"}, "e f": {"type": "null"}},
            "properties": {
                "1": {"$ref": "#/$defs/a~1b"},
                "2": {"$ref": "#/$defs/c~0d"},
                "3": {"$ref": "#/$defs/e%20f"},
            },
        },
        [{"1": 1, "2": "", "3": None}],
        [{"1": ""}],
    ),
    (
        "minProps",
        {"type": "object", "minProperties": 2, "additionalProperties": {"type": "integer"}},
        [{"a": 1, "b": 2}],
        [{"a": 1}],
    ),
    (
        "maxProps",
        {"type": "object", "maxProperties": 50, "additionalProperties": {"type": "integer"}},
        [{"a": 1, "b": 2}],
        [{"a": "x"}],
    ),
    (
        "not anyOf",
        {"not": {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, "type": "object"},
        [{"c": 1}],
        [{"a": 1}],
    ),
    ("not type", {"not": {"type": ["string", "null"]}}, [1], ["", None]),
    ("not enum", {"type": "string", "not": {"enum": ["a", "b"]}}, ["c", ""], ["a"]),
    ("not const obj", {"not": {"const": {"a": 1}}}, [{"a": 2}, {}], [{"a": 1}]),
    ("not array items", {"not": {"type": "array", "items": {"type": "string"}}}, [[1], 3], [["a"], []]),
    (
        "oneOf overlap",
        {"oneOf": [{"type": "string", "maxLength": 5}, {"type": "string", "minLength": 3}]},
        ["ab", "abcdef"],
        ["abcd"],
    ),
    (
        "oneOf objs",
        {
            "oneOf": [
                {"properties": {"a": {"type": "string"}}, "required": ["a"]},
                {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
            ]
        },
        [{"a": 1}],
        [{"a": None}],
    ),
    (
        "if then",
        {
            "if": {"properties": {"c": {"const": "US"}}, "required": ["c"]},
            "then": {"properties": {"z": {"pattern": "^[0-9]{5}$"}}},
            "else": {"properties": {"z": {"maxLength": 3}}},
        },
        [{"c": "US", "z": "12345"}, {"z": "abc"}],
        [{"c": "US", "z": "1"}, {"z": "abcd"}],
    ),
    (
        "discriminator many",
        {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": f"k{i}"}, f"f{i}": {"type": "integer"}},
                    "required": ["kind", f"f{i}"],
                    "additionalProperties": False,
                }
                for i in range(60)
            ]
        },
        [{"kind": "k7", "f7": 1}, {"f59": 1, "kind": "k59"}],
        [{"kind": "k7", "f8": 1}],
    ),
    (
        "anyOf many open",
        {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"enum": [f"k{i}"]}, f"f{i}": {"type": "integer"}},
                    "required": ["kind"],
                }
                for i in range(60)
            ]
        },
        [{"kind": "k7", "f7": 1}],
        [{"kind": "k7", "f7": "x"}],
    ),
    (
        "oneOf many req",
        {"type": "object", "oneOf": [{"required": [f"r{i}"]} for i in range(12)]},
        [{"r1": 1}],
        [{"r1": 1, "r2": 2}, {}],
    ),
    (
        "anyOf many req",
        {"type": "object", "anyOf": [{"required": [f"r{i}"]} for i in range(40)]},
        [{"r1": 1, "r2": 2}],
        [{}],
    ),
    (
        "allOf ifs",
        {
            "type": "object",
            "allOf": [
                {"if": {"properties": {"t": {"const": f"x{i}"}}, "required": ["t"]}, "then": {"required": [f"r{i}"]}}
                for i in range(15)
            ],
        },
        [{"t": "x1", "r1": 0}, {"t": "q"}],
        [{"t": "x1"}],
    ),
    (
        "deps",
        {"dependencies": {"a": ["b"], "c": {"properties": {"d": {"type": "integer"}}, "required": ["d"]}}},
        [{"a": 1, "b": 1}, {"c": 1, "d": 1}],
        [{"a": 1}, {"c": 1}],
    ),
    (
        "depSchemas 8",
        {"type": "object", "dependentSchemas": {f"k{i}": {"required": [f"z{i}"]} for i in range(8)}},
        [{"k1": 1, "z1": 1}],
        [{"k1": 1}],
    ),
    (
        "propertyNames",
        {"propertyNames": {"pattern": "^[a-z]+$", "maxLength": 5}},
        [{"abc": 1}],
        [{"ABC": 1}, {"abcdef": 1}],
    ),
    ("propertyNames fmt", {"propertyNames": {"format": "uuid"}}, [{}], [{"ABC": 1}]),
    (
        "propertyNames big",
        {"propertyNames": {"pattern": "^[a-zA-Z0-9_.-]+$", "maxLength": 255}},
        [{"abc": 1}],
        [{"a b": 1}],
    ),
    (
        "contains objs",
        {"type": "array", "contains": {"type": "object", "required": ["a"]}, "items": {"type": "object"}},
        [[{"a": 1}]],
        [[{}]],
    ),
    (
        "contains 2",
        {"type": "array", "allOf": [{"contains": {"const": 1}}, {"contains": {"const": 2}}]},
        [[1, 2]],
        [[1]],
    ),
    (
        "unevaluated",
        {
            "$ref": "#/$defs/b",
            "properties": {"x": {"type": "integer"}},
            "unevaluatedProperties": False,
            "$defs": {"b": {"properties": {"y": {"type": "string"}}}},
        },
        [{"x": 1, "y": ""}],
        [{"z": 1}],
    ),
    ("multipleOf dec", {"type": "number", "multipleOf": 0.01}, [1.25, 3], [1.255]),
    ("multipleOf large", {"type": "integer", "multipleOf": 1024}, [2048], [2047]),
    ("num exact", {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, [0.5, 1], [0, 1.1]),
    (
        "int bigrange",
        {"type": "integer", "minimum": -9223372036854775808, "maximum": 9223372036854775807},
        [9223372036854775807],
        [9223372036854775808],
    ),
    ("pattern uni", {"type": "string", "pattern": "^\\p{L}+$"}, ["é"], ["1"]),
    ("pattern \\d{1,} i", {"type": "string", "pattern": "^(?i)abc$"}, ["ABC"], ["x"]),
    ("pattern words", {"type": "string", "pattern": "\\bfoo\\b"}, ["foo", "a foo.", "foo-bar"], ["food", "afoo"]),
    ("pattern behind", {"type": "string", "pattern": "^[a-z-]+(?<!-)$"}, ["a-b", "b"], ["a-", "-", ""]),
    ("pattern inside", {"type": "string", "pattern": "(^|,)ab?(,|$)"}, ["a", "x,ab", "ab,c"], ["xa", "ac", ""]),
    ("pattern named", {"type": "string", "pattern": "^(?<y>\\d{4})-(?<m>\\d\\d)$"}, ["2024-01"], ["x"]),
    ("pattern backslash /", {"type": "string", "pattern": "^\\/dev\\/[^\\/]+(\\/[^\\/]+)*$"}, ["/dev/sda"], ["dev"]),
    ("pattern mid ^", {"type": "string", "pattern": "(^a|b$)"}, ["ax", "xb"], ["xa"]),
    ("pattern $ mid", {"type": "string", "pattern": "^a$|^b$"}, ["a", "b"], ["c"]),
    ("pattern \\Z", {"type": "string", "pattern": "\\A\\w+\\Z"}, ["abc"], ["a b"]),
    ("pattern cond", {"type": "string", "pattern": "^(?=.{1,10}$)[a-z]+(?:-[a-z]+)*$"}, ["ab-c"], ["a" * 11]),
    ("pattern invalid esc", {"type": "string", "pattern": "^[\\w-\\.]+@\\w+$"}, ["a.b@c"], ["@"]),
    (
        "recursive",
        {
            "$defs": {
                "n": {
                    "type": "object",
                    "properties": {
                        "v": {"type": "integer"},
                        "c": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1},
                    },
                    "required": ["v"],
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/n",
        },
        [{"v": 1, "c": [{"v": 2}]}],
        [{"v": 1, "c": []}],
    ),
    (
        "anchor $recursiveRef",
        {
            "$schema": "https://json-schema.org/draft/2019-09/schema",
            "$recursiveAnchor": True,
            "properties": {"a": {"$recursiveRef": "#"}},
            "additionalProperties": False,
        },
        [{"a": {"a": {}}}],
        [{"a": {"b": 1}}],
    ),
    (
        "items tuple d7",
        {
            "$schema": DRAFT_7,
            "items": [{"type": "string"}, {"type": "integer"}],
            "additionalItems": False,
            "minItems": 2,
        },
        [["a", 1]],
        [["a"], ["a", 1, 2]],
    ),
    ("enum mixed types w/ type", {"type": ["string", "integer"], "enum": ["a", 1, None, 2.5]}, ["a", 1], [None, 2.5]),
    ("type number enum", {"type": "integer", "enum": [1.0, 2.5]}, [1], [2.5]),
    ("default wins", {"type": "string", "default": 5}, ["a"], [5]),
    ("readOnly", {"properties": {"a": {"readOnly": True, "type": "string"}}}, [{"a": ""}], [{"a": 1}]),
    ("ref to root meta", {"$ref": "http://json-schema.org/draft-07/schema#"}, [{"type": "string"}], [{"type": "zzz"}]),
    ("$comment", {"$comment": "x", "title": 3, "type": "null"}, [None], [1]),
]


def compiled(schema: Any) -> CompiledGrammar:
    return compile_grammar(JsonSchema(schema, JsonOptions(whitespace="any")), BYTES)


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    state = grammar.advance_bytes(0, text.encode())
    return state is not None and grammar.is_accepting(state)


@pytest.mark.parametrize(("schema", "good", "bad"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_exactly_the_valid_values_are_accepted(schema: Any, good: list[Any], bad: list[Any]) -> None:
    grammar = compiled(schema)
    for value in good:
        assert accepts(grammar, json.dumps(value)), value
        assert accepts(grammar, json.dumps(value, separators=(",", ":"))), value
    for value in bad:
        assert not accepts(grammar, json.dumps(value)), value


REFUSED: list[tuple[Any, str]] = [
    ({"pattern": "^[a-z-]+(?<!--)$"}, "pattern"),
    ({"pattern": "^(a+|b)\\1$"}, "pattern"),
    ({"pattern": "^[^@]++@x$"}, "pattern"),
    ({"pattern": "^(?>a|ab)c$"}, "pattern"),
]


UNIQUE: list[tuple[Any, list[Any], list[Any]]] = [
    (
        True,
        [[], [1, True], [[1], [2]], [{"a": 1}, {"a": 2}, {}]],
        [[[1], [1.0]], [{"a": 1, "b": []}, {"b": [], "a": 1}]],
    ),
    ({"type": "object"}, [[{"a": {"b": 1}}, {"a": {"b": 2}}]], [[{"a": {"b": 1, "c": 2}}, {"a": {"c": 2, "b": 1}}]]),
    ({"type": "array"}, [[[], [[]], [[], []]]], [[[], [[]], [[]]]]),
    ({"enum": [{"a": 1}, [1], 1]}, [[1, [1], {"a": 1}]], [[{"a": 1}, {"a": 1}]]),
]


@pytest.mark.parametrize(("items", "good", "bad"), UNIQUE)
def test_items_of_every_kind_are_compared(items: Any, good: list[Any], bad: list[Any]) -> None:
    grammar = compiled({"type": "array", "uniqueItems": True, "items": items})
    for value in good:
        assert accepts(grammar, json.dumps(value)), value
    for value in bad:
        assert not accepts(grammar, json.dumps(value)), value


def test_items_that_must_not_all_differ() -> None:
    unique = {"type": "array", "uniqueItems": True}
    for schema in ({"type": "array", "not": unique}, {"oneOf": [unique, {"type": "array"}]}):
        grammar = compiled(schema)
        good: Any
        for good in ([1, 2, 1.0], [{"a": [1]}, "x", {"a": [1]}], [[], []]):
            assert accepts(grammar, json.dumps(good))
        for bad in ([], [1], [1, True, "1"], [{"a": [1]}, {"a": [2]}]):
            assert not accepts(grammar, json.dumps(bad))
        state = grammar.advance_bytes(0, b'[{"a":1}')
        assert state is not None
        assert bytes(grammar.shortest_completion(state)) == b',{"a":1}]'


def test_items_that_must_not_all_differ_come_again_in_time() -> None:
    prefix = [{"enum": [1, 2]}, {"const": 3}, {"enum": [2, 4]}]
    grammar = compiled({"type": "array", "not": {"uniqueItems": True}, "prefixItems": prefix, "items": False})
    assert accepts(grammar, "[2,3,2]")
    assert grammar.advance_bytes(0, b"[1") is None


CLOSED: Any = {"type": "object", "additionalProperties": False}
RUNNING_OUT: list[tuple[Any, str, str | None]] = [  # (schema without type and uniqueItems, a text, how it is closed)
    ({"prefixItems": [{"enum": [1, 2]}, {"const": 1}], "minItems": 2}, "[", "2,1]"),
    ({"items": {"type": "string", "pattern": "^[ab]$"}, "minItems": 2}, '["b"', ',"a"]'),
    (
        {"items": {**CLOSED, "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
        '[{"a":true},{"a"',
        ":false}]",
    ),
    ({"items": {**CLOSED, "properties": {"a": {"const": 1}}}}, '[{"a":1},{},', None),
    ({"items": {"type": "array", "items": {"const": 1}, "maxItems": 1}, "minItems": 2}, "[[", "],[1]]"),
    ({"items": {"type": "array", "items": {"const": 1}, "maxItems": 1}, "minItems": 2}, "[[1],", "[]]"),
]


@pytest.mark.parametrize(("schema", "text", "closing"), RUNNING_OUT)
def test_items_that_must_differ_do_not_run_out(schema: Any, text: str, closing: str | None) -> None:
    grammar = compiled({"type": "array", "uniqueItems": True, **schema})
    state = grammar.advance_bytes(0, text.encode())
    if closing is None:
        assert state is None
    else:
        assert state is not None
        assert bytes(grammar.shortest_completion(state)) == closing.encode()


@pytest.mark.parametrize(("schema", "keyword"), REFUSED)
def test_what_is_not_enforced_is_refused_by_keyword(schema: Any, keyword: str) -> None:
    with pytest.raises(UnsupportedSchema) as caught:
        compiled({"properties": {"p": schema}})
    assert [(p, k) for p, k, _ in caught.value.problems] == [("/properties/p", keyword)]


def test_more_alternatives_than_a_machine_word_has_bits() -> None:
    branches = [
        {"properties": {"code": {"const": i}, "text": {"const": f"t{i}"}}, "required": ["code"]} for i in range(70)
    ]
    grammar = compiled({"type": "object", "oneOf": branches})
    assert accepts(grammar, '{"code": 67, "text": "t67"}')
    assert not accepts(grammar, '{"code": 67, "text": "t68"}')
    unique = compiled({"type": "array", "uniqueItems": True, "items": {"type": "object"}})
    objects = [{"id": i, "same": True} for i in range(66)]
    assert accepts(unique, json.dumps(objects))
    assert not accepts(unique, json.dumps([*objects, objects[3]]))


def test_numbers_beyond_a_float() -> None:
    grammar = compiled({"type": "array", "uniqueItems": True})
    assert accepts(grammar, "[1e400,5]")
    assert not accepts(grammar, "[1e400,1e400]")
    state = grammar.advance_bytes(0, b"[-1e99999999999")
    assert state is not None
    assert len(grammar.shortest_completion(state)) == 1


def test_integers_have_no_fraction_where_they_are_to_be_plain() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}, "required": ["n"]}
    either = {"oneOf": [{"type": "integer"}, {"type": "number", "exclusiveMinimum": 5}]}
    for text, exact in (('{"n":10}', True), ('{"n":10.0}', True), ('{"n":1e1}', False), ('{"n":10.5}', False)):
        assert accepts(compiled(schema), text) == exact
        plain = compile_grammar(JsonSchema(schema, JsonOptions("any", integers="plain")), BYTES)
        assert accepts(plain, text) == (text == '{"n":10}')
    grammar = compile_grammar(JsonSchema(either, JsonOptions(integers="plain")), BYTES)
    assert [accepts(grammar, text) for text in ("3", "3.0", "6", "6.0", "6.5")] == [True, False, False, False, True]
