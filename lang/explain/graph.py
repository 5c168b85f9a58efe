"""`explain()` of a graph without its function: what a server is asked for (`POST /v1/programs/explain`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ramet.lang.explain.plan import explain_plan
from ramet.lang.graph import ir
from ramet.lang.graph.run_record import RunRecord
from ramet.lang.passes.target import TokenizerTarget


def explain_on_server(
    graph: ir.Graph, program: str, tokenizer: Any, model: str, limits: Mapping[str, int]
) -> dict[str, Any]:  # Any: a runtime's Tokenizer; JSON
    """The plan as plain data, by a server's own tokenizer: exact where the graph's arguments are given.

    `limits`: of its engine, as a Target has them. A staged program's later parts can't be in it. Raises InvalidProgram.
    """
    ir.GraphIndex().add(graph)
    unbound = ir.Graph(graph.nodes) if any(isinstance(node, ir.Argument) for node in graph.nodes) else None
    target = TokenizerTarget(tokenizer, name=model, **limits)
    return explain_plan(RunRecord(program, graph), target, unbound).to_dict()
