"""Identical generations of one program run once: the same tokens, fewer computed; who leaves harms nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from ramet import State, function, gen, select
from ramet.runtime.programs.engine import Handle
from ramet.runtime.programs.executor import ProgramHost
from ramet.runtime.programs.shared_nodes import SharedRequests, request_key
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.testing.scripted_model import ScriptedEngine
from ramet.runtime.types import FinishReason, RequestOptions, RequestOutput, SamplingParams, Usage


def run(program: Any, *, share: bool, **kwargs: Any) -> tuple[State, ScriptedEngine]:
    with ScriptedEngine(tokenizer=ByteTokenizer()) as engine:
        state = program.run(backend=ProgramHost(engine, share_nodes=share), **kwargs)
        error = state.error()
        if error is not None:
            raise error
        return state, engine


@function
def votes(s: State, temperature: float, seed: int | None = None) -> None:
    s += "Is the sky blue? "
    branches = s.fork(4)
    branches += gen("why", temperature=temperature, seed=seed, max_tokens=20)
    branches += " So: " + select("answer", ["yes", "no"])
    branches.join()


@pytest.mark.parametrize(("temperature", "seed"), [(0, None), (1, 5), (0, 3)])
def test_repeatable_branches_are_computed_once_and_read_the_same(temperature: float, seed: int | None) -> None:
    shared, few = run(votes, share=True, temperature=temperature, seed=seed)
    alone, many = run(votes, share=False, temperature=temperature, seed=seed)
    assert shared["why"] == alone["why"]
    assert shared["answer"] == alone["answer"]
    assert {n: e.text for n, e in shared.record.events.items()} == {n: e.text for n, e in alone.record.events.items()}
    assert few.stats().num_requests == 1 + 2 * 2  # a generation, two choices after two texts
    assert many.stats().num_requests == 4 * (1 + 2 * 2)
    assert few.stats().computed_tokens < many.stats().computed_tokens
    assert few.stats().completion_tokens * 4 == many.stats().completion_tokens
    assert shared.usage.computed_tokens == few.stats().computed_tokens


def test_the_likeliest_token_alone_is_greedy_too_as_the_plan_says() -> None:
    @function(top_k=1, max_tokens=8)
    def program(s: State) -> None:
        s += "A word: "
        branches = s.fork(3)
        branches += gen("word")
        branches.join()

    state, engine = run(program, share=True)
    with ScriptedEngine(tokenizer=ByteTokenizer()) as other:
        plan = program.explain(backend=other)
    assert engine.stats().num_requests == 1
    usages = [state.meta("word")["branches"][i]["usage"] for i in range(3)]
    assert [usage.computed_tokens for usage in usages] == [node.new.at_most for node in plan.nodes] == [8, 0, 0]


def test_what_samples_without_a_seed_is_never_shared() -> None:
    state, engine = run(votes, share=True, temperature=1.0)
    assert len(set(state["why"])) > 1
    assert engine.stats().num_requests >= 4 + 2


def test_a_program_s_seed_gives_every_branch_its_own_text() -> None:
    @function
    def program(s: State) -> None:
        s += "A word: "
        branches = s.fork(3)
        branches += gen("word", temperature=1)
        branches.join()

    state, engine = run(program, share=True, seed=4)
    assert len(set(state["word"])) == 3
    assert engine.stats().num_requests == 3


def test_a_later_twin_gets_the_text_that_is_there() -> None:
    @function(temperature=0)
    def program(s: State) -> None:
        first, second = s.fork(2)
        first += "Same words. " + gen("x")
        assert len(first["x"]) > 0  # waits for it
        second += "Same words. " + gen("x")
        s.join(first, second)

    state, engine = run(program, share=True)
    assert state["x"][0] == state["x"][1]
    assert engine.stats().num_requests == 1


class StubEngine:
    """Collects requests; a test answers them."""

    def __init__(self) -> None:
        self.requests: list[Callable[[RequestOutput], None]] = []
        self.cancelled: list[int] = []

    def submit(
        self, prompt: list[int], sampling: SamplingParams, options: Any, *, on_output: Any = None, **_: Any
    ) -> Handle:
        index = len(self.requests)
        self.requests.append(on_output)
        cancelled = self.cancelled

        class StubHandle:
            def cancel(self) -> None:
                cancelled.append(index)

        return StubHandle()


def output(text: str, reason: FinishReason | None = None) -> RequestOutput:
    return RequestOutput("r", text, (1,), Usage(3, 1, 1), reason)


GREEDY, PLAIN = SamplingParams(temperature=0), RequestOptions()


def test_one_who_leaves_does_not_end_the_request_of_the_others() -> None:
    engine = StubEngine()
    requests = SharedRequests(cast(Any, engine))
    got: list[list[str]] = [[], []]
    first = requests.submit([1, 2, 3], GREEDY, PLAIN, on_output=lambda o: got[0].append(o.text))
    second = requests.submit([1, 2, 3], GREEDY, PLAIN, on_output=lambda o: got[1].append(o.text))
    engine.requests[0](output("a"))
    first.cancel()
    engine.requests[0](output("b", FinishReason.STOP))
    assert engine.cancelled == []
    assert got == [["a"], ["a", "b"]]
    second.cancel()
    assert engine.cancelled == []  # it had ended


def test_a_request_that_nobody_wants_any_more_ends_and_is_not_read_by_others() -> None:
    engine = StubEngine()
    requests = SharedRequests(cast(Any, engine))
    readers = [requests.submit([1], GREEDY, PLAIN, on_output=lambda o: None) for _ in range(2)]
    for reader in readers:
        reader.cancel()
    assert engine.cancelled == [0]
    requests.submit([1], GREEDY, PLAIN, on_output=lambda o: None)
    assert len(engine.requests) == 2


def test_a_failed_request_is_asked_again() -> None:
    engine = StubEngine()
    requests = SharedRequests(cast(Any, engine))
    requests.submit([1], GREEDY, PLAIN, on_output=lambda o: None)
    engine.requests[0](output("", FinishReason.ERROR))
    requests.submit([1], GREEDY, PLAIN, on_output=lambda o: None)
    assert len(engine.requests) == 2


def test_outputs_arrive_in_order_from_several_threads() -> None:
    engine = StubEngine()
    requests = SharedRequests(cast(Any, engine))
    got: list[list[str]] = [[] for _ in range(8)]
    requests.submit([1], GREEDY, PLAIN, on_output=lambda o: got[0].append(o.text))
    late = [
        threading.Thread(
            target=lambda i=i: requests.submit([1], GREEDY, PLAIN, on_output=lambda o: got[i].append(o.text))
        )
        for i in range(1, 8)
    ]
    for i in range(40):
        engine.requests[0](output(str(i), FinishReason.STOP if i == 39 else None))
        if i % 5 == 0 and i // 5 < len(late):
            late[i // 5].start()
    for thread in late:
        thread.join()
    assert got == [[str(i) for i in range(40)]] * 8


class SlowAfterLast:
    """A lock whose release by the engine's thread takes so long that another thread gets in between."""

    def __init__(self, is_last: Callable[[], bool]) -> None:
        self._lock, self._is_last = threading.Lock(), is_last
        self.others_turn, self.other_is_done = threading.Event(), threading.Event()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        if threading.current_thread() is threading.main_thread() and self._is_last() and not self.others_turn.is_set():
            self.others_turn.set()
            self.other_is_done.wait(10)


