"""Tracing: runs a program's function without a model, with symbolic arguments, to get its graph.

An argument put into text becomes an Argument node. If Python code needs its value (`if`, `len()`, a loop over it), the
given value is used, and the graph holds for that value only. A need for a generated value ends the trace; the rest is
recorded when the program runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ramet.lang.graph import ir
from ramet.lang.graph.operations import MAX_STEPS, Operation, Step, follow, path_text
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.graph.run_record import RunRecord
from ramet.lang.running.run import Run
from ramet.lang.running.source_lines import caller_line
from ramet.lang.running.values import Source, Value


class TraceStopped(BaseException):
    """A trace needed a value that it doesn't have. Not an Exception, so that a program's `except` can't catch it."""


class TracingRun(Run):
    """A run without a backend."""

    def __init__(self, program: str, seed: int | None = None) -> None:
        super().__init__(None, ProgramOptions(program=program), seed=seed)
        self._specialised: dict[str, str] = {}
        self._argument_nodes: dict[str, int] = {}

    def submit(self, *, is_last: bool = False) -> None:
        """Send nothing."""

    def need(self, node: int, why: str) -> None:
        stage = self.note_stage(node, why)
        raise TraceStopped(f"{stage.line} needs a value ({why})")

    def depend_on(self, argument: str, why: str) -> None:
        """Note that Python code needs the value of an argument, so that the graph holds for this value only."""
        self._specialised.setdefault(argument, f"{caller_line()} ({why})")

    def report(self) -> RunRecord:
        return replace(super().report(), specialised=dict(self._specialised))

    def argument_node(self, name: str, *examples: Any) -> int:
        """Return the node of an argument, recorded at its first use in text. `examples`: its value, if it has one."""
        if name not in self._argument_nodes:
            self._argument_nodes[name] = self.record(ir.Argument, None, name=name)
            if examples:
                self.arguments[name] = as_argument(*examples)
        return self._argument_nodes[name]


class ArgumentSource(Source):
    """A symbolic argument. `examples`: its value in the trace, or nothing. `path`: the operations on it."""

    __slots__ = ("argument", "examples", "path", "run")

    run: TracingRun

    def __init__(self, run: TracingRun, argument: str, *examples: Any, path: tuple[Step, ...] = ()) -> None:
        self.run, self.argument, self.examples, self.path = run, argument, examples, path

    @property
    def node(self) -> int:
        return self.run.argument_node(self.argument, *self.examples)

    @property
    def is_text(self) -> bool:
        return self.kind is str or not self.examples

    @property
    def kind(self) -> type | None:
        kind = type(self.examples[0]) if self.examples else None
        for step in self.path:
            assert isinstance(step, Operation)
            assert kind is not None
            kind = step.kind(kind)
        return kind

    def format(self, spec: str) -> str:
        return self.run.placeholders.add(ir.Ref(self.node, self.path, spec), self.argument + path_text(self.path))

    def child(self, name: str | int) -> None:
        return None

    def result_of(self, operation: Operation) -> ArgumentSource | None:
        if type(as_argument(*self.examples)) is not type(*self.examples) or len(self.path) >= MAX_STEPS:
            return None  # the graph has its text
        return ArgumentSource(self.run, self.argument, *self.examples, path=(*self.path, operation))

    def read(self, why: str) -> Any:
        if not self.examples:
            self.run.need(self.node, why)
        self.run.depend_on(self.argument, why)
        return follow(self.examples[0], self.path)

    async def aread(self) -> Any:
        return self.read("await")

    def shown(self) -> str:
        return self.format("!r")


def as_argument(value: Any) -> Any:  # Any: JSON
    """Return an argument's value in a graph: the value, if its JSON has the text of an f-string, else its `str()`."""
    is_same = type(value) in (str, int) or (type(value) is float and math.isfinite(value))
    return value if is_same else str(value)


def symbolic(run: TracingRun, names: list[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for a trace: symbolic if they have a JSON form or no value, else unchanged."""
    found: dict[str, Any] = {}
    for name in names:
        if name not in given:
            found[name] = Value(ArgumentSource(run, name))
        elif ir.is_json(given[name]) and given[name] is not None:
            found[name] = Value(ArgumentSource(run, name, given[name]))
        else:
            found[name] = given[name]
    return found
