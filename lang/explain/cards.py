"""The cards of a drawing: their contents and their places.

Text and the generation after it are one card. Branches are lanes; time goes from left to right. A hue marks a shared
prefix. Not here: the look of a card (drawing.py, svg.py, html.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ramet.lang.explain.explanation import NodeCost
from ramet.lang.graph import ir
from ramet.lang.passes.paths import Paths

MAX_BRANCHES = 12  # branches drawn for one fork; of the others, only the number is shown
MAX_CHOICES = 4  # of a selection, the likeliest
HUES = 8
_NOT_SHOWN = ("is_branch", "column", "lane", "is_open", "num_requests")
_WORDS = {ir.Generate: "gen", ir.Select: "select", ir.ToolCall: "tool"}  # on cards that end with such a node


@dataclass(slots=True)
class Card:
    """One box. Owner: `_Cards`, which creates it; read-only in a Drawing.

    `cached`, `computed`, `written`: tokens; None if unknown. `label`: the same in words. `hue`: the shared prefix that
    it continues. `probs`: the likeliest choices of a selection. `parent`: the card whose text precedes it. `joins` and
    `uses`: cards whose values it waits for.
    """

    id: int
    kind: str = "text"
    name: str = ""
    line: str = ""
    parent: int | None = None
    is_branch: bool = False
    joins: list[int] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)
    prompt: str = ""
    written_text: str = ""
    probs: str = ""
    cached: int | None = None
    computed: int | None = None
    written: int | None = None
    label: str = ""
    start_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    error: str = ""
    is_cancelled: bool = False
    num_readers: int = 0
    prefix_tokens: str = ""
    hue: int = 0
    column: int = 0
    lane: int = 0
    is_open: bool = True
    num_hidden: int = 0  # the number of undrawn branches that the card represents
    num_requests: int = 0  # theirs

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        """Return what a page shows: all but the card's place, and what only its making needs."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _NOT_SHOWN}


def cards_of(
    graph: ir.Graph,
    texts: Sequence[str],
    paths: Paths | None,
    costs: Mapping[int, NodeCost],
    events: Mapping[int, ir.NodeEvent],
) -> tuple[Card, ...]:
    """Return the cards of a graph, each in its place. `texts`: the readable text that each node adds to its branch.

    `paths`: None if the tokens of prefixes are unknown. `costs`: planned costs by node. `events`: measured events.
    """
    return _Cards(graph, texts, paths, costs, events).arranged()


