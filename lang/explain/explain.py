"""`explain()`: what a program will cost before it runs, and what it did cost afterwards. EXPLAIN for prompts.

Before a run: exact prompt, shared and new tokens wherever the text is known, limits for the rest, a KV bound, and one
line for each pass. After a run: what was measured, by node. Nothing here runs a model (`analyze=True` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ramet.errors import GrammarError, InvalidRequest
from ramet.lang.graph import ir
from ramet.lang.passes.argument_motion import argument_motion, as_written, late_gain
from ramet.lang.passes.fold import Folded, fold_constants
from ramet.lang.passes.forced_tokens import forced_tokens
from ramet.lang.passes.fork_groups import fork_groups
from ramet.lang.passes.identical_nodes import identical_nodes
from ramet.lang.passes.kv_bound import KvBound, kv_bound, most_pages
from ramet.lang.passes.liveness import liveness
from ramet.lang.passes.paths import ZERO, Count, Paths, interpret
from ramet.lang.passes.prefixes import BatchPrefixes, batch_prefixes, static_prefixes
from ramet.lang.passes.requests import RequestPlan, plan_requests
from ramet.lang.passes.target import Target, target_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ramet.lang.graph.run_record import RunRecord
    from ramet.lang.program.function import Function
    from ramet.lang.recording.trace import Trace


@dataclass(frozen=True, slots=True)
class NodeCost:
    """What one generation or selection asks for. Of a selection: all its choices together.

    `num_exact`: how many of prompt, shared and new are exact. `twin`: the node whose text it takes over.
    """

    node: int
    kind: str
    name: str | None
    line: str
    prompt: Count
    shared: Count
    new: Count
    written: Count
    twin: int | None = None

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        counts = {name: _plain(getattr(self, name)) for name in ("prompt", "shared", "new", "written")}
        return {"node": self.node, "kind": self.kind, "name": self.name, "line": self.line, **counts, "twin": self.twin}


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass found, in a sentence, and in numbers."""

    name: str
    text: str
    numbers: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class StageReport:
    """A source line that needed a generated value in Python, and for what; recording stopped there."""

    line: str
    why: str
    value: str


