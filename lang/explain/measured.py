"""`explain()` after a run: the measured cost of every node."""

from __future__ import annotations

from ramet.lang.explain.explanation import Explanation, Measured, stage_reports
from ramet.lang.graph import ir
from ramet.lang.graph.run_record import RunRecord
from ramet.lang.passes.kv_bound import KvBound


def explain_run(record: RunRecord) -> Explanation:
    """Explain a run: measured tokens and times by node, and the lines that forced a stage."""
    measured = tuple(
        one for node in record.graph.nodes if (one := _measure(node, record.events.get(node.id))) is not None
    )
    most = max((one.usage.prompt_tokens + one.usage.completion_tokens for one in measured), default=0)
    total = sum((one.usage for one in measured), ir.Usage())
    kv = KvBound(total.computed_tokens + total.completion_tokens, None, total.computed_tokens, most, True)
    return Explanation(record.program, "", (), (), stage_reports(record), {}, kv, True, measured=measured)


def _measure(node: ir.AnyNode, event: ir.NodeEvent | None) -> Measured | None:
    if node.run_by == "runner" or event is None:
        return None
    times = event.timings or {}
    return Measured(
        node.id,
        node.kind_name,
        node.label,
        node.line,
        event.usage or ir.Usage(),
        times.get("start_s"),
        times.get("first_token_s"),
        times.get("end_s"),
        None if event.error is None else f"{event.error.type}: {event.error.message}",
    )
