"""Programs on the real engine with a tiny random model: what is computed, what is shared, what select means."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from numpy.testing import assert_allclose

from ramet import Engine, State, function, gen, select
from ramet.errors import ContextOverflow, InvalidProgram, ProgramCancelled, ProgramError
from ramet.lang.backends.in_process import EngineBackend
from ramet.lang.backends.protocol import Session
from ramet.lang.graph.events import OnEvent
from ramet.lang.graph.ir import Generate, Graph
from ramet.lang.graph.options import ProgramOptions
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.programs import executor
from ramet.runtime.types import SamplingParams

PROGRAMS = Path(__file__).resolve().parents[3] / "examples" / "programs"
Load = Callable[[Path], Any]  # Any: the Example of conftest.py


@pytest.fixture(scope="module")
def engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, num_kv_tokens=1 << 15, max_running_requests=40, chunked_prefill_size=256) as engine:
        yield engine


@pytest.fixture(autouse=True)
def no_page_is_lost(engine: Engine) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 10
    while engine.stats()["num_running"] and time.monotonic() < deadline:
        time.sleep(0.005)
    engine.check_integrity()
    stats = engine.stats()
    assert stats["num_free_pages"] + stats["num_evictable_pages"] == stats["num_pages"]


def test_a_turn_computes_exactly_the_tokens_that_are_new(engine: Engine) -> None:
    @function(temperature=0, max_tokens=5, ignore_eos=True)
    def chat(s: State) -> None:
        s += "A beginning that nobody else has used."
        for i in range(4):
            s += f" Turn {i}:" + gen("x")

    state = chat.run(backend=engine)
    events = state.record.events
    usages = [events[n.id].usage for n in state.record.graph.nodes if isinstance(n, Generate)]
    for usage in usages[1:]:
        assert usage is not None
        # The last token of a generation that max_tokens ended has not been computed: it comes with the new text.
        assert usage.computed_tokens == len(" Turn 0:") + 1


def test_a_turn_computes_its_own_text_and_the_tokens_that_the_text_before_it_ended_with(engine: Engine) -> None:
    @function(temperature=0, max_tokens=5, ignore_eos=True)
    def chat(s: State) -> None:
        s += "Another beginning that is used once: "
        s += gen("first")
        s += gen("second", regex="abc", ignore_eos=False)  # ends as soon as it is there: no step computes it
        s += " and on" + gen("third")

    state = chat.run(backend=engine)
    assert state["second"] == "abc"
    assert state.meta("third")["usage"].computed_tokens == len("abc and on")


def test_a_value_that_max_tokens_cannot_hold_says_what_it_would_take(engine: Engine) -> None:
    @function(max_tokens=4)
    def program(s: State) -> None:
        s += "A code: " + gen("code", regex="[a-c]{6}") + " and " + gen("digits", regex="[0-9]{3}")

    state = program.run(backend=engine)
    assert len(state["code"]) == 4
    assert "takes 6 tokens" in state.meta("code")["incomplete"]
    assert "incomplete" not in state.meta("digits")

    @function(max_tokens=4)
    def typed(s: State) -> None:
        s += "A switch: " + gen("switch", json_schema={"type": "object", "required": ["on"]})

    with pytest.raises(ProgramError, match=r"because it was cut by max_tokens \(4\).*takes 10 tokens"):
        typed.run(backend=engine)["switch"]


def test_thirty_two_branches_compute_their_prefix_once(engine: Engine) -> None:
    prefix, width = "w" * 300, 32

    @function(temperature=0, max_tokens=4, ignore_eos=True)
    def program(s: State) -> None:
        s += prefix
        branches = s.fork(width)
        branches += lambda i: f" branch {i:02}"
        branches += gen("x")
        branches.join()

    before = engine.stats()["num_computed_tokens"]
    state = program.run(backend=engine)
    computed = engine.stats()["num_computed_tokens"] - before
    assert len(state["x"]) == width
    # Each branch computes its own ten tokens, and three that it generates.
    assert computed <= len(prefix) + width * (len(" branch 00") + 4)


def test_select_equals_a_brute_force_by_full_forward_passes(tiny_model: LoadedModel, engine: Engine) -> None:
    choices = ["tea", "teapot", "coffee", "cocoa with milk"]

    @function
    def program(s: State) -> None:
        s += "To drink I take "
        s += select("drink", choices, scorer="likelihood")

    meta = program.run(backend=engine).meta("drink")
    with Engine(tiny_model, num_kv_tokens=4096, max_running_requests=1, radix_cache=False) as alone:
        start = len("To drink I take ")
        expected = []
        for choice in choices:
            handle = alone.submit(f"To drink I take {choice}", SamplingParams(max_tokens=1), score_from=start)
            logprobs = handle.result().prompt_logprobs
            assert logprobs is not None
            assert len(logprobs) == len(choice)
            expected.append(math.exp(math.fsum(logprobs)))
    assert math.isclose(sum(meta["probs"]), 1.0, abs_tol=1e-12)
    assert_allclose(meta["probs"], [p / sum(expected) for p in expected], rtol=1e-3)


class Gated:
    """An engine whose next step waits until the first part of a program is there as a whole."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def start(self, options: ProgramOptions, on_event: OnEvent) -> Session:
        session, gate = EngineBackend(self.engine).start(options, on_event), threading.Event()
        extend = session.extend

        def opening(graph: Graph, *, is_last: bool = False) -> None:
            extend(graph, is_last=is_last)
            gate.set()

        session.extend = opening  # type: ignore[method-assign]
        self.engine.before_next_step(lambda: gate.wait(60))
        return session


