"""Lists are read while they are written: a branch starts as soon as its item is there."""

from __future__ import annotations

import itertools
import json
import queue
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, Field, field_validator

from ramet import MockBackend, OpenAI, ProgramError, Remote, State, function, gen
from ramet.lang.graph import ir
from ramet.lang.graph.events import NodeEvent, OnEvent
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.graph.written_json import WrittenJson
from ramet.lang.running.output_types import output_type
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.testing.scripted_model import ScriptedEngine

Serve = Callable[..., AbstractContextManager[Any]]
STEPS = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "steps": {"type": "array", "items": {"type": "string"}},
        "why": {"type": "string"},
    },
    "required": ["title", "steps", "why"],
}
PLAN = '{"title": "T", "steps": ["one", "two, or \\"2\\"", "three"], "why": "because"}'
SCRIPT = {"Plan: ": PLAN, "Do one": "a", 'Do two, or "2"': "b", "Do three": "c"}

scalars = st.one_of(st.text(max_size=5), st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False))
values = st.recursive(
    scalars, lambda of: st.one_of(st.lists(of, max_size=3), st.dictionaries(st.text(), of)), max_leaves=6
)


def _read(text: str, path: tuple[str, ...]) -> list[Any]:
    reader = WrittenJson()
    reader.push(text)
    return reader.next_items(path)


@given(
    st.dictionaries(st.text(max_size=3), values, max_size=3),
    st.lists(values, max_size=4),
    st.dictionaries(st.text(max_size=3), values, max_size=2),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")]),
    st.lists(st.integers(0, 300), max_size=8),
)
def test_items_of_any_json_come_once_and_in_order(
    before: dict[str, Any], items: list[Any], behind: dict[str, Any], separators: Any, cuts: list[int]
) -> None:
    whole = {**before, "steps": {"deep": items}, **{k: v for k, v in behind.items() if k != "steps"}}
    text = json.dumps(whole, separators=separators)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    reader, found = WrittenJson(), list[Any]()
    for start, end in itertools.pairwise(places):
        reader.push(text[start:end])
        found += reader.next_items(("steps", "deep"))
    assert found == items
    for name, value in before.items():
        if name != "steps" and name not in behind:
            assert reader.field((name,)) == (value,)


@pytest.mark.parametrize(
    ("piece", "items"),
    [
        ('["a"', ["a"]),
        ('["a', []),
        ("[1", []),
        ("[1 ", [1]),
        ("[1.", []),
        ("[true", []),
        ("[true,", [True]),
        ("[tru", []),
        ("[[1]", [[1]]),
    ],
)
def test_an_item_is_there_when_it_is_closed_and_not_before(piece: str, items: list[Any]) -> None:
    assert _read(piece, ()) == items


@pytest.mark.parametrize("text", ["", "null", "[", '{"a": 1}', '{"steps": 7, "b": []}', "[" * 100_000, '{"steps"'])
def test_what_is_no_list_there_gives_nothing(text: str) -> None:
    assert _read(text, ("steps",)) == []


def body(branch: State, step: str) -> None:
    branch += f"Do {step}: " + gen("done", max_tokens=4)


@function(max_tokens=400)
def followed(s: State) -> list[str]:
    s += "Task. "
    aside = s.copy()
    aside += "Plan: " + gen("plan", STEPS)
    return [branch.text() for branch in s.map(aside["plan"]["steps"], body)]


@function(max_tokens=400)
def staged(s: State) -> list[str]:
    s += "Task. "
    aside = s.copy()
    aside += "Plan: " + gen("plan", STEPS)
    return [branch.text() for branch in s.map(list(aside["plan"]["steps"].value), body)]


def test_followed_and_staged_write_the_same_everywhere(serve: Serve) -> None:
    wanted = staged.run(backend=MockBackend(SCRIPT)).result
    assert wanted == ["Task. Do one: a", 'Task. Do two, or "2": b', "Task. Do three: c"]
    assert followed.run(backend=MockBackend(SCRIPT)).result == wanted
    assert followed.run(backend=MockBackend(SCRIPT), stage="always").result == wanted
    with serve(ScriptedEngine(SCRIPT)) as served:
        for backend in (Remote(served.url), OpenAI(served.url + "/v1", extensions=True)):
            with backend:
                assert followed.run(backend=backend).result == wanted


@pytest.mark.parametrize("plan", [PLAN, '{"title": "T", "steps": [], "why": "because"}'])
def test_seeds_are_those_of_a_fork(plan: str) -> None:
    @function(max_tokens=400)
    def twice(s: State, program: Any) -> Any:
        found = program(s)
        return found, [branch.text() for branch in s.map("ab", body)]

    def texts(program: Any) -> Any:  # all words but the plan's are drawn
        return twice.run(program, backend=MockBackend({"Plan: ": plan}), seed=5).result

    assert texts(followed) == texts(staged)


