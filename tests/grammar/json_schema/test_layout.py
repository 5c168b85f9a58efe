"""How JSON is written where a schema leaves it open: white space, the order of properties, and other properties."""

from __future__ import annotations

import json
import random
import typing
from typing import Any

import jsonschema
import pytest

from ramet.errors import InvalidGrammar
from ramet.grammar import CompiledGrammar, Vocabulary, compile_constraint, compile_grammar, ir
from ramet.grammar.ir import AS_MODELS_WRITE, JsonOptions, JsonSchema
from ramet.lang.graph import json_form

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b""], [256])
VALUES: list[Any] = [
    {"a": [1, {"b": []}], "c": {}, "d": [[], [{}]]},
    [],
    {},
    [1, "x, y: {z}", None],
    {"": {"": {"": True}}},
    [[[[[0]]]]],
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "model": {},
    "compact": {"separators": (",", ":")},
    **{f"indent={n}": {"indent": n} for n in range(9)},
}


def compiled(schema: Any, **options: Any) -> CompiledGrammar:
    return compile_grammar(JsonSchema(schema, JsonOptions(**options)), BYTES)


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    state = grammar.advance_bytes(0, text.encode())
    return state is not None and grammar.is_accepting(state)


def test_the_language_and_the_grammars_know_the_same_values() -> None:
    assert typing.get_args(json_form.Whitespace) == typing.get_args(ir.Whitespace)
    for name, known in json_form.KNOWN.items():
        for value in known:
            given: dict[str, Any] = {name: value}
            JsonOptions(**given)
        unknown: dict[str, Any] = {name: "other"}
        with pytest.raises(InvalidGrammar, match=name):
            JsonOptions(**unknown)


@pytest.mark.parametrize("whitespace", LAYOUTS)
def test_a_layout_is_exactly_the_one_of_json_dumps(whitespace: str) -> None:
    grammar = compiled(True, whitespace=whitespace)
    for value in VALUES:
        own = json.dumps(value, **LAYOUTS[whitespace])
        assert accepts(grammar, own)
        for layout in LAYOUTS.values():
            other = json.dumps(value, **layout)
            assert accepts(grammar, other) == (other == own), other


@pytest.mark.parametrize("whitespace", [*LAYOUTS, "any"])
def test_every_beginning_of_a_text_can_be_closed_in_its_layout(whitespace: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "minItems": 2}, "b": {"type": "object", "required": ["x"]}},
        "required": ["a", "b"],
    }
    grammar = compiled(schema, whitespace=whitespace, **AS_MODELS_WRITE)
    text = json.dumps({"a": [1, {"k": "v"}], "b": {"x": [[]]}}, **LAYOUTS.get(whitespace, {})).encode()
    for cut in range(len(text) + 1):
        state = grammar.advance_bytes(0, text[:cut])
        assert state is not None, text[:cut]
        whole = text[:cut] + bytes(grammar.shortest_completion(state))
        assert accepts(grammar, whole.decode()), whole
        if whitespace != "any":
            assert whole.decode() == json.dumps(json.loads(whole), ensure_ascii=False, **LAYOUTS[whitespace])


def test_any_white_space_is_accepted_up_to_its_bounds() -> None:
    grammar, rng = compiled(True, whitespace="any"), random.Random(5)

    def spaced(value: Any) -> str:
        def gap() -> str:
            return rng.choice(["", " ", "\n", "\n" + "".join(rng.choices(" \t", k=rng.randrange(21)))])

        if isinstance(value, dict):
            inner = ",".join(f"{gap()}{json.dumps(k)}{gap()}:{gap()}{spaced(v)}{gap()}" for k, v in value.items())
            return f"{{{inner or gap()}}}"
        if isinstance(value, list):
            return f"[{','.join(f'{gap()}{spaced(one)}{gap()}' for one in value) or gap()}]"
        return json.dumps(value)

    for _ in range(20):
        for value in VALUES:
            text = spaced(value)
            assert accepts(grammar, text), text
    for text in (" []", "[] ", "[  ]", "[\n\n]", "[\n" + " " * 21 + "]", "[\r\n]", "[1\f]"):
        assert not accepts(grammar, text), text


