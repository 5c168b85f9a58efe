"""What is known of a run of a program: its graph, what happened to each node, and where recording had to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

    `attempts`: generation -> the texts that its checks refused (`text`) and why (`problem`).
    """

    program: str
    graph: ir.Graph
    events: Mapping[int, ir.NodeEvent]
    stages: tuple[Stage, ...]
    attempts: Mapping[int, tuple[dict[str, str], ...]]
