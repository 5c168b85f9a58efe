"""Programs that go on after their end, and states in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from ramet import Engine, MockBackend, Remote, State, assistant, function, gen, select, user
from ramet.errors import InvalidProgram, InvalidRequest, ProgramError
from ramet.lang.graph import ir
from ramet.lang.recording.recorder import Recorder
from ramet.runtime.testing.scripted_model import ScriptedEngine

Serve = Callable[..., AbstractContextManager[Any]]


@function(max_tokens=8)
def chat(s: State, rule: str = "Be brief.") -> str:
    s.system(rule)
    return "begun"


def talk(backend: Any, turns: int, **options: Any) -> State:
    session = chat.start(**({} if backend is None else {"backend": backend}), **options)
    for turn in range(turns):
        session.say(f"Question {turn}?", max_tokens=4 + turn % 5)
    return session


def asked(session: State) -> tuple[str, Any]:
    return session.say("And the last?"), session.meta("answer")["usage"]


def test_a_session_of_thirty_turns_is_saved_and_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    wanted = asked(talk(MockBackend(), 30, seed=7))
    file = tmp_path / "session.json"
    backend = MockBackend()
    talk(backend, 30, seed=7).save(file)
    again = State.load(file, backend)
    assert asked(again) == wanted
    assert len(again.messages()) == 1 + 2 * 31
    _, usage = wanted
    assert usage.computed_tokens < 40  # what the last turn wrote, and the question


def test_a_session_goes_on_through_a_server(tmp_path: Path, serve: Serve) -> None:
    file = tmp_path / "session.json"
    wanted = asked(talk(MockBackend(), 5, seed=7))
    with serve(ScriptedEngine()) as served, Remote(served.url) as remote:
        session = talk(remote, 5, seed=7)
        session.save(file)
        session.close()
    with serve(ScriptedEngine()) as served, Remote(served.url) as remote:  # another server, whose cache is empty
        again = State.load(file, remote)
        answer, usage = asked(again)
        again.close()
    assert answer == wanted[0]
    assert usage.prompt_tokens == wanted[1].prompt_tokens


@pytest.mark.slow
def test_a_model_goes_on_from_the_tokens_that_it_wrote(tmp_path: Path) -> None:
    """At a high temperature it writes tokens that the tokenizer would not make of their text."""
    file = tmp_path / "session.json"
    with Engine("smollm2-135m", device="cpu") as engine:
        straight = talk(engine, 30, seed=3, temperature=1.5)
        engine.flush_cache()
        session = talk(engine, 30, seed=3, temperature=1.5)
        assert session.text() == straight.text()
        wanted = asked(session)
        engine.flush_cache()
        session = talk(engine, 30, seed=3, temperature=1.5)
        session.save(file)
        assert asked(State.load(file, engine)) == wanted


def test_a_finished_state_goes_on() -> None:
    @function(max_tokens=4)
    def program(s: State) -> None:
        s += "Say: " + gen("a")

    with MockBackend(["one", "two", "tree", "four"]):
        state = program.run()
        assert state["a"] == "one"
        state += ", and then " + gen("b", max_tokens=8)
        assert (state["a"], state["b"]) == ("one", "two")
        assert state.text() == "Say: one, and then two"
        branches = state.fork(2)
        branches += "; " + gen("c", max_tokens=4)
        state.join(branches)
        assert state["c"] == ["tree", "four"]
        assert state.meta("a")["finish_reason"] == "stop"
        assert state.meta("b")["finish_reason"] == "stop"


def test_what_is_read_after_the_program_is_the_value_itself() -> None:
    with MockBackend(["Paris", "Rome"]):
        session = chat.start()
        assert session.result == "begun"
        session += user("Where?") + assistant(gen("city"))
        found = session["city"]
        assert type(found) is str
        session += user(f"Not {found}.") + assistant(gen("city"))
        assert session["city"] == "Rome"
        assert session.messages()[-2]["content"] == "Not Paris."


def test_messages_choices_types_and_tools_go_on() -> None:
    with MockBackend({"colour": "red", "many": "12", "add": "a"}) as backend:
        session = chat.start()
        session += user("Which colour?") + assistant(select("colour", ["red", "blue"]))
        session += user("How many?") + assistant(gen("n", int))
        assert (session["colour"], session["n"]) == ("red", 12)
        session.close()
        session += user("add") + assistant(gen("more", max_tokens=2))
        assert session["more"] == "a"
        assert backend.stats().num_finished > 0


def test_each_branch_of_a_finished_program_goes_on_alone() -> None:
    @function(max_tokens=4)
    def program(s: State) -> list[State]:
        s += "Start. "
        branches = s.fork(2)
        branches += lambda i: f"{i}: " + gen("x", max_tokens=2)
        return list(branches)

    with MockBackend({"0: ": "a", "1: ": "b", "more": "c"}):
        first, second = program.run().result
        first += " more: " + gen("y", max_tokens=2)
        assert first.text() == "Start. 0: a more: c"
        assert second.text() == "Start. 1: b"


def test_a_failed_program_and_a_trace_do_not_go_on() -> None:
    @function
    def program(s: State) -> None:
        s += "a" + gen("x")

    with MockBackend(failures={"a": RuntimeError("broken")}):
        state = program.run(failures="keep")
        with pytest.raises(ProgramError, match="broken"):
            state += "b"
    with MockBackend():
        state = program.run(failures="keep")
        state.cancel()
        with pytest.raises(InvalidProgram, match="cancelled"):
            state += "b"


def test_a_program_saves_its_state_while_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "state.json"

    @function(max_tokens=4)
    def program(s: State) -> None:
        s += "a" + gen("x") + "b"
        s.save(file)
        s += "c"

    with MockBackend(["1"]):
        state = program.run()
        assert state.text() == "a1bc"
        assert State.load(file).text() == "a1b"
        assert State.load(file)["x"] == "1"


def test_an_edited_file_is_read_as_text(tmp_path: Path) -> None:
    file = tmp_path / "session.json"
    backend = MockBackend()
    talk(backend, 3).save(file)
    saved = json.loads(file.read_text())
    nodes = saved["graph"]["nodes"]
    (text,) = [node for node in nodes if node.get("parts") == ["Question 0?"]]
    text["parts"] = ["Something else?"]
    file.write_text(json.dumps(saved))
    session = State.load(file, backend)
    _, usage = asked(session)
    assert session.messages()[1]["content"] == "Something else?"
    assert 0 < usage.cached_tokens < usage.prompt_tokens / 2


def test_the_same_text_saved_twice_has_its_path_once(tmp_path: Path) -> None:
    file = tmp_path / "session.json"
    backend = MockBackend()
    session = talk(backend, 2)
    session.save(file)
    session = State.load(file, backend)
    session.say("More?")
    session.save(file)
    graph = ir.Graph.from_json(json.dumps(json.loads(file.read_text())["graph"]))
    assert sum(isinstance(node, ir.Recalled) for node in graph.nodes) == 1
    State.load(file, backend).save(file)
    again = ir.Graph.from_json(json.dumps(json.loads(file.read_text())["graph"]))
    assert again.nodes == graph.nodes


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"program": "a"}'])
def test_another_file_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "other"
    file.write_bytes(data)
    with pytest.raises(InvalidProgram, match="no saved state"):
        State.load(file, MockBackend())


def test_a_path_outside_of_the_vocabulary_fails_its_node_alone(tmp_path: Path) -> None:
    file = tmp_path / "session.json"
    backend = MockBackend()
    talk(backend, 1).save(file)
    saved = json.loads(file.read_text())
    (recalled,) = [node for node in saved["graph"]["nodes"] if node["kind"] == "recalled"]
    recalled["path"]["tokens"][0] = 10**9
    file.write_text(json.dumps(saved))
    session = State.load(file, backend)
    with pytest.raises(ProgramError, match="outside of the vocabulary"):
        session.say("More?")
    assert asked(talk(backend, 1))[0]


def test_a_variable_without_a_json_form_is_named(tmp_path: Path) -> None:
    session = chat.start(backend=MockBackend())
    session["lock"] = object()
    with pytest.raises(InvalidRequest, match="'lock'"):
        session.save(tmp_path / "session.json")


def test_an_async_program_is_not_started() -> None:
    @function
    async def program(s: State) -> None:
        s += "a"

    with pytest.raises(InvalidProgram, match="async"):
        program.start(backend=MockBackend())


def test_the_recorder_counts_what_it_generated() -> None:
    with MockBackend():
        recorder: Recorder = talk(None, 3).recorder
        assert (recorder.num_generated, recorder.counts["answer"]) == (3, 3)