@pytest.mark.parametrize("is_checked", [False, True])
def test_what_a_branch_asks_for_once_it_has_read_is_part_of_the_next_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, is_checked: bool
) -> None:
    monkeypatch.setattr(executor, "PATIENCE_S", 60.0)
    first = gen("a", where=lambda text: len(text) > 0) if is_checked else gen("a")

    @function(temperature=0, max_tokens=3, ignore_eos=True)
    def program(s: State) -> None:
        s += "A prefix of all branches. "

        def body(branch: State, index: int) -> None:
            branch += f"Branch {index}" + first
            branch += f" has {len(str(branch['a']))} letters" + gen("b", max_tokens=2 + index)

        s.map(range(4), body)

    def steps(run: Callable[[], object]) -> float:
        engine.flush_cache()
        before = engine.stats()["num_steps"]
        run()
        return engine.stats()["num_steps"] - before

    backend = Gated(engine)
    state = program.run(backend=backend)

    def replay() -> None:  # the nodes of that run as one graph, which reads nothing
        ended = threading.Semaphore(0)
        session = backend.start(ProgramOptions(), lambda event: ended.release() if event.kind == "done" else None)
        session.extend(state.record.graph, is_last=True)
        session.finish()
        assert all(ended.acquire(timeout=60) for _ in state.record.graph.nodes)

    assert steps(lambda: program.run(backend=backend)) == steps(replay)