def test_the_last_output_reaches_readers_in_the_order_in_which_they_asked() -> None:
    """A reader that is still catching up on another thread must not have it first: what it asks next would go first."""
    engine = StubEngine()
    requests = SharedRequests(cast(Any, engine))
    told: list[tuple[str, str]] = []
    requests.submit([1, 2], GREEDY, PLAIN, on_output=lambda o: told.append(("first", o.text)))
    engine.requests[0](output("a"))
    (shared,) = requests._known.values()
    lock = SlowAfterLast(lambda: len(shared.outputs) == 2)
    shared.lock = cast(Any, lock)

    def second(found: RequestOutput) -> None:
        told.append(("second", found.text))
        if found.text == "a":
            is_catching_up.set()
            lock.others_turn.wait(10)

    def join() -> None:
        requests.submit([1, 2], GREEDY, PLAIN, on_output=second)
        lock.other_is_done.set()

    is_catching_up = threading.Event()
    thread = threading.Thread(target=join)
    thread.start()
    assert is_catching_up.wait(10)
    engine.requests[0](output("b", FinishReason.STOP))
    thread.join(10)
    assert told == [("first", "a"), ("second", "a"), ("first", "b"), ("second", "b")]


def test_keys_tell_requests_apart_that_may_write_different_text() -> None:
    def key(**values: Any) -> object:
        return request_key([1, 2], SamplingParams(**values), None, None)

    assert key(temperature=0, seed=1) == key(temperature=0, seed=2)
    assert key(temperature=1, seed=1) != key(temperature=1, seed=2)
    assert key(temperature=0, max_tokens=5) != key(temperature=0, max_tokens=6)
    assert key(temperature=0, stop=("a",)) != key(temperature=0)
    assert key(temperature=0, logit_bias={1: 2.0}) != key(temperature=0)
    assert request_key([1, 2], GREEDY, None, None) != request_key([1, 3], GREEDY, None, None)
    assert request_key([1, 2], GREEDY, None, None) != request_key([1, 2], GREEDY, None, 1)
    assert request_key([1, 2], GREEDY, None, None) != request_key([1, 2], GREEDY, None, None, "an adapter")
