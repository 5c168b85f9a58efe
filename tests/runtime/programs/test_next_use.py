"""A prefix that a program will read again is kept in favour of others. Same tokens, fewer computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from ramet import Engine, MockBackend, State, function, gen
from ramet.lang.backends.in_process import EngineBackend
from ramet.runtime.models.load import LoadedModel


@pytest.fixture
def engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, num_kv_tokens=512, max_running_requests=4, chunked_prefill_size=256) as engine:
        yield engine


@function(temperature=0, max_tokens=2, ignore_eos=True)
def waits(s: State) -> None:
    """A branch that goes on when four others, one after the other, are done."""
    document, *others = s.fork(5)
    document += "document " * 20 + gen("summary")
    before: Any = document["summary"]
    for index, other in enumerate(others):
        other += f"{index} {before} " + f"{index}" * 100 + gen("x")
        before = other["x"]
    document += f" In the end: {before}" + gen("end")
    s.set_var("end", document["end"])
    s.set_var("document", document)


def run(engine: Any) -> tuple[str, int]:
    state = waits.run(backend=engine)
    meta = state.meta("end")
    return state["end"], meta["usage"].computed_tokens


def test_what_is_read_later_is_kept_and_what_is_not_makes_room(
    engine: Engine, tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, computed = run(engine)
    with Engine(tiny_model, num_kv_tokens=512, max_running_requests=4, chunked_prefill_size=256) as other:
        for hint in ("set_next_use", "mark_dead"):
            monkeypatch.setattr(other, hint, lambda *_: None)
        text_without, computed_without = run(other)
    assert text == text_without
    assert computed <= len(" In the end: ") + 8  # its own text and the value in it
    assert computed_without > 100  # the document again, as far as its pages were given away
    engine.check_integrity()


class Noting(EngineBackend):
    """Notes every hint."""

    def __init__(self, mock: MockBackend) -> None:
        self.hints: list[tuple[str, float]] = []
        engine: Any = mock.engine

        def set_next_use(tokens: list[int], next_use: float, cache_salt: str = "") -> None:
            self.hints.append((engine.tokenizer.decode(tokens), next_use))

        engine.set_next_use, engine.mark_dead = set_next_use, lambda *_: None
        super().__init__(engine)


def test_hints_say_how_many_requests_come_before_and_are_taken_back() -> None:
    with MockBackend() as mock:
        backend = Noting(mock)
        waits.run(backend=backend)
    documents = [when for text, when in backend.hints if text.startswith("document ")]
    assert 4 <= documents[0] < math.inf
    assert documents[-1] == math.inf
    last = dict(backend.hints)
    assert set(last.values()) == {math.inf}
    mock.engine.shutdown()


def test_a_program_without_waiting_branches_gives_no_hints() -> None:
    @function
    def chat(s: State) -> None:
        s += "Hello" + gen("a")
        branches = s.fork(3)
        branches += gen("b")
        s += " Bye" + gen("c")

    with MockBackend() as mock:
        backend = Noting(mock)
        chat.run(backend=backend)
    assert backend.hints == []
    mock.engine.shutdown()