def test_functions_that_take_long_are_waited_for_less_and_less(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    host, waits = executor.ProgramHost(engine), list[Callable[[], object]]()
    monkeypatch.setattr(engine, "before_next_step", waits.append)
    slow, quick = threading.Event(), threading.Event()
    quick.set()
    patience = []
    for rests in ([slow], [quick, slow], [slow], [quick, quick]):
        for one in rests:
            host.let_go_on(one)
        while waits:
            waits.pop()()
        patience.append(host.patience_s)
    first = executor.PATIENCE_S
    assert patience == [first / 4, first / 16, first / 64, first]


@pytest.mark.parametrize(
    "name", ["chain_of_thought", "debate", "rag_shared_documents", "map_reduce_summary", "router", "tree_of_thoughts"]
)
def test_examples_give_the_same_tokens_traced_and_staged(name: str, load_example: Load, engine: Engine) -> None:
    example = load_example(PROGRAMS / f"{name}.py")
    options = {**example.arguments, "backend": engine, "seed": 3}
    runs = [example.program.run(**options, stage=stage) for stage in ("needed", "always")]
    assert runs[0].text() == runs[1].text()
    assert repr(runs[0].variables) == repr(runs[1].variables)


def test_a_cancelled_program_leaves_the_engine_idle(engine: Engine) -> None:
    @function(max_tokens=200, ignore_eos=True)
    def program(s: State) -> None:
        branches = s.fork(8)
        branches += lambda i: f"{i} go on: "
        branches += gen("x")
        s.recorder.run.submit()
        time.sleep(0.05)
        s.cancel()

    assert isinstance(program.run(backend=engine, failures="keep").error(), ProgramCancelled)
    deadline = time.monotonic() + 5
    while engine.stats()["num_running"] and time.monotonic() < deadline:
        time.sleep(0.005)
    assert engine.stats()["num_running"] == 0


@pytest.mark.parametrize("is_compiled", [False, True])
def test_an_interrupt_of_a_batch_cancels_every_row(engine: Engine, is_compiled: bool) -> None:
    @function(temperature=0, max_tokens=400, ignore_eos=True)
    def program(s: State, row: int) -> None:
        s += f"Row {row} of those that nobody waits for: " + gen("x") + " and " + gen("y")

    before = engine.stats()["num_decoded_tokens"]

    def interrupt() -> None:
        while engine.stats()["num_decoded_tokens"] - before < 100:
            pass
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    rows = [{"row": row} for row in range(60)]
    with pytest.raises(KeyboardInterrupt):
        (program.compile() if is_compiled else program).run_batch(rows, backend=engine)
    thread.join()
    deadline = time.monotonic() + 60
    while (stats := engine.stats())["num_running"] or stats["num_waiting"]:
        assert time.monotonic() < deadline
    assert stats["num_decoded_tokens"] - before < 60 * 2 * 400


def test_a_compiled_batch_with_a_wrong_row_starts_none(engine: Engine) -> None:
    @function(temperature=0, max_tokens=400, ignore_eos=True)
    def program(s: State, row: int) -> None:
        s += f"Row {row} beside a wrong one: " + gen("x")

    before = engine.stats()["num_decoded_tokens"]
    with pytest.raises(InvalidProgram, match="needs argument 'row'"):
        program.compile().run_batch([{"row": 1}, {"row": 2}, {}], backend=engine)
    deadline = time.monotonic() + 60
    while (stats := engine.stats())["num_running"] or stats["num_waiting"]:
        assert time.monotonic() < deadline
    assert stats["num_decoded_tokens"] - before < 2 * 400


def test_a_prompt_that_overflows_the_context_fails_its_node_alone(engine: Engine) -> None:
    @function
    def program(s: State) -> None:
        s += "x" * (engine.context_length + 1) + gen("x")

    state = program.run(backend=engine, failures="keep")
    with pytest.raises(ProgramError) as raised:
        state["x"]
    assert isinstance(raised.value.__cause__, ContextOverflow)
    assert engine.generate("still there", SamplingParams(max_tokens=2)).token_ids


def test_the_losers_of_first_of_free_their_pages(engine: Engine) -> None:
    @function(temperature=0, ignore_eos=True)
    def program(s: State) -> None:
        s += "Who is first? "
        s.first_of("slow: " + gen("x", max_tokens=400), "quick: " + gen("x", max_tokens=2))
        # Only the winner's branch is left of the program before it goes on.
        deadline = time.monotonic() + 10
        while engine.stats()["num_running"] and time.monotonic() < deadline:
            time.sleep(0.002)
        stats = engine.stats()
        s.set_var("idle", stats["num_running"] == 0)
        s.set_var("whole", stats["num_free_pages"] + stats["num_evictable_pages"] == stats["num_pages"])
        s += " and on" + gen("y", max_tokens=2)

    state = program.run(backend=engine)
    assert state["idle"]
    assert state["whole"]
    assert state.text().startswith("Who is first? quick: ")
    assert state.error() is None
