"""Programs on the scripted backend: appending, roles, branches, values, staging, errors, running and streaming."""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest

from ramet import MockBackend, assistant, function, gen, select, starts_with, system, use_backend, user
from ramet.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidProgram,
    InvalidRequest,
    ProgramCancelled,
    ProgramError,
    UndefinedVariable,
)
from ramet.lang.graph.ir import Argument, Generate, Graph, NodeEvent, Ref, Text
from ramet.lang.recording.state import State
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer


@pytest.fixture
def backend() -> Iterator[MockBackend]:
    script = {"name?": "Ann", "age?": "41", "colour?": "red", "long?": "one two three four five"}
    with MockBackend(script, tokenizer=ByteTokenizer()) as mock:
        yield mock
    mock.engine.shutdown()


def eventually(check: Callable[[], bool]) -> bool:
    """True once `check` holds; what other threads do may take a moment."""
    deadline = time.monotonic() + 5
    while not check() and time.monotonic() < deadline:
        time.sleep(0.005)
    return check()


# Texts, values and roles.


def test_texts_and_generations_are_written_in_order(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "name? "
        s += gen("name")
        s += ["; ", "age? " + gen("age", int) + "."]

    state = program.run()
    assert state.text() == "name? Ann; age? 41."
    assert (state["name"], state["age"]) == ("Ann", 41)
    assert state.variables == {"name": "Ann", "age": 41}


def test_a_generated_value_in_an_fstring_is_a_data_edge_not_a_read(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "name? " + gen("name")
        s += f"\nDear {s['name']:>5}, " + s["name"] + "!"

    state = program.run()
    assert state.text() == "name? Ann\nDear   Ann, Ann!"
    assert state.record.stages == ()
    texts = [node.parts for node in state.record.graph.nodes if isinstance(node, Text)]
    assert texts[1] == ("\nDear ", Ref(1, (), ">5"), ", ", Ref(1), "!")


def test_a_field_of_a_structured_value_is_a_data_edge(backend: MockBackend) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}

    @function
    def program(s: State) -> None:
        s += "trip? " + gen("trip", schema, regex=r"\{.*\}")
        s += f" {s['trip']['city']} for {s['trip']['days']} days"

    with use_backend(MockBackend({"trip?": '{"city": "Rome", "days": 3}'})):
        state = program.run()
    assert state.text().endswith(" Rome for 3 days")
    assert state.record.stages == ()
    assert state["trip"] == {"city": "Rome", "days": 3}


def test_needing_a_value_in_python_stages_and_says_where(backend: MockBackend) -> None:
    @function
    def program(s: State) -> str:
        s += "colour? " + gen("colour")
        if s["colour"] == "red":
            s += " name? " + gen("name")
        return f"{s['colour']} {len(s['colour'])} {s['colour'].upper()}"

    state = program.run()
    assert state.text() == "colour? red name? Ann"
    (stage,) = state.record.stages
    assert stage.why == "=="
    assert stage.line.startswith("tests/lang/program/test_program.py:")
    assert state.result == "red 3 RED"


def test_values_behave_like_what_they_stand_for(backend: MockBackend) -> None:
    checks: dict[str, bool] = {}

    @function
    def program(s: State) -> None:
        s += "age? " + gen("age", int)
        s += "name? " + gen("name")
        age, name = s["age"], s["name"]
        checks["int"] = int(age) == 41
        checks["arithmetic"] = (age + 1, 1 + age, age * 2, 100 - age, age / 2, age // 2, age % 2, -age, abs(age)) == (
            (42, 42, 82, 59, 20.5, 20, 1, -41, 41)
        )
        checks["order"] = 40 < age <= 41 < 42 and not age > 41 and age != 40
        checks["index"] = list(range(50))[age] == 41
        checks["text"] = str(name) == "Ann" and "nn" in name and list(name) == ["A", "n", "n"] and name[0] == "A"
        checks["hash"] = {name: 1}["Ann"] == 1
        checks["bool"] = bool(age) and bool(name)
        checks["regex"] = re.match("A", str(name)) is not None
        checks["float"] = float(age) == 41.0 and round(age) == 41
        checks["value"] = name.value == "Ann"
        checks["percent"] = "%s is %d" % (name, age) == "Ann is 41"  # noqa: UP031
        checks["repr"] = re.search("‹Value of name›", repr(name)) is not None

    program.run()
    assert all(checks.values()), checks


@pytest.mark.parametrize("stage", ["needed", "always"])
def test_a_list_of_values_in_text_is_a_list_of_what_was_generated(backend: MockBackend, stage: str) -> None:
    @function
    def program(s: State) -> None:
        branches = s.fork(2)
        branches += ["colour?", "name?"]
        branches += gen("x", str)
        branches.join()
        s += f"{s['x']} {s['x'][1]!r} { ({'a': s['x'][0]}) }"

    state = program.run(stage=stage)
    assert state.text() == "['red', 'Ann'] 'Ann' {'a': 'red'}"
    if stage == "needed":
        assert not state.record.stages


def test_values_are_put_into_text_on_several_threads() -> None:
    switch_s = sys.getswitchinterval()

    @function
    def program(s: State) -> None:
        branches = s.fork(8)
        branches += lambda i: f"colour {i}?" + gen("x", max_tokens=1)

        def append(branch: State, other: State) -> None:
            for _ in range(50):
                branch.append(f"{other['x']}")

        pairs = zip(branches, [*branches[1:], branches[0]], strict=True)
        threads = [threading.Thread(target=append, args=pair) for pair in pairs]
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(switch_s)
        branches.join(mode="append")

    with MockBackend({f"colour {i}?": str(i) for i in range(8)}) as mock:
        text = program.run().text()
    mock.engine.shutdown()
    assert all(f"colour {i}?{i}" + str((i + 1) % 8) * 50 in text for i in range(8))


def test_roles_as_blocks_calls_and_descriptions_give_the_same_messages(backend: MockBackend) -> None:
    @function
    def blocks(s: State) -> None:
        with s.system():
            s += "Be brief."
        with s.user():
            s += "name?"
        with s.assistant():
            s += gen("name")

    @function
    def calls(s: State) -> None:
        s.system("Be brief.")
        s.user("name?")
        s.assistant(gen("name"))

    @function
    def descriptions(s: State) -> None:
        s += system("Be brief.")
        s += user("name?") + assistant(gen("name"))

    states = [program.run() for program in (blocks, calls, descriptions)]
    assert len({state.text() for state in states}) == 1
    assert states[0].messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "name?"},
        {"role": "assistant", "content": "Ann"},
    ]


