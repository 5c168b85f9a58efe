"""The requests that a run will make: each with its prompt, and the cached and computed tokens of that prompt.

`plan_requests` simulates the executor. Nodes start in the order in which they become ready, the cache is empty at the
start, a generation makes one request, and a selection makes one for each choice. A token is shared if an earlier
request of the run has read or written it. Two requests that may run at the same time always share a page or more of
equal tokens. For fewer tokens, the engine makes neither wait for the other, so both may compute them. If the model
happens to write the same text on two branches, the plan does not count it as shared. The plan also bounds the KV cache
that a run needs (`kv_bound`).
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ramet.lang.graph import ir
from ramet.lang.graph.following import MAX_BYTES
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.graph.run import GraphRun, NodeRun
from ramet.lang.passes.paths import ZERO, Count, Item, Opaque, Paths, Point, SelectPaths

_NOTHING = ir.NodeResult()
MAX_ORDERS = 50_000  # nodes times simulated orders; above it, counts that depend on the order have no limits


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request: of a generation, or of one `choice` of a selection (`part` "alone": the choice without its prompt).

    `prompt` == `shared` + `new` where all are exact.
    `added`: the number of known text tokens after the last generated text; None: unknown. `unread`: tokens at the end
    of an earlier generated text whose keys this request computes; `new` includes them. `tries`: how often the request
    may be made because checks refuse its text; upper limits hold for all tries together.
    """

    node: int
    choice: int | None
    part: str
    prompt: Count
    shared: Count
    new: Count
    added: int | None
    unread: Count
    written: Count
    tries: int = 1

    def pages(self, page_size: int) -> int:
        """Return the most new pages that the request takes. With a page size of 1, these are tokens.

        Whole pages are shared. After the last whole page, a path has its own page, even if other paths have the same
        tokens.
        """
        retries = self.tries - 1
        prompt, written, new = (self.prompt.at_most // self.tries, self.written.at_most // self.tries, self.new.at_most)
        whole = _num_pages(prompt + written, page_size)
        behind = self.shared.at_most % page_size if self.shared.is_exact else page_size - 1
        own = new - retries + written
        first = min(whole, _num_pages(behind + own, page_size)) if own else 0
        return first + retries * min(whole, _num_pages(page_size + written, page_size))


@dataclass(slots=True)
class RequestPlan:
    """All requests in order. Owner: `plan_requests`; read-only afterwards.

    `kv`: tokens whose keys and values exist after the run if nothing is evicted. A shared token counts once.
    """

    requests: list[PlannedRequest] = field(default_factory=list)
    kv: Count = ZERO

    def of(self, node: int) -> list[PlannedRequest]:
        return [request for request in self.requests if request.node == node]

    @property
    def appended(self) -> int:
        """The known tokens of text after generations, which is always appended in one forward pass."""
        return sum(one.added for one in self.requests if one.unread.at_most and one.added is not None)

    @property
    def prompt(self) -> Count:
        return _sum(request.prompt for request in self.requests)

    @property
    def shared(self) -> Count:
        return _sum(request.shared for request in self.requests)

    @property
    def new(self) -> Count:
        return _sum(request.new for request in self.requests)

    @property
    def written(self) -> Count:
        return _sum(request.written for request in self.requests)


@dataclass(frozen=True, slots=True)
class KvBound:
    """The most KV cache that a program can need, whatever its generations write.

    Every part of every path counts once, even if it is shared, and all branches may be alive together, so no run
    exceeds the bound. A runtime with pages shares only whole pages: a branch that leaves another within a page has its
    own copy of that page. There the bound is a number of pages, and its tokens are those that fit into them. The bound
    in bytes is the number of tokens times the model's bytes per token.

    `tokens`: the bound. `pages`: the bound in the runtime's pages; None if these are unknown.

    `known`: tokens that every run needs. `longest`: tokens of the longest request with its text. `is_complete` False:
    the graph is the first part of a program, and the bound holds for that part only.
    """

    tokens: int
    pages: int | None
    known: int
    longest: int
    is_complete: bool


def plan_requests(paths: Paths) -> RequestPlan:
    """Simulate the run of one graph. Generations that always write the same text make one request.

    The start of some nodes depends on the run: a constrained generation waits for its grammar, a node after a join for
    the last branch. Each of these nodes is simulated as the first and as the last one, and different counts become
    limits.
    """
    plan = _Planner(paths).run(run_order(paths.graph))
    unordered = _unordered(paths)
    if not unordered:
        return plan
    if len(unordered) * len(paths.graph.nodes) > MAX_ORDERS:
        plan.requests = [_at_any_time(one) if one.node in set(unordered) else one for one in plan.requests]
        return plan
    orders: list[Iterable[ir.AnyNode]] = [run_order(paths.graph, unordered)]
    for node in unordered:
        orders.append(run_order(paths.graph, [node]))  # all other nodes before it
        orders.append(_alone_order(paths.graph, node))  # only its dependencies before it
    for index, order in enumerate(orders):
        only = None if index == 0 else unordered[(index - 1) // 2]
        other = _Planner(paths).run(order)
        found = {(r.node, r.choice, r.part): r for r in other.requests if only is None or r.node == only}
        plan.requests = [_either(one, found.get((one.node, one.choice, one.part), one)) for one in plan.requests]
    return plan


def kv_bound(plan: RequestPlan, *, context_length: int, page_size: int = 1, is_complete: bool = True) -> KvBound:
    """Return the bound of one graph. O(requests)."""
    longest = max((request.prompt.at_most + request.written.at_most for request in plan.requests), default=0)
    tokens = plan.kv.at_most if page_size == 1 else most_pages([plan], page_size) * page_size
    return KvBound(tokens, tokens // page_size, plan.kv.at_least, min(longest, context_length), is_complete)


def most_pages(plans: Sequence[RequestPlan], page_size: int, num_common: int = 0) -> int:
    """Return the most pages of several programs whose prompts share their first `num_common` tokens."""
    pages = sum(request.pages(page_size) for plan in plans for request in plan.requests)
    return pages - num_common // page_size * (len(plans) - 1)


def _alone_order(graph: ir.Graph, node: int) -> list[ir.AnyNode]:
    needed = {node, *_needed(graph, node)}
    return [one for one in run_order(graph) if one.id in needed]


def _needed(graph: ir.Graph, node: int) -> set[int]:
    """Return all nodes that are done before `node` can run."""
    found: set[int] = set()
    stack = list(ir.dependencies(graph.nodes[node]))
    while stack:
        at = stack.pop()
        if at not in found:
            found.add(at)
            stack.extend(ir.dependencies(graph.nodes[at]))
    return found


def _at_any_time(request: PlannedRequest) -> PlannedRequest:
    prompt = request.prompt
    return replace(request, new=Count(0, prompt.at_most), shared=Count(0, prompt.at_most))


def _unordered(paths: Paths) -> list[int]:
    """Return the nodes whose place in the order depends on the run."""
    found = []
    for node in paths.graph.nodes:
        is_constrained = isinstance(node, ir.Generate) and node.narrowed().constraint is not None
        if node.run_by == "model" and (is_constrained or node.id in paths.joined):
            found.append(node.id)
    return found


def _either(a: PlannedRequest, b: PlannedRequest) -> PlannedRequest:
    return replace(a, shared=_hull(a.shared, b.shared), new=_hull(a.new, b.new))


def _hull(a: Count, b: Count) -> Count:
    return Count(min(a.at_least, b.at_least), max(a.at_most, b.at_most))


def _is_known(selection: SelectPaths) -> bool:
    """Return whether every choice's own tokens are known."""
    return not any(isinstance(item, Opaque) for one in selection.choices for item in one.items[selection.num_shared :])


@dataclass(frozen=True, slots=True)
class _Missing:
    """The uncached part of a prompt. `num_added`: the number of its known tokens; None: a part of it is unknown."""

    new: Count
    cached: Count
    num_added: int | None
    unread: Count
    is_beside_unknown: bool
    unsure: Count  # of `cached`: tokens that may be computed again


class _Planner:
    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._cached: dict[int, int | None] = {0: None}  # position of the trie -> node whose request computes it first
        self._read: dict[int, int] = {}  # position after a text whose last token was unread -> node that read it first
        self._needs: dict[int, set[int | None]] = {}  # node -> all that is done before it begins
        self._runs_from: set[int] = set()  # positions after which text is cached that depends on the run
        self._may_repeat = not all(_is_known(selection) for selection in paths.selections.values())
        self._scored: set[object] = set()  # scoring requests that were made
        self._plan = RequestPlan()

    def run(self, order: Iterable[ir.AnyNode]) -> RequestPlan:
        for node in order:
            if isinstance(node, ir.Generate):
                if node.id not in self._paths.twins:
                    self._generate(node.id)
            elif isinstance(node, ir.Select):
                self._select(node)
        return self._plan

    def _generate(self, node: int) -> None:
        behind = self._paths.points[node]
        written = next(p for p in behind.chain() if p.items and p.node == node)
        assert isinstance(written.items[-1], Opaque)
        node_of = self._paths.graph.nodes[node]
        assert isinstance(node_of, ir.Generate)
        count, again = written.items[-1].count, self._paths.given_back[node]
        if again:  # the first token counts as one of the prompt
            count = Count(count.at_least - 1, count.at_most - 1)
        if node_of.constraint is not None and node_of.constraint.kind == "choice":
            # An end token may follow, or a token of the text after it. That text is read on while it may be a part of a
            # longer choice, too.
            most = node_of.sampling.max_tokens or self._paths.context_length
            count = Count(0, min(count.at_most + (MAX_BYTES if _has_beginnings(node_of.constraint) else 1), most))
        self._request(node, None, self._paths.prompts[node], count)
        self._write_again(again)
        if node in self._paths.unordered:
            last = self._plan.requests[-1]
            new, shared = Count(0, last.new.at_most), Count(last.shared.at_least, last.prompt.at_most)
            self._plan.requests[-1] = replace(last, new=new, shared=shared)
        if node_of.checks and node_of.retries:
            self._retry(node_of.retries, 1 if again == b"" else 2)
        self._cache(written, node)

    def _write_again(self, given_back: bytes | None) -> None:
        """Count the prompt's last token, if the model writes it again, as a new token of the last request's prompt."""
        if given_back == b"":
            return
        last, one = self._plan.requests[-1], Count(1, 1)
        if given_back is None:
            shared = Count(max(0, last.shared.at_least - 1), last.shared.at_most)
            self._plan.requests[-1] = replace(last, new=last.new + Count(0, 1), shared=shared)
        else:
            self._plan.requests[-1] = replace(last, prompt=last.prompt + one, new=last.new + one)

    def _retry(self, retries: int, num_new: int) -> None:
        """Count `retries` possible retries of the last request, whose prompt is then cached but for `num_new` tokens.

        Refused texts stay in the cache beside the kept one.
        """
        last = self._plan.requests[-1]
        prompt, most = last.prompt.at_most * retries, last.written.at_most * retries
        self._plan.requests[-1] = replace(
            last,
            prompt=last.prompt + Count(0, prompt),
            shared=last.shared + Count(0, prompt),
            new=last.new + Count(0, num_new * retries),
            written=last.written + Count(0, most),
            tries=1 + retries,
        )
        self._plan.kv = self._plan.kv + Count(0, most)

    def _select(self, node: ir.Select) -> None:
        found = self._paths.selections[node.id]
        if len(found.choices) == 1:
            return
        own = [(i, c, len(c.items) - found.num_shared) for i, c in enumerate(found.choices)]
        own = [(index, choice, size) for index, choice, size in own if size]
        is_sure = _is_known(found)
        for index, choice, size in own:
            if self._is_scored((choice.position, size)):
                count = choice.count if is_sure else Count(0, choice.count.at_most)
                self._plan.requests.append(PlannedRequest(node.id, index, "", count, count, ZERO, 0, ZERO, ZERO))
            else:
                self._request(node.id, index, choice, ZERO, keep=size + 1, is_sure=is_sure)
        self._cache(
            self._paths.points[node.id], node.id, is_counted=False
        )  # the winner's tokens are one of the choices'
        if found.num_neutral:
            for index, choice, size in own:
                self._alone(node.id, index, found.num_neutral, choice.items[-size:], is_sure=is_sure)

    def _alone(self, node: int, index: int, opening: int, tail: tuple[Item, ...], *, is_sure: bool) -> None:
        """Add a choice's request after `opening` tokens of neutral text. All is scored, so nothing is shared."""
        size = Count(opening, opening)
        for item in tail:
            size = size + (item.count if isinstance(item, Opaque) else Count(1, 1))
        if not is_sure:
            size = Count(0, size.at_most)
        is_known = self._is_scored((opening, tail))
        new = ZERO if is_known else size
        shared = size if is_known else ZERO
        if self._may_repeat and not is_known:
            # A choice with a value in it may turn out to equal this one.
            new, shared = Count(0, size.at_most), Count(0, size.at_most)
        self._plan.requests.append(PlannedRequest(node, index, "alone", size, shared, new, None, ZERO, ZERO))
        if not is_known:
            self._plan.kv = self._plan.kv + size

    def _is_scored(self, key: object) -> bool:
        """Return whether the same scoring request was made before, so that its answer is reused."""
        is_known = key in self._scored
        self._scored.add(key)
        return is_known

    def _request(
        self, node: int, choice: int | None, prompt: Point, written: Count, keep: int = 1, *, is_sure: bool = True
    ) -> None:
        """Add a request. `keep`: this number of items at the prompt's end are computed even if they are cached.

        `is_sure` False: the run may not need this request.
        """
        missing = self._missing(node, prompt, keep)
        unsure, unread = missing.unsure, missing.unread
        new = missing.new + unread + Count(0, unsure.at_most)
        least, most = missing.cached.at_least, missing.cached.at_most
        shared = Count(max(0, least - unsure.at_most - unread.at_most), max(0, most - unread.at_least))
        self._plan.kv = self._plan.kv + Count(0, unsure.at_most)
        if missing.num_added is None or missing.is_beside_unknown:
            # Tokens that depend on the run may turn out to be, at least in part, those of another branch.
            new, shared = Count(0, new.at_most), Count(shared.at_least, prompt.count.at_most)
        count = prompt.count
        if not is_sure:
            new, shared, count = Count(0, new.at_most), Count(0, count.at_most), Count(0, count.at_most)
        count, shared, new = (one.capped(self._paths.context_length) for one in (count, shared, new))
        self._plan.requests.append(
            PlannedRequest(node, choice, "", count, shared, new, missing.num_added, unread, written)
        )
        self._cache(prompt, node, but_last=keep > 1)

    def _missing(self, node: int, prompt: Point, keep: int) -> _Missing:
        """Return the part of a prompt after its longest cached prefix."""
        total, count = ZERO, 0
        added: int | None = 0
        cached = prompt.count
        for item, position in prompt.items_backwards():
            is_opaque = isinstance(item, Opaque)
            if position in self._cached and count >= keep:
                unread = item.unread if isinstance(item, Opaque) else ZERO
                if position in self._read:  # by a request that is done, or may be running
                    is_sure = self._paths.page_size == 1 or self._read[position] in self._done_before(node)
                    unread = Count(0, 0 if is_sure else unread.at_most)
                self._read.setdefault(position, node)
                unsure = self._unsure(node, prompt, position, cached)
                return _Missing(total, cached, added, unread, position in self._runs_from, unsure)
            size = item.count if isinstance(item, Opaque) else Count(1, 1)
            if is_opaque and position in self._cached and count == keep - 1:
                # The whole prompt is cached, but its last token is computed again.
                total, cached = total + Count(1, 1), Count(max(0, cached.at_least - 1), cached.at_most - 1)
                count += 1
                continue
            total = total + size
            cached = Count(cached.at_least - size.at_least, cached.at_most - size.at_most)
            added = None if added is None or is_opaque else added + 1
            count += 1
        return _Missing(total, cached, added, ZERO, 0 in self._runs_from, ZERO)

    def _unsure(self, node: int, prompt: Point, end: int, cached: Count) -> Count:
        """Count the tokens before position `end` that may be computed again, as their owners may run at the same time.

        The owners are visited from the end. The engine waits for an owner that computes a page or more which no other
        request provides.
        """
        page, is_reached = self._paths.page_size, False
        unsure, owned, owner = ZERO, ZERO, self._cached[end]

        def is_waited_for() -> bool:
            behind = cached.at_most - unsure.at_most
            is_exact = cached.is_exact and unsure.is_exact and owned.is_exact
            return owned.at_least >= page or (is_exact and behind - (behind - owned.at_most) // page * page >= page)

        for item, position in prompt.items_backwards():
            is_reached = is_reached or position == end
            if not is_reached:
                continue
            if self._cached[position] != owner:
                if is_waited_for():
                    return unsure
                unsure, owned, owner = unsure + owned, ZERO, self._cached[position]
            if owner in self._done_before(node):
                return unsure
            owned = owned + (item.count if isinstance(item, Opaque) else Count(1, 1))
            if owned.at_least >= page:
                return unsure
        return unsure if is_waited_for() else unsure + owned

    def _done_before(self, node: int) -> set[int | None]:
        if node not in self._needs:
            self._needs[node] = {None, *_needed(self._paths.graph, node)}
        return self._needs[node]

    def _cache(self, point: Point, node: int, *, is_counted: bool = True, but_last: bool = False) -> None:
        """Cache a path. `but_last`: the last token is not read. `is_counted` False: only its unread tokens count."""
        last = point.position if but_last and not isinstance(point.items[-1], Opaque) else None
        for at in point.chain():
            if at.position in self._cached:
                fresh = [i for i, position in enumerate(at.positions) if position not in self._cached]
                if not fresh:
                    return
            before = at.parent.position if at.parent is not None else 0
            for item, position in zip(at.items, at.positions, strict=True):
                if position not in self._cached and position != last:
                    self._cached[position] = node
                    if isinstance(item, Opaque) and item.is_text:
                        self._runs_from.add(before)
                    size = item.count if isinstance(item, Opaque) else Count(1, 1)
                    if not is_counted:
                        size = Count(0, item.unread.at_most) if isinstance(item, Opaque) else ZERO
                    self._plan.kv = self._plan.kv + size
                before = position


def run_order(graph: ir.Graph, late: Sequence[int] = ()) -> Iterator[ir.AnyNode]:
    """Yield nodes in the executor's starting order, if generations end in the order in which they began.

    `late`: nodes that start only when no other node can, in the given order.
    """
    held = dict.fromkeys(late)
    run = GraphRun(ProgramOptions(), is_held=lambda node: node.id in held)
    run.extend(graph)
    running: deque[NodeRun] = deque()
    while True:
        started = run.take_ready()
        if started is not None:
            yield started.node
            if started.node.run_by != "runner":
                running.append(started)
            else:
                run.done(started, _NOTHING)
        elif running:
            run.done(running.popleft(), _NOTHING)
        else:
            first = next((node for node in held if run.nodes[node].needs_release_alone), None)
            if first is None:
                return
            run.release(run.nodes[first])


def _has_beginnings(constraint: ir.Constraint) -> bool:
    """Return whether one of the choices begins with another one."""
    choices = sorted(str(choice) for choice in json.loads(constraint.source))
    return any(b.startswith(a) for a, b in itertools.pairwise(choices))


def _num_pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def _sum(counts: Iterable[Count]) -> Count:
    total = ZERO
    for count in counts:
        total = total + count
    return total
