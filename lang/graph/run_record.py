"""The record of a run or a trace: its graph, the events of its nodes, and the lines where recording stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ramet.lang.graph import ir


@dataclass(frozen=True, slots=True)
class Stage:
    """One stop of recording, because Python code needed a generated value.

    `line`: of the source. `why`: the use that needed the value. `value`: its name. `num_nodes`: recorded by then.
    """

    line: str
    why: str
    value: str
    num_nodes: int


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The record of a run: its graph, the last event of each node (by id), and the stages where recording stopped.

    `attempts`: generation -> its refused texts (`text`), each with the reason (`problem`). `specialised`: arguments
    whose value the graph of a trace depends on, each with the line that needed the value. A trace has no events and at
    most one stage, which ends it.
    """

    program: str
    graph: ir.Graph
    events: Mapping[int, ir.NodeEvent] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    attempts: Mapping[int, tuple[dict[str, str], ...]] = field(default_factory=dict)
    specialised: Mapping[str, str] = field(default_factory=dict)

    @property
    def stop(self) -> Stage | None:
        """The first need for a generated value. None: the graph is the whole program."""
        return self.stages[0] if self.stages else None
