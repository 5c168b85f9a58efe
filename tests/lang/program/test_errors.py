"""What goes wrong in a program, in process and on a server: the error names program, node, line, prompt and cause;
its siblings are cancelled, the engine lives, and every page is accounted for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest

from ramet import Engine, MockBackend, ProgramError, Remote, State, function, gen
from ramet.errors import (
    ConfigError,
    ContextOverflow,
    DeadlineExceeded,
    InvalidProgram,
    ProgramCancelled,
    RametError,
    UndefinedVariable,
)
from ramet.lang.backends.default import as_backend
from ramet.lang.graph import ir
from ramet.lang.graph.events import OnEvent
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.recording.state import State as ProgramState
from ramet.lang.running.output_types import TEXT
from ramet.runtime.models.load import LoadedModel


@pytest.fixture(scope="module")
def engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, num_kv_tokens=1 << 14, max_running_requests=16) as engine:
        yield engine


@pytest.fixture(params=["in process", "on a server"])
def backend(
    request: pytest.FixtureRequest, engine: Engine, serve: Callable[..., AbstractContextManager[Any]]
) -> Iterator[Any]:
    with ExitStack() as stack:
        if request.param == "in process":
            yield engine
        else:
            yield stack.enter_context(Remote(stack.enter_context(serve(engine)).url))


@pytest.fixture(autouse=True)
def the_engine_lives_and_no_page_is_lost(engine: Engine, backend: Any) -> Iterator[None]:
    yield
    alive = short.run(backend=backend)
    assert alive.error() is None
    assert len(alive["x"]) == 3
    deadline = time.monotonic() + 5
    while engine.stats()["num_running"] and time.monotonic() < deadline:
        time.sleep(0.005)
    engine.check_integrity()
    stats = engine.stats()
    assert stats["num_running"] == stats["num_waiting"] == 0
    assert stats["num_free_pages"] + stats["num_evictable_pages"] == stats["num_pages"]


@function(temperature=0, max_tokens=3, ignore_eos=True)
def short(s: State) -> None:
    s += "Still there? " + gen("x")


def line_of(error: ProgramError) -> int:
    assert error.source_line is not None
    file, _, line = error.source_line.rpartition(":")
    assert file.endswith("test_errors.py")
    return int(line)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [ir.Text(id=0, parent=1, parts=("a",), line="a.py:1"), ir.Text(id=1, parent=0, parts=("b",))],
            r"text node 0 \(a.py:1\) is part of a cycle: 0 -> 1 -> 0",
        ),
        (
            [ir.Text(id=0, parts=(ir.Ref(1),), line="a.py:1"), ir.Generate(id=1, line="a.py:2")],
            r"text node 0 \(a.py:1\) uses node 1 before it is generated",
        ),
    ],
    ids=["cycle", "used before it is generated"],
)
def test_a_graph_that_cannot_run_is_refused_with_node_and_line(
    nodes: list[ir.AnyNode], message: str, backend: Any
) -> None:
    session = as_backend(backend).start(ProgramOptions("raw"), lambda event: None)
    with pytest.raises(InvalidProgram, match=message) as raised:
        session.extend(ir.Graph(tuple(nodes)), is_last=True)
    session.cancel()
    assert raised.value.node == 0
    assert raised.value.source_line == "a.py:1"
    if isinstance(backend, Remote):  # who sends such a graph without asking first gets the same from the server
        with pytest.raises(InvalidProgram, match=message):
            backend.explain(ir.Graph(tuple(nodes)))


def test_a_variable_read_before_it_is_generated_is_named(backend: Any) -> None:
    @function
    def program(s: State) -> None:
        s += "Begin. "
        s += f"It was {s['answer']}." + gen("answer", max_tokens=4)

    with pytest.raises(UndefinedVariable, match="program: no variable 'answer'") as raised:
        program.run(backend=backend)
    assert raised.value.program == "program"


def test_an_argument_without_a_json_form_is_named_before_anything_is_sent(backend: Any) -> None:
    @function
    def program(s: State, what: object) -> None:
        s += f"{what}: " + gen("x", max_tokens=3)

    compiled = program.compile()
    with pytest.raises(InvalidProgram, match="argument 'what' of program has no JSON form"):
        compiled.run(what=object(), backend=backend)
    session = as_backend(backend).start(ProgramOptions("raw"), lambda event: None)
    graph = ir.Graph((ir.Argument(id=0, name="what"),), {"what": {1, 2}.__iter__()})
    with pytest.raises(InvalidProgram, match="argument 'what' has no JSON form"):
        graph.to_json()
    if not isinstance(backend, Engine):
        with pytest.raises(InvalidProgram, match="argument 'what' has no JSON form"):
            session.extend(graph)
    session.cancel()


def add_tool_call(s: ProgramState, tool: str) -> int:
    """A call of a tool at this place of the program."""
    return s.recorder.add(ir.ToolCall, tool=tool, arguments=('{"city": "Oslo"}',), name="weather")


def test_a_failing_tool_is_the_cause_and_its_siblings_are_cancelled(backend: Any) -> None:
    def weather(city: str) -> str:
        raise KeyError(f"no weather in {city}")

    @function(temperature=0, ignore_eos=True)
    def program(s: State) -> None:
        s += "What is the weather? "
        slow, asking = s.fork(2)
        slow += gen("slow", max_tokens=1900)
        add_tool_call(asking, "weather")
        asking += " so " + gen("plan", max_tokens=5)
        s.join(slow, asking)

    start_s = time.monotonic()
    state = program.run(backend=backend, tools={"weather": weather}, failures="keep")
    error = state.error()
    assert error is not None
    assert error.program == "program"
    assert isinstance(error.__cause__, KeyError)
    assert "no weather in Oslo" in str(error)
    assert error.node is not None
    assert isinstance(state.record.graph.nodes[error.node], ir.ToolCall)
    assert line_of(error) > 0
    assert error.prompt_tail == "What is the weather? "
    with pytest.raises(ProgramCancelled) as sibling:
        assert state["slow"]
    assert "cancelled because node" in str(sibling.value)
    assert "no weather in Oslo" in str(sibling.value)
    assert time.monotonic() - start_s < 5, "the sibling did not run to its end"


def test_a_prompt_that_does_not_fit_names_its_node_and_the_limit(backend: Any, engine: Engine) -> None:
    @function(temperature=0)
    def program(s: State) -> None:
        s += "x" * (engine.context_length + 1)
        s += gen("x", max_tokens=4)

    state = program.run(backend=backend, failures="keep")
    with pytest.raises(ProgramError) as raised:
        assert state["x"]
    error = raised.value
    assert isinstance(error.__cause__, ContextOverflow)
    assert error.prompt_tail == "x" * 200
    assert isinstance(state.record.graph.nodes[error.node or 0], ir.Generate)
    assert "test_errors.py" in str(error)


def test_a_cancelled_branch_fails_whoever_reads_it_and_nobody_else(backend: Any) -> None:
    @function(temperature=0, ignore_eos=True)
    def program(s: State) -> None:
        s += "Two ways. "
        left, right = s.fork(2)
        left += "Left: " + gen("x", max_tokens=1900)
        right += "Right: " + gen("y", max_tokens=5)
        s.set_var("right", str(right["y"]))
        left.cancel()
        s.join(left, right)

    state = program.run(backend=backend)
    assert len(state["right"]) == 5
    assert len(state["y"][0]) == 5
    with pytest.raises(ProgramCancelled, match="this branch was cancelled") as raised:
        assert state["x"]
    assert raised.value.program == "program"
    assert raised.value.prompt_tail == "Two ways. Left: "
    assert line_of(raised.value) > 0


def test_a_deadline_ends_every_branch(backend: Any) -> None:
    @function(temperature=0, ignore_eos=True)
    def program(s: State) -> None:
        branches = s.fork(3)
        branches += lambda i: f"{i} on and on: "
        branches += gen("x", max_tokens=1900)
        branches.join()

    start_s = time.monotonic()
    state = program.run(backend=backend, timeout_s=0.2, failures="keep")
    error = state.error()
    assert time.monotonic() - start_s < 3
    assert isinstance(error, DeadlineExceeded)
    assert isinstance(error, TimeoutError)
    assert error.program == "program"
    assert error.prompt_tail is not None
    assert error.prompt_tail.endswith("on and on: ")
    assert line_of(error) > 0


def test_a_deadline_holds_where_the_backend_is_silent() -> None:
    """What it finished before stays readable; the rest names node and line, and `run` itself raises nothing."""

    class Silent:
        cancelled = 0

        def start(self, options: ProgramOptions, on_event: OnEvent) -> Silent:
            self.on_event = on_event
            return self

        def extend(self, graph: ir.Graph, *, is_last: bool = False) -> None:
            for node in graph.nodes:
                if isinstance(node, ir.Text):
                    self.on_event(ir.NodeEvent(node.id, "done", text="said"))

        def cancel(self, nodes: object = None) -> None:
            self.cancelled += 1

        def provide(self, node: int, value: object = None, error: Exception | None = None) -> None: ...

        def finish(self) -> None: ...

    @function
    def program(s: State) -> None:
        s += "Never: " + gen("x")

    silent = Silent()
    state = program.run(backend=silent, timeout_s=0.05, failures="keep")
    error = state.error()
    assert isinstance(error, DeadlineExceeded)
    assert "did not answer" in str(error)
    assert (error.program, error.node) == ("program", 1)
    assert line_of(error) > 0
    assert silent.cancelled == 1
    silent.on_event(ir.NodeEvent(1, "done", text="too late", value="too late"))
    with pytest.raises(DeadlineExceeded):
        assert state["x"]


def test_a_constraint_that_cannot_be_compiled_is_the_cause(backend: Any) -> None:
    @function
    def program(s: State) -> None:
        s += "As JSON: " + gen("x", json_schema={"type": "string", "minLength": 9, "maxLength": 2})
        s += gen("y", regex=r"(a)\1")

    state = program.run(backend=backend, failures="keep")
    error = state.error()
    assert error is not None
    assert isinstance(error.__cause__, RametError)
    assert type(error.__cause__).__module__ == "ramet.errors"


def test_an_exception_of_the_program_itself_cancels_what_it_started(backend: Any) -> None:
    @function(max_tokens=1900, ignore_eos=True)
    def program(s: State) -> None:
        branches = s.fork(3)
        branches += gen("x")
        s.recorder.run.submit()
        raise ZeroDivisionError("of the program")

    with pytest.raises(ZeroDivisionError):
        program.run(backend=backend)


def test_run_raises_what_failed_unless_the_program_met_it_and_went_on(backend: Any) -> None:
    @function(temperature=0, max_tokens=3)
    def fails(s: State) -> None:
        s += "never read " + gen("x", regex="(")

    @function(temperature=0, max_tokens=3)
    def meets(s: State) -> None:
        branch = s.copy()
        branch += gen("x", regex="(")
        with pytest.raises(ProgramError, match="does not parse"):
            str(branch["x"])
        s += "and on " + gen("y")

    @function(temperature=0, max_tokens=3)
    def cancels(s: State) -> None:
        branch = s.copy()
        branch += "b" + gen("x")
        branch.cancel()
        s += "c" + gen("y")

    for run in (fails.run, fails.start, fails.compile().run):
        with pytest.raises(ProgramError, match="does not parse"):
            run(backend=backend)
    kept = fails.run(backend=backend, failures="keep")
    assert isinstance(kept.error(), ProgramError)
    assert meets.run(backend=backend)["y"]
    assert cancels.run(backend=backend)["y"]
    for run in (fails.run, fails.start, fails.compile().run):
        with pytest.raises(ConfigError, match="failures is 'loud', but must be one of raise, keep"):
            run(backend=backend, failures="loud")
    with pytest.raises(ConfigError, match="failures is 'loud'"):
        fails.run_batch([{}], backend=backend, failures="loud")


def test_rows_keep_their_failures_unless_they_are_to_be_raised_in_their_turn(backend: Any) -> None:
    @function(temperature=0, max_tokens=3)
    def program(s: State, pattern: str) -> None:
        s += "row " + gen("x", regex=pattern)

    rows = ["[a-z]", "(", "[0-9]"]
    assert [state.error() is None for state in program.run_batch(rows, backend=backend)] == [True, False, True]
    states = program.run_batch(rows, backend=backend, failures="raise", generator_style=True)
    assert next(states)["x"]
    with pytest.raises(ProgramError, match="does not parse"):
        next(states)


# Streams.


def test_a_stream_raises_the_error_of_any_node_in_the_end_unless_failures_are_kept() -> None:
    @function
    def program(s: State) -> None:
        fine, broken = s.fork(2)
        fine += "fine " + gen("x", max_tokens=3)
        broken += "bad " + gen("y")

    for options in ({}, {"failures": "raise"}):
        with (
            MockBackend(failures={"bad": RuntimeError("no luck")}) as bad,
            pytest.raises(ProgramError, match="no luck"),
        ):
            list(program.stream(backend=bad, **options))
        with (
            MockBackend(failures={"bad": RuntimeError("no luck")}) as bad,
            pytest.raises(ProgramError, match="no luck"),
        ):
            list(program.stream(backend=bad, var="y", **options))
    for var in (None, "y"):
        with MockBackend(failures={"bad": RuntimeError("no luck")}) as bad:
            stream = program.stream(backend=bad, failures="keep", var=var)
            assert bool(list(stream)) == (var is None)
            assert "no luck" in str(stream.state.error())
    with MockBackend() as fine, pytest.raises(ConfigError, match="failures is 'never'"):
        program.stream(backend=fine, failures="never")


def test_what_was_cancelled_with_a_failed_node_is_marked_otherwise() -> None:
    @function
    def program(s: State) -> None:
        fine, broken = s.fork(2)
        fine += "fine " + gen("x", max_tokens=500, ignore_eos=True)
        broken += "bad " + gen("y")

    with MockBackend(failures={"bad": RuntimeError("no luck")}, latency_s=0.001) as bad:
        state = program.run(backend=bad, failures="keep")
    shown = state.record._repr_html_()
    assert shown.index("cancelled") < shown.index("failed")
    assert "⊘" in str(state.explain())
    assert "✗" in str(state.explain())
    (cancelled,) = (node.id for node in state.record.graph.nodes if node.label == "x")
    with pytest.raises(ProgramCancelled, match=r"cancelled because node .* failed: no luck"):
        state.recorder.run.read(cancelled, TEXT, "test")