@dataclass(frozen=True, slots=True)
class Measured:
    """What one node did cost. Times in seconds since the program's start; None where the backend didn't say."""

    node: int
    kind: str
    name: str | None
    line: str
    usage: ir.Usage
    start_s: float | None
    first_token_s: float | None
    end_s: float | None
    error: str | None

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        return {
            "node": self.node,
            "kind": self.kind,
            "name": self.name,
            "line": self.line,
            "prompt": self.usage.prompt_tokens,
            "cached": self.usage.cached_tokens,
            "computed": self.usage.computed_tokens,
            "decoded": self.usage.completion_tokens,
            "start_s": self.start_s,
            "first_token_s": self.first_token_s,
            "end_s": self.end_s,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """The plan of a program. `str()` and rich show it as a table, `to_dict()` as plain data.

    `is_complete`: the plan covers the whole program; else it ends where `stages` says, and so does the KV bound.
    """

    program: str
    target: str
    nodes: tuple[NodeCost, ...]
    passes: tuple[PassReport, ...]
    stages: tuple[StageReport, ...]
    specialised: Mapping[str, str]
    kv: KvBound
    is_complete: bool
    num_rows: int = 1
    measured: tuple[Measured, ...] = ()

    @property
    def prompt(self) -> Count:
        """Prompt tokens of all requests."""
        return _sum(node.prompt for node in self.nodes)

    @property
    def shared(self) -> Count:
        """Those of them that an earlier request of the program has computed."""
        return _sum(node.shared for node in self.nodes)

    @property
    def new(self) -> Count:
        """Those that are computed."""
        return _sum(node.new for node in self.nodes)

    @property
    def written(self) -> Count:
        """Tokens that the model writes."""
        return _sum(node.written for node in self.nodes)

    @property
    def usage(self) -> ir.Usage:
        """Measured tokens of all nodes; zero before a run."""
        return sum((one.usage for one in self.measured), ir.Usage())

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        """Plain data; a count is an int where it is exact, else [least, most]."""
        return {
            "program": self.program,
            "target": self.target,
            "is_complete": self.is_complete,
            "rows": self.num_rows,
            **{name: _plain(getattr(self, name)) for name in ("prompt", "shared", "new", "written")},
            "kv_bound": {name: getattr(self.kv, name) for name in ("tokens", "pages", "known", "longest")},
            "nodes": [node.to_dict() for node in self.nodes],
            "passes": {one.name: {"text": one.text, **one.numbers} for one in self.passes},
            "stages": [{"line": s.line, "why": s.why, "value": s.value} for s in self.stages],
            "specialised": dict(self.specialised),
            "measured": [one.to_dict() for one in self.measured],
        }

    def __rich__(self) -> RenderableType:
        from ramet.lang.explain.text import render

        return render(self)

    def __str__(self) -> str:
        from ramet.lang.explain.text import as_text

        return as_text(self)


def explain_program(
    program: Function,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    rows: Iterable[Any] | None = None,
    target: Target | None = None,
    analyze: bool = False,
) -> Explanation:
    """See Function.explain."""
    kwargs = dict(kwargs or {})
    if rows is not None:
        if analyze:
            raise InvalidRequest(
                "explain(rows=...) can't analyze; run the batch, and explain its states", param="analyze"
            )
        return _explain_rows(program, list(rows), kwargs, target)
    trace = _trace(program, args, kwargs)
    found = target or target_of(program._split(args, kwargs, is_partial=True).options.get("backend"))
    folded = fold_constants(trace.graph)
    paths = interpret(trace.graph, found)
    plan = _explanation(trace, folded, paths, found, [_motion_report(program, args, kwargs, found)])
    if not analyze:
        return plan
    after = explain_record(program.run(*args, **kwargs).record)
    return replace(plan, measured=after.measured, stages=after.stages)


def explain_trace(trace: Trace, target: Target) -> Explanation:
    """The plan of what a trace recorded; see Function.explain."""
    motion = _motion_of(ir.Graph(trace.graph.nodes), target) if _has_arguments(trace.graph) else None
    return _explanation(trace, fold_constants(trace.graph), interpret(trace.graph, target), target, [motion])


def explain_record(record: RunRecord) -> Explanation:
    """What a run did: measured tokens and times by node, and the lines that forced a stage."""
    measured = tuple(
        one for node in record.graph.nodes if (one := _measure(node, record.events.get(node.id))) is not None
    )
    stages = tuple(StageReport(s.line, s.why, _value_name(record.graph, s.node)) for s in record.stages)
    most = max((one.usage.prompt_tokens + one.usage.completion_tokens for one in measured), default=0)
    total = sum((one.usage for one in measured), ir.Usage())
    kv = KvBound(total.computed_tokens + total.completion_tokens, None, total.computed_tokens, most, True)
    return Explanation(record.program, "", (), (), stages, {}, kv, True, measured=measured)


def _trace(program: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Trace:
    """With every argument given, the very nodes that a run records; else arguments stay symbolic."""
    call = program._split(args, kwargs, is_partial=True)
    if all(p.name in call.arguments for p in program.parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)):
        return program._trace(call, is_symbolic=False)
    return program.trace(*args, **kwargs)


def _explanation(
    trace: Trace, folded: Folded, paths: Paths, target: Target, more: Sequence[PassReport | None]
) -> Explanation:
    plan = plan_requests(paths)
    is_complete = trace.is_complete
    limits = {"context_length": target.context_length, "page_size": target.page_size}
    kv = kv_bound(plan, **limits, is_complete=is_complete)
    reports = [
        _fold_report(folded, paths, plan),
        _prefix_report(paths, plan),
        _identical_report(paths),
        _liveness_report(paths),
        _kv_report(kv),
        _fork_report(paths),
        _forced_report(paths, plan, target),
        *more,
    ]
    stages = () if trace.stop is None else (_stage(trace),)
    return Explanation(
        trace.program,
        target.name,
        tuple(_node_costs(paths, plan)),
        tuple(report for report in reports if report is not None),
        stages,
        trace.specialised,
        kv,
        is_complete,
    )


def _stage(trace: Trace) -> StageReport:
    assert trace.stop is not None
    return StageReport(trace.stop.line, trace.stop.why, _value_name(trace.graph, trace.stop.node))


def _value_name(graph: ir.Graph, node: int) -> str:
    found = graph.nodes[node]
    name = getattr(found, "name", None)
    what = type(found).__name__.lower()
    return f"{what} {name!r}" if name else f"{what} (node {node})"


def _node_costs(paths: Paths, plan: RequestPlan) -> Iterable[NodeCost]:
    by_node: dict[int, list[Any]] = {}
    for request in plan.requests:
        by_node.setdefault(request.node, []).append(request)
    for node in paths.graph.nodes:
        if not isinstance(node, ir.Generate | ir.Select):
            continue
        kind, found = type(node).__name__.lower(), by_node.get(node.id, [])
        twin = paths.twins.get(node.id)
        if twin is not None:
            assert isinstance(node, ir.Generate)
            prompt = paths.prompts[node.id].count
            if node.checks:
                prompt = prompt + Count(0, prompt.at_most * node.retries)
            shared, new, written = prompt, ZERO, ZERO
            if twin in paths.unordered:  # any of them may be the one that runs
                new, written = (_sum(getattr(r, what) for r in by_node[twin]) for what in ("new", "written"))
                shared = Count(0, prompt.at_most)
            yield NodeCost(node.id, kind, node.name, node.line, prompt, shared, new, written, twin)
            continue
        prompt, shared, new, written = (
            _sum(getattr(request, what) for request in found) for what in ("prompt", "shared", "new", "written")
        )
        yield NodeCost(node.id, kind, node.name, node.line, prompt, shared, new, written)


# One line a pass.


def _fold_report(folded: Folded, paths: Paths, plan: RequestPlan) -> PassReport:
    texts = sum(isinstance(node, ir.Text) for node in paths.graph.nodes)
    left = sum(isinstance(node, ir.Text) for node in folded.graph.nodes)
    known = plan.kv.at_least
    bound = f"{_some(folded.num_bound, 'argument')} became text; " if folded.num_bound else ""
    text = f"{bound}{_some(texts, 'text')} folded to {left:,}, {known:,} tokens known before the run"
    return PassReport(
        "fold constants", text, {"arguments": folded.num_bound, "texts": texts, "folded": left, "tokens": known}
    )


def _prefix_report(paths: Paths, plan: RequestPlan) -> PassReport:
    found = static_prefixes(paths)
    saved = plan.shared.at_least
    if not found:
        return PassReport("static prefixes", "no two requests begin alike", {"prefixes": 0, "saved": saved})
    best = max(found, key=lambda p: p.num_tokens * (p.num_readers - 1))
    where = f" (to {best.line})" if best.line else ""
    text = f"{best.num_tokens:,} tokens{where} are read by {best.num_readers:,} requests and computed once"
    if len(found) > 1:
        text += f"; {_some(len(found), 'shared prefix', 'shared prefixes')} in all"
    return PassReport("static prefixes", text, {"prefixes": len(found), "longest": best.num_tokens, "saved": saved})


def _identical_report(paths: Paths) -> PassReport:
    found = identical_nodes(paths)
    text = f"{_some(len(found.twins), 'generation')} of {len(paths.prompts)} take over another one's text"
    if not found.twins:
        text = "no generation surely writes what another one does"
    if found.unseeded:
        text += f"; {len(found.unseeded)} with an equal prompt sample without a seed, so each runs"
    return PassReport("identical nodes", text, {"shared": len(found.twins), "unseeded": len(found.unseeded)})


def _liveness_report(paths: Paths) -> PassReport:
    found = liveness(paths)
    early = [s for s in found.segments if found.order and s.last_use != found.order[-1]]
    size = _sum(segment.count for segment in early)
    again = sum(len(segment.reads) > 1 for segment in found.segments)
    text = (
        f"{_some(len(found.segments), 'segment')}, {again} read more than once; "
        f"{size} tokens are last read before the last request"
    )
    numbers = {"segments": len(found.segments), "read_again": again, "dead_early": size.at_most}
    return PassReport("liveness", text, numbers)


def _kv_report(kv: KvBound) -> PassReport:
    part = "" if kv.is_complete else "; for the part up to the stage below"
    pages = "" if kv.pages is None or kv.pages == kv.tokens else f" ({_some(kv.pages, 'page')})"
    text = f"at most {kv.tokens:,} tokens{pages} for the whole program, {kv.longest:,} for one branch{part}"
    return PassReport("kv bound", text, {"tokens": kv.tokens, "longest": kv.longest})


def _fork_report(paths: Paths) -> PassReport:
    found = fork_groups(paths)
    if not found:
        return PassReport("fork groups", "no fork", {"groups": 0, "reads_saved": 0})
    saved = sum(group.reads_saved for group in found)
    widths = ", ".join(
        f"{len(g.branches):,} branches over {g.prefix} tokens" for g in sorted(found, key=lambda g: -g.reads_saved)[:3]
    )
    more = f", {len(found) - 3} more" if len(found) > 3 else ""
    text = f"{widths}{more}: a step that decodes all of them reads {saved:,} positions less"
    return PassReport("fork groups", text, {"groups": len(found), "reads_saved": saved})


def _forced_report(paths: Paths, plan: RequestPlan, target: Target) -> PassReport:
    try:
        found = forced_tokens(paths, plan, target)
    except GrammarError as error:
        return PassReport("forced tokens", f"a constraint doesn't compile: {error}", {"appended": 0, "at_start": 0})
    start = sum(found.at_start.values())
    text = f"{found.appended:,} tokens of text between generations are appended, not decoded"
    constrained = sum(isinstance(n, ir.Generate) and n.constraint is not None for n in paths.graph.nodes)
    if constrained:
        text += (
            f"; {_some(constrained, 'constrained text')} begin with {start} forced tokens, the rest shows in the run"
        )
    return PassReport("forced tokens", text, {"appended": found.appended, "at_start": start})


def _motion_report(
    program: Function, args: Sequence[Any], kwargs: Mapping[str, Any], target: Target
) -> PassReport | None:
    call = program._split(args, kwargs, is_partial=True)
    if not call.arguments and not program.parameters:
        return None
    return _motion_of(ir.Graph(program.trace(*args, **kwargs).graph.nodes), target)


def _has_arguments(graph: ir.Graph) -> bool:
    return any(isinstance(node, ir.Argument) for node in graph.nodes)


def _motion_of(graph: ir.Graph, target: Target) -> PassReport:
    """`graph`: with its arguments unbound."""
    late = late_gain(graph, target)
    if late is not None:
        text = (
            f"{_some(late.num_moved, 'text')} stood late: {late.shared_after:,} tokens are the same in every call; as "
            f"written {late.shared_before:,}; gained {late.gain:,}"
        )
        return PassReport("argument motion", text, {"shared": late.shared_after, "gained": late.gain, "gain": 0})
    found = argument_motion(interpret(graph, target), target)
    if not found:
        return PassReport("argument motion", "no argument stands before text that all calls share", {"gain": 0})
    best = found[0]
    text = (
        f"{best.shared_now:,} tokens are the same in every call; with {best.argument!r} ({best.line}) behind the text "
        f"that follows it: {best.gain:,} more"
    )
    if not best.gain:
        text = f"{best.shared_now:,} tokens before {best.argument!r} are the same in every call; nothing to gain"
    return PassReport("argument motion", text, {"shared": best.shared_now, "gain": best.gain})


# The rows of a batch.


def _explain_rows(program: Function, rows: list[Any], kwargs: Mapping[str, Any], target: Target | None) -> Explanation:
    if not rows:
        raise InvalidRequest("rows is empty; a batch needs at least one row", param="rows")
    calls = [program._split_row(row, kwargs) for row in rows]
    found = target or target_of(calls[0].options.get("backend"))
    traces = [program._trace(call, is_symbolic=False) for call in calls]
    batch = batch_prefixes([trace.graph for trace in traces], found)
    first = _explanation(traces[0], fold_constants(traces[0].graph), interpret(traces[0].graph, found), found, [])
    plans = batch.plans
    size = found.page_size
    tokens = sum(plan.kv.at_most for plan in plans) - (batch.separate - batch.computed)
    if size > 1:
        tokens = most_pages(plans, size, batch.common) * size
    kv = KvBound(
        tokens,
        tokens // size,
        batch.computed,
        first.kv.longest,
        all(trace.is_complete for trace in traces),
    )
    stages = tuple(_stage(trace) for trace in traces if trace.stop is not None)[:1]
    gained = 0
    if any(isinstance(node, ir.Text) and node.moved for trace in traces for node in trace.graph.nodes):
        gained = batch_prefixes([as_written(trace.graph) for trace in traces], found).computed - batch.computed
    reports = (
        _batch_report(batch, len(rows), gained),
        _kv_report(kv),
        *(p for p in first.passes if p.name != "kv bound"),
    )
    return Explanation(
        program.name, found.name, first.nodes, reports, stages, {}, kv, kv.is_complete, num_rows=len(rows)
    )


def _batch_report(batch: BatchPrefixes, num_rows: int, gained: int) -> PassReport:
    saved = batch.separate - batch.computed
    part = f" ({saved / batch.separate:.0%})" if batch.separate else ""
    text = (
        f"all {num_rows} rows begin with the same {batch.common:,} tokens; known text of all rows: {batch.separate:,} "
        f"tokens, computed {batch.computed:,}, saved {saved:,}{part}"
    )
    if gained:
        text += f"; {gained:,} of them because texts stood late"
    numbers = {"common": batch.common, "separate": batch.separate, "computed": batch.computed, "gained": gained}
    return PassReport("prefixes of rows", text, numbers)


# After a run.


def _measure(node: ir.AnyNode, event: ir.NodeEvent | None) -> Measured | None:
    if not isinstance(node, ir.Generate | ir.Select | ir.ToolCall) or event is None:
        return None
    times = event.timings or {}
    return Measured(
        node.id,
        type(node).__name__.lower(),
        node.name,
        node.line,
        event.usage or ir.Usage(),
        times.get("start_s"),
        times.get("first_token_s"),
        times.get("end_s"),
        None if event.error is None else f"{event.error.type}: {event.error.message}",
    )


def _plain(count: Count) -> int | list[int]:
    return count.at_most if count.is_exact else [count.at_least, count.at_most]


def _some(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _sum(counts: Iterable[Count]) -> Count:
    total = ZERO
    for count in counts:
        total = total + count
    return total
