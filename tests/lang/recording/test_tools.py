"""Tools: their schemas, and the loop in which a model calls them, on the scripted model."""

from __future__ import annotations

import asyncio
import datetime
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from ramet import MockBackend, Remote, State, Tool, ToolUse, function, gen, tool, use_backend
from ramet.errors import InvalidProgram, InvalidRequest, ProgramCancelled, ProgramError
from ramet.lang.graph.ir import Generate, Graph, NodeEvent, ToolCall, Tools
from ramet.lang.running.run import Run


def call(name: str, **arguments: Any) -> str:
    return '<tool_call>\n{"name": "' + name + '", "arguments": ' + json.dumps(arguments) + "}\n</tool_call>"


@tool
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first one
        b (int): the second one,
            which may be negative
    """
    return a + b


@tool
def capital(country: str) -> str:
    """The capital of a country."""
    return {"France": "Paris", "Japan": "Tokyo"}[country]


# Schemas.


def test_a_tool_is_its_signature_and_its_docstring() -> None:
    assert isinstance(add, Tool)
    assert (add.name, add.description, add.timeout_s) == ("add", "Add two numbers.", None)
    assert add.parameters == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "the first one"},
            "b": {"type": "integer", "description": "the second one, which may be negative"},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    assert add(2, b=3) == 5
    assert add.declaration()["function"]["name"] == "add"


def test_defaults_may_be_left_out_and_arguments_come_in_their_types() -> None:
    @dataclass
    class Place:
        town: str
        zip_code: int = 0

    def visit(
        place: Place, day: datetime.date, mode: Literal["car", "train"] = "train", *, hours: float | None = None
    ) -> str:
        """Plan a visit.

        :param day: when
        """
        return f"{place.town} {day.year} {mode} {hours}"

    # the annotations of a function inside of a function are looked up where its class is
    visit.__annotations__.update(place=Place, day=datetime.date)
    made = tool(name="plan", timeout_s=3)(visit)
    assert made.name == "plan"
    assert made.timeout_s == 3
    assert made.parameters["required"] == ["place", "day"]
    assert made.parameters["properties"]["day"]["description"] == "when"
    assert "title" not in json.dumps(made.parameters)
    found = made.read({"place": {"town": "Bergen"}, "day": "2026-05-17"})
    assert found == {"place": Place("Bergen"), "day": datetime.date(2026, 5, 17)}
    assert made(**found) == "Bergen 2026 train None"
    with pytest.raises(InvalidRequest, match=r"tool 'plan' was called with a bad place.town"):
        made.read({"place": {"town": 3}, "day": "2026-05-17"})


def test_functions_without_a_schema_are_refused() -> None:
    def untyped(x) -> None:  # type: ignore[no-untyped-def]
        ...

    def variadic(*x: int) -> None: ...

    def strange(x: threading.Lock) -> None: ...

    strange.__annotations__["x"] = type(threading.Lock())
    for bad, message in ((untyped, "needs a type"), (variadic, "no model can give by name"), (strange, "strange")):
        with pytest.raises(InvalidRequest, match=message):
            tool(bad)
    with pytest.raises(InvalidRequest, match="must match"):
        tool(name="two words")(lambda: 1)
    with pytest.raises(InvalidRequest, match="must be above 0"):
        tool(timeout_s=0)(capital.function)


# The loop.


@pytest.fixture
def backend() -> Iterator[MockBackend]:
    script = {
        "capital of France?": call("capital", country="France"),
        "Paris": "It is Paris.",
        "2 + 3 and 4 + 5?": call("add", a=2, b=3) + "\n" + call("add", a=4, b=5),
        "tool\n9": "5 and 9.",
        "Hello": "Hi!",
    }
    with MockBackend(script) as mock:
        yield mock
    mock.engine.shutdown()


@function(temperature=0, max_tokens=200)
def ask(s: State, /, question: str, **options: Any) -> Any:
    s.user(question)
    return s.call_tools([capital, add], **options)


def test_the_model_calls_a_tool_and_reads_its_result(backend: MockBackend) -> None:
    state = ask.run(question="The capital of France?")
    assert state["answer"] == state.result == "It is Paris."
    assert state["calls"] == [ToolUse("capital", {"country": "France"}, "Paris")]
    messages = state.messages()
    assert [m["role"] for m in messages[-3:]] == ["assistant", "tool", "assistant"]
    assert messages[-2]["content"] == "Paris"
    assert messages[-3]["content"] == call("capital", country="France")
    assert [stage.why for stage in state.record.stages] == ["which tools the model calls"] * 2


def test_an_answer_without_calls_ends_the_loop(backend: MockBackend) -> None:
    state = ask.run(question="Hello")
    assert state["answer"] == "Hi!"
    assert state["calls"] == []


def test_several_calls_of_one_message_run_at_once() -> None:
    both = threading.Barrier(2, timeout=10)

    @tool
    def meet(who: str) -> str:
        both.wait()
        return f"{who} is here"

    @function(temperature=0)
    def program(s: State) -> None:
        s.user("Who?")
        s.call_tools([meet])

    script = {"Who?": call("meet", who="Ann") + "\n" + call("meet", who="Bob"), "Bob is here": "Both."}
    with use_backend(MockBackend(script)):
        state = program.run()
    assert state["answer"] == "Both."
    assert [use.result for use in state["calls"]] == ["Ann is here", "Bob is here"]
    assert [m["content"] for m in state.messages() if m["role"] == "tool"] == ["Ann is here", "Bob is here"]


def test_after_max_steps_the_model_must_answer() -> None:
    seen: list[int] = []

    @tool
    def again(n: int) -> int:
        seen.append(n)
        return n

    @function(temperature=0, max_tokens=100)
    def program(s: State) -> None:
        s.user("Go.")
        s.call_tools([again], max_steps=3)

    with use_backend(MockBackend(lambda prompt: call("again", n=1))):
        state = program.run()
    assert len(seen) == 3
    assert "<tool_call>" not in str(state["answer"])
    assert "<tool_call>" not in state.messages()[-1]["content"]


def test_a_tool_can_be_asked_for(backend: MockBackend) -> None:
    state = ask.run(question="Hello", choice="add", failures="keep")
    assert [use.name for use in state["calls"]] == ["add"]
    state = ask.run(question="Hello", choice="required", on_error="report")
    assert len(state["calls"]) >= 1
    with pytest.raises(InvalidRequest, match="choice is 'sub'"):
        ask.run(question="Hello", choice="sub", failures="keep")
    with pytest.raises(InvalidRequest, match="max_steps is 0"):
        ask.run(question="Hello", max_steps=0, failures="keep")


def test_a_failing_tool_ends_the_program_with_its_place_and_its_cause() -> None:
    states: list[State] = []

    @function(temperature=0)
    def program(s: State) -> None:
        states.append(s)
        s.user("The capital of Spain?")
        a, b = s.fork(2)
        b += "Once" + gen("story", max_tokens=5000)
        a.call_tools([capital])

    slow = MockBackend({"of Spain?": call("capital", country="Spain"), "Once": "upon " * 900}, latency_s=0.002)
    with use_backend(slow), pytest.raises(ProgramError, match=r"tool 'capital'.* failed: KeyError: 'Spain'") as raised:
        program.run()
    error = raised.value
    assert isinstance(error.__cause__, KeyError)
    assert error.program == "program"
    assert error.node is not None
    assert isinstance(states[0].record.graph.nodes[error.node], ToolCall)
    assert error.source_line is not None
    assert error.source_line.startswith("tests/lang/recording/test_tools.py:")
    assert error.prompt_tail is not None
    assert "</tool_call>" in error.prompt_tail
    found = states[0].error()
    assert found is not None
    assert found.node == error.node
    story = next(n for n in states[0].record.graph.nodes if isinstance(n, Generate) and n.name == "story")
    assert isinstance(states[0].recorder.run.error_of(story.id), ProgramCancelled)
    assert slow.engine.submit("still there").result().text


def test_a_failing_tool_can_be_reported_to_the_model() -> None:
    script = {"of Spain?": call("capital", country="Spain"), "KeyError: 'Spain'": "I don't know."}
    with use_backend(MockBackend(script)):
        state = ask.run(question="The capital of Spain?", on_error="report")
    assert state["answer"] == "I don't know."
    assert state["calls"][0].result == {"error": "KeyError: 'Spain'"}
    assert state.error() is None


def test_a_tool_that_takes_too_long_is_given_up() -> None:
    release = threading.Event()

    @tool(timeout_s=0.05)
    def hangs(x: int) -> int:
        release.wait(20)
        return x

    @tool(timeout_s=0.05)
    async def sleeps(x: int) -> int:
        await asyncio.sleep(20)
        return x

    @function(temperature=0)
    def program(s: State, chosen: Tool) -> None:
        s.user("Go.")
        s.call_tools([chosen], on_error="report")

    start_s = time.monotonic()
    for chosen in (hangs, sleeps):
        with use_backend(MockBackend({"Go.": call(chosen.name, x=1), "did not answer": "Too late."})):
            state = program.run(chosen=chosen)
        assert state["answer"] == "Too late."
        assert "within 0.05 s" in state["calls"][0].result["error"]
    release.set()
    assert time.monotonic() - start_s < 10


def test_async_tools_run_on_the_programs_loop_beside_other_branches() -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    met: list[str] = []

    @tool
    async def look(what: str) -> str:
        loops.append(asyncio.get_running_loop())
        met.append(what)
        while len(met) < 2:  # goes on only when the other branch's tool runs as well
            await asyncio.sleep(0.001)
        return f"seen {what}"

    @function(temperature=0)
    async def program(s: State) -> None:
        s.system("Look.")

        async def one(branch: State, what: str) -> None:
            branch.user(f"Find {what}!")
            await branch.acall_tools([look])

        a, b = s.fork(2)
        await asyncio.gather(one(a, "tea"), one(b, "milk"))
        s.join(a, b)

    script = {"Find tea!": call("look", what="tea"), "Find milk!": call("look", what="milk"), "seen": "Found."}
    with use_backend(MockBackend(script)):
        state = program.run()
    assert state["answer"] == ["Found.", "Found."]
    assert len(set(map(id, loops))) == 1


def test_the_loops_of_many_branches_run_together() -> None:
    num = 20
    all_called = threading.Barrier(num, timeout=20)

    @tool
    def square(n: int) -> int:
        all_called.wait()  # no loop waits for another one's tool
        return n * n

    @function(temperature=0)
    def program(s: State) -> None:
        s.use_tools([square])
        branches = s.map(range(num), lambda branch, n: branch.user(f"<{n}> squared?"))
        answers = branches.call_tools()
        assert len(answers) == num
        branches.join()

    def script(prompt: str) -> str:
        n = int(prompt.partition("> squared")[0].rpartition("<")[2])
        return (
            f"It is {n * n}."
            if prompt.rstrip().endswith("assistant") and f"\n{n * n}" in prompt
            else call("square", n=n)
        )

    with use_backend(MockBackend(script)):
        state = program.run()
    assert state["answer"] == [f"It is {n * n}." for n in range(num)]


def test_results_come_as_json_and_what_has_no_json_form_is_an_error() -> None:
    @dataclass
    class Found:
        when: datetime.date
        places: list[str]

    @tool
    def search(what: str) -> Any:
        return Found(datetime.date(2026, 1, 2), ["a", "b"]) if what == "tea" else object()

    @function(temperature=0)
    def program(s: State, what: str) -> None:
        s.user(f"Find {what}!")
        s.call_tools([search])

    script = {"Find tea!": call("search", what="tea"), "Find it!": call("search", what="it"), "2026-01-02": "Then."}
    with use_backend(MockBackend(script)):
        state = program.run(what="tea")
        assert state["calls"][0].result == {"when": "2026-01-02", "places": ["a", "b"]}
        assert '{"when":"2026-01-02","places":["a","b"]}' in state.text()
        with pytest.raises(ProgramError, match="has no JSON form"):
            program.run(what="it")


def test_tools_are_told_before_the_first_message_and_described_in_one_later() -> None:
    @function(tools=[capital])
    def first(s: State) -> None:
        s.user("Hello")
        s.call_tools()

    @function
    def late(s: State) -> None:
        s.user("Hello")
        s.call_tools([capital])
        s.user("More")
        s.call_tools()

    with use_backend(MockBackend({"Hello": "Hi!", "More": "No."})):
        early, afterwards = first.run(), late.run()
    for state in (early, afterwards):
        assert state.text().count("The capital of a country.") == 1
    assert early.text().index("The capital of") < early.text().index("Hello")
    assert afterwards.text().index("The capital of") > afterwards.text().index("Hello")
    assert afterwards["answer"] == "No."
    nodes = early.record.graph.nodes
    assert isinstance(nodes[0], Tools)
    assert Graph.from_json(early.record.graph.to_json()).nodes == nodes
    wire = next(node for node in nodes if isinstance(node, Generate))
    assert wire.type == "tools"
    assert wire.constraint is not None
    assert '"format"' not in wire.constraint.source


def test_traced_and_staged_runs_of_a_loop_are_the_same(backend: MockBackend) -> None:
    texts = {ask.run(question="2 + 3 and 4 + 5?", stage=stage).text() for stage in ("needed", "always")}
    assert len(texts) == 1
    assert texts.pop().count("<tool_call>") >= 2


def test_misuse_is_said_where_it_is_written(backend: MockBackend) -> None:
    @function
    def inside(s: State) -> None:
        with s.assistant():
            s.call_tools([add])

    @function
    def none(s: State) -> None:
        s.call_tools()

    @function
    def twice(s: State) -> None:
        s.use_tools([add])
        s.use_tools([tool(name="add")(capital.function)])

    with pytest.raises(InvalidProgram, match="assistant message is open"):
        inside.run()
    with pytest.raises(InvalidProgram, match="has no tools"):
        none.run()
    with pytest.raises(InvalidProgram, match="another tool of the name 'add'"):
        twice.run()
    with pytest.raises(InvalidRequest, match="two tools have the name"):
        ask.run(question="Hello", backend=backend) if False else function(tools=[add, add])(lambda s: None)
    with pytest.raises(InvalidProgram, match="declares tools that are no JSON list"):
        Graph.from_json(Graph((Tools(id=0, tools="[3]"),)).to_json())


def test_a_plan_ends_where_the_model_may_call_a_tool(backend: MockBackend) -> None:
    plan = ask.explain(question="The capital of France?")
    assert not plan.is_complete
    assert plan.stages[0].why == "which tools the model calls"
    assert plan.nodes[0].prompt.is_exact
    state = ask.run(question="The capital of France?")
    event = state.record.events[plan.nodes[0].node]
    assert event.usage is not None
    assert event.usage.prompt_tokens == plan.nodes[0].prompt.at_most
    drawing = state.graph()
    assert "capital" in drawing.mermaid()


# Tools that start while their message is being written.


def _held_until(monkeypatch: pytest.MonkeyPatch, started: threading.Event) -> None:
    """Hold back the end of every message with calls until a tool has started."""
    on_event = Run.on_event

    def held(self: Run, event: NodeEvent) -> threading.Event | None:
        if event.kind == "done" and isinstance(event.value, dict) and event.value.get("calls"):
            assert started.wait(20), "no tool started before its message ended"
        return on_event(self, event)

    monkeypatch.setattr(Run, "on_event", held)


def _starting(started: threading.Event, numbers: list[int]) -> Tool:
    @tool
    def double(number: int) -> int:
        """Twice as much."""
        numbers.append(number)
        started.set()
        return 2 * number

    return double


TWO_CALLS = f"Wait. {call('double', number=1)}\n{call('double', number=2)}"


@function
def doubling(s: State, double: Tool, on_error: Any) -> None:
    s.user("Double 1 and 2.")
    s.call_tools([double], on_error=on_error)


def test_a_tool_starts_when_its_arguments_close(monkeypatch: pytest.MonkeyPatch) -> None:
    started, numbers = threading.Event(), list[int]()
    _held_until(monkeypatch, started)
    backend = MockBackend([TWO_CALLS, "2 and 4"])
    state = doubling.run(_starting(started, numbers), "raise", backend=backend)
    assert sorted(numbers) == [1, 2], "each call is made once"
    assert [use.result for use in state["calls"]] == [2, 4]
    assert state["answer"] == "2 and 4"


def test_a_tool_starts_early_on_a_server_too(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started, numbers = threading.Event(), list[int]()
    _held_until(monkeypatch, started)
    with MockBackend([TWO_CALLS, "2 and 4"]) as backend, serve(backend.engine) as served, Remote(served.url) as remote:
        state = doubling.run(_starting(started, numbers), "raise", backend=remote)
    assert sorted(numbers) == [1, 2]
    assert [use.result for use in state["calls"]] == [2, 4]


def test_an_async_tool_starts_early_on_its_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    started, loops = threading.Event(), list[asyncio.AbstractEventLoop]()
    _held_until(monkeypatch, started)

    @tool
    async def double(number: int) -> int:
        """Twice as much."""
        loops.append(asyncio.get_running_loop())
        started.set()
        return 2 * number

    @function
    async def program(s: State) -> None:
        s.user("Double 1 and 2.")
        await s.acall_tools([double])
        loops.append(asyncio.get_running_loop())

    state = asyncio.run(program.arun(backend=MockBackend([TWO_CALLS, "2 and 4"])))
    assert len(loops) == 3
    assert len(set(map(id, loops))) == 1
    assert [use.result for use in state["calls"]] == [2, 4]


def test_a_program_that_waits_for_each_generation_starts_no_tool_early() -> None:
    numbers: list[int] = []
    backend = MockBackend([TWO_CALLS, "2 and 4"])
    state = doubling.run(_starting(threading.Event(), numbers), "raise", backend=backend, stage="always")
    assert not any(isinstance(node, Generate) and node.tells_calls for node in state.record.graph.nodes)
    assert [use.result for use in state["calls"]] == [2, 4]


def test_an_error_of_a_tool_that_started_early_is_where_it_was() -> None:
    @tool
    def double(number: int) -> int:
        """Twice as much."""
        raise ValueError(f"no {number}")

    with pytest.raises(ProgramError, match=r"tool 'double'.*ValueError: no 1"):
        doubling.run(double, "raise", backend=MockBackend([TWO_CALLS, "2 and 4"]))
    state = doubling.run(double, "report", backend=MockBackend([TWO_CALLS, "2 and 4"]))
    assert [use.result for use in state["calls"]] == [{"error": f"ValueError: no {number}"} for number in (1, 2)]


def test_a_call_of_a_message_that_was_cut_off_is_forgotten() -> None:
    started, numbers = threading.Event(), list[int]()
    cut = MockBackend([TWO_CALLS])
    num_tokens = len(cut.engine.tokenizer.encode(TWO_CALLS))

    @function
    def program(s: State) -> None:
        s.user("Double 1 and 2.")
        s.call_tools([_starting(started, numbers)], max_tokens=num_tokens - 5)

    with pytest.raises(ProgramError, match="cut by max_tokens"):
        program.run(backend=cut)
