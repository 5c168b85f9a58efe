"""`explain()` before a run: a program's predicted cost, like EXPLAIN for database queries.

The plan has exact prompt, shared and new tokens wherever the text is known, limits for the rest, a KV bound, and one
line for each pass. Nothing here runs a model. Not here: measured costs, the table (explanation.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from ramet.errors import GrammarError
from ramet.lang.explain.explanation import Explanation, NodeCost, PassReport, sum_counts, widest
from ramet.lang.graph import ir
from ramet.lang.graph.following import children_of, following, is_ended_by_following, known_start
from ramet.lang.graph.run_record import RunRecord
from ramet.lang.passes.argument_motion import (
    argument_motion,
    as_written,
    cues_before_late_text,
    shared_by_calls,
    unfinished,
)
from ramet.lang.passes.constraints import masked_checks, tokens_at_start
from ramet.lang.passes.fold import fold_constants
from ramet.lang.passes.fork_groups import fork_groups
from ramet.lang.passes.liveness import liveness
from ramet.lang.passes.paths import ZERO, Count, Paths, interpret
from ramet.lang.passes.prefixes import BatchPrefixes, batch_prefixes, static_prefixes
from ramet.lang.passes.requests import KvBound, RequestPlan, kv_bound, most_pages, plan_requests
from ramet.lang.passes.target import Target


def explain_plan(traced: RunRecord, target: Target, unbound: ir.Graph | None = None) -> Explanation:
    """Predict the cost of a traced program. The plan ends where the trace needed a generated value.

    `unbound`: the graph without arguments given, to find what all calls share; None if the program has no arguments.
    """
    paths = interpret(traced.graph, target)
    plan = plan_requests(paths)
    is_complete = not traced.stages
    kv = kv_bound(plan, context_length=target.context_length, page_size=target.page_size, is_complete=is_complete)
    reports = [
        _fold_report(paths, plan),
        _prefix_report(paths, plan),
        _identical_report(paths),
        _liveness_report(paths),
        _kv_report(kv),
        _fork_report(paths),
        _forced_report(paths, plan, target),
        *_checks_report(paths, target),
        *_masks_report(paths, target),
    ]
    if unbound is not None:
        reports.append(_motion_report(unbound, target))
    reports += _cue_report(traced.graph)
    return Explanation(
        traced.program,
        target.name,
        tuple(
            _any_of([cost], may_be_absent=True) if cost.node in traced.cancelled else cost
            for cost in _node_costs(paths, plan)
        ),
        tuple(reports),
        traced.stages,
        traced.specialised,
        kv,
        is_complete,
    )


def explain_arms(
    traced: Sequence[RunRecord], are_all: bool, target: Target, unbound: ir.Graph | None = None
) -> Explanation:
    """Predict the cost of a program that goes one of several ways, each traced by itself. `are_all`: there are no more.

    The nodes are those of all ways, and a node that a way lacks may cost nothing.
    """
    arms = tuple(explain_plan(one, target, unbound) for one in traced)
    if len(arms) == 1:
        return arms[0]
    is_complete = are_all and all(arm.is_complete for arm in arms)
    found: dict[object, list[NodeCost]] = {}
    for arm in arms:
        seen: Counter[object] = Counter()
        for node in arm.nodes:
            key = (node.kind, node.name, node.line)
            found.setdefault((*key, seen[key]), []).append(node)
            seen[key] += 1
    nodes = []
    for some in found.values():
        nodes.append(_any_of(some, may_be_absent=len(some) < len(arms)))
    most = [max(getattr(arm.kv, what) for arm in arms) for what in ("tokens", "longest")]
    kv = KvBound(most[0], most[0] // target.page_size, min(arm.kv.known for arm in arms), most[1], is_complete)
    more = "" if are_all else ", and there are more"
    text = f"{len(arms)} ways through it{more}: counts are the least and the most of all, the lines below the first's"
    reports = [p for p in arms[0].passes if p.name != "kv bound"]
    return replace(
        arms[0],
        nodes=tuple(nodes),
        passes=(PassReport("arms", text, {"arms": len(arms)}), _kv_report(kv), *reports),
        stages=tuple({stage: None for arm in arms for stage in arm.stages}),
        kv=kv,
        is_complete=is_complete,
        arms=arms,
    )


def explain_rows(traced: Sequence[RunRecord], target: Target) -> Explanation:
    """Predict the cost of a batch with one or more rows. Every row was traced with its arguments given."""
    batch = batch_prefixes([one.graph for one in traced], target)
    first = explain_plan(traced[0], target)
    plans = batch.plans
    size = target.page_size
    tokens = sum(plan.kv.at_most for plan in plans) - (batch.separate - batch.computed)
    if size > 1:
        tokens = most_pages(plans, size, batch.common) * size
    kv = KvBound(
        tokens,
        tokens // size,
        batch.computed,
        first.kv.longest,
        not any(one.stages for one in traced),
    )
    stages = next((one.stages for one in traced if one.stages), ())
    gained = 0
    if any(isinstance(node, ir.Text) and node.moved for one in traced for node in one.graph.nodes):
        gained = batch_prefixes([as_written(one.graph) for one in traced], target).computed - batch.computed
    reports = (
        _batch_report(batch, len(traced), gained),
        _kv_report(kv),
        *(p for p in first.passes if p.name != "kv bound"),
    )
    return replace(
        first, passes=reports, stages=stages, specialised={}, kv=kv, is_complete=kv.is_complete, num_rows=len(traced)
    )


def explain_on_server(graph: ir.Graph, program: str, target: Target) -> dict[str, Any]:  # Any: JSON
    """Return the plan of a graph without its function, by a server's tokenizer (`POST /v1/programs/explain`).

    Its counts are exact if the graph's arguments are given. It lacks the later parts of a staged program. Raises
    InvalidProgram.
    """
    ir.GraphIndex().add(graph)
    unbound = ir.Graph(graph.nodes) if any(isinstance(node, ir.Argument) for node in graph.nodes) else None
    return explain_plan(RunRecord(program, graph), target, unbound).to_dict()


def _node_costs(paths: Paths, plan: RequestPlan) -> Iterable[NodeCost]:
    by_node: dict[int, list[Any]] = {}
    for request in plan.requests:
        by_node.setdefault(request.node, []).append(request)
    for node in paths.graph.nodes:
        if node.run_by != "model":
            continue
        kind, found = node.kind_name, by_node.get(node.id, [])
        twin = paths.twins.get(node.id)
        if twin is not None:
            assert isinstance(node, ir.Generate)
            prompt = paths.prompts[node.id].count
            if paths.given_back[node.id]:
                prompt = prompt + Count(1, 1)
            if node.checks:
                prompt = prompt + Count(0, prompt.at_most * node.retries)
            shared, new, written = prompt, ZERO, ZERO
            if twin in paths.unordered:  # any of them may run
                new, written = (sum_counts(getattr(r, what) for r in by_node[twin]) for what in ("new", "written"))
                shared = Count(0, prompt.at_most)
            yield NodeCost(node.id, kind, node.label, node.line, prompt, shared, new, written, twin)
            continue
        prompt, shared, new, written = (
            sum_counts(getattr(request, what) for request in found) for what in ("prompt", "shared", "new", "written")
        )
        yield NodeCost(node.id, kind, node.label, node.line, prompt, shared, new, written)


def _any_of(costs: Sequence[NodeCost], *, may_be_absent: bool) -> NodeCost:
    """Return the cost of a node that is one of these, or that a run may not have asked for at all."""
    absent = [ZERO] * may_be_absent
    prompt, shared, new, written = (
        widest([*(getattr(cost, what) for cost in costs), *absent]) for what in ("prompt", "shared", "new", "written")
    )
    twin = None if may_be_absent else costs[0].twin
    return replace(costs[0], prompt=prompt, shared=shared, new=new, written=written, twin=twin)


# One line for each pass.


def _fold_report(paths: Paths, plan: RequestPlan) -> PassReport:
    folded = fold_constants(paths.graph)
    (texts, arguments), (left, open_ones) = (
        [sum(isinstance(node, kind) for node in graph.nodes) for kind in (ir.Text, ir.Argument)]
        for graph in (paths.graph, folded)
    )
    known, num_bound = plan.kv.at_least, arguments - open_ones
    bound = f"{_some(num_bound, 'argument')} became text; " if num_bound else ""
    text = f"{bound}{_some(texts, 'text')} folded to {left:,}, {known:,} tokens known before the run"
    return PassReport("fold constants", text, {"arguments": num_bound, "texts": texts, "folded": left, "tokens": known})


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
    text = f"{_some(len(paths.twins), 'generation')} of {len(paths.prompts)} take over another one's text"
    if not paths.twins:
        text = "no generation surely writes what another one does"
    if paths.unseeded:
        text += f"; {len(paths.unseeded)} with an equal prompt sample without a seed, so each runs"
    return PassReport("identical nodes", text, {"shared": len(paths.twins), "unseeded": len(paths.unseeded)})


def _liveness_report(paths: Paths) -> PassReport:
    segments, order = liveness(paths)
    early = [s for s in segments if order and s.last_use != order[-1]]
    size = sum_counts(segment.count for segment in early)
    again = sum(len(segment.reads) > 1 for segment in segments)
    text = (
        f"{_some(len(segments), 'segment')}, {again} read more than once; "
        f"{size} tokens are last read before the last request"
    )
    numbers = {"segments": len(segments), "read_again": again, "dead_early": size.at_most}
    return PassReport("liveness", text, numbers)


def _kv_report(kv: KvBound) -> PassReport:
    whole = "for the whole program" if kv.is_complete else "up to the stage below; what follows it comes on top"
    pages = "" if kv.pages is None or kv.pages == kv.tokens else f" ({_some(kv.pages, 'page')})"
    text = f"at most {kv.tokens:,} tokens{pages} {whole}, {kv.longest:,} for one branch"
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
        start = sum(tokens_at_start(paths.graph, target).values())
    except GrammarError as error:
        return PassReport("forced tokens", f"a constraint doesn't compile: {error}", {"appended": 0, "at_start": 0})
    appended = plan.appended
    text = f"{appended:,} tokens of text between generations are appended, not decoded"
    constrained = sum(isinstance(n, ir.Generate) and n.narrowed().constraint is not None for n in paths.graph.nodes)
    if constrained:
        begin = "begins" if constrained == 1 else "begin"
        text += (
            f"; {_some(constrained, 'constrained text')} {begin} with {start} forced tokens, the rest shows in the run"
        )
    return PassReport("forced tokens", text, {"appended": appended, "at_start": start})


def _checks_report(paths: Paths, target: Target) -> Iterable[PassReport]:
    """Report which checks are masks, if there are checks at all."""
    masked, retried = list[str](), list[str]()
    for node in paths.graph.nodes:
        if not isinstance(node, ir.Generate) or not node.checks:
            continue
        try:
            found = masked_checks(node, target)
        except GrammarError as error:
            yield PassReport("checks", f"a check can't be met: {error}", {"masked": 0, "retried": 0})
            return
        name = ir.variable(node.name) if node.name else f"node {node.id}"
        masked.extend(f"{name}: {check}" for check in found.masked)
        retried.extend(f"{name}: {check}" for check in found.retried)
    if masked or retried:
        shown = [f"{what} {'; '.join(checks)}" for what, checks in (("masks", masked), ("retried", retried)) if checks]
        yield PassReport("checks", " | ".join(shown), {"masked": len(masked), "retried": len(retried)})


def _masks_report(paths: Paths, target: Target) -> Iterable[PassReport]:
    """Report where the masks of constraints are made, if the target has a device that makes them."""
    nodes = paths.graph.nodes
    children, on_host = children_of(nodes), dict[str, bool]()
    for node in nodes:
        if not isinstance(node, ir.Generate):
            continue
        template = following(node, children) if is_ended_by_following(node) else ()
        after = known_start(template, lambda ref: False, str)
        try:
            constraint = masked_checks(node, target).constraint
            is_there = None if constraint is None else target.masks_on_host(constraint, after)
        except GrammarError:
            continue  # the report of forced tokens names it
        if is_there is not None:
            on_host[ir.variable(node.name) if node.name else f"node {node.id}"] = is_there
    if on_host:
        host = [name for name, is_there in on_host.items() if is_there]
        device = len(on_host) - len(host)
        text = f"{_some(device, 'constrained text')} by masks on the device"
        text += f"; on the host, because the states are too many for tables: {', '.join(host)}" if host else ""
        yield PassReport("masks", text, {"device": device, "host": len(host)})


def _motion_report(graph: ir.Graph, target: Target) -> PassReport:
    """Report argument motion. `graph`: its arguments are unbound."""
    num_moved = sum(isinstance(node, ir.Text) and node.moved > 0 for node in graph.nodes)
    if num_moved:
        before, after = shared_by_calls(as_written(graph), target), shared_by_calls(graph, target)
        text = (
            f"{_some(num_moved, 'text')} stood late: {after:,} tokens are the same in every call; as written "
            f"{before:,}; gained {after - before:,}"
        )
        return PassReport("argument motion", text, {"shared": after, "gained": after - before, "gain": 0})
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


def _cue_report(graph: ir.Graph) -> Iterable[PassReport]:
    """Warn of unfinished lines, such as "Answer:", that the model now reads before the question."""
    found = cues_before_late_text(graph)
    for cue, late in found[:1]:
        text = (
            f"{cue.line} ends with {unfinished(cue)!r}, and the late text of {late.line} now stands behind it: write "
            "the cue into the late text, so that the model reads it last"
        )
        yield PassReport("warning", text, {"cues": len(found)})


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


def _some(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
