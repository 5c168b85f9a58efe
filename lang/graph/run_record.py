"""The record of a run or a trace: its graph, the events of its nodes, and the lines where recording stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

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
    whose value the graph of a trace depends on, each with the line that needed the value. `cancelled`: nodes of a trace
    that its run may cancel. A trace has no events and at most one stage, which ends it.
    """

    program: str
    graph: ir.Graph
    events: Mapping[int, ir.NodeEvent] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    attempts: Mapping[int, tuple[dict[str, str], ...]] = field(default_factory=dict)
    specialised: Mapping[str, str] = field(default_factory=dict)
    cancelled: frozenset[int] = frozenset()

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a line for each node that a model or a tool ran."""
        rows = []
        for node in self.graph.nodes:
            event = self.events.get(node.id)
            if node.run_by == "runner":
                continue
            state: str = "not run" if event is None else event.kind
            if event is not None and event.error is not None:
                state = "cancelled" if event.error.is_cancelled else "failed"
            usage = ir.Usage() if event is None or event.usage is None else event.usage
            what = (node.kind_name, node.label or node.id, node.line.rpartition("/")[2], state)
            cells = (*what, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
            rows.append("".join(f"<td>{escape(str(cell))}</td>" for cell in cells))
        head = "".join(f"<th>{name}</th>" for name in ("kind", "name", "line", "state", "prompt", "cached", "written"))
        body = "".join(f"<tr>{row}</tr>" for row in rows[:200])
        return f"<b>{escape(self.program)}</b><table><tr>{head}</tr>{body}</table>"

    @property
    def stop(self) -> Stage | None:
        """The first need for a generated value. None: the graph is the whole program."""
        return self.stages[0] if self.stages else None
