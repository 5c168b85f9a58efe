"""A branch that waits for a value holds up nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from ramet import MockBackend, State, function, gen
from ramet.errors import CheckFailed, InvalidProgram, ProgramError
from ramet.lang.backends.protocol import Session
from ramet.lang.graph.events import OnEvent
from ramet.lang.graph.ir import Generate, Graph
from ramet.lang.graph.options import ProgramOptions


class Counted:
    """A backend that notes how many generations came with each part of a program."""

    def __init__(self, script: dict[str, Any]) -> None:
        self.mock = MockBackend(script)
        self.parts: list[int] = []

    def start(self, options: ProgramOptions, on_event: OnEvent) -> Session:
        session = self.mock.start(options, on_event)
        extend = session.extend

        def counted(graph: Graph, *, is_last: bool = False) -> None:
            self.parts.append(sum(isinstance(node, Generate) for node in graph.nodes))
            extend(graph, is_last=is_last)

        session.extend = counted  # type: ignore[method-assign]
        return session


@pytest.fixture
def backend() -> Counted:
    return Counted({"long?": "a b c", "short?": "a", "more?": "x"})


def reads(branch: State, index: int) -> None:
    branch += "long?" + gen("a")
    if str(branch["a"]) == "a b c":
        branch += f" more?{index}" + gen("b")


def by_map(s: State) -> None:
    s.map(range(8), reads).join()


def by_each(s: State) -> None:
    branches = s.fork(8)
    branches.each(lambda branch: reads(branch, 0))
    branches.join()


def by_program(s: State) -> None:
    s.map(range(8), function(reads)).join()


@pytest.mark.parametrize("way", [by_map, by_each, by_program])
def test_bodies_that_read_a_value_run_together(backend: Counted, way: Callable[[State], None]) -> None:
    state = function(way).run(backend=backend)
    assert state["a"] == ["a b c"] * 8
    assert state["b"] == ["x"] * 8
    assert backend.parts[0] == 8  # all had started before the first waited
    assert sum(backend.parts) == 16


def test_checks_in_python_of_all_branches_run_together(backend: Counted) -> None:
    @function
    def program(s: State) -> None:
        branches = s.fork(4)
        branches += "long?" + gen("a", where=lambda text: "b" in text)
        branches.join()

    assert program.run(backend=backend)["a"] == ["a b c"] * 4
    assert backend.parts[0] == 4


def test_a_loop_over_branches_still_waits_for_each(backend: Counted) -> None:
    @function
    def program(s: State) -> None:
        for index, branch in enumerate(s.fork(4)):
            reads(branch, index)

    program.run(backend=backend)
    assert backend.parts[0] == 1


def test_stage_always_runs_one_after_the_other_and_writes_the_same(backend: Counted) -> None:
    program = function(by_map)
    together = program.run(backend=backend, seed=3)
    backend.parts.clear()
    alone = program.run(backend=backend, seed=3, stage="always")
    assert max(backend.parts) == 1
    assert [alone["a"], alone["b"]] == [together["a"], together["b"]]


def test_results_come_in_order_and_an_error_ends_the_program(backend: Counted) -> None:
    @function
    def program(s: State, bad: int) -> object:
        def body(branch: State) -> object:
            branch += "long?" + gen("a")
            if branch["a"] and branch.recorder.place[-1] == bad:
                raise KeyError(bad)
            return branch.recorder.place[-1]

        return s.fork(5).each(body)

    assert program.run(-1, backend=backend).result == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError):
        program.run(2, backend=backend)


def test_maps_nest_and_a_failed_check_is_raised_in_its_body(backend: Counted) -> None:
    caught: list[int] = []

    def refuses(branch: State, index: int) -> None:
        try:
            branch += "long?" + gen("a", where=lambda _: index != 1, retries=1)
        except CheckFailed:
            caught.append(index)

    @function
    def program(s: State) -> None:
        s.map(range(2), lambda branch, _: branch.map(range(3), refuses).join()).join()

    state = program.run(backend=backend)
    assert caught == [1, 1]
    assert [len(values) for values in state["a"]] == [3, 3]


def test_a_deadline_passes_in_all_bodies(backend: Counted) -> None:
    slow = MockBackend({"long?": " ".join("abcdefgh" * 40)}, latency_s=0.05)

    @function
    def program(s: State) -> None:
        s.map(range(3), reads)

    with pytest.raises(ProgramError):
        program.run(backend=slow, timeout_s=0.2)


def test_an_async_body_is_refused_and_arun_takes_maps(backend: Counted) -> None:
    async def body(branch: State, index: int) -> None:
        reads(branch, index)

    @function
    def program(s: State) -> None:
        s.map(range(3), body)

    with pytest.raises(InvalidProgram, match=r"asyncio\.gather"):
        program.run(backend=backend)
    assert asyncio.run(function(by_map).arun(backend=backend))["a"] == ["a b c"] * 8


def test_lines_are_those_of_the_program_wherever_it_is_recorded(backend: Counted) -> None:
    @function
    def program(s: State) -> None:
        branches = s.fork(2)
        branches += "long?" + gen("a", where=lambda text: "b" in text)
        branches.join()

    @function
    def nested(s: State) -> None:
        s.map(range(2), lambda branch, _: branch.map(range(2), lambda leaf, _: leaf.append("long?")))

    for one in (program, nested):
        record = one.run(backend=backend).record
        lines = [node.line for node in record.graph.nodes] + [stage.line for stage in record.stages]
        assert lines
        assert all("test_turns_in_programs.py:" in line for line in lines)
