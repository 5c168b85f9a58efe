from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest

from ramet.errors import GrammarError, InvalidGrammar, UnsupportedSchema
from ramet.grammar import CompiledGrammar, Vocabulary, compile_constraint
from ramet.grammar.tools.events import CallEnd, CallStart, ToolCallReader
from ramet.grammar.tools.formats import FORMATS, ToolFormat
from ramet.grammar.tools.tool_set import ToolSet, with_marker_tokens

IN_JSON = [name for name, layout in FORMATS.items() if not layout.before_key]  # others: test_parameters.py
PIECES = [
    b'{"',
    b'": ',
    b"<tool",
    b"_call>",
    b"ool_call",
    b'", "',
    b"}\n",
    b"[TOOL_CALLS]",
    b'{"name": "',
    b"add",
    b"arguments",
]
BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), *PIECES, b"<eos>"], [256 + len(PIECES)])
ADD = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
ADDRESS = {
    "name": "address",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Bonn", "Köln"]}}, "required": ["city"]},
}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}


def compiled(**fields: Any) -> CompiledGrammar:
    return compile_constraint("tools", {"tools": [ADD, ADDRESS, NOW], **fields}, BYTES)


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    state = grammar.advance_bytes(0, text.encode())
    return state is not None and grammar.is_accepting(state)


def call(layout: ToolFormat, name: str, arguments: str) -> str:
    return layout.before_name + name + layout.before_arguments + arguments + layout.after_arguments


def calls(layout: ToolFormat, *given: tuple[str, str]) -> str:
    return layout.begin + layout.separator.join(call(layout, *g) for g in given) + layout.end


@pytest.mark.parametrize("name", IN_JSON)
def test_calls_of_each_format_are_exactly_those_of_the_tools(name: str) -> None:
    layout = FORMATS[name]
    grammar = compiled(format=name)
    assert accepts(grammar, calls(layout, ("add", '{"a": 1, "b": -2}')))
    assert accepts(grammar, calls(layout, ("add", '{"b": 1, "a": 2}'), ("now", "{}"), ("address", '{"city": "Köln"}')))
    assert not accepts(grammar, calls(layout, ("sub", "{}")))
    assert not accepts(grammar, calls(layout, ("add", '{"a": 1}')))
    assert not accepts(grammar, calls(layout, ("now", '{"a": 1}')))
    assert not accepts(grammar, calls(layout, ("address", '{"city": "Rome"}')))
    assert not accepts(grammar, calls(layout, ("now", "{}"))[:-1])
    assert not accepts(grammar, calls(layout, ("now", "{}")) + "x")


@pytest.mark.parametrize("name", IN_JSON)
def test_free_text_may_stand_before_calls_where_the_format_has_it(name: str) -> None:
    layout = FORMATS[name]
    grammar = compiled(format=name)
    assert accepts(grammar, "")
    assert accepts(grammar, "Let me see <tool or [TOOL or {")
    # where calls stand only at the start, what looks like one later is text
    assert accepts(grammar, "é" + calls(layout, ("now", "{}")))
    assert accepts(grammar, "é" + calls(layout, ("sub", "{}"))) == layout.is_only_at_start
    assert not accepts(grammar, " " + calls(layout, ("sub", "{}")))
    if not layout.is_only_at_start:
        assert accepts(grammar, "Let me see. " + calls(layout, ("now", "{}")))
        assert not accepts(grammar, "Let me see " + layout.marker)
    assert not accepts(grammar, layout.marker)


def test_choice_decides_what_may_be_said() -> None:
    hermes = FORMATS["hermes"]
    now, add = calls(hermes, ("now", "{}")), calls(hermes, ("add", '{"a": 1, "b": 2}'))
    required, none, only = compiled(choice="required"), compiled(choice="none"), compiled(choice={"name": "add"})
    assert [accepts(required, t) for t in ("", "text", now, "text" + now, add)] == [False, False, True, False, True]
    assert [accepts(none, t) for t in ("", "text", now)] == [True, True, False]
    assert [accepts(only, t) for t in ("", now, add, add + "\n" + add)] == [False, False, True, False]


@pytest.mark.parametrize(("parallel", "most"), [(False, 1), (True, 5), (2, 2)])
def test_parallel_calls_are_counted(parallel: Any, most: int) -> None:
    for name in IN_JSON:
        grammar = compiled(parallel=parallel, format=name)
        for count in range(1, 6):
            assert accepts(grammar, calls(FORMATS[name], *[("now", "{}")] * count)) == (count <= most)


