"""What is known of a run of a program, or of its trace: its graph, what happened to each node, and where recording
had to stop for a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ramet.lang.graph import ir


@dataclass(frozen=True, slots=True)
class Stage:
    """One time that recording stopped for a value: the source line, what it needed, and how far recording had come."""

    line: str
    node: int
    why: str
    num_nodes: int


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run did: its graph, what happened to each node (by id), and where recording had to stop.

    `attempts`: generation -> the texts that its checks refused (`text`) and why (`problem`). `specialised`: arguments
    of a trace whose value its graph depends on, with the line that needed it. A trace has no events, and at most one
    stage, with which it ends.
    """

    program: str
    graph: ir.Graph
    events: Mapping[int, ir.NodeEvent] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    attempts: Mapping[int, tuple[dict[str, str], ...]] = field(default_factory=dict)
    specialised: Mapping[str, str] = field(default_factory=dict)