def test_a_description_in_an_fstring_is_generated_in_its_place(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += f"name? {gen('name')}, colour? {gen('colour')}."

    assert program.run().text() == "name? Ann, colour? red."


def test_nested_roles_are_refused(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        with s.user(), s.assistant():
            s += "x"

    with pytest.raises(InvalidProgram, match="assistant message begins inside of a user message"):
        program.run()


def test_a_variable_written_again_gives_the_latest_value() -> None:
    @function
    def program(s: State) -> None:
        for _ in range(3):
            s += "n: " + gen("n") + "\n"

    with use_backend(MockBackend(["1", "2", "3"])):
        state = program.run()
    assert state["n"] == "3"
    assert [n.name for n in state.record.graph.nodes if isinstance(n, Generate)] == ["n", "n#2", "n#3"]


def test_var_scope_keeps_all_text_of_its_block(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "before "
        with s.var_scope("all"):
            s += "name? " + gen("name")
        s += " after"
        s.set_var("note", 7)

    state = program.run()
    assert state["all"] == "name? Ann"
    assert state["note"] == 7
    assert "note" in state
    assert state.get("missing", 1) == 1


# Branches.


def test_branches_are_joined_in_their_order(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "Plan. "
        branches = s.fork(3)
        branches += lambda i: f"Way {i}: "
        branches += gen("way")
        branches += ["a", "b", "c"]
        branches.join()
        s += "\n".join(f"- {way}" for way in s["way"])

    state = program.run()
    assert len(state["way"]) == 3
    assert state.text() == "Plan. " + "\n".join(f"- {way}" for way in state["way"])
    assert state.record.stages == ()


def test_branches_can_be_unpacked_indexed_copied_and_appended() -> None:
    @function
    def program(s: State) -> None:
        s += "Start."
        a, b = s.fork(2)
        a += "A" + gen("x")
        b += "B" + gen("x")
        with s.copy() as c:
            c += "C" + gen("y")
        s.join(a, [b], mode="append")
        s["c"] = c["y"]
        branches = s.fork(2)
        branches[0] += "!"
        assert len(branches[0:1]) == 1

    with use_backend(MockBackend({"StartA": "", ".A": "1", ".B": "2", ".C": "3"})):
        state = program.run()
    assert state.text() == "Start.A1B2"
    assert state["x"] == ["1", "2"]
    assert state["c"] == "3"


def test_a_branch_forked_inside_of_a_message_may_begin_the_next_one(backend: MockBackend) -> None:
    @function
    def program(s: State) -> list[dict[str, str]]:
        s.user("hello")
        with s.assistant():
            a, b = s.fork(2)
            a += "first"
            with a.user():
                a += "name?"
            a += assistant(gen("name"))
            b += "second"
            s += "done"
        return a.messages()

    state = program.run()
    assert [m["content"] for m in state.result] == ["hello", "first", "name?", "Ann"]
    assert [m["content"] for m in state.messages()] == ["hello", "done"]


def test_every_branch_of_a_seeded_run_has_its_own_seed_and_runs_repeat(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "Say: "
        branches = s.fork(4)
        branches += gen("x", temperature=1)
        branches.join()

    one, two = program.run(seed=3)["x"], program.run(seed=3, stage="always")["x"]
    assert one == two
    assert len(set(one)) > 1
    assert program.run(seed=4)["x"] != one


def test_select_returns_probabilities_that_sum_to_one_and_takes_values_as_choices(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        a, b = s.fork(2)
        a += "name? " + gen("x")
        b += "colour? " + gen("x")
        s += "The best is "
        s += select("best", [a["x"], b["x"], "neither"])

    state = program.run()
    meta = state.meta("best")
    assert abs(sum(meta["probs"]) - 1) < 1e-12
    assert state["best"] == ["Ann", "red", "neither"][meta["index"]]
    assert state.record.stages == ()


# Calling programs from programs.


def test_a_program_called_with_a_state_becomes_a_part_of_it(backend: MockBackend) -> None:
    @function(max_tokens=2)
    def ask(s: State, what: Any) -> Any:
        s += f"{what}? " + gen("answer")
        return s["answer"]

    @function
    def program(s: State) -> None:
        first = ask(s, "name")
        s += f" is {first}. "
        ask(s, what="colour")

    state = program.run()
    assert state.text() == "name? An is An. colour? re"
    assert state.record.stages == ()


def test_a_program_run_inside_of_another_gets_read_values(backend: MockBackend) -> None:
    @function
    def inner(s: State, topic: str) -> None:
        assert isinstance(topic, str)
        s += f"About {topic}: name? " + gen("name")

    @function
    def outer(s: State) -> None:
        s += "colour? " + gen("colour")
        one = inner.run(topic=s["colour"])
        two = inner.run(f"deep {s['colour']}")
        s += one.text() + two.text()

    assert outer.run().text() == "colour? redAbout red: name? AnnAbout deep red: name? Ann"


def test_recursion_loops_and_try_work(backend: MockBackend) -> None:
    @function
    def count(s: State, n: int) -> None:
        if n:
            s += f"{n} name? " + gen("name")
            count(s, n - 1)

    assert count.run(3).text() == "3 name? Ann2 name? Ann1 name? Ann"

    @function
    def careful(s: State) -> None:
        side = s.copy()
        side += "bad " + gen("x")
        try:
            s += str(side["x"])
        except ProgramError:
            s += "name? " + gen("name")

    with use_backend(MockBackend({"name?": "Ann"}, failures={"bad": RuntimeError("no")})):
        assert careful.run().text() == "name? Ann"


# Async programs.


def test_an_async_program_awaits_values_and_gathers_branches(backend: MockBackend) -> None:
    @function
    async def program(s: State) -> int:
        async def side(branch: State, what: str) -> int:
            branch += f"{what}? " + gen("x")
            return len(await branch["x"])

        a, b = s.fork(2)
        lengths = await asyncio.gather(side(a, "name"), side(b, "colour"))
        s.join(a, b)
        s += f"{s['x'][0]} and {s['x'][1]}"
        return sum(lengths)

    state = program.run()
    assert state.text() == "Ann and red"
    assert state.result == 6


def test_hundreds_of_async_programs_wait_on_one_loop_without_threads(backend: MockBackend) -> None:
    @function
    async def program(s: State, i: int) -> str:
        s += f"{i} name? " + gen("name")
        name = str(await s["name"])
        s += " colour? " + gen("colour")
        return name

    async def main() -> list[State]:
        return await asyncio.gather(*(program.arun(i=i) for i in range(300)))

    before = threading.active_count()
    states = asyncio.run(main())
    assert threading.active_count() <= before + 2
    assert {state.result for state in states} == {"Ann"}
    assert states[7].text() == "7 name? Ann colour? red"


def test_thousands_of_branches_are_awaited_in_one_program(backend: MockBackend) -> None:
    @function
    async def program(s: State) -> int:
        async def one(branch: State) -> int:
            branch += "age? " + gen("age", int)
            return int(await branch["age"])

        return sum(await asyncio.gather(*(one(branch) for branch in s.fork(2000))))

    assert program.run().result == 2000 * 41


def test_a_sync_program_runs_on_an_event_loop(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "name? " + gen("name")
        s += str(len(s["name"]))

    assert asyncio.run(program.arun()).text() == "name? Ann3"


# Batches and streams.


def test_a_batch_gives_states_in_the_order_of_its_rows(backend: MockBackend) -> None:
    @function
    def program(s: State, what: str, n: int = 0) -> None:
        s += f"{n} {what}? " + gen("x")

    rows: list[Any] = [{"what": "name", "n": 1}, ("colour",), "age"]
    states = program.run_batch(rows, n=5, progress_bar=True)
    assert [state.text() for state in states] == ["1 name? Ann", "5 colour? red", "5 age? 41"]
    lazily = program.run_batch(rows, n=5, generator_style=True)
    assert next(lazily).text() == "1 name? Ann"
    assert len(list(lazily)) == 2


def test_one_rows_error_stays_in_its_state() -> None:
    @function
    def program(s: State, x: int) -> None:
        s += f"row {x} " + gen("y")
        if x == 2:
            raise ValueError("two")

    with use_backend(MockBackend(failures={"row 1": RuntimeError("no")})):
        zero, one, two = program.run_batch([0, 1, 2])
    assert zero["y"]
    with pytest.raises(ProgramError, match="no"):
        one["y"]
    with pytest.raises(ValueError, match="two"):
        two.wait()


def test_a_batch_of_async_programs_runs(backend: MockBackend) -> None:
    @function
    async def program(s: State, i: int) -> None:
        s += f"{i} name? " + gen("name")
        await s["name"]

    assert [state["name"] for state in program.run_batch(range(5))] == ["Ann"] * 5


def test_a_stream_gives_one_variables_text_as_it_comes(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "name? " + gen("name") + " long? " + gen("long") + select("pick", ["a", "b"])

    stream = program.stream(var="long")
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == "one two three four five" == stream.state["long"]
    assert "".join(program.stream(var="pick")) in ("a", "b")
    events = list(program.stream())
    assert all(isinstance(event, NodeEvent) for event in events)
    assert events[-1].kind == "done"


def test_a_stream_on_an_event_loop(backend: MockBackend) -> None:
    @function
    async def program(s: State) -> None:
        s += "long? " + gen("long")
        await s["long"]

    @function
    def plain(s: State) -> None:
        s += "long? " + gen("long")
        s += str(len(s["long"]))

    async def main(chosen: Any) -> list[str]:
        return [piece async for piece in chosen.astream(var="long")]

    for chosen in (program, plain):
        assert "".join(asyncio.run(main(chosen))) == "one two three four five"
    assert "".join(program.stream(var="long")) == "one two three four five"


def test_leaving_a_stream_early_cancels_the_program() -> None:
    @function
    def program(s: State) -> None:
        s += "long? " + gen("long")

    slow = MockBackend({"long?": "a b c d e f g h i j"}, latency_s=0.02)
    stream = program.stream(var="long", backend=slow)
    iterator = iter(stream)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]  # it is a generator
    assert eventually(lambda: slow.stats().num_cancelled == 1)
    slow.engine.shutdown()


# Errors.


def test_a_failure_is_raised_where_the_value_is_read_with_node_line_and_cause() -> None:
    boom = RuntimeError("no luck")

    @function
    def program(s: State) -> None:
        s += "some text then bad " + gen("x")

    state = program.run(backend=MockBackend(failures={"bad": boom}), failures="keep")
    with pytest.raises(ProgramError) as raised:
        state["x"]
    error = raised.value
    assert error.__cause__ is boom
    assert error.program == "program"
    assert error.node == 1
    assert error.source_line is not None
    assert error.source_line.startswith("tests/lang/program/test_program.py:")
    assert error.prompt_tail is not None
    assert error.prompt_tail.endswith("then bad ")
    assert "no luck" in str(error)
    with pytest.raises(ProgramError):
        state.text()
    assert isinstance(state.error(), ProgramError)


def test_siblings_of_a_failed_branch_are_cancelled() -> None:
    @function
    def program(s: State) -> None:
        a, b = s.fork(2)
        a += "bad " + gen("x")
        b += "good " + gen("y")
        s.join(a, b)

    with use_backend(MockBackend({"good": "a b c d"}, failures={"bad": RuntimeError("no")}, latency_s=0.01)) as slow:
        state = program.run(failures="keep")
        with pytest.raises(ProgramCancelled, match="because node"):
            state["y"]
        error = state.error()
        assert error is not None
        assert not isinstance(error, ProgramCancelled)
        assert isinstance(slow, MockBackend)
        assert eventually(lambda: slow.stats().num_cancelled == 1)


def test_reading_an_unknown_variable_names_the_known_ones(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "name? " + gen("name")

    state = program.run()
    with pytest.raises(UndefinedVariable, match="no variable 'nmae'; known: name"):
        state["nmae"]
    with pytest.raises(KeyError):
        state["nmae"]
    with pytest.raises(UndefinedVariable):
        state.meta("nmae")


def test_an_exception_of_the_function_is_raised_and_the_run_cancelled() -> None:
    @function
    def program(s: State) -> None:
        s += "long? " + gen("long")
        s.recorder.run.submit()
        raise ZeroDivisionError("mine")

    slow = MockBackend({"long?": "a b c d e f g h i j"}, latency_s=0.02)
    with pytest.raises(ZeroDivisionError, match="mine"):
        program.run(backend=slow)
    assert eventually(lambda: slow.stats().num_cancelled == 1)


def test_selections_that_draw_have_each_their_own_seed(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "Heads or tails? "
        branches = s.fork(40)
        branches += select("side", ["a", "b"], temperature=100.0)
        branches.join()

    sides = program.run(seed=3)["side"]
    assert set(sides) == {"a", "b"}
    assert program.run(seed=3, stage="always")["side"] == sides
    assert program.run(seed=4)["side"] != sides


def test_a_deadline_is_raised_and_ends_the_requests() -> None:
    @function
    def program(s: State) -> None:
        s += "long? " + gen("long")
        s += str(len(s["long"]))

    slow = MockBackend({"long?": "a b c d e f g h i j"}, latency_s=0.05)
    with pytest.raises(DeadlineExceeded):
        program.run(backend=slow, timeout_s=0.1)


def test_a_cancelled_branch_ends_alone(backend: MockBackend) -> None:
    @function
    def program(s: State) -> str:
        a, b = s.fork(2)
        a += "a name? " + gen("x")
        b += "b name? " + gen("x")
        s.recorder.run.submit()
        b.cancel()
        return str(a["x"])

    slow = MockBackend({"name?": "Ann Bee"}, latency_s=0.02)
    state = program.run(backend=slow)
    assert state.result == "Ann Bee"
    assert state.error() is None


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gen("x", temperature=-1), InvalidRequest, "temperature is -1"),
        (lambda: gen("x", max_tokens="many"), InvalidRequest, "max_tokens is 'many'"),  # type: ignore[arg-type]
        (lambda: gen("x", top_p=2), InvalidRequest, "top_p"),
        (lambda: gen("x", stop=""), InvalidRequest, r"stop is \('',\) but must be strings that are not empty"),
        (lambda: gen("x", regex="a", cfg="b"), InvalidRequest, "one of regex and cfg"),
        (lambda: gen("x", choices=[]), InvalidRequest, "non-empty"),
        (lambda: gen("x", type=3), InvalidRequest, "must be a type"),  # type: ignore[arg-type]
        (lambda: select("x", []), InvalidRequest, "needs a list of choices"),
        (lambda: select("x", "abc"), InvalidRequest, "needs a list of choices"),
        (lambda: select("x", ["a"], scorer="best"), InvalidRequest, "scorer is 'best'"),
        (lambda: select("x", ["a", 3]), InvalidRequest, "a choice is 3"),  # type: ignore[list-item]
    ],
)
def test_bad_values_are_refused_where_they_are_written(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_misuse_of_a_state_says_what_to_do_instead(backend: MockBackend) -> None:
    @function
    def appends_a_number(s: State) -> None:
        s += 3  # type: ignore[arg-type]

    @function
    def forks_into_none(s: State) -> None:
        s.fork(0)

    @function
    def reads_too_much(s: State) -> None:
        s += gen("a#b")

    with pytest.raises(TypeError, match="f-string"):
        appends_a_number.run()
    with pytest.raises(InvalidProgram, match="at least one branch"):
        forks_into_none.run()
    with pytest.raises(InvalidProgram, match="no '#'"):
        reads_too_much.run()

    @function
    def fine(s: State) -> None:
        s += "name? " + gen("name")

    with pytest.raises(TypeError, match=r"\.run"):
        fine("no state")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no parameter 'citty'"):
        fine.run(citty=1)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="stage is"):
        fine.run(stage="sometimes")
    with pytest.raises(ConfigError, match="must be an Engine"):
        fine.run(backend=3)
    with pytest.raises(InvalidProgram, match="first parameter"):
        function(lambda: None)  # type: ignore[arg-type, misc]


def test_a_json_variable_streams_as_its_value_so_far() -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "tags": {"type": "array"}}}

    @function
    def program(s: State) -> None:
        s += "Who? " + gen("who", schema)
        s += "Again? " + gen("who", schema)
        s += "None? " + gen("none", {"type": "null"})

    first, second = '{"name": "Ann of the north", "tags": ["a b", 1]}', '{"name": "B", "tags": []}'
    mock = MockBackend({"Who?": first, "Again?": second, "None?": "null"})
    found = list(program.stream(var="who", backend=mock))
    values = [{"name": "Ann of the north", "tags": ["a b", 1]}, {"name": "B", "tags": []}]
    assert found[-1] == values[1]
    whole = found.index(values[0])
    assert whole > 1, "it came in one piece"
    for earlier, later in itertools.pairwise(found[: whole + 1]):
        assert set(earlier) <= set(later)
        assert later["name"].startswith(earlier.get("name", ""))
        assert later.get("tags", [])[: len(earlier.get("tags", [])) - 1] == earlier.get("tags", [])[:-1]
    assert list(program.stream(var="none", backend=mock)) == [None]


# Arguments.


def test_arguments_and_results_have_the_types_of_the_function() -> None:
    """What is wrong here is refused by mypy, too: an ignore without an error would be one."""

    @function(max_tokens=4)
    def f(s: State, n: int, word: str = "x") -> list[int]:
        s += f"{word}: " + gen("y")
        return [n + 1]

    found: list[int] = f.run(3, word="a", backend=MockBackend(), seed=3).result
    assert found == [4]
    with use_backend(MockBackend()):
        word: str = f.run(3).result  # type: ignore[assignment]
        assert word == [4]  # type: ignore[comparison-overlap]
        with pytest.raises(TypeError):
            f.run(m=3)  # type: ignore[call-overload]
        with pytest.raises(TypeError):
            f.run("three")  # type: ignore[call-overload]
        with pytest.raises(InvalidRequest):
            f.run(3, timeout_s="x")  # type: ignore[call-overload]
        with pytest.raises(InvalidRequest):
            gen("y", 64)  # type: ignore[arg-type]


def test_append_returns_the_value_in_its_type() -> None:
    """As above: what is wrong here is refused by mypy."""

    @function
    def f(s: State) -> tuple[int, str, int]:
        s += "How many? "
        n = s.append(gen("n", int))
        kind = s.append(select(None, ["few", "many"]))
        s += f" of {kind}, {n + 1}: "
        unnamed = s.append(gen(type=int, max_tokens=3))
        assert s.append("text") is None
        assert s.append("text" + gen("x", max_tokens=1)) is None
        found: int = n.value
        wrong: str = n.value  # type: ignore[assignment]
        assert found == wrong == s["n"]  # type: ignore[comparison-overlap]
        return n.value, str(kind), unnamed.value

    with use_backend(MockBackend()):
        state = f.run()
        assert state.result[0] == state["n"]
        assert state.result[1] in ("few", "many")
        assert isinstance(state.result[2], int)
        wrong: str = f.run().result[0]  # type: ignore[assignment]
        assert isinstance(wrong, int)


def test_arguments_of_the_function_win_over_options_of_the_run(backend: MockBackend) -> None:
    @function
    def program(s: State, temperature: str, *, seed: str = "x") -> None:
        s += f"{temperature} {seed} name? " + gen("name", max_tokens=2)

    assert program.run(temperature="hot", seed="pip").text() == "hot pip name? An"
    assert program.bind(temperature="cold").run().text() == "cold x name? An"
    with pytest.raises(TypeError, match="temperature"):
        program.run()  # type: ignore[call-overload]


def test_sampling_defaults_come_from_the_call_then_the_decorator(backend: MockBackend) -> None:
    @function(max_tokens=1)
    def program(s: State) -> None:
        s += "name? " + gen("a") + " name? " + gen("b", max_tokens=2)

    assert program.run().text() == "name? A name? An"
    assert program.run(max_tokens=3).text() == "name? Ann name? An"


# Tracing.


def test_a_trace_is_the_graph_of_a_run_with_arguments_kept_symbolic(backend: MockBackend) -> None:
    @function
    def program(s: State, city: str, n: int) -> None:
        s += f"In {city} for {n:03}: name? " + gen("name", Literal["Ann", "Bob"])

    trace = program.trace()
    assert trace.stop is None
    assert trace.graph.arguments == {}
    graph = Graph.from_json(trace.graph.to_json())
    text = next(node for node in graph.nodes if isinstance(node, Text))
    assert text.parts == ("In ", Ref(0), " for ", Ref(1, (), "03"), ": name? ")
    assert program.trace(city="Rome", n=7).graph.arguments == {"city": "Rome", "n": 7}
    assert program.run(city="Rome", n=7).text() == "In Rome for 007: name? Ann"


def test_a_trace_says_which_value_stopped_it_and_which_arguments_it_depends_on() -> None:
    @function
    def program(s: State, items: list[str]) -> None:
        for item in items:
            s += item
        s += gen("x")
        if s["x"] == "a":
            s += "b"

    trace = program.trace(items=["p", "q"])
    assert trace.stop is not None
    assert trace.stop.why == "=="
    assert "iteration" in trace.specialised["items"]
    assert len(trace.graph.nodes) == 3
    needs = program.trace()
    assert needs.stop is not None
    assert needs.stop.why == "iteration"


def test_ten_thousand_live_branches_in_one_process(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "name? "
        branches = s.fork(10_000)
        branches += gen("name", max_tokens=1)
        branches.join()

    before = threading.active_count()
    state = program.run()
    assert threading.active_count() <= before + 2
    assert state["name"] == ["A"] * 10_000


# Branches that compete.


def test_a_program_beside_this_one_is_a_root_of_its_own_in_the_same_graph(backend: MockBackend) -> None:
    @function
    def ask(s: State, question: str) -> Any:
        s += f"{question} name? " + gen("name", max_tokens=2)
        return s["name"]

    @function(temperature=1)
    def program(s: State) -> Any:
        s += "Main. "
        found = [ask(s.spawn(), f"Q{number}") for number in range(3)]
        aside = s.spawn()
        with aside.copy() as branch:
            branch.user("Who?")
            branch.assistant(gen("who", max_tokens=2))
        s.join(branch)
        s += f"{found[0]} and {s['who'][0]}: " + gen("end", max_tokens=2)
        return found

    state = program.run(seed=3)
    assert state.record.stages == ()
    assert state.text().startswith(f"Main. {state.result[0]} and ")
    roots = [node for node in state.record.graph.nodes if node.parent is None and not isinstance(node, Argument)]
    assert len(roots) == 1 + 3 + 1
    seeds = [node.sampling.seed for node in state.record.graph.nodes if isinstance(node, Generate)]
    assert len(set(seeds)) == len(seeds), "each has its own place"
    assert program.run(seed=3, stage="always").text() == state.text()
    assert program.compile(seed=3).run().result == state.result
    assert program.explain().new.at_least > 0
    assert state.graph().mermaid()


def test_map_gives_every_item_a_branch(backend: MockBackend) -> None:
    @function
    def program(s: State, words: list[str]) -> None:
        s += "Words. "

        def one(branch: State, word: str) -> None:
            branch += f"{word}? " + gen("x")

        s.map(words, one).join()
        assert len(s.map([], one)) == 0

    assert program.run(words=["name", "colour"])["x"] == ["Ann", "red"]


def test_best_of_judges_all_branches_at_once_where_the_score_is_generated() -> None:
    @function
    def program(s: State) -> None:
        def score(branch: State) -> Any:
            judge = branch.copy()
            judge += " score? " + gen("score", int)
            return judge["score"]

        s += "which? "
        s.best_of(3, gen("x", max_tokens=8), by=score)

    with MockBackend({"which?": ["a", "b", "c"], "score?": ["1", "3", "2"]}) as mock:
        state = program.run()
        assert state["x"] == "b"
        assert {stage.num_nodes for stage in state.record.stages} == {len(state.record.graph.nodes)}
    mock.engine.shutdown()


def test_best_of_goes_on_as_the_best_branch() -> None:
    @function
    def program(s: State) -> None:
        s += "Say: "
        s.best_of(3, gen("x"), by=lambda branch: len(str(branch["x"])))
        s += "!"

    with use_backend(MockBackend(["ab", "abcd", "a"])):
        state = program.run()
    assert state.text() == "Say: abcd!"
    assert state["x"] == "abcd"


def test_vote_goes_on_as_the_most_frequent_answer() -> None:
    @function
    def program(s: State) -> Any:
        s += "Say: "
        return s.vote(4, gen("x", int), "x")

    with use_backend(MockBackend(["3", "5", "7", "5"])):
        state = program.run()
    assert state.result == 5
    assert state.text() == "Say: 5"


def test_the_first_branch_that_is_done_wins_and_the_others_are_cancelled() -> None:
    @function
    def program(s: State) -> int:
        s += "Say "
        return s.first_of("long: " + gen("x"), "short: " + gen("x"))

    slow = MockBackend({"long:": "a b c d e f g h i j k l", "short:": "a"}, latency_s=0.01)
    state = program.run(backend=slow)
    assert state.result == 1
    assert state.text() == "Say short: a"
    assert eventually(lambda: slow.stats().num_cancelled == 1)


@pytest.mark.parametrize("good", [0, 1, None])
@pytest.mark.parametrize("is_checked_in_python", [False, True])
def test_branches_that_fail_are_skipped_by_first_of_unless_all_fail(
    good: int | None, is_checked_in_python: bool
) -> None:
    def item(index: int) -> Any:
        if is_checked_in_python:
            return f"{index}: " + gen("x", where=lambda text: text == "fine", retries=0)
        return f"{index}: " + gen("x")

    @function
    def program(s: State) -> int:
        index = s.first_of(item(0), item(1))
        s += "; and then " + gen("after")
        return index

    script = {"and then ": "more", **({} if good is None else {f"{good}: ": "fine"})}
    if is_checked_in_python:
        backend = MockBackend({"0: ": "wrong", "1: ": "wrong", **script})
    else:
        backend = MockBackend(script, strict=True)  # a prompt without an answer fails
    if good is None:
        with pytest.raises(ProgramError, match="0"):
            program.run(backend=backend)
        return
    state = program.run(backend=backend)
    assert (state.result, state.text()) == (good, f"{good}: fine; and then more")


def test_what_fails_after_a_race_ends_the_program() -> None:
    @function
    def program(s: State) -> None:
        s.first_of("one: " + gen("x"), "two: " + gen("x"))
        bad, slow = s.fork(2)
        bad += "; bad: " + gen("y")
        slow += "; slow: " + gen("z")
        s.join([bad, slow])

    def script(prompt: str) -> str:
        if prompt.endswith("bad: "):
            raise ValueError("bad luck")
        return "a " * 400 if prompt.endswith("slow: ") else "fine"

    backend = MockBackend(script, latency_s=0.02)
    state = program.run(backend=backend, failures="keep")
    ended = {event.name: event for event in state.record.events.values()}
    assert ended["z"].error is not None
    assert ended["z"].error.is_cancelled


# Giving up.


def test_a_cancelled_task_cancels_its_program() -> None:
    slow = MockBackend({"long?": "a " * 500}, latency_s=0.02)

    @function
    async def waits(s: State) -> None:
        s += "long? " + gen("long")
        await s["long"]

    @function
    def traced(s: State) -> None:
        s += "long? " + gen("long")

    async def main() -> None:
        tasks = [asyncio.create_task(program.arun(backend=slow)) for program in (waits, traced)]
        while slow.stats().num_requests < 2:
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)

    asyncio.run(main())
    assert eventually(lambda: slow.stats().num_cancelled == 2)


def test_a_batch_that_is_left_early_cancels_the_rest() -> None:
    slow = MockBackend({"0 ": "a", "long?": "a b c d e f g h i j k l m n"}, latency_s=0.1)

    @function
    def program(s: State, i: int) -> None:
        s += f"long? {i} " + gen("long")
        s += str(len(s["long"]))

    states = program.run_batch(range(5), backend=slow, generator_style=True)
    assert next(states)["long"] == "a"
    states.close()
    assert eventually(lambda: slow.stats().num_cancelled == 4)


def test_a_listener_that_fails_breaks_nothing_but_itself(
    backend: MockBackend, caplog: pytest.LogCaptureFixture
) -> None:
    @function
    def program(s: State) -> None:
        s.recorder.run.outcomes.listen(lambda event: 1 / 0)  # type: ignore[arg-type]
        s += "name? " + gen("name")

    with caplog.at_level("CRITICAL"):
        state = program.run()
    assert state["name"] == "Ann"
    assert backend.engine.submit("the engine lives").result().text


def test_a_placeholder_that_is_seen_says_what_it_stands_for(backend: MockBackend) -> None:
    seen: list[str] = []

    @function
    def program(s: State) -> str:
        s += "name? " + gen("name")
        seen.append(f"Dear {s['name']}!")
        s += seen[0] * 2
        return seen[0]

    state = program.run()
    assert "‹Value of name›" in seen[0]
    assert state.text() == "name? AnnDear Ann!Dear Ann!"
    assert state.result == "Dear Ann!"


def test_private_use_characters_of_the_users_own_text_are_left_alone(backend: MockBackend) -> None:
    text = "\U000f0000 a \U000f0001 \U000f0000\U000f0105\U000f0001"

    @function
    def program(s: State, text: str) -> None:
        s += text + " name? " + gen("name")

    assert program.run(text=text).text() == f"{text} name? Ann"


def test_a_method_is_the_program_of_its_object(backend: MockBackend) -> None:
    class Guide:
        def __init__(self, city: str) -> None:
            self.city = city

        @function(temperature=0, stop=".")
        def plan(self, s: State, days: int) -> str:
            s += f"{days} days in {self.city}? " + gen("plan")
            return self.city

        @function
        async def aplan(self, s: State) -> None:
            s += f"a day in {self.city}? " + gen("plan")

    @function
    def both(s: State, guides: list[Guide]) -> None:
        for guide in guides:
            guide.plan(s, 2)
            s += "\n"

    slow = MockBackend({"days in Rome?": "walk. Rest", "days in Oslo?": "swim", "a day in": "look"})
    state = Guide("Rome").plan.run(days=3, backend=slow)
    assert (state.result, state["plan"], state.text()) == ("Rome", "walk", "3 days in Rome? walk")
    assert Guide("Oslo").aplan.run(backend=slow)["plan"] == "look"
    joined = both.run(guides=[Guide("Rome"), Guide("Oslo")], backend=slow)
    assert joined.text() == "2 days in Rome? walk\n2 days in Oslo? swim\n"
    assert Guide.plan.name == "plan"


def test_a_generation_ends_before_what_a_pattern_matches() -> None:
    @function(temperature=0)
    def plan(s: State, pattern: str) -> None:
        s += "A trip? " + gen("plan", stop_regex=pattern) + "!"

    slow = MockBackend({"trip?": "walk for 12 km. Rest"})
    state = plan.run(pattern=r" \d+ ?k?m", backend=slow)
    assert (state["plan"], state.text()) == ("walk for", "A trip? walk for!")
    assert state.meta("plan")["finish_reason"] == "stop"

    @function(temperature=0, stop_regex=r"\d")
    def checked(s: State) -> None:
        s += "trip? " + gen("plan", where=starts_with("walk"))

    assert checked.run(backend=slow)["plan"] == "walk for "
    with pytest.raises(ProgramError, match="looks beyond"):
        plan.run(pattern="a$", backend=slow)["plan"]
