"""The graph's JSON form and its checks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import InvalidProgram
from ramet.lang.graph.ir import (
    AnyNode,
    Argument,
    Capture,
    Constraint,
    Fork,
    Generate,
    Graph,
    GraphIndex,
    Join,
    NodeEvent,
    Ref,
    Role,
    Sampling,
    Select,
    Text,
    ToolCall,
    Usage,
    branch,
    dependencies,
    parse_value,
    render,
)

KINDS = ["text", "argument", "generate", "select", "fork", "join", "role", "tool", "capture"]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Random valid graphs: one step appends one node (or the nodes of one fork) to a random branch."""
    nodes: list[AnyNode] = []
    values: list[int] = []
    tips: list[int | None] = [None]
    arguments: dict[str, Any] = {}

    def template() -> tuple[str | Ref, ...]:
        part = st.text(max_size=8)
        if values:
            ref = st.builds(
                Ref, st.sampled_from(values), st.tuples(st.integers(0, 3)) | st.just(()), st.sampled_from(["", ">4"])
            )
            return tuple(draw(st.lists(part | ref, min_size=1, max_size=3)))
        return (draw(part),)

    for _ in range(draw(st.integers(0, 12))):
        at, number = draw(st.integers(0, len(tips) - 1)), len(nodes)
        kind = draw(st.sampled_from(KINDS))
        common: dict[str, Any] = {"id": number, "parent": tips[at], "line": draw(st.sampled_from(["", "a.py:3"]))}
        if kind == "argument":
            nodes.append(Argument(id=number, name=f"a{number}"))
            values.append(number)
            if draw(st.booleans()):
                arguments[f"a{number}"] = draw(st.integers() | st.text() | st.lists(st.booleans()))
            continue
        if kind == "fork":
            width = draw(st.integers(1, 3))
            nodes += [Fork(**common | {"id": number + i}, group=number, index=i, width=width) for i in range(width)]
            tips += range(number, number + width)
            continue
        if kind == "text":
            nodes.append(Text(**common, parts=template()))
        elif kind == "generate":
            sampling = draw(
                st.builds(
                    Sampling,
                    max_tokens=st.none() | st.integers(1, 9),
                    temperature=st.none() | st.floats(0, 2),
                    stop=st.none() | st.just(("\n",)),
                    logit_bias=st.none() | st.just(((3, 1.5),)),
                )
            )
            constraint = draw(st.none() | st.builds(Constraint, st.sampled_from(["regex", "cfg"]), st.text(max_size=5)))
            nodes.append(Generate(**common, name=f"g{number}", sampling=sampling, constraint=constraint))
        elif kind == "select":
            nodes.append(Select(**common, choices=(("a", *template()), ("b",))))
        elif kind == "join":
            joined = [tip for tip in tips if tip is not None]
            if not joined:
                continue
            nodes.append(Join(**common, branches=tuple(joined)))
        elif kind == "role":
            nodes.append(Role(**common, role="user", is_open=draw(st.booleans())))
        elif kind == "tool":
            nodes.append(ToolCall(**common, tool="f", arguments=template()))
        else:
            nodes.append(Capture(**common, name=f"c{number}"))
        if kind in ("generate", "select", "tool", "capture"):
            values.append(number)
        tips[at] = number
    return Graph(tuple(nodes), arguments)


@given(graphs())
@settings(max_examples=200, deadline=None)
def test_a_graph_read_back_from_json_is_the_same_graph(graph: Graph) -> None:
    assert Graph.from_json(graph.to_json()) == graph
    json.loads(graph.to_json())


@given(graphs())
@settings(max_examples=50, deadline=None)
def test_every_dependency_comes_before_its_user(graph: Graph) -> None:
    for node in graph.nodes:
        assert all(used < node.id for used in dependencies(node))


