"""Keyword by keyword: which JSON texts a compiled schema accepts, and what it says of schemas it cannot compile."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from ramet.errors import GrammarError, GrammarTooLarge, InvalidSchema, UnsupportedSchema
from ramet.grammar import CompiledGrammar, Vocabulary, compile_grammar
from ramet.grammar.ir import AS_MODELS_WRITE, JsonOptions, JsonSchema

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b""], [256])


def compiled(schema: Any, **options: Any) -> CompiledGrammar:
    options.setdefault("whitespace", "any")
    return compile_grammar(JsonSchema(schema, JsonOptions(**options)), BYTES)


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    state = grammar.advance_bytes(0, text.encode())
    return state is not None and grammar.is_accepting(state)


def forms(value: Any) -> set[str]:
    return {json.dumps(value), json.dumps(value, separators=(",", ":")), json.dumps(value, ensure_ascii=False)}


def ref(definition: Any, **more: Any) -> Any:
    return {"$ref": "#/$defs/t", "$defs": {"t": definition}, **more}


TREE = {
    "type": "object",
    "properties": {"c": {"type": "array", "items": {"$ref": "#/$defs/t"}}},
    "required": ["c"],
    "additionalProperties": False,
}
TAGGED = {
    "anyOf": [
        {"type": "object", "properties": {"k": {"const": "a"}, "v": {"type": "string"}}, "required": ["k"]},
        {"type": "object", "properties": {"k": {"const": "b"}, "v": {"type": "integer"}}, "required": ["k", "v"]},
    ]
}

CASES: list[tuple[str, Any, list[Any], list[Any]]] = [
    ("anything", True, [1, "x", [{}], {"a": None}], []),
    ("types", {"type": ["string", "null"]}, ["", None], [0, False, [], {}]),
    ("integer", {"type": "integer"}, [0, -7, 10**30, 1.0], [1.5, "1"]),
    ("enum", {"enum": ["a", 1, None, {"x": [1, 2]}, True]}, ["a", 1, None, {"x": [1, 2]}, True], ["b", 2, False, {}]),
    ("const", {"const": {"a": [1.5]}}, [{"a": [1.5]}], [{"a": [1]}, {}]),
    ("range", {"type": "number", "minimum": -1.5, "exclusiveMaximum": 10.25}, [-1.5, 0, 10.24], [-1.51, 10.25, 11]),
    (
        "draft 4 bounds",
        {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3, "exclusiveMinimum": True},
        [3.5, 4, "x"],
        [3, 2],
    ),
    ("multipleOf", {"multipleOf": 0.25}, [0, 1, -0.5, 3.75], [0.1, 1.3]),
    ("multipleOf and range", {"type": "integer", "multipleOf": 150, "minimum": 100}, [150, 3000], [0, 200]),
    ("string length", {"type": "string", "minLength": 2, "maxLength": 4}, ["ab", "😀é", 'a\n"b'], ["a", "abcde"]),
    (
        "long strings",
        {"type": "string", "minLength": 100, "maxLength": 200},
        ["é" * 100, "b" * 200],
        ["a" * 99, "a" * 201],
    ),
    ("pattern", {"type": "string", "pattern": "^a+é$"}, ["aé", "aaé"], ["a", "xaé", "aéé"]),
    ("pattern is searched", {"type": "string", "pattern": "b\\d"}, ["b1", "ab2c"], ["b", "1b"]),
    ("pattern and length", {"type": "string", "pattern": "^[ab]*$", "maxLength": 2}, ["", "ab"], ["abc", "c", "aba"]),
    ("lookahead", {"type": "string", "pattern": "^(?=.*\\d)(?!x)\\w{3,}$"}, ["ab1", "1234"], ["abc", "x12", "1"]),
    (
        "date-time",
        {"type": "string", "format": "date-time"},
        ["2024-02-29T10:00:00Z"],
        ["2023-02-29T10:00:00Z", "2024-02-29"],
    ),
    ("unknown format", {"type": "string", "format": "colour"}, ["anything"], [1]),
    (
        "required",
        {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a", "b"]},
        [{"a": "x", "b": 1}, {"b": [], "z": 1, "a": ""}],
        [{"a": "x"}, {"a": 1, "b": 1}, []],
    ),
    (
        "closed",
        {"type": "object", "properties": {"a": {}, "ab": {"type": "integer"}}, "additionalProperties": False},
        [{}, {"ab": 3}, {"ab": 3, "a": "k"}],
        [{"b": 1}, {"ab": "x"}],
    ),
    (
        "patterned keys",
        {
            "patternProperties": {"^x-": {"type": "string"}},
            "additionalProperties": {"type": "integer"},
            "properties": {"x-a": {"maxLength": 2}},
        },
        [{"x-b": "sss", "q": 1}, {"x-a": "ab"}, 3],
        [{"x-a": "abc"}, {"q": "s"}, {"x-b": 1}],
    ),
    (
        "key names",
        {"type": "object", "propertyNames": {"maxLength": 2}, "minProperties": 1, "maxProperties": 2},
        [{"ab": 1}, {"a": 1, "b": 2}],
        [{}, {"abc": 1}, {"a": 1, "b": 1, "c": 1}],
    ),
    (
        "keys to escape",
        {"type": "object", "properties": {'é\n"': {"type": "null"}}, "additionalProperties": False},
        [{'é\n"': None}],
        [{"é": None}],
    ),
    (
        "dependentRequired",
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        [{}, {"b": 1}, {"a": 1, "b": 2}],
        [{"a": 1}],
    ),
    (
        "dependencies",
        {"dependencies": {"a": {"required": ["b"]}, "c": ["d"]}},
        [{}, {"a": 1, "b": 1}, 2],
        [{"a": 1}, {"c": 1}],
    ),
    (
        "items",
        {"type": "array", "items": {"minimum": 2}, "minItems": 2, "maxItems": 3},
        [[2, 3], ["x", 2, 7]],
        [[2], [1, 2], [2] * 4],
    ),
    ("prefixItems", {"prefixItems": [{"type": "string"}], "items": False}, [[], ["x"]], [[1], ["x", "y"]]),
    (
        "items as a list",
        {"items": [{"type": "string"}], "additionalItems": {"type": "null"}},
        [["x", None], []],
        [[1], ["x", 1]],
    ),
    (
        "contains",
        {"type": "array", "contains": {"const": 5}, "minContains": 1, "maxContains": 2},
        [[5], [1, 5, 5]],
        [[], [1], [5] * 3],
    ),
    (
        "unique scalars",
        {"type": "array", "uniqueItems": True, "items": {"type": ["string", "integer", "boolean"]}},
        [["a", "b"], [1, 2, "1", True]],
        [["a", "a"], [1, 2, 1], [True, True]],
    ),
    ("unique numbers", {"type": "array", "uniqueItems": True, "items": {"type": "number"}}, [[1, 2.5]], [[1, 1.0]]),
    ("allOf", {"allOf": [{"minimum": 3}, {"type": "integer"}]}, [3, 9], [2, 3.5, "x"]),
    (
        "anyOf",
        TAGGED,
        [{"k": "a", "v": "s"}, {"v": 3, "k": "b"}, {"k": "a"}],
        [{"k": "b"}, {"v": 3, "k": "a"}, {"v": "x", "k": "b"}],
    ),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 5}]}, [1, 7.5], [7, 1.5, "x"]),
    (
        "oneOf keys",
        {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"},
        [{"a": 1}, {"b": 1, "c": 1}],
        [{}, {"a": 1, "b": 1}],
    ),
    (
        "not",
        {"not": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}},
        [1, {"a": 1}, {}],
        [{"a": "s"}],
    ),
    (
        "not additional",
        {"not": {"additionalProperties": {"type": "string"}}},
        [{"a": 1}, {"a": "x", "b": 2}],
        [{}, {"a": "s"}, 1],
    ),
    ("not a pattern", {"type": "string", "not": {"pattern": "b"}}, ["", "ac"], ["b", "abc"]),
    (
        "if",
        {
            "if": {"properties": {"t": {"const": 1}}, "required": ["t"]},
            "then": {"required": ["a"]},
            "else": {"required": ["b"]},
        },
        [{"t": 1, "a": 2}, {"t": 2, "b": 1}, 3],
        [{"t": 1}, {"t": 1, "b": 1}, {"a": 1}],
    ),
    ("recursion", ref(TREE), [{"c": []}, {"c": [{"c": []}]}], [{}, {"c": [{}]}]),
    (
        "unevaluated",
        {
            "allOf": [{"properties": {"a": True}}],
            "anyOf": [{"properties": {"b": {"const": 1}}, "required": ["b"]}, True],
            "unevaluatedProperties": False,
        },
        [{"a": 1}, {"a": 1, "b": 1}, 3],
        [{"b": 2}, {"c": 1}],
    ),
    (
        "unevaluated items",
        {"prefixItems": [True], "contains": {"const": "x"}, "unevaluatedItems": False},
        [[1, "x"], ["x"]],
        [[1, "x", 2]],
    ),
    ("anchors", {"$ref": "#a", "$defs": {"q": {"$anchor": "a", "type": "null"}}}, [None], [1]),
    (
        "dynamic references",
        {"$id": "https://x/tree", "$dynamicAnchor": "n", "type": "array", "items": {"$dynamicRef": "#n"}},
        [[], [[]]],
        [[1]],
    ),
]


@pytest.mark.parametrize(("schema", "good", "bad"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_exactly_the_valid_values_are_accepted(schema: Any, good: list[Any], bad: list[Any]) -> None:
    grammar = compiled(schema)
    for value in good:
        for text in forms(value):
            assert accepts(grammar, text), text
    for value in bad:
        for text in forms(value):
            assert not accepts(grammar, text), text


@pytest.mark.parametrize(("schema", "good"), [c[1:3] for c in CASES], ids=[c[0] for c in CASES])
def test_every_prefix_of_a_valid_text_can_be_completed(schema: Any, good: list[Any]) -> None:
    grammar = compiled(schema)
    for value in good:
        text = json.dumps(value, separators=(",", ":")).encode()
        for cut in range(len(text) + 1):
            state = grammar.advance_bytes(0, text[:cut])
            assert state is not None
            for token in grammar.shortest_completion(state):
                following = grammar.advance(state, token)
                assert following is not None, (text[:cut], token)
                state = following
            assert grammar.is_accepting(state), text[:cut]


def test_compact_whitespace_has_no_spaces() -> None:
    grammar = compiled({"type": "object"}, whitespace="compact")
    assert accepts(grammar, '{"a":[1,2]}')
    assert not accepts(grammar, '{"a": 1}')
    assert not accepts(compiled({"type": "object"}), '{"a":  1}')


def test_keys_come_once() -> None:
    grammar = compiled({"type": "object", "properties": {"a": {}}})
    assert not accepts(grammar, '{"a":1,"a":2}')
    assert not accepts(grammar, '{"x":1,"x":2}')
    assert not accepts(grammar, '{"x\u00e9":1,"x\\u00E9":2}')
    assert accepts(grammar, '{"x":1,"xx":2,"":3,"a":{"x":1}}')


def test_declared_order_writes_named_properties_in_order() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {}, "c": {}}, "required": ["b"]}
    grammar = compiled(schema, **AS_MODELS_WRITE)
    for value in ({"a": "x", "b": 1}, {"b": 1}, {"b": 1, "c": None}):
        assert accepts(grammar, json.dumps(value)), value
    refused: list[Any] = [{"b": 1, "a": "x"}, {"c": 1, "b": 1}, {"a": "x"}, {"b": 1, "d": 1}]
    for value in refused:
        assert not accepts(grammar, json.dumps(value)), value


def test_strict_mode_names_the_rule_that_is_broken() -> None:
    good = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
    assert accepts(compiled(good, strict=True), '{"a":""}')
    with pytest.raises(InvalidSchema, match="additionalProperties must be false"):
        compiled({**good, "additionalProperties": True}, strict=True)
    with pytest.raises(InvalidSchema, match="required must name every property"):
        compiled({**good, "required": []}, strict=True)
    with pytest.raises(InvalidSchema, match="root must have type object"):
        compiled({"type": "array"}, strict=True)


def test_all_problems_are_listed_at_once() -> None:
    schema = {
        "properties": {
            "a": {"pattern": "(?<=xx)y"},
            "b": {"type": "array", "items": {"pattern": "(a+)\\1"}},
        }
    }
    with pytest.raises(UnsupportedSchema) as caught:
        compiled(schema)
    assert {(p, k) for p, k, _ in caught.value.problems} == {
        ("/properties/a", "pattern"),
        ("/properties/b/items", "pattern"),
    }
    lenient = compiled(schema, on_unsupported="validate")
    assert accepts(lenient, '{"a":"anything"}')
    assert len(lenient.unenforced) == 2


@pytest.mark.parametrize(
    ("schema", "pointer"),
    [
        ({"properties": {"a": {"type": "strin"}}}, "/properties/a/type"),
        ({"properties": []}, "/properties"),
        ({"items": {"minimum": "3"}}, "/items/minimum"),
        ({"allOf": [{"$ref": "#/nowhere"}]}, "/allOf/0"),
        ({"$ref": "https://example.com/other"}, ""),
        ({"pattern": "("}, ""),
        ({"$ref": "#"}, ""),
        ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "/$defs/a"),
    ],
)
def test_invalid_schemas_name_the_place(schema: Any, pointer: str) -> None:
    with pytest.raises(InvalidSchema) as caught:
        compiled(schema)
    assert caught.value.pointer == pointer


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": []},
        False,
        {"type": "integer", "minimum": 3, "maximum": 2},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "object", "required": ["a"], "properties": {"a": False}},
        {"type": "object", "required": ["a", "b"], "maxProperties": 1},
        {"allOf": [{"type": "string"}, {"type": "null"}]},
        {"type": "array", "minItems": 1, "items": False},
        {"type": "string", "pattern": "^a$", "minLength": 2},
        {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
        {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 3},
        {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 20},
            "uniqueItems": True,
            "minItems": 21,
        },
        {"type": "array", "items": {"type": "string", "pattern": "^[ab]$"}, "uniqueItems": True, "minItems": 3},
        {"type": "array", "prefixItems": [{"const": 1}, {"const": 1}], "uniqueItems": True, "minItems": 2},
        {"type": "array", "items": {"enum": [{}, {"a": 1}]}, "uniqueItems": True, "minItems": 3},
        {"type": "object", "patternProperties": {"^[ab]$": {}}, "additionalProperties": False, "minProperties": 3},
    ],
)
def test_contradictory_schemas_are_refused(schema: Any) -> None:
    with pytest.raises(GrammarError, match="contradictory"):
        compiled(schema)


def test_a_document_without_a_dialect_has_that_of_what_refers_to_it() -> None:
    registry = {"https://example.com/a": {"definitions": {"n": {"$id": "#n", "type": "null"}}, "$ref": "#n"}}
    draft_7 = "http://json-schema.org/draft-07/schema#"
    grammar = compiled({"$schema": draft_7, "items": {"$ref": "https://example.com/a"}}, registry=registry)
    assert accepts(grammar, "[null]")


def test_references_reach_a_registry_and_nothing_else() -> None:
    registry = {"https://example.com/number": {"type": "number"}}
    grammar = compiled({"items": {"$ref": "https://example.com/number"}}, registry=registry)
    assert accepts(grammar, "[1.5]")
    assert not accepts(grammar, '["x"]')


def test_deep_nesting_ends_in_a_typed_error() -> None:
    schema: Any = {}
    for _ in range(10_000):
        schema = {"items": schema}
    with pytest.raises(InvalidSchema, match="nested deeper"):
        compiled(schema)


def test_exponential_alternatives_end_in_a_typed_error() -> None:
    properties = [{"properties": {f"{i}{j}": {"type": "integer"} for j in range(12)}} for i in range(9)]
    with pytest.raises(GrammarTooLarge, match="cases"):
        compiled({"oneOf": properties})


def test_large_counts_of_patterns_end_in_a_typed_error() -> None:
    grammar = compiled({"type": "string", "pattern": "^(a|b)*a(a|b){40}$"})
    with pytest.raises(GrammarTooLarge, match="states"):
        grammar.advance_bytes(0, b'"aa')


def test_property_order_is_free_for_many_properties() -> None:
    names = [f"p{i}" for i in range(60)]
    grammar = compiled(
        {"properties": {n: {"type": "integer"} for n in names}, "required": names[::2], "type": "object"}
    )
    assert accepts(grammar, json.dumps(dict.fromkeys(reversed(names), 1)))
    assert not accepts(grammar, json.dumps(dict.fromkeys(names[1:], 1)))


@pytest.mark.parametrize(
    ("schema", "longest"),
    [
        ({"type": "object", "minProperties": 3, "required": ["a"]}, 30),
        ({"type": "array", "contains": {"type": "array", "items": True, "contains": True}}, 10),
        ({"type": "array", "contains": {"contains": {"contains": {"const": 1}}}, "minItems": 2}, 20),
        ({"type": "array", "items": {"type": "object"}, "contains": {"required": ["a"]}}, 15),
        ({"type": "array", "contains": {"type": "array", "contains": {"enum": [[None]]}}}, 15),
        ({"not": {"additionalProperties": {"not": {"not": {"additionalProperties": {"type": "null"}}}}}}, 20),
    ],
)
def test_closing_makes_way_to_every_part_that_is_missing(schema: Any, longest: int) -> None:
    grammar = compiled(schema)
    assert len(grammar.shortest_completion(0)) <= longest


@pytest.mark.parametrize("order", ["any", "declared"])
@pytest.mark.parametrize("more", [{}, {"additionalProperties": False}, {"maxProperties": 3, "required": ["it/1"]}])
def test_no_beginning_of_a_key_leads_only_to_keys_that_came_or_may_not_come(order: str, more: Any) -> None:
    names, pattern = ["id", "it/1", "ität", "title"], "^(title_[ab]|it[xy])$"
    schema: Any = {"type": "object", "properties": {n: {"const": 1} for n in names}, "additionalProperties": False}
    schema |= {"patternProperties": {pattern: {"const": 1}}, **more}
    if not more:
        del schema["patternProperties"]
    grammar = compiled(schema, whitespace="compact", order=order)
    rng = random.Random(3)
    for _ in range(40):
        state, text = 0, b""
        while True:
            allowed = grammar.allowed_tokens(state).tolist()
            assert allowed == [t for t in range(257) if (t == 256 and grammar.is_accepting(state)) or
                               (t < 256 and grammar.advance(state, t) is not None)]  # fmt: skip
            end = text + b"".join(bytes((t,)) for t in grammar.shortest_completion(state))
            assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(end)), end
            assert len(json.loads(end)) == end.count(b":"), "no key came twice"
            token = rng.choice(allowed)
            if token == 256:
                break
            following = grammar.advance(state, token)
            assert following is not None
            state, text = following, text + bytes((token,))
