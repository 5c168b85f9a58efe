"""What a run will ask of the engine: every request with its prompt, what the cache holds of it, and what is new.

Follows the executor: nodes in the order in which they become ready, an empty cache at the start, one request for a
generation and one for each choice of a selection. Known tokens that an earlier request of this run had are shared, so
is what a generation wrote on the way. Text that a model happens to write like another branch's is not counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from ramet.lang import ir
from ramet.lang.passes.paths import ZERO, Count, Opaque, Paths, Point


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `prompt` == `shared` + `new` where all are exact.

    `added`: exact tokens of known text behind the last thing that the model wrote; what a turn adds to its branch.
    `after_generation`: the last token that was written before may have to be computed with it; then `new` counts it.
    """

    node: int
    choice: int | None
    prompt: Count
    shared: Count
    new: Count
    added: int | None
    after_generation: bool
    written: Count


@dataclass(slots=True)
class RequestPlan:
    """All requests in their order. Owner: `plan_requests`; read-only afterwards.

    `kv`: tokens whose keys and values exist after the run, if nothing were evicted: each shared one counts once.
    """

    requests: list[Request] = field(default_factory=list)
    kv: Count = ZERO

    def of(self, node: int) -> list[Request]:
        return [request for request in self.requests if request.node == node]

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


def plan_requests(paths: Paths, *, share_nodes: bool = True) -> RequestPlan:
    """Simulate the run of one graph. `share_nodes`: generations that surely write the same are asked for once."""
    return _Planner(paths, share_nodes).run()


class _Planner:
    def __init__(self, paths: Paths, share_nodes: bool) -> None:
        self._paths, self._share = paths, share_nodes
        self._cached: set[int] = {0}  # positions of the trie
        self._plan = RequestPlan()

    def run(self) -> RequestPlan:
        for node in run_order(self._paths.graph):
            if isinstance(node, ir.Generate):
                if not (self._share and node.id in self._paths.twins):
                    self._generate(node.id)
            elif isinstance(node, ir.Select):
                self._select(node)
        return self._plan

    def _generate(self, node: int) -> None:
        behind = self._paths.points[node]
        written = next(p for p in behind.chain() if p.items and p.node == node)
        assert isinstance(written.items[-1], Opaque)
        self._request(node, None, self._paths.prompts[node], written.items[-1].count)
        self._cache(written)

    def _select(self, node: ir.Select) -> None:
        found = self._paths.selections[node.id]
        if len(found.choices) == 1:
            return
        for index, choice in enumerate(found.choices):
            if len(choice.items) > found.num_shared:
                self._request(node.id, index, choice, ZERO, keep=len(choice.items) - found.num_shared + 1)
        self._cache(self._paths.points[node.id])  # the winner's tokens: those of one of the choices
        if node.scorer == "unconditional":
            self._alone(
                node.id, [choice for choice in found.choices if len(choice.items) > found.num_shared], found.num_shared
            )

    def _alone(self, node: int, choices: list[Point], num_shared: int) -> None:
        """Each choice once more behind the opening token alone; scored from its first token, so nothing is shared."""
        for index, choice in enumerate(choices):
            tail = choice.items[num_shared:]
            known = sum(not isinstance(item, Opaque) for item in tail)
            size = Count(known + 1, known + 1)
            for item in tail:
                if isinstance(item, Opaque):
                    size = size + item.count
            self._plan.requests.append(Request(node, index, size, ZERO, size, None, False, ZERO))

    def _request(self, node: int, choice: int | None, prompt: Point, written: Count, keep: int = 1) -> None:
        """`keep`: that many items at the end of the prompt are computed whatever the cache holds."""
        new, num_new, is_after = self._missing(prompt, keep)
        shared = Count(max(0, prompt.count.at_least - new.at_least), prompt.count.at_most - new.at_most)
        added = new.at_least if num_new is not None else None
        if is_after:
            new = Count(new.at_least, new.at_most + 1)
        self._plan.requests.append(Request(node, choice, prompt.count, shared, new, added, is_after, written))
        self._cache(prompt)

    def _missing(self, prompt: Point, keep: int) -> tuple[Count, int | None, bool]:
        """Tokens behind the longest cached prefix; how many items they are, or None where some are unknown; whether
        that prefix ends with something the model wrote."""
        total, count = ZERO, 0
        known: int | None = 0
        for point in prompt.chain():
            for item, position in zip(reversed(point.items), reversed(point.positions), strict=True):
                if position in self._cached and count >= keep:
                    is_after = isinstance(item, Opaque) and item.is_generated
                    return total, known, is_after
                if isinstance(item, Opaque):
                    # Where all of it is cached, its last token is computed again nevertheless.
                    is_last = position in self._cached and count == keep - 1
                    total = total + (Count(1, 1) if is_last else item.count)
                    known = None
                else:
                    total = total + Count(1, 1)
                    known = None if known is None else known + 1
                count += 1
        return total, known, False

    def _cache(self, point: Point) -> None:
        for at in point.chain():
            if at.position in self._cached:
                fresh = [i for i, position in enumerate(at.positions) if position not in self._cached]
                if not fresh:
                    return
            for item, position in zip(at.items, at.positions, strict=True):
                if position not in self._cached:
                    self._cached.add(position)
                    self._plan.kv = self._plan.kv + (item.count if isinstance(item, Opaque) else Count(1, 1))


def run_order(graph: ir.Graph) -> Iterable[ir.AnyNode]:
    """Nodes in the order in which the executor starts them, if generations end in the order in which they began."""
    users: dict[int, list[int]] = {}
    missing: dict[int, int] = {}
    ready: deque[int] = deque()
    for node in graph.nodes:
        needs = ir.dependencies(node)
        missing[node.id] = len(needs)
        for used in needs:
            users.setdefault(used, []).append(node.id)
        if not needs:
            ready.append(node.id)
    running: deque[int] = deque()
    while ready or running:
        at = ready.popleft() if ready else running.popleft()
        node = graph.nodes[at]
        if isinstance(node, ir.Generate | ir.Select | ir.ToolCall) and missing[at] == 0:
            missing[at] = -1  # begun: its users wait for its end
            running.append(at)
            yield node
            continue
        if missing[at] == 0:
            yield node
        for user in users.get(at, ()):
            missing[user] -= 1
            if missing[user] == 0:
                ready.append(user)


def _sum(counts: Iterable[Count]) -> Count:
    total = ZERO
    for count in counts:
        total = total + count
    return total