def test_the_json_form_has_a_version_and_an_unknown_one_is_refused() -> None:
    data = json.loads(Graph(()).to_json())
    assert data["version"] == 2
    assert Graph.from_json(json.dumps(data | {"version": 1})).nodes == Graph.from_json(json.dumps(data)).nodes
    with pytest.raises(InvalidProgram, match="version 99"):
        Graph.from_json(json.dumps(data | {"version": 99, "nodes": [{"kind": "from the future"}]}))


def load(*nodes: dict[str, Any]) -> Graph:
    return Graph.from_json(json.dumps({"nodes": nodes, "version": 1}))


GEN = {"kind": "generate", "id": 0, "name": "x"}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([{"kind": "text", "id": 0, "parent": 7, "parts": []}], "node 7, which doesn't exist"),
        ([{"kind": "text", "id": 3, "parts": []}], "has id 3 at position 0"),
        (
            [{"kind": "text", "id": 0, "parent": 1, "parts": []}, {"kind": "text", "id": 1, "parent": 0, "parts": []}],
            "cycle: 0 -> 1 -> 0",
        ),
        (
            [{"kind": "text", "id": 0, "parts": [{"node": 1}], "line": "a.py:4"}, GEN | {"id": 1}],
            r"text node 0 \(a.py:4\) uses node 1 before it is generated",
        ),
        ([{"kind": "text", "id": 0, "parts": ["a"]}, {"kind": "text", "id": 1, "parts": [{"node": 0}]}], "has none"),
        ([{"kind": "fork", "id": 0, "group": 0, "index": 0, "width": 0}], "forks into 0 branches"),
        ([{"kind": "fork", "id": 0, "group": 0, "index": 0, "width": 2}], "don't fit together"),
        ([{"kind": "fork", "id": 0, "group": 0, "index": 0, "width": 10**30}], "don't fit together"),
        ([GEN, GEN | {"id": 1, "parent": 0}], "writes variable 'x', which node 0 on the same branch already wrote"),
        ([GEN | {"name": ""}], "empty name"),
        ([GEN | {"sampling": {"temperature": -1}}], "temperature is -1.0 but must be in"),
        ([GEN | {"sampling": {"max_tokens": 0}}], "max_tokens is 0 but must be an integer >= 1"),
        ([GEN | {"sampling": {"top_p": 0}}], "top_p"),
        ([GEN | {"sampling": {"stop": [""]}}], r"stop is \('',\) but must be strings that are not empty"),
        ([GEN | {"sampling": {"heat": 1}}], "unknown field `heat`"),
        ([{"kind": "select", "id": 0, "choices": []}], "no choices"),
        ([{"kind": "select", "id": 0, "choices": [["a"], ["a"]]}], "same choice twice"),
        ([{"kind": "role", "id": 0, "role": "wizard", "is_open": True}], "roles are system, user"),
        ([{"kind": "join", "id": 0, "branches": []}], "joins no branches"),
        ([GEN, {"kind": "capture", "id": 1, "start": 0}], "not on its branch"),
        ([GEN, {"kind": "capture", "id": 1, "parent": 0, "start": 0, "of": "tokens"}], "path begins with the branch"),
        ([{"kind": "argument", "id": 0, "name": "a"}, {"kind": "argument", "id": 1, "name": "a"}], "second time"),
        ([{"kind": "spell", "id": 0}], "not a program graph: Invalid value 'spell'"),
        ([{"kind": "text", "id": "0", "parts": []}], r"\$\.nodes"),
    ],
)
def test_a_wrong_graph_is_refused_with_its_reason(nodes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InvalidProgram, match=message):
        load(*nodes)


def test_an_argument_without_json_form_is_named() -> None:
    with pytest.raises(InvalidProgram, match="argument 'city' has no JSON form"):
        Graph((Argument(id=0, name="city"),), {"city": object()}).to_json()


def test_the_same_name_may_be_written_on_two_branches() -> None:
    load(
        {"kind": "fork", "id": 0, "group": 0, "index": 0, "width": 2},
        {"kind": "fork", "id": 1, "group": 0, "index": 1, "width": 2},
        {"kind": "generate", "id": 2, "parent": 0, "name": "x"},
        {"kind": "generate", "id": 3, "parent": 1, "name": "x"},
    )