class _Cards:
    """Creates the cards of a graph, and places them."""

    def __init__(
        self,
        graph: ir.Graph,
        texts: Sequence[str],
        paths: Paths | None,
        costs: Mapping[int, NodeCost],
        events: Mapping[int, ir.NodeEvent],
    ) -> None:
        self._graph, self._texts, self._paths, self._costs, self._events = graph, texts, paths, costs, events
        self._cards: list[Card] = []
        self._card_of: dict[int, int | None] = {}  # node -> its card
        self._hidden: dict[int, int] = {}  # nodes of undrawn branches -> the card that represents them
        self._more: dict[int, int] = {}  # fork group -> the card that represents its undrawn branches
        self._branch: set[int] = set()  # Fork nodes
        self._hues: dict[int, int] = {}  # Fork node -> hue
        for node in graph.nodes:
            self._visit(node)

    def arranged(self) -> tuple[Card, ...]:
        self._count_readers()
        _place(self._cards)
        return tuple(self._cards)

    def _visit(self, node: ir.AnyNode) -> None:
        parent = node.parent
        if isinstance(node, ir.Argument) or (parent is not None and parent in self._hidden):
            self._card_of[node.id] = None
            if parent in self._hidden:
                self._hidden[node.id] = more = self._hidden[parent]
                self._cards[more].num_requests += node.run_by == "model"
            return
        if isinstance(node, ir.Fork):
            self._fork(node)
            return
        above = None if parent is None else self._card_of[parent]
        if isinstance(node, ir.Capture):
            self._card_of[node.id] = above
            return
        if isinstance(node, ir.Role) and not node.is_open and (above is None or not self._cards[above].is_open):
            self._card_of[node.id] = above  # the end of a message has no card of its own
            if parent in self._branch:
                self._branch.add(node.id)
            return
        card = self._card_for(node, above)
        self._card_of[node.id] = card.id
        if isinstance(node, ir.Join):
            sources = [self._card_of.get(branch) for branch in node.branches if branch not in self._hidden]
            card.joins = [one for one in dict.fromkeys(sources) if one is not None and one != above]
            card.name = f"{len(node.branches):,} branches"
        for ref in ir.refs(node):
            source = self._card_of.get(ref.node)
            if source is None or source in card.uses or source in card.joins:
                continue
            if not self._is_above(source, card.id):
                card.uses.append(source)
        if node.run_by == "runner":
            card.prompt += self._texts[node.id]
        else:
            self._close(card, node)

    def _fork(self, node: ir.Fork) -> None:
        above = None if node.parent is None else self._card_of[node.parent]
        if above is not None:
            self._cards[above].is_open = False
        if node.index >= MAX_BRANCHES:
            if node.index == MAX_BRANCHES:
                more = node.width - MAX_BRANCHES
                card = Card(len(self._cards), "more", f"{more:,} more branches", node.line, above, True)
                card.num_hidden, card.is_open, card.hue = more, False, self._hues[node.group]
                self._more[node.group] = card.id
                self._cards.append(card)
            self._hidden[node.id] = self._more[node.group]
        if node.width > 1 and node.group not in self._hues:
            self._hues[node.group] = 1 + len(self._hues) % (HUES - 1)
        if node.width > 1:
            self._hues[node.id] = self._hues[node.group]
        else:
            self._hues[node.id] = self._hue_above(node.parent)
        self._branch.add(node.id)
        self._card_of[node.id] = above

    def _hue_above(self, node: int | None) -> int:
        while node is not None:
            if node in self._hues:
                return self._hues[node]
            node = self._graph.nodes[node].parent
        return 0

    def _card_for(self, node: ir.AnyNode, above: int | None) -> Card:
        is_branch = node.parent in self._branch
        is_join = isinstance(node, ir.Join)
        if above is not None and self._cards[above].is_open and not is_branch and not is_join:
            return self._cards[above]
        if above is not None:
            self._cards[above].is_open = False
        card = Card(len(self._cards), "join" if is_join else "text", line=node.line, parent=above, is_branch=is_branch)
        card.hue = self._hue_above(node.id)
        self._cards.append(card)
        return card

    def _is_above(self, card: int, below: int) -> bool:
        at: int | None = below
        while at is not None:
            if at == card:
                return True
            at = self._cards[at].parent
        return False

    def _close(self, card: Card, node: ir.AnyNode) -> None:
        card.kind = _WORDS.get(type(node), node.kind_name)
        card.name = ir.variable(node.label or "") or (node.tool if isinstance(node, ir.ToolCall) else "")
        card.line, card.is_open = node.line, False
        event = self._events.get(node.id)
        if event is not None:
            card.written_text = event.text or ("" if event.value is None else ir.value_text(event.value))
            meta = event.meta or {}
            ranked = sorted(zip(meta.get("probs", ()), meta.get("choices", ()), strict=False), reverse=True)
            card.probs = ", ".join(f"{choice} {prob:.0%}" for prob, choice in ranked[:MAX_CHOICES])
            if event.error is not None:
                card.error = f"{event.error.type}: {event.error.message}"
                card.is_cancelled = event.error.is_cancelled
            times = event.timings or {}
            card.start_s, card.first_token_s = times.get("start_s"), times.get("first_token_s")
            card.end_s = times.get("end_s")
            if event.usage is not None:
                usage = event.usage
                card.cached, card.computed = usage.cached_tokens, usage.computed_tokens
                card.written = usage.completion_tokens
                card.label = f"{card.cached:,} cached · {card.computed:,} new · {card.written:,} written"
                if not card.computed and not card.written and card.written_text:
                    card.label = "taken over from an identical node"
        elif node.id in self._costs:
            cost = self._costs[node.id]
            card.cached, card.computed, card.written = cost.shared.at_least, cost.new.at_least, cost.written.at_most
            card.label = f"{cost.shared} shared · {cost.new} new · {cost.written} written"
            if cost.twin is not None:
                card.label = "takes over an identical node's text"

    def _count_readers(self) -> None:
        last_node: dict[int, int] = {}
        for node, card in self._card_of.items():
            if card is not None and not isinstance(self._graph.nodes[node], ir.Fork):
                last_node[card] = node
        for one in self._cards:
            num_requests = one.num_requests or int(one.kind in ("gen", "select"))
            at = one.parent
            while at is not None:
                self._cards[at].num_readers += num_requests
                at = self._cards[at].parent
        for one in self._cards:
            forks = sum(other.parent == one.id and other.is_branch for other in self._cards)
            if forks > 1 and self._paths is not None and one.id in last_node:
                branch = next(
                    n.id for n in self._graph.nodes if isinstance(n, ir.Fork) and self._card_of[n.id] == one.id
                )
                one.prefix_tokens = str(self._paths.points[branch].count)


def _place(cards: Sequence[Card]) -> None:
    """Place cards in columns by their dependencies, and in lanes so that a branch stays in one and none cross.

    A branch occupies its lane from its first column to its last, so another branch may use the lane before or after.
    """
    children: dict[int | None, list[Card]] = {}
    for card in cards:
        before = [cards[i].column for i in (card.parent, *card.joins, *card.uses) if i is not None]
        card.column = 1 + max(before, default=-1)
        children.setdefault(card.parent, []).append(card)
    taken: list[list[tuple[int, int]]] = []

    sizes = {card.id: 1 for card in cards}
    for card in reversed(cards):
        if card.parent is not None:
            sizes[card.parent] += sizes[card.id]
    for found in children.values():  # small branches first, so that they stay near their beginning
        found.sort(key=lambda card: (not card.is_branch, card.num_hidden, sizes[card.id]))

    def chain_of(card: Card) -> list[Card]:
        chain = [card]
        while True:
            found = children.get(chain[-1].id, [])
            on = [c for c in found if not c.is_branch] or (found if len(found) == 1 else [])
            if not on:
                return chain
            chain.append(on[0])

    def put(card: Card, lowest: int) -> int:
        """Place a branch and all branches that start on it. Return the lowest lane used."""
        chain = chain_of(card)
        first, last = card.column, chain[-1].column
        lane = lowest
        while lane < len(taken) and any(first <= end and start <= last for start, end in taken[lane]):
            lane += 1
        while lane >= len(taken):
            taken.append([])
        taken[lane].append((first, last))
        deepest = lane
        for one in chain:
            one.lane, below = lane, lane
            for child in children.get(one.id, ()):
                if child not in chain:
                    below = put(child, below + 1)
                    deepest = max(deepest, below)
        return deepest

    for card in children.get(None, []):
        put(card, 0)