class ByHand:
    """A backend whose events the test makes."""

    def __init__(self) -> None:
        self.parts: queue.SimpleQueue[ir.Graph] = queue.SimpleQueue()
        self.nodes: list[ir.AnyNode] = []

    def start(self, options: ProgramOptions, on_event: OnEvent) -> ByHand:
        self.on_event = on_event
        return self

    def extend(self, graph: ir.Graph, *, is_last: bool = False) -> None:
        self.nodes += graph.nodes
        self.parts.put(graph)

    def cancel(self, nodes: Sequence[int] | None = None) -> None:
        pass

    def provide(self, node: int, value: Any = None, error: Exception | None = None) -> None:
        pass

    def finish(self) -> None:
        pass

    def named(self, name: str) -> ir.AnyNode:
        return next(node for node in self.nodes if node.label == name)


def test_a_branch_is_sent_while_the_list_is_still_being_written() -> None:
    backend, found = ByHand(), list[Any]()
    thread = threading.Thread(target=lambda: found.append(followed.run(backend=backend)), daemon=True)
    thread.start()
    assert backend.parts.get(timeout=30).nodes
    plan = backend.named("plan")
    backend.on_event(NodeEvent(plan.id, "text", text='{"title": "T", "steps": ["one", "tw'))
    part = backend.parts.get(timeout=30)
    assert [node.parts for node in part.nodes if isinstance(node, ir.Text)] == [("Do one: ",)]
    backend.on_event(NodeEvent(plan.id, "text", text='o"'))
    part = backend.parts.get(timeout=30)
    assert [node.parts for node in part.nodes if isinstance(node, ir.Text)] == [("Do two: ",)]
    value = {"title": "T", "steps": ["one", "two"], "why": "w"}
    backend.on_event(NodeEvent(plan.id, "done", text=json.dumps(value), value=value))
    done = {plan.id}
    while thread.is_alive():
        for node in list(backend.nodes):
            if node.id not in done:
                done.add(node.id)
                text = node.parts[0] if isinstance(node, ir.Text) else "x" if isinstance(node, ir.Generate) else ""
                backend.on_event(NodeEvent(node.id, "done", text=str(text), value=text))
        thread.join(0.01)
    assert found[0].result == ["Task. Do one: x", "Task. Do two: x"]


def test_a_list_is_followed_in_a_loop() -> None:
    @function(max_tokens=64)
    def program(s: State) -> list[Any]:
        s += "Numbers: " + gen("n", list[int])
        return [one + 1 for one in s["n"]]

    assert program.run(backend=MockBackend({"Numbers": "[1, 22, 333]"})).result == [2, 23, 334]


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (MockBackend(failures={"Words": RuntimeError("broken")}), "broken"),
        (MockBackend({"Words": '["one", "two", "three"]'}, tokenizer=ByteTokenizer()), "cut by max_tokens"),
    ],
)
def test_a_list_that_fails_fails_the_program_as_before(backend: MockBackend, message: str) -> None:
    @function(max_tokens=16)
    def program(s: State) -> None:
        s += "Words: " + gen("words", list[str])
        s.map(s["words"], lambda branch, word: branch.append(word + gen("x", max_tokens=1)))

    with pytest.raises(ProgramError, match=message):
        program.run(backend=backend)


def test_the_error_of_a_body_is_raised_while_others_wait_for_items() -> None:
    @function(max_tokens=64)
    def program(s: State) -> None:
        s += "Words: " + gen("words", list[str])

        def wrong(branch: State, word: str) -> None:
            raise KeyError(word)

        s.map(s["words"], wrong)

    with pytest.raises(KeyError, match="one"):
        program.run(backend=MockBackend({"Words": '["one", "two", "three"]'}))


@pytest.mark.parametrize("kind", [list[dict[str, int]], list[float], set[str]])
def test_items_whose_json_is_not_surely_their_value_are_read_at_the_end(kind: Any) -> None:
    @function(max_tokens=64)
    def program(s: State) -> int:
        s += "Items: " + gen("items", kind)
        return len(s.map(s["items"], lambda branch, item: branch.append("x")))

    state = program.run(backend=MockBackend())
    assert not any(node.tells_text for node in state.record.graph.nodes if isinstance(node, ir.Generate))


Shout = Annotated[str, AfterValidator(str.upper)]


class Typed(TypedDict):
    words: list[str]


class Loud(TypedDict):
    words: list[Shout]


@dataclass
class Plain:
    words: list[str]
    title: str = ""


@dataclass
class Checked:
    words: list[str]

    def __post_init__(self) -> None:
        self.words = [word.upper() for word in self.words]


class Model(BaseModel):
    words: list[str]
    inner: Plain | None = None


class Nested(BaseModel):
    words: list[str]
    number: int = Field(0, description="how many")


class LoudModel(BaseModel):
    words: list[Shout]


class Stripped(BaseModel, str_to_upper=True):
    words: list[str]


