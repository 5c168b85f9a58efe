"""What the engine process does with commands that fail for a reason that nobody expected."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from ramet import Engine
from ramet.lang.graph.ir import Constraint, Generate, Graph, Text
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.server.link.process import EngineServer
from ramet.runtime.server.link.protocol import (
    Abort,
    Answer,
    Ask,
    Command,
    Output,
    ProgramEvent,
    Report,
    StartProgram,
    Submit,
)
from ramet.runtime.types import SamplingParams


def broken(*arguments: Any, **options: Any) -> Any:
    raise ZeroDivisionError("a bug")


COMMANDS: dict[str, tuple[Command, str]] = {
    "a request": (Submit("r", [1], SamplingParams(max_tokens=1)), "submit"),
    "a constrained request": (Submit("r", [1], SamplingParams(max_tokens=1), Constraint("regex", "a")), "submit"),
    "a program": (StartProgram("p", b'{"version": 1, "nodes": []}', (b"{}",)), "_start_row"),
    "a question": (Ask("q", "stats", {}), "stats"),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_bug_in_one_command_is_reported_to_its_caller_and_the_next_command_is_carried_out(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    command, function = COMMANDS[kind]
    reports: list[Report] = []
    came = threading.Event()

    def send(report: Report) -> None:
        reports.append(report)
        came.set()

    def first(carry_out: Callable[[Command], None], command: Command) -> Any:
        came.clear()
        reports.clear()
        carry_out(command)
        assert came.wait(30)
        return reports[0]

    with Engine(tiny_model, num_kv_tokens=4096) as engine:
        server = EngineServer(engine, send)
        with monkeypatch.context() as patch:
            patch.setattr(server if function.startswith("_") else engine, function, broken)
            if kind == "a question":
                patch.setitem(server.questions, "stats", broken)
            failed = first(server.carry_out, command)
        assert isinstance(failed, Output | ProgramEvent | Answer)
        assert failed.error is not None
        assert "ZeroDivisionError('a bug')" in failed.error.message
        whole = first(server.carry_out, Submit("next", [1], SamplingParams(max_tokens=1)))
        assert whole.error is None
        server._host.model.grammars.close()


def test_while_a_large_program_is_read_others_are_served_and_what_follows_for_it_waits(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [Text(id=i, parent=i - 1 if i else None, parts=("some text",)) for i in range(3000)]
    graph = Graph((*nodes, Generate(id=3000, parent=2999)))
    may_be_read, is_served, is_over = threading.Event(), threading.Event(), threading.Event()
    ends: list[ProgramEvent] = []

    def send(report: Report) -> None:
        if isinstance(report, Output) and report.finish_reason is not None:
            is_served.set()
        if isinstance(report, ProgramEvent) and report.is_last:
            ends.append(report)
            is_over.set()

    def read(data: bytes) -> Graph:
        assert may_be_read.wait(30)
        return graph

    with Engine(tiny_model, num_kv_tokens=4096) as engine:
        server = EngineServer(engine, send)
        monkeypatch.setattr(Graph, "from_json", staticmethod(read))
        server.carry_out(StartProgram("p", graph.to_json(), (b"{}",)))
        server.carry_out(Abort("p/0"))
        server.carry_out(Submit("r", [1], SamplingParams(max_tokens=1)))
        assert is_served.wait(30)
        assert not ends
        may_be_read.set()
        assert is_over.wait(30)
        server.carry_out(Ask("q", "stats", {}))
        assert not server._programs
        server._host.model.grammars.close()