def test_a_final_answer_may_have_a_schema_of_its_own() -> None:
    grammar = compiled(answer={"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]})
    assert accepts(grammar, '{"x": 12}')
    assert not accepts(grammar, '{"x": "12"}')
    assert not accepts(grammar, "text")
    assert accepts(grammar, calls(FORMATS["hermes"], ("now", "{}")))


def test_an_answer_that_begins_like_a_call_is_refused() -> None:
    with pytest.raises(InvalidGrammar, match="begin alike"):
        compiled(answer={"type": "object"}, format="llama3")


@pytest.mark.parametrize("name", IN_JSON)
def test_random_texts_of_the_grammar_are_read_back_as_valid_calls(name: str) -> None:
    schemas = {
        "add": ADD["parameters"],
        "address": ADDRESS["parameters"],
        "now": {"type": "object", "maxProperties": 0},
    }
    grammar = compiled(format=name)
    rng = random.Random(name)
    num_calls = 0
    for seed in range(30):
        state, out = 0, b""
        if seed % 2:
            out = FORMATS[name].marker.encode()
            begun = grammar.advance_bytes(0, out)
            assert begun is not None
            state = begun
        for _ in range(rng.randrange(40)):
            allowed = [t for t in grammar.allowed_tokens(state).tolist() if t not in BYTES.eos_ids]
            if not allowed:
                break
            token = rng.choice(allowed)
            following = grammar.advance(state, token)
            assert following is not None
            state, out = following, out + BYTES.token_bytes[token]
        out += b"".join(BYTES.token_bytes[t] for t in grammar.shortest_completion(state))
        reader = ToolCallReader(FORMATS[name])
        events = [*reader.push(out), *reader.finish()]
        started = [e for e in events if isinstance(e, CallStart)]
        for start in started:
            arguments = json.loads(
                "".join(e.text for e in events if hasattr(e, "index") and hasattr(e, "text") and e.index == start.index)
            )
            jsonschema.validate(arguments, schemas[start.name])
            assert CallEnd(start.index, True) in events
            num_calls += 1
        if not started:
            assert "".join(e for e in events if isinstance(e, str)) == out.decode()
    assert num_calls >= 15


def test_masks_equal_brute_force_along_a_call() -> None:
    grammar = compiled()
    state: int | None = 0
    for byte in ("ok " + calls(FORMATS["hermes"], ("address", '{"city": "Köln"}'))).encode():
        assert state is not None
        row = np.unpackbits(grammar.mask(state).view(np.uint8), bitorder="little")
        for token in range(len(BYTES.token_bytes) - 1):
            assert row[token] == (grammar.advance(state, token) is not None), (state, token)
        state = grammar.advance(state, byte)


def test_tools_with_the_same_schema_and_with_references_of_their_own() -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        return {
            "name": name,
            "parameters": {
                "$defs": {"x": {"type": kind}},
                "properties": {"v": {"$ref": "#/$defs/x"}},
                "required": ["v"],
            },
        }

    grammar = compile_constraint(
        "tools", {"tools": [tool("a", "integer"), tool("b", "boolean"), tool("c", "integer")]}, BYTES
    )
    hermes = FORMATS["hermes"]
    for name, value, good in [
        ("a", "1", True),
        ("b", "1", False),
        ("b", "true", True),
        ("c", "2", True),
        ("c", "true", False),
    ]:
        assert accepts(grammar, calls(hermes, (name, f'{{"v": {value}}}'))) == good


def test_a_special_token_can_be_the_marker() -> None:
    tokens = [*(bytes((i,)) for i in range(256)), b"", b""]
    vocabulary = Vocabulary(tokens, [257], [256, 257])
    source = {"tools": [NOW], "format": "mistral"}
    assert compile_constraint("tools", source, vocabulary).advance(0, 256) is None
    grammar = compile_constraint("tools", source, with_marker_tokens(vocabulary, {256: "[TOOL_CALLS]"}))
    state = grammar.advance(0, 256)
    assert state is not None
    assert grammar.forced_tokens(state)[:4] == list(b'[{"n')
    with pytest.raises(InvalidGrammar, match="not a special token"):
        with_marker_tokens(vocabulary, {65: "A"})
    with pytest.raises(InvalidGrammar, match="not a special token"):
        with_marker_tokens(vocabulary, {257: "[TOOL_CALLS]"})


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({}, InvalidGrammar, "'tools' must be a list"),
        ({"tools": [ADD, ADD]}, InvalidGrammar, "two tools have the name 'add'"),
        ({"tools": [{"name": "a b"}]}, InvalidGrammar, r"the name of tools\[0\] is 'a b'"),
        ({"tools": [ADD], "choice": {"name": "x"}}, InvalidGrammar, "asks for tool 'x'; tools are add"),
        ({"tools": [ADD], "format": "x"}, InvalidGrammar, "no tool format 'x'; formats are hermes"),
        ({"tools": [ADD], "format": {"marker": "<"}}, InvalidGrammar, "lacks a field"),
        ({"tools": [ADD], "parallel": 0}, InvalidGrammar, "parallel is 0"),
        ({"tools": [ADD], "toolz": 0}, InvalidGrammar, "no field 'toolz'"),
        ({"tools": [{"name": "a", "parameters": 3}]}, InvalidGrammar, "must be a JSON schema"),
        ({"tools": [{"name": "a", "parameters": {"required": ["x"], "maxProperties": 0}}]},
         GrammarError, "contradictory"),
        ({"tools": [{"name": "a", "parameters": {"properties": {"x": {"pattern": "(?<=aa)b"}}}}]},
         UnsupportedSchema, "pattern"),
    ],
)  # fmt: skip
def test_bad_tool_sets_raise_typed_errors(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compile_constraint("tools", json.dumps(source), BYTES)


def test_the_number_of_calls_has_a_limit() -> None:
    with pytest.raises(InvalidGrammar, match="from 1 to 64"):
        ToolSet.of({"tools": [ADD], "parallel": 65})


def test_what_is_wrong_with_a_schema_names_the_tool() -> None:
    def error_of(parameters: Any, **fields: Any) -> str:
        tools = {"tools": [{"name": "good"}, {"name": "odd", "parameters": parameters}], "format": "hermes", **fields}
        with pytest.raises(GrammarError) as caught:
            compile_constraint("tools", json.dumps(tools), BYTES)
        return str(caught.value)

    assert error_of({"type": "objec"}).startswith("the parameters of tool 'odd': /type: must be")
    assert "(the parameters of tool 'odd')" in error_of({"properties": {"a": {"pattern": "(a+)\\1"}}})
    assert error_of({"required": ["a"], "properties": {"a": False}}).startswith("the parameters of tool 'odd': ")
    assert error_of({}, answer={"enum": []}).startswith("the answer: a schema is contradictory")
