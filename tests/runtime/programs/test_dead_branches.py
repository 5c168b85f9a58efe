"""Branches that a finished program leaves behind go first; rows that begin alike run together. Same tokens, fewer
computed, on a real engine whose cache is too small to keep everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Semaphore
from typing import Any

import pytest

from ramet import Engine, MockBackend, State, function, gen
from ramet.errors import ConfigError
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.programs.cache_hints import dead_branches
from ramet.runtime.programs.path import Path


@pytest.fixture
def engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, num_kv_tokens=512, max_running_requests=4, chunked_prefill_size=256) as engine:
        yield engine


@function(temperature=0, ignore_eos=True)
def judge(s: State, question: str) -> None:
    """A main branch, and two side branches that end after it and that nobody needs afterwards."""
    s += f"{question} " + "m" * 30
    for branch in s.fork(2):
        branch += "side " * 8 + gen("opinion", max_tokens=40)
    s += " Result: " + "r" * 90 + gen("result", max_tokens=2)


@function(temperature=0, max_tokens=4, ignore_eos=True)
def again(s: State, text: str) -> None:
    s += text + " And then? " + gen("more")


def conversation(engine: Any, after_first: Callable[[], object] = lambda: None) -> tuple[list[str], int]:
    """One program, another one that needs room, and one that goes on with the first one's text."""
    first = judge.run("First?", backend=engine)
    after_first()
    second = again.run("z" * 310, backend=engine)
    third = again.run(first.text(), backend=engine)
    return [first.text(), second.text(), third.text()], third.usage.computed_tokens


def test_dead_branches_make_room_so_that_the_main_one_is_still_there(
    engine: Engine, tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark_dead, marked = engine.mark_dead, Semaphore(0)

    def mark(*args: Any) -> None:
        mark_dead(*args)
        marked.release()

    monkeypatch.setattr(engine, "mark_dead", mark)
    # a program's text may be read a moment before the engine is told of its two side branches
    texts, computed = conversation(engine, lambda: [marked.acquire(timeout=10) for _ in range(2)])
    with Engine(tiny_model, num_kv_tokens=512, max_running_requests=4, chunked_prefill_size=256) as other:
        for hint in ("set_next_use", "mark_dead"):
            monkeypatch.setattr(other, hint, lambda *_: None)
        texts_without, computed_without = conversation(other)
    assert texts == texts_without
    assert computed < computed_without
    assert computed == len(" And then? ") + 1  # what is new, and the last token that was written
    assert computed_without > 50


def test_only_what_left_the_main_branch_is_dead() -> None:
    with MockBackend() as backend:
        state = judge.run("Q?")
    nodes = state.record.graph.nodes
    size = {n.id: Path(None, tuple(range(10 * (n.id + 1))), 10 * (n.id + 1)) for n in nodes}
    found = list(dead_branches(nodes, size.__getitem__))
    assert len(found) == 2
    assert {num_live for _, num_live in found} == {10 * (len([n for n in nodes if n.parent is None]))}
    backend.engine.shutdown()


@function(temperature=0, max_tokens=4, ignore_eos=True)
def ask(s: State, question: str, document: str) -> None:
    s += f"Read: {document}\n{question} " + gen("answer")


ROWS = [{"document": letter * 300, "question": f"Question {i}?"} for i in range(3) for letter in "abc"]


def test_rows_that_begin_alike_run_together_and_compute_less(engine: Engine) -> None:
    given = ask.run_batch(ROWS, backend=engine, max_live=1)
    engine.flush_cache()
    grouped = ask.run_batch(ROWS, backend=engine, max_live=1, order="prefix")
    assert [state.text() for state in given] == [state.text() for state in grouped]
    computed = [sum(state.usage.computed_tokens for state in states) for states in (given, grouped)]
    assert computed[1] < 3 * 330 + 6 * 32  # each document once
    assert computed[0] > 2 * computed[1]  # three documents don't fit together: a row finds little of its own


def test_results_come_in_the_order_of_the_rows_one_by_one_as_well(engine: Engine) -> None:
    states = ask.run_batch(ROWS, backend=engine, order="prefix", generator_style=True, max_live=2)
    assert [f"Question {i // 3}?" in state.text() for i, state in enumerate(states)] == [True] * 9


def test_an_unknown_order_is_an_error() -> None:
    with pytest.raises(ConfigError, match="order is 'random', but must be one of given, prefix"):
        ask.run_batch(ROWS, order="random")