CLOSED: list[tuple[str, Any, list[Any], list[Any]]] = [
    ("named", {"properties": {"a": {}}}, [{}, {"a": 1}], [{"b": 1}, {"a": 1, "b": 1}]),
    ("none", {"type": "object", "properties": {}}, [{}], [{"a": 1}]),
    ("required", {"properties": {"a": {}}, "required": ["b"]}, [{"b": 1}, {"a": 1, "b": 2}], [{"b": 1, "c": 1}]),
    ("said", {"properties": {"a": {}}, "additionalProperties": {"const": 1}}, [{"b": 1}], [{"b": 2}]),
    ("open", {"properties": {"a": {}}, "additionalProperties": True}, [{"b": 1}], []),
    ("without names", {"type": "object"}, [{"b": 1}], []),
    (
        "patterns",
        {"properties": {"a": {}}, "patternProperties": {"^x": {"const": 1}}},
        [{"x": 1}],
        [{"x": 2}, {"b": 1}],
    ),
    ("both", {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, [{"a": 1, "b": 1}], [{"c": 1}]),
    (
        "both patterns",
        {"allOf": [{"properties": {}, "patternProperties": {f"^{c}": {}}} for c in "xy"]},
        [{"x": 1, "y": 1}],
        [{"z": 1}],
    ),
    (
        "one speaks",
        {"allOf": [{"properties": {"a": {}}}, {"additionalProperties": {"const": 1}}]},
        [{"b": 1}],
        [{"b": 2}],
    ),
    (
        "unevaluated",
        {"allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": {"const": 1}},
        [{"a": 2, "b": 1}],
        [{"b": 2}],
    ),
    ("unevaluated, any", {"allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": True}, [{"b": 1}], []),
    (
        "either",
        {"properties": {"k": {}}, "anyOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {}}}]},
        [{"k": 0, "a": 1}, {"k": 0, "b": 1}],
        [{"c": 1}],
    ),
    ("inside", {"type": "array", "items": {"properties": {"a": {}}}}, [[{"a": 1}, 2]], [[{"b": 1}]]),
    ("values of names", {"properties": {"a": {"type": "object"}}}, [{"a": {"b": 1}}], [{"b": 1}]),
    ("no closed object", {"properties": {"a": {}}, "minProperties": 2}, [{"a": 1, "b": 1}], [{"a": 1}]),
    (
        "no other value",
        {"properties": {"a": {"const": 1}}, "required": ["a"], "not": {"const": {"a": 1}}},
        [{"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    ("negated", {"not": {"properties": {"a": {"type": "null"}}}, "type": "object"}, [{"a": 1, "b": 1}], [{"b": 1}]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), [case[1:] for case in CLOSED], ids=[case[0] for case in CLOSED])
@pytest.mark.parametrize("order", ["any", "declared"])
def test_an_object_is_closed_where_its_schema_names_properties_and_says_nothing_of_others(
    order: str, schema: Any, good: list[Any], bad: list[Any]
) -> None:
    grammar = compiled(schema, order=order, additional_properties="closed")
    literal = compiled(schema)
    for value in good:
        assert accepts(grammar, json.dumps(value)), value
        assert accepts(literal, json.dumps(value)), value
    for value in bad:
        assert not accepts(grammar, json.dumps(value)), value


@pytest.mark.parametrize("order", ["any", "declared"])
def test_closed_objects_that_must_differ_never_come_to_a_dead_end(order: str) -> None:
    item = {"type": "object", "properties": {"a": {"type": "boolean"}}}
    schema = {"type": "array", "items": item, "uniqueItems": True, "minItems": 5}
    grammar, rng = compiled(schema, order=order, additional_properties="closed"), random.Random(2)
    for _ in range(10):
        state, text = 0, b""
        while len(text) < 90 and not grammar.is_accepting(state):
            token = rng.choice(grammar.allowed_tokens(state).tolist())
            after = grammar.advance(state, token)
            assert after is not None
            state, text = after, text + bytes((token,))
        text += bytes(token for token in grammar.shortest_completion(state))
        found = json.loads(text)
        assert len({json.dumps(one, sort_keys=True) for one in found}) == len(found) >= 5


DIFFERENT: list[tuple[dict[str, Any], list[Any]]] = [  # (items, some of them)
    (
        {
            "properties": {"z": {"type": "string"}, "b": {"type": "boolean"}, "a": {"type": "integer"}},
            "required": ["z"],
        },
        [{"z": "", "a": 1}, {"z": "x", "b": True}],
    ),
    (
        {"properties": {"a": {"enum": [1, 2]}, "b": {"enum": [*"abcdef"]}}, "required": ["a", "b"]},
        [{"a": 2, "b": "a"}, {"a": 1, "b": "c"}],
    ),
    (
        {
            "properties": {"p": {"type": "object", "properties": {"q": {"minimum": 5}}, "required": ["q"]}},
            "required": ["p"],
            "dependentRequired": {"p": ["r"]},
        },
        [{"p": {"q": 5}, "r": []}, {"p": {"q": 6}, "r": {}}],
    ),
    ({"properties": {"a": {"type": "integer"}}, "minProperties": 1}, [{"a": 0}, {"a": 3}]),
]


@pytest.mark.parametrize("order", ["any", "declared"])
@pytest.mark.parametrize("whitespace", LAYOUTS)
@pytest.mark.parametrize(("items", "given"), DIFFERENT)
def test_the_objects_that_an_array_lacks_are_closed_at_once(
    items: dict[str, Any], given: list[Any], whitespace: str, order: str
) -> None:
    schema = {"type": "array", "items": {"type": "object", **items}, "uniqueItems": True, "minItems": 12}
    grammar, other = (compiled(schema, whitespace=whitespace, order=order) for _ in range(2))
    text = json.dumps(given, **LAYOUTS[whitespace]).rstrip("]").rstrip().encode()
    state, num_frames = 0, 0
    for place, byte in enumerate(text):
        after = grammar.advance(state, byte)
        assert after is not None, text[:place]
        state = after
        whole = text[: place + 1] + bytes(grammar.shortest_completion(state))
        assert accepts(other, whole.decode()), whole
        found = json.loads(whole)
        jsonschema.validate(found, schema)
        assert len(whole) - place - 1 <= grammar.completion_bound(state)
        if place == text.index(b"}"):
            num_frames = len(grammar.machine.frames)
    added = len(grammar.machine.frames) - num_frames
    assert added < 100, f"{added} frames for the second object: the missing ones were written one by one"


def test_tools_and_tags_take_the_same_options() -> None:
    schema = {"type": "object", "properties": {"a": {}, "b": {}}}
    options = {"whitespace": "compact", "order": "declared", "additional_properties": "closed"}
    tools = {"tools": [{"name": "f", "parameters": schema}], "choice": "required", "json": options}
    tag = {"triggers": ["<"], "structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}]}
    whole = {"sequence": ["<f>", {"json_schema": schema}, "</f>"]}
    for value, fits in (('{"a":1,"b":2}', True), ('{"a": 1}', False), ('{"b":1,"a":2}', False), ('{"c":1}', False)):
        call = f'<tool_call>\n{{"name": "f", "arguments": {value}}}\n</tool_call>'
        assert accepts(compile_constraint("tools", tools, BYTES), call) == fits
        for kind, source in (("structural_tag", tag), ("grammar", whole)):
            grammar = compile_constraint(kind, source, BYTES, **options)  # type: ignore[arg-type]
            assert accepts(grammar, f"<f>{value}</f>") == fits, (kind, value)
    with pytest.raises(InvalidGrammar, match="has no field 'mode'"):
        compile_constraint("tools", {**tools, "json": {"mode": "exact"}}, BYTES)
