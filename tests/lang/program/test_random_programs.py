"""Random programs give identical tokens traced, staged, one node at a time, and as a graph sent in one piece."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramet import Engine, State, function, gen, select, starts_with
from ramet.errors import CheckFailed, ProgramError
from ramet.lang.graph.ir import Graph
from ramet.lang.program.compiled import Compiled
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.testing.scripted_model import ScriptedEngine

Step = tuple[str, Any]
Record = Callable[[], Any]  # Any: the RecordingEngine of conftest.py


@dataclass
class Pair:
    name: str
    is_fine: bool


def double(number: int) -> int:
    """Twice as much."""
    return 2 * number


FIRST_LETTERS = "abcdeghimr\ufffd"  # about half of what the scripted model begins with, and of what random weights do

several_models: ContextVar[bool] = ContextVar("several_models", default=False)

leaves = st.one_of(
    st.tuples(st.just("text"), st.sampled_from(["a ", "Bé\n", "c.", "  "])),
    st.tuples(
        st.just("gen"), st.sampled_from([{"temperature": 0}, {"temperature": 1}, {"max_tokens": 3}, {"stop": " "}])
    ),
    st.tuples(st.just("gen of"), st.sampled_from(["", "b"])),
    st.tuples(st.just("select of"), st.sampled_from(["", "b"])),
    st.tuples(st.just("select"), st.sampled_from([["x", "xy"], ["yes", "no", "nope"]])),
    st.tuples(st.just("use"), st.integers(0, 5)),
    st.tuples(st.just("choose among values"), st.integers(0, 5)),
    st.tuples(st.just("scope"), st.none()),
    st.tuples(st.just("late"), st.sampled_from(["L ", "Lé\n"])),
    st.tuples(st.just("checked"), st.sampled_from([0, 1])),
    st.tuples(st.just("checked in python"), st.sampled_from([0, 1])),
    st.tuples(st.just("best of"), st.integers(1, 3)),
    st.tuples(st.just("vote"), st.integers(1, 3)),
    st.tuples(st.just("map"), st.lists(st.sampled_from(["p", "q"]), max_size=3)),
    st.tuples(st.just("set"), st.integers(0, 5)),
    st.tuples(st.just("copy"), st.integers(0, 5)),
    st.tuples(st.just("typed"), st.sampled_from([int, bool, Literal["on", "off"], list[bool]])),
    st.tuples(st.just("field"), st.integers(0, 1)),
    st.tuples(st.just("field aside"), st.integers(0, 1)),
    st.tuples(st.just("spawn"), st.integers(0, 5)),
    st.tuples(st.just("loop"), st.just(0)),
    st.tuples(st.just("first of"), st.just(0)),
    st.tuples(st.just("tools"), st.integers(0, 1)),
)
steps = st.recursive(
    st.lists(leaves, max_size=4),
    lambda inner: st.lists(
        leaves
        | st.tuples(st.just("fork"), st.lists(inner, min_size=1, max_size=3))
        | st.tuples(st.just("message"), inner)
        | st.tuples(st.just("sub-program"), inner)
        | st.tuples(st.just("if"), inner),
        max_size=4,
    ),
    max_leaves=12,
)


def execute(s: State, program: Sequence[Step], known: list[Any], may_read: bool, depth: int = 0) -> None:
    for kind, what in program:
        if kind == "text":
            s += what
        elif kind == "gen":
            s += "> " + gen("g", **what)
            known.append(s["g"])
        elif kind == "gen of":
            s += "> " + gen("g", model=what if several_models.get() else "")
            known.append(s["g"])
        elif kind == "select of":
            s += "= " + gen("t", int, model=what if several_models.get() else "") + " of "
            s += select("s", ["x", "xy"], model=what if several_models.get() else "")
            known += [s["t"], s["s"]]
        elif kind == "select":
            s += ">" + select("s", what)
            known.append(s["s"])
        elif kind == "use" and known:
            s += f"[{known[what % len(known)]}]"
        elif kind == "choose among values" and known:
            s += select("c", [f"1{known[what % len(known)]}", "other"])
        elif kind == "late":
            s.append(what if not known else f"{what}{known[-1]}", prefix="late")
        elif kind == "scope":
            with s.var_scope("scope"):
                s += "in " + gen("g", max_tokens=2)
            known.append(s["scope"])
        elif kind == "checked":
            s += "> " + gen("g", temperature=what, where=starts_with(*FIRST_LETTERS), retries=100)
            known.append(s["g"])
        elif kind == "checked in python" and may_read:
            s += "> " + gen(
                "g", temperature=what, where=lambda text: text.startswith(tuple(FIRST_LETTERS)), retries=100
            )
            known.append(s["g"])
        elif kind == "best of" and may_read:
            s.best_of(what, ">" + gen("g", temperature=1), by=lambda branch: len(branch["g"]))
            known.append(s["g"])
        elif kind == "vote" and may_read:
            s.vote(what, gen("g", temperature=1, max_tokens=1))
            known.append(s["g"])
        elif kind == "map":
            s.map(what, lambda branch, item: branch.append(f"{item}: " + gen("g", max_tokens=4))).join()
        elif kind == "set" and known:
            s.set_var("kept", known[what % len(known)])
            s += f"<{s['kept']}>"
        elif kind == "copy":
            with s.copy() as other:
                other += f"copy {what}" + gen("g", max_tokens=3)
            known.append(other["g"])
        elif kind == "typed":
            s += "= " + gen("t", what, max_tokens=30) + gen(max_tokens=1)  # text of the same stage would end the value
            known.append(s["t"])
        elif kind == "field":
            s += "> " + gen("pair", Pair, max_tokens=60, temperature=what) + gen(max_tokens=1)
            s += f"<{s['pair'].name}, {s['pair'].is_fine}>"
        elif kind == "field aside":  # used before the value is whole
            with s.copy() as other:
                other += "> " + gen("pair", Pair, max_tokens=60, temperature=what) + gen(max_tokens=1)
            s += f"<{other['pair'].name}" + gen("g", max_tokens=2) + f"{other['pair'].is_fine}>"
            known.append(s["g"])
        elif kind == "spawn":
            beside = s.spawn()
            beside += f"beside {known[what % len(known)] if known else what}: " + gen("g", max_tokens=3)
            known.append(beside["g"])
        elif kind == "loop" and may_read:
            s += "= " + gen("l", list[bool], max_tokens=30) + gen(max_tokens=1)
            for number, item in enumerate(s["l"]):
                s += f"({number}: {item})"
        elif kind == "first of" and may_read:  # of one: which of several is first depends on time
            s.first_of("> " + gen("g"))
            known.append(s["g"])
        elif kind == "tools" and may_read and s.recorder.role is None:
            known.append(s.call_tools([double], max_steps=2, max_tokens=60, temperature=what))
        elif kind == "sub-program":
            known.append(part(s, what, known, may_read, depth + 1))
        elif kind == "fork":
            branches = s.fork(len(what))
            for i, (branch, inner) in enumerate(zip(branches, what, strict=True)):
                branch += f"{i}:"
                execute(branch, inner, list(known), may_read, depth + 1)
                branch["last"] = branch.get("g", "none")
            branches.join(mode="append" if depth else "gather")
        elif kind == "message":
            if s.recorder.role is None:
                with s.user():
                    execute(s, what, known, may_read, depth + 1)
        elif kind == "if" and known and may_read and len(str(known[-1])) % 2 == 0:
            execute(s, what, known, may_read, depth)


@function(temperature=0)
def part(s: State, program: Sequence[Step], known: list[Any], may_read: bool, depth: int) -> Any:
    s += "part "
    execute(s, program, known, may_read, depth)
    s += gen("r", max_tokens=2)
    return s["r"]


@function(max_tokens=12)
def random_program(s: State, program: Any, may_read: bool) -> None:
    s += "Begin. "
    execute(s, program, [], may_read)


@given(program=steps, may_read=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_how_a_program_is_cut_into_stages_does_not_matter(
    program: list[Step], may_read: bool, recording_engine: Record
) -> None:
    results = []
    for stage in ("needed", "always"):
        with recording_engine() as engine:
            state = random_program.run(program=program, may_read=may_read, backend=engine, seed=7, stage=stage)
            error = state.error()
            assert error is None, error
            texts = [(n, e.text, repr(e.value)) for n, e in sorted(state.record.events.items())]
            results.append((texts, engine.prompts, engine.stats().computed_tokens, state.usage.completion_tokens))
    (texts, prompts, _, completed), (texts_2, prompts_2, _, completed_2) = results
    assert texts == texts_2
    assert Counter(prompts) == Counter(prompts_2)
    assert completed == completed_2


@given(program=steps, may_read=st.booleans(), stage=st.sampled_from(["needed", "always"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_two_models_that_are_alike_write_what_one_writes(program: list[Step], may_read: bool, stage: str) -> None:
    found, tokenizer = [], ByteTokenizer()  # a byte a token, as each model splits the other's text anew
    for is_several in (False, True):
        token = several_models.set(is_several)
        with ScriptedEngine(tokenizer=tokenizer) as first, ScriptedEngine(tokenizer=tokenizer) as second:
            backend: Any = {"a": first, "b": second} if is_several else first
            state = random_program.run(program=program, may_read=may_read, backend=backend, seed=7, stage=stage)
            error = state.error()
            assert error is None, error
            found.append([(n, e.text, repr(e.value)) for n, e in sorted(state.record.events.items())])
        several_models.reset(token)
    assert found[0] == found[1]


@given(steps)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_graph_read_back_from_json_runs_as_the_program_does(program: list[Step]) -> None:
    compiled: Compiled = random_program.compile(program=program, may_read=False, seed=7, max_tokens=12)
    compiled.graph = Graph.from_json(compiled.graph.to_json())
    with ScriptedEngine() as engine:
        direct = random_program.run(program=program, may_read=False, backend=engine, seed=7, max_tokens=12)
    with ScriptedEngine() as engine:
        sent = compiled.run(backend=engine)
    assert sent.text() == direct.text()
    assert {n: e.text for n, e in sent.record.events.items()} == {n: e.text for n, e in direct.record.events.items()}


@given(steps, st.sampled_from(["a ", ">", "1:", "never"]), st.floats(0, 0.02), st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_program_that_fails_or_is_cancelled_ends_and_leaves_the_engine_idle(
    program: list[Step], bad: str, cancel_after_s: float, is_cancelled: bool
) -> None:
    with ScriptedEngine(failures={bad: RuntimeError("injected")}, latency_s=0.001) as engine:
        stream = random_program.stream(program=program, may_read=True, backend=engine, seed=7)
        if is_cancelled:
            threading.Timer(cancel_after_s, stream.state.cancel).start()
        error: ProgramError | None = None
        try:
            for event in stream:
                assert event.kind in ("text", "done", "error")
            error = stream.state.error()
        except ProgramError as raised:
            error = raised
        assert error is None or is_cancelled or "injected" in str(error)
        alive = engine.submit("the engine lives").result()
        assert alive.finish_reason is not None
        deadline = time.monotonic() + 5
        while engine.stats().num_finished < engine.stats().num_requests and time.monotonic() < deadline:
            time.sleep(0.001)
        assert engine.stats().num_finished >= engine.stats().num_requests


@pytest.fixture(scope="module")
def engines(tiny_model: LoadedModel) -> Iterator[tuple[Engine, Engine]]:
    """One that batches over a cache, and one that knows nothing of the past and runs one request at a time."""
    with (
        Engine(tiny_model, num_kv_tokens=1 << 14, max_running_requests=32) as shared,
        Engine(tiny_model, num_kv_tokens=1 << 13, max_running_requests=1, radix_cache=False) as alone,
    ):
        yield shared, alone


@given(program=steps, may_read=st.booleans(), seed=st.integers(0, 3))
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_a_real_engine_writes_the_same_in_branches_and_one_node_at_a_time(
    program: list[Step], may_read: bool, seed: int, engines: tuple[Engine, Engine]
) -> None:
    found = []
    for engine, stage in ((engines[0], "needed"), (engines[0], "always"), (engines[1], "always")):
        try:
            state = random_program.run(program=program, may_read=may_read, backend=engine, seed=seed, stage=stage)
            error = state.error()
        except CheckFailed as raised:
            error = raised
        if isinstance(error, CheckFailed):
            return  # random weights may write none of the letters that it asks for
        assert error is None, error
        found.append([(n, e.text, repr(e.value)) for n, e in sorted(state.record.events.items())])
        engine.check_integrity()
    assert found[0] == found[1] == found[2]
