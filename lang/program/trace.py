"""Tracing: runs a program's function without a model, with symbolic arguments, to get its graph.

An argument put into text becomes an Argument node. If Python code needs its value (`if`, `len()`, a loop over it), the
given value is used, and the graph holds for that value only. A need for a generated value ends the trace; the rest is
recorded when the program runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ramet.lang.graph import ir
from ramet.lang.graph.operations import MAX_STEPS, Operation, Step, follow, path_text
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.graph.run_record import RunRecord
from ramet.lang.running.output_types import OutputType
from ramet.lang.running.run import Run
from ramet.lang.running.source_lines import caller_line
from ramet.lang.running.values import Source, Value

T = TypeVar("T")


class TraceStopped(BaseException):
    """A trace needed a value that it doesn't have. Not an Exception, so that a program's `except` can't catch it."""


class TracingRun(Run):
    """A run without a backend.

    `arm`: the answers to assume, in order, where the program asks which branch is done first or which choice a
    selection made; when they are used up, the first option. None: such a question ends the trace, as any other need of
    a value does. `taken`: the options that it took, each with their number.
    """

    def __init__(self, program: str, seed: int | None, arm: Sequence[int] | None) -> None:
        super().__init__(None, ProgramOptions(program=program), seed=seed)
        self.arm = arm
        self.taken: list[tuple[int, int]] = []
        self._chosen: dict[int, str] = {}  # selection -> its choice
        self._cancelled: set[int] = set()
        self._specialised: dict[str, str] = {}
        self._argument_nodes: dict[str, int] = {}

    def submit(self, *, is_last: bool = False) -> None:
        """Send nothing."""

    def pick(self, values: Sequence[T], choose: Callable[[], tuple[int, T]]) -> tuple[int, T]:
        return super().pick(values, choose) if self.arm is None else (0, values[0])

    def first_done(self, nodes: list[int]) -> int:
        return super().first_done(nodes) if self.arm is None else self._option(len(nodes))

    def read(self, node: int, output: OutputType, why: str) -> Any:
        select = self.nodes[node]
        if self.arm is None or not isinstance(select, ir.Select):
            return super().read(node, output, why)
        choices = ["".join(part for part in choice if isinstance(part, str)) for choice in select.choices]
        if any(not isinstance(part, str) for choice in select.choices for part in choice):
            return super().read(node, output, why)
        if node not in self._chosen:
            self._chosen[node] = choices[self._option(len(choices))]
        return output.convert(self._chosen[node])

    def _option(self, num_options: int) -> int:
        assert self.arm is not None
        place = len(self.taken)
        option = self.arm[place] if place < len(self.arm) else 0
        self.taken.append((option, num_options))
        return option

    def cancel(self, nodes: list[int] | None = None) -> None:
        """Note the nodes that a run may cancel before it has asked for them."""
        self._cancelled.update(nodes or ())

    def need(self, node: int, why: str) -> None:
        stage = self.note_stage(node, why)
        raise TraceStopped(f"{stage.line} needs a value ({why})")

    def depend_on(self, argument: str, why: str) -> None:
        """Note that Python code needs the value of an argument, so that the graph holds for this value only."""
        self._specialised.setdefault(argument, f"{caller_line()} ({why})")

    def report(self) -> RunRecord:
        return replace(super().report(), specialised=dict(self._specialised), cancelled=frozenset(self._cancelled))

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

    def in_run(self, run: Run, arguments: Mapping[str, Any]) -> Any:
        return follow(arguments[self.argument], self.path)

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
