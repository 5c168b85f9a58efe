"""`explain()` of a graph without its function: what a server is asked for (`POST /v1/programs/explain`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ramet.lang.explain.explain import Explanation, explain_trace
from ramet.lang.graph import ir
from ramet.lang.passes.target import Target, TokenizerTarget
from ramet.lang.recording.state import State
from ramet.lang.recording.trace import Trace, TracingRun


def explain_graph(graph: ir.Graph, program: str, target: Target) -> Explanation:
    """The plan of a graph: exact where its arguments are given, with limits where they are not.

    A staged program's later parts can't be in it. Raises InvalidProgram.
    """
    ir.GraphIndex().add(graph)
    return explain_trace(Trace(program, graph, None, {}, State(TracingRun(program, ir.Sampling()))), target)


def explain_on_server(
    graph: ir.Graph, program: str, tokenizer: Any, model: str, limits: Mapping[str, int]
) -> dict[str, Any]:  # Any: a runtime's Tokenizer; JSON
    """The plan as plain data, by a server's own tokenizer. `limits`: of its engine, as a Target has them."""
    return explain_graph(graph, program, TokenizerTarget(tokenizer, name=model, **limits)).to_dict()