def test_a_refused_part_leaves_the_index_as_it_was() -> None:
    index = GraphIndex()
    index.add(Graph((Generate(id=0, name="x"),)))
    with pytest.raises(InvalidProgram):
        index.add(Graph((Text(id=1, parent=0, parts=("a",)), Generate(id=2, parent=1, name="x")), first=1))
    index.add(Graph((Text(id=1, parent=0, parts=("a",)), Generate(id=2, parent=1, name="y")), first=1))
    assert [node.id for node in branch(index.nodes, 2)] == [0, 1, 2]


def test_a_template_inserts_text_fields_and_formatted_values() -> None:
    values: dict[int, Any] = {0: {"name": "Ann", "tags": ["a", True]}, 1: 3.14159}
    template = ("<", Ref(0, ("name",)), Ref(0, ("tags",)), Ref(1, (), ".2f"), Ref(1), ">")
    assert render(template, lambda node: f"[text {node}]", values.__getitem__) == '<Ann["a",true]3.14[text 1]>'
    with pytest.raises(InvalidProgram, match="has no 'age'"):
        render((Ref(0, ("age",)),), str, values.__getitem__)


def test_values_are_parsed_by_their_type() -> None:
    assert [parse_value("int", "-3"), parse_value("bool", "true"), parse_value("str", " a")] == [-3, True, " a"]
    assert parse_value("json", '{"a": [1]}') == {"a": [1]}
    for kind, text in (("int", "1."), ("bool", "maybe"), ("json", '{"a"'), ("float", "")):
        with pytest.raises(ValueError):
            parse_value(kind, text)


def test_an_event_is_encoded_without_its_cause() -> None:
    event = NodeEvent(3, "done", text="a", usage=Usage(5, 3, 1), cause=ValueError("x"))
    assert json.loads(event.to_json())["usage"] == {"prompt_tokens": 5, "cached_tokens": 3, "completion_tokens": 1}
    assert Usage(5, 3, 1).computed_tokens == 2


@given(st.lists(st.tuples(st.integers(-1, 30), st.sampled_from("abcde")), max_size=30), st.integers(1, 30))
def test_no_branch_writes_a_variable_twice_in_whatever_parts_it_comes(
    written: list[tuple[int, str]], size: int
) -> None:
    nodes = [
        Generate(id=i, parent=None if parent < 0 or i == 0 else parent % i, name=name)
        for i, (parent, name) in enumerate(written)
    ]

    def has_twice(node: Generate) -> bool:
        above = [one.name for one in branch(nodes, node.parent) if isinstance(one, Generate)]
        return node.name in above

    index = GraphIndex()
    for first in range(0, len(nodes), size):
        part = nodes[first : first + size]
        if any(map(has_twice, part)):
            with pytest.raises(InvalidProgram, match="already wrote"):
                index.add(Graph(tuple(part), first=first))
            assert len(index.nodes) == first, "nothing of a wrong part is kept"
            return
        index.add(Graph(tuple(part), first=first))


def test_a_long_branch_is_checked_without_looking_at_each_earlier_node_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def label(self: Any) -> str:  # Any: a node
        nonlocal looks
        looks += 1
        return str(self.name)

    monkeypatch.setattr(Generate, "label", property(label))
    nodes = [Generate(id=i, parent=i - 1 if i else None, name=f"v{i}") for i in range(2000)]
    GraphIndex().add(Graph(tuple(nodes)))
    assert looks < 20 * len(nodes)


def test_a_long_cycle_is_named() -> None:
    nodes = [Text(id=i, parent=i - 1 if i else None, parts=("x",)) for i in range(3000)]
    nodes[0] = Text(id=0, parts=(Ref(2999),))
    with pytest.raises(InvalidProgram, match="is part of a cycle: 0 -> 2999 -> 2998"):
        GraphIndex().add(Graph(tuple(nodes)))
