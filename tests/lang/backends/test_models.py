"""Several models in one program: each reads the branch in its own way, and values flow between them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest

from ramet import MockBackend, OpenAI, Remote, State, function, gen, select, set_default_backend, tool, use_backend
from ramet.errors import ConfigError, InvalidProgram, InvalidRequest, ProgramCancelled, ProgramError
from ramet.lang.graph.ir import Graph
from ramet.runtime.testing.scripted_model import ScriptedEngine

Serve = Callable[..., AbstractContextManager[Any]]


@dataclass
class Person:
    name: str
    age: int


@function(max_tokens=20)
def drafted(s: State, town: str) -> Any:
    s += f"A line about {town}: " + gen("draft", stop="\n")
    s += "\nBetter: " + gen("line", model="big", stop="\n")
    s += f"\nAgain: {s['draft']} and {s['line']}: " + gen("last", stop="\n")
    return s["line"]


SMALL = {"Better: ": "never asked", "Again": "three", "A line": "one"}
BIG = {"Better: ": "two"}


def test_each_model_writes_its_part_and_reads_what_the_other_wrote() -> None:
    state = drafted.run("Rome", backend={"small": MockBackend(SMALL), "big": MockBackend(BIG)})
    assert state.text() == "A line about Rome: one\nBetter: two\nAgain: one and two: three"
    assert (state["draft"], state["line"], state["last"], state.result) == ("one", "two", "three", "two")
    assert len(state.record.stages) == 0


def test_models_run_behind_a_server_and_an_openai_endpoint_as_they_do_here(serve: Serve) -> None:
    with ScriptedEngine(SMALL) as small, ScriptedEngine(BIG) as big, serve(small) as near, serve(big) as far:
        here = drafted.run("Rome", backend={"small": small, "big": big})
        with OpenAI(f"{far.url}/v1", model="test", extensions=True) as endpoint, Remote(near.url) as remote:
            for backend in ({"small": near.url, "big": far.url}, {"small": remote, "big": endpoint}):
                there = drafted.run("Rome", backend=backend)
                assert there.text() == here.text()
                assert there.result == here.result


@function(max_tokens=40)
def asked(s: State) -> None:
    with s.copy() as other:
        other += "Somebody: " + gen("person", Person, model="big")
    s += f"{other['person'].name} is {other['person'].age + 1}: "
    s += select("kind", ["young", "old"], model="big") + ", " + gen("why")
    s.fork(2).join()
    branches = s.fork(3)
    branches += lambda i: f"{i}: " + gen("n", int, model="big" if i == 1 else "")
    branches.join()
    s += f"{s['n']}" + gen("end", model="big")


def test_fields_selections_and_branches_flow_between_models() -> None:
    with ScriptedEngine() as first, ScriptedEngine() as second, ScriptedEngine() as alone:
        several = asked.run(backend={"a": first, "big": second}, seed=3)
        one = asked.run(backend={"big": alone}, seed=3)
        assert several.text() == one.text()
        assert several.variables == one.variables
        assert first.stats().num_requests < alone.stats().num_requests


def test_the_first_model_is_the_one_that_is_not_named() -> None:
    backends = {"big": MockBackend(lambda prompt: "big"), "small": MockBackend(lambda prompt: "small")}

    @function
    def program(s: State) -> None:
        s += "a" + gen("x") + gen("y", model="small") + gen("z", model="big")

    assert program.run(backend=backends).variables == {"x": "big", "y": "small", "z": "big"}
    with use_backend(backends):
        assert program.run().variables == {"x": "big", "y": "small", "z": "big"}
        assert program.run_batch([{}, {}])[1]["y"] == "small"
    set_default_backend(backends)
    try:
        assert program.compile().run()["y"] == "small"
    finally:
        set_default_backend(None)


def test_messages_are_in_each_models_own_template() -> None:
    small, big = MockBackend(lambda prompt: "s"), MockBackend(lambda prompt: "b")

    @function
    def chat(s: State) -> None:
        s.user("Hello")
        s.assistant(gen("a"))
        s.user("And you?")
        s.assistant(gen("b", model="big"))

    state = chat.run(backend={"small": small, "big": big})
    assert [one["content"] for one in state.messages()] == ["Hello", "s", "And you?", "b"]


def test_tools_are_called_once_and_both_models_read_the_result() -> None:
    called: list[int] = []

    @tool
    def double(number: int) -> int:
        """Twice as much."""
        called.append(number)
        return 2 * number

    @function(max_tokens=300)
    def program(s: State) -> None:
        s.user("Double!")
        s.call_tools([double], choice="required", max_steps=1, model="big")
        s.assistant(gen("small", max_tokens=8))
        s.assistant(gen("end", max_tokens=8, model="big"))

    with ScriptedEngine() as first, ScriptedEngine() as second, ScriptedEngine() as alone:
        several = program.run(backend={"small": first, "big": second}, seed=1)
        num_calls = len(called)
        one = program.run(backend={"big": alone}, seed=1)
        assert num_calls == len(several["calls"]) == len(one["calls"]) >= 1
        assert several.text() == one.text()


@pytest.mark.parametrize("model", ["small", "big"])
def test_a_failure_in_one_model_is_the_error_of_the_program(model: str) -> None:
    bad = MockBackend(failures={"bad": RuntimeError("no luck")})

    @function
    def program(s: State) -> None:
        a, b = s.fork(2)
        a += "fine " + gen("fine", model="small" if model == "big" else "big")
        b += "bad " + gen("broken", model=model)
        a += f"{b['broken']}" + gen("after", model="small")

    backends = {"small": bad, "big": MockBackend()} if model == "small" else {"small": MockBackend(), "big": bad}
    with pytest.raises(ProgramError, match="no luck") as raised:
        program.run(backend=backends)
    assert "broken" in str(raised.value)
    state = program.run(backend=backends, failures="keep")
    assert "no luck" in str(state.error())
    assert isinstance(state.recorder.run.error_of(len(state.record.graph.nodes) - 1), ProgramError)


def test_a_race_between_models_goes_to_the_one_that_does_not_fail() -> None:
    @function
    def program(s: State) -> int:
        s += "bad "
        return s.first_of(gen("x"), gen("x", model="big"))

    broken = MockBackend(failures={"bad": RuntimeError("no luck")})
    state = program.run(backend={"small": broken, "big": MockBackend({"bad": "fine"})})
    assert (state.result, state["x"]) == (1, "fine")


def test_a_cancelled_program_ends_in_all_of_its_models() -> None:
    with ScriptedEngine(latency_s=0.01) as first, ScriptedEngine(latency_s=0.01) as second:

        @function(max_tokens=400)
        def program(s: State) -> None:
            branches = s.fork(2)
            branches[0] += "a" + gen("x", ignore_eos=True)
            branches[1] += "b" + gen("x", ignore_eos=True, model="big")
            branches.join()
            s += gen("end", model="big")

        for _ in program.stream(backend={"small": first, "big": second}):
            break
        end_s = time.monotonic() + 10
        while any(one.stats().num_finished < one.stats().num_requests for one in (first, second)):
            assert time.monotonic() < end_s
            time.sleep(0.01)

        @function
        def cancelling(s: State) -> None:
            s += "a" + gen("x", model="big", ignore_eos=True, max_tokens=400)
            s.cancel()
            str(s["x"])

        with pytest.raises(ProgramCancelled):
            cancelling.run(backend={"small": first, "big": second})


def test_wrong_names_and_wrong_backends_are_refused_by_name() -> None:
    good = MockBackend()
    with pytest.raises(InvalidProgram, match=r"'line'.*asks for model 'big'; known: small, huge"):
        drafted.run("Rome", backend={"small": good, "huge": good})
    with pytest.raises(InvalidProgram, match="asks for model 'big', but the backend has one model: give the run"):
        drafted.run("Rome", backend=good)
    for wrong in ({}, {"": good}, {1: good}, {"a": {"b": good}}, {"a": 3}):
        with pytest.raises(ConfigError, match="backend"):
            drafted.run("Rome", backend=wrong)
    for name in (3, None, "\ud800"):
        with pytest.raises(InvalidRequest, match="model is"):
            gen("x", model=name)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="model is"):
            select("x", ["a", "b"], model=name)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tokenise in their own ways"):
        drafted.explain("Rome", backend={"small": good, "big": good})


def test_a_server_refuses_a_graph_that_names_a_model(serve: Serve) -> None:
    graph: Graph = drafted.compile(town="Rome").graph
    with ScriptedEngine() as engine, serve(engine) as served:
        body = {"graph": json.loads(graph.to_json()), "arguments": {"town": "Rome"}}
        (row,) = served.client.post("/v1/programs", json=body).json()["rows"]
        assert row["error_type"] == "InvalidProgram"
        assert "asks for model 'big'" in row["error"]
        assert engine.submit("the engine lives").result().finish_reason is not None
