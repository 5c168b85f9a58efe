"""Calls whose arguments stand one by one between tags: what is allowed, and that it is read back as it was meant."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import jsonschema
import pytest
from hypothesis import given, settings

from ramet.errors import InvalidGrammar, UnsupportedSchema
from ramet.grammar import CompiledGrammar, Vocabulary, compile_constraint
from ramet.grammar.tools.arguments import kinds_of, value_text
from ramet.grammar.tools.events import ArgumentsDelta, CallEnd, CallStart, ToolCallReader
from ramet.grammar.tools.formats import FORMATS, ToolFormat

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b"<eos>"], [256])
WRITE: Any = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "text": {"type": "string"},
        "mode": {"enum": ["new", "append"]},
        "line": {"type": "integer", "minimum": 1},
        "where": {"$ref": "#/$defs/place"},
        "note": {"type": ["string", "null"]},
        "more": {},
    },
    "required": ["path", "text"],
    "$defs": {"place": {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}}}}},
}
TOOLS = [{"name": "write", "parameters": WRITE}, {"name": "now"}]
LAYOUTS = [pytest.param(FORMATS[name], id=name) for name in ("qwen3-coder", "seed-oss")]
GRAMMARS: dict[str, CompiledGrammar] = {}


def grammar(layout: ToolFormat) -> CompiledGrammar:
    name = next(name for name, known in FORMATS.items() if known == layout)
    if name not in GRAMMARS:
        GRAMMARS[name] = compile_constraint("tools", {"tools": TOOLS, "format": name}, BYTES)
    return GRAMMARS[name]


def accepts(layout: ToolFormat, text: str) -> bool:
    state = grammar(layout).advance_bytes(0, text.encode())
    return state is not None and grammar(layout).is_accepting(state)


def written(layout: ToolFormat, name: str, values: dict[str, str]) -> str:
    one = "".join(layout.before_key + k + layout.before_value + v + layout.after_value for k, v in values.items())
    return layout.before_name + name + layout.before_arguments + one + layout.after_arguments


def read(layout: ToolFormat, text: str, cuts: int = 0) -> list[Any]:
    reader, data, found = ToolCallReader(layout, {"write": WRITE}), text.encode(), list[Any]()
    for i in range(0, len(data), cuts or len(data)):
        found += reader.push(data[i : i + (cuts or len(data))])
    return found + reader.finish()


def arguments(events: list[Any], index: int = 0) -> Any:
    assert CallEnd(index, is_complete=True) in events
    return json.loads("".join(e.text for e in events if isinstance(e, ArgumentsDelta) and e.index == index))


HOSTILE = [
    "",
    "\n",
    "\n\nline\n",
    "</parameter>",
    "</parameter>\n</par",
    "a</parameter>\nb",
    "<parameter=path>",
    "</function>\n</tool_call>",
    '"quoted" \\ back',
    "12",
    "true",
    "null",
    '{"a": 1}',
    "é 漢字 \U0001f600",
    "\x00\x1b\t\r\n",
    "<tool_call>\n<function=now>\n</function>\n</tool_call>",
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_string_comes_back_as_it_is(layout: ToolFormat, value: str) -> None:
    text = "Now. " + written(layout, "write", {"path": value, "text": value, "line": "3"})
    assert accepts(layout, text)
    for cuts in (0, 1, 3):
        events = read(layout, text, cuts)
        assert arguments(events) == {"path": value, "text": value, "line": 3}
        assert "".join(e for e in events if isinstance(e, str)) == "Now. "


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["qwen3-coder", "seed-oss"]),
    st.lists(
        st.sampled_from(["</parameter>", "\n", "<parameter=", "</function>", "a", " ", '"', "\\", "{", "é", "=x>"]),
        max_size=9,
    ).map("".join),
    st.integers(1, 7),
)
def test_what_the_grammar_allows_is_read_as_it_was_meant(name: str, value: str, cuts: int) -> None:
    layout = FORMATS[name]
    text = written(layout, "write", {"path": "p", "text": value})
    if accepts(layout, text):
        assert arguments(read(layout, text, cuts)) == {"path": "p", "text": value}
    else:
        squeezed = "".join(value.split())
        assert "</parameter><parameter=" in squeezed or "</parameter></function>" in squeezed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mode": "append"}, {"mode": "append"}),
        (
            {"where": '{"tags": ["</parameter><parameter=x>", "1"]}'},
            {"where": {"tags": ["</parameter><parameter=x>", "1"]}},
        ),
        ({"note": "null"}, {"note": None}),
        ({"note": "nullable"}, {"note": "nullable"}),
        ({"more": "[1, true]"}, {"more": [1, True]}),
        ({"line": "7", "note": "n"}, {"line": 7, "note": "n"}),
    ],
)
def test_values_have_the_types_of_the_schema(layout: ToolFormat, values: dict[str, str], expected: Any) -> None:
    text = written(layout, "write", {"path": "1", "text": "2.0", **values})
    assert accepts(layout, text)
    found = arguments(read(layout, text, 2))
    assert found == {"path": "1", "text": "2.0", **expected}
    jsonschema.validate(found, WRITE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "values",
    [
        {"path": "a"},
        {"text": "a", "path": "b"},
        {"path": "a", "text": "b", "mode": "other"},
        {"path": "a", "text": "b", "line": "0"},
        {"path": "a", "text": "b", "line": "x"},
        {"path": "a", "text": "b", "unknown": "x"},
        {"path": "a", "text": "b", "where": "[]"},
    ],
)
def test_a_call_that_its_schema_forbids_is_not_allowed(layout: ToolFormat, values: dict[str, str]) -> None:
    assert not accepts(layout, written(layout, "write", values))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_calls_and_one_without_arguments(layout: ToolFormat) -> None:
    text = layout.separator.join([written(layout, "now", {}), written(layout, "write", {"path": "a", "text": "b"})])
    assert accepts(layout, text)
    events = read(layout, text, 5)
    assert [e.name for e in events if isinstance(e, CallStart)] == ["now", "write"]
    assert (arguments(events), arguments(events, 1)) == ({}, {"path": "a", "text": "b"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_string_streams_while_it_is_written(layout: ToolFormat) -> None:
    reader = ToolCallReader(layout, {"write": WRITE})
    text = written(layout, "write", {"path": "a", "text": "x" * 1000})
    events = reader.push(text[: text.index("xxx") + 500].encode())
    said = "".join(e.text for e in events if isinstance(e, ArgumentsDelta))
    assert said.startswith('{"path": "a", "text": "xxx')
    assert len(said) > 490
    cut = reader.finish()
    assert cut[-1] == CallEnd(0, is_complete=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_cut_of_two_calls_leaves_calls_that_are_whole_or_flagged_and_no_text(layout: ToolFormat) -> None:
    first, second = written(layout, "write", {"path": "a", "text": "b", "line": "12"}), written(layout, "now", {})
    whole = first + layout.separator + second
    for end in range(len(layout.marker), len(whole)):
        reader = ToolCallReader(layout, {"write": WRITE})
        events = [*reader.push(whole[:end].encode()), *reader.finish(is_cut=True)]
        assert not [e for e in events if isinstance(e, str) and e.strip()], end
        ended = [e for e in events if isinstance(e, CallEnd)]
        assert len(ended) == len([e for e in events if isinstance(e, CallStart)])
        assert [e.is_complete for e in ended[:1]] == ([end >= len(first)] if ended else [])
        if end >= len(first):
            assert arguments(events) == {"path": "a", "text": "b", "line": 12}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_white_space_of_the_layout_may_differ(layout: ToolFormat) -> None:
    tag = layout.marker.strip("<>")
    path, value = "<parameter=path>a</parameter>", "<parameter=text>b</parameter>"
    text = f"<{tag}> <function=write> {path}\n\n {value}</function>\n\n</{tag}>"
    assert arguments(read(layout, text, 1)) == {"path": "a", "text": "b"}


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("True", "json", "true"),
        ("None", "nullable", "null"),
        ("none", "string", '"none"'),
        (" 5 ", "json", "5"),
        ("NaN", "json", '"NaN"'),
        ("{'a': 1}", "json", "\"{'a': 1}\""),
        ("[" * 100_000, "any", json.dumps("[" * 100_000)),
    ],
)
def test_a_value_without_a_grammar_is_read_as_json_that_it_may_be(text: str, kind: Any, expected: str) -> None:
    assert value_text(text, kind) == expected


def test_kinds_follow_the_schema() -> None:
    kinds = {"path": "string", "text": "string", "mode": "string", "line": "json", "where": "json", "note": "nullable"}
    assert kinds_of(WRITE) == {**kinds, "more": "any"}
    optional = {"anyOf": [{"type": "string"}, {"type": "null"}], "title": "T"}
    mixed = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    both = {"properties": {"o": optional, "m": mixed, "a": {"type": "string", "allOf": [{}]}}}
    assert kinds_of(both) == {"o": "nullable", "m": "any", "a": "any"}


def test_what_cannot_be_written_so_is_refused_with_its_name() -> None:
    for parameters, error in (
        ({"type": "object", "minProperties": 2}, UnsupportedSchema),
        ({"type": "object", "properties": {"a>b": {"type": "string"}}}, InvalidGrammar),
    ):
        tools = [{"name": "write", "parameters": parameters}]
        with pytest.raises(error, match="write"):
            compile_constraint("tools", {"tools": tools, "format": "qwen3-coder"}, BYTES)


def test_tags_inside_of_json_strings_end_nothing_however_many_there_are() -> None:
    layout = FORMATS["qwen3-coder"]
    value = json.dumps({"a": '"</parameter><parameter=x>' * 3000})
    text = written(layout, "write", {"path": "a", "text": "b", "more": value})
    assert arguments(read(layout, text, 1))["more"] == json.loads(value)