class Validated(BaseModel):
    words: list[str]

    @field_validator("words")
    @classmethod
    def loud(cls, words: list[str]) -> list[str]:
        return [word.upper() for word in words]


class After(BaseModel):
    words: list[str]

    def model_post_init(self, context: object) -> None:
        self.words = [word.upper() for word in self.words]


class Renamed(BaseModel):
    words: list[str] = Field(alias="Words")


@pytest.mark.parametrize("kind", [Plain, Nested])
def test_a_list_in_a_dataclass_or_a_model_is_followed(kind: Any) -> None:
    @function(max_tokens=64)
    def program(s: State) -> list[str]:
        s += "Items: " + gen("items", kind)
        return [str(word) for word in s["items"].words]

    state = program.run(backend=MockBackend({"Items": '{"words": ["one", "two"]}'}))
    assert state.result == ["one", "two"]
    assert isinstance(state["items"], kind)
    assert any(isinstance(node, ir.Generate) and node.tells_text for node in state.record.graph.nodes)


@pytest.mark.parametrize("kind", [Checked, LoudModel, Stripped, Validated, After])
def test_a_list_that_its_class_changes_is_not_followed(kind: Any) -> None:
    @function(max_tokens=64)
    def program(s: State) -> list[str]:
        s += "Items: " + gen("items", kind)
        return [str(word) for word in s["items"].words]

    state = program.run(backend=MockBackend({"Items": '{"words": ["one", "two"]}'}))
    assert state.result == ["ONE", "TWO"]
    assert not any(isinstance(node, ir.Generate) and node.tells_text for node in state.record.graph.nodes)


def test_a_field_of_another_name_and_one_of_several_types_are_read_at_the_end() -> None:
    assert not output_type(Renamed).has_plain_fields
    assert not output_type(Model).has_plain_fields


@pytest.mark.parametrize(
    ("kind", "is_followed"), [(Typed, True), (Loud, False), (list[str], True), (list[Shout], False)]
)
def test_a_type_that_changes_its_values_is_not_followed(kind: Any, is_followed: bool) -> None:
    text = '["one", "two"]' if get_origin(kind) is list else '{"words": ["one", "two"]}'

    @function(max_tokens=64)
    def program(s: State) -> list[str]:
        s += "Items: " + gen("items", kind)
        return [str(word) for word in (s["items"] if get_origin(kind) is list else s["items"]["words"])]

    state = program.run(backend=MockBackend({"Items": text}))
    assert state.result == (["one", "two"] if is_followed else ["ONE", "TWO"])
    assert any(isinstance(node, ir.Generate) and node.tells_text for node in state.record.graph.nodes) == is_followed


def test_a_field_is_read_while_the_rest_is_still_being_written() -> None:
    @function(max_tokens=64)
    def program(s: State) -> int:
        s += "Plan: " + gen("plan", STEPS)
        titles.put(str(s["plan"]["title"].upper()))
        return len(s["plan"]["steps"].value)

    titles: queue.SimpleQueue[str] = queue.SimpleQueue()
    backend, found = ByHand(), list[Any]()
    thread = threading.Thread(target=lambda: found.append(program.run(backend=backend)), daemon=True)
    thread.start()
    assert backend.parts.get(timeout=30).nodes
    plan = backend.named("plan")
    backend.on_event(NodeEvent(plan.id, "text", text='{"title": "My pl'))
    backend.on_event(NodeEvent(plan.id, "text", text='an", "st'))
    assert titles.get(timeout=30) == "MY PLAN"
    backend.on_event(NodeEvent(plan.id, "text", text='eps": ["one"], "wh'))
    value = {"title": "My plan", "steps": ["one"], "why": "w"}
    for node in list(backend.nodes):
        if node.id != plan.id:
            backend.on_event(NodeEvent(node.id, "done"))
    backend.on_event(NodeEvent(plan.id, "done", text=json.dumps(value), value=value))
    thread.join(30)
    assert found[0].result == 1


def test_a_trace_stops_at_the_list() -> None:
    assert followed.trace().stop is not None
    assert not followed.explain(backend=MockBackend()).is_complete


def test_a_program_that_hangs_says_where() -> None:
    @function(max_tokens=64)
    def program(s: State) -> None:
        s += "Plan: " + gen("plan", STEPS)
        s += f"{len(str(s['plan']['why']))}"

    backend = ByHand()
    stream = program.stream(backend=backend)
    assert backend.parts.get(timeout=30).nodes
    plan = backend.named("plan")
    for node in list(backend.nodes):
        if node.id != plan.id:
            backend.on_event(NodeEvent(node.id, "done"))
    waiting, running = stream.state.where()
    assert re.fullmatch(r"\S*test_written_json.py:\d+ has waited \d\.\d s for generate 'plan'", waiting)
    assert re.fullmatch(r"generate 'plan' of \S*test_written_json.py:\d+ runs, or waits for its turn", running)
    stream.state.cancel()
