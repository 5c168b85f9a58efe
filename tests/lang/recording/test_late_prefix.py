"""`prefix="late"`: where such text stands, that it doesn't depend on stages, and that the tokens it saves are real."""

from __future__ import annotations

from typing import Any

import pytest

from ramet import MockBackend, State, function, gen, use_backend
from ramet.errors import InvalidProgram
from ramet.lang.graph.ir import Graph, Text
from ramet.lang.passes.argument_motion import as_written
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.testing.scripted_model import ScriptedEngine

RULES = "Rules: be brief, be kind, be right. " * 20


@function(temperature=0, max_tokens=8)
def ask(s: State, question: str, late: bool = True) -> None:
    s += "You are a clerk. "
    s.append(f"Question: {question}\n", prefix="late" if late else None)
    s += RULES
    s += f"Again: {RULES}"
    s += "Answer:" + gen("answer")


def test_late_text_stands_before_the_next_generation() -> None:
    with use_backend(MockBackend()):
        text = ask.run(question="Why?").text()
        plain = ask.run(question="Why?", late=False).text()
    assert text.startswith(f"You are a clerk. {RULES}Again: {RULES}Answer:Question: Why?\n")
    assert plain.startswith(f"You are a clerk. Question: Why?\n{RULES}")


def test_late_text_stays_where_a_check_in_python_refuses_what_was_generated() -> None:
    @function(max_tokens=4)
    def program(s: State) -> None:
        s.append("[late]", prefix="late")
        s += "body:" + gen("x", where=lambda text: text == "two")

    with use_backend(MockBackend(["one", "two"])):
        assert program.run().text() == "body:[late]two"


@pytest.mark.parametrize("stage", ["needed", "always"])
def test_where_late_text_stands_does_not_depend_on_stages(stage: str) -> None:
    seen: list[str] = []

    @function(temperature=0, max_tokens=4)
    def program(s: State, name: str) -> None:
        s += "A:" + gen("a")
        s.append(f"[1 {name}]", prefix="late")
        s += "x"
        s.append("[2]", prefix="late")
        if len(s["a"]):  # a stage between the late text and what it is moved behind
            s += "y"
        with s.user():
            s.append("[3]", prefix="late")
            s += "z"
        branch = s.copy()
        branch.append("[4]", prefix="late")
        branch += "w" + gen("b")
        s.append("[5]", prefix="late")
        s += "v"
        seen.append(s.text())
        s.append("[6]", prefix="late")
        s += "u"
        s.set_var("branch", branch["b"])

    with use_backend(MockBackend()):
        state = program.run(name="N", stage=stage)
    text = state.text()
    assert "xy[1 N][2]<|im_start|>user\nz[3]<|im_end|>" in text
    assert text.endswith("v[5]u[6]")
    assert seen[0].endswith("v[5]")
    branch_text = "".join(e.text for e in state.record.events.values() if e.text in ("w", "[4]"))
    assert branch_text == "w[4]"


def test_the_graph_says_what_was_moved_and_can_be_put_back() -> None:
    @function
    def program(s: State, a: str, b: str) -> None:
        s.append(f"[{a}]", prefix="late")
        s += "x"
        s.append(f"[{b}]", prefix="late")
        s += "y"
        s += gen("g")

    graph = program.trace(a="A", b="B").graph
    assert [n.moved for n in graph.nodes if isinstance(n, Text)] == [0, 0, 2, 1]
    assert Graph.from_json(graph.to_json()) == graph
    back = as_written(graph)
    Graph.from_json(back.to_json())
    texts = [n for n in back.nodes if isinstance(n, Text)]
    assert [n.parts[0] for n in texts] == ["[", "x", "[", "y"]
    assert all(n.moved == 0 for n in texts)
    assert as_written(back) == back
    bad = Graph((Text(id=0, parts=("x",), moved=1),))
    with pytest.raises(InvalidProgram, match="is moved behind 1 texts"):
        Graph.from_json(bad.to_json())


def test_explain_reports_the_tokens_that_calls_share_more() -> None:
    with ScriptedEngine(tokenizer=ByteTokenizer()) as engine:
        report = next(p for p in ask.explain(question="Why?", backend=engine).passes if p.name == "argument motion")
        plain = next(
            p for p in ask.explain(question="Why?", late=False, backend=engine).passes if p.name == "argument motion"
        )
    moved = len(f"{RULES}Again: {RULES}Answer:")
    assert report.numbers["gained"] == moved
    assert plain.numbers["gain"] == moved + len("\n")  # of the question's own text: what follows the argument


def test_the_tokens_saved_are_real_over_rows() -> None:
    rows: list[Any] = [
        {"question": f"{i}: why is {word} there?"} for i, word in enumerate(["tea", "milk", "rain", "snow"])
    ]

    def computed(late: bool) -> int:
        with ScriptedEngine(tokenizer=ByteTokenizer()) as engine:
            ask.run_batch(rows, late=late, backend=engine)
            return engine.stats().computed_tokens

    with ScriptedEngine(tokenizer=ByteTokenizer()) as engine:
        plan = ask.explain(rows=rows, backend=engine)
    gained = next(p for p in plan.passes if p.name == "prefixes of rows").numbers["gained"]
    saved = computed(False) - computed(True)
    assert saved == gained
    assert saved >= 3 * (2 * len(RULES))


def test_only_text_can_stand_late() -> None:
    @function
    def program(s: State, item: Any, prefix: str) -> None:
        s.append(item, prefix=prefix)

    with use_backend(MockBackend()):
        for item, prefix, message in (
            (gen("x"), "late", "only text can stand late"),
            ("x", "soon", "prefix is 'soon'"),
        ):
            with pytest.raises(InvalidProgram, match=message):
                program.run(item=item, prefix=prefix)

        @function
        def inside(s: State) -> None:
            s.append(f"a {gen('x')}", prefix="late")

        with pytest.raises(InvalidProgram, match="append the generation by itself"):
            inside.run()
