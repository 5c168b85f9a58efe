"""`graph()`: a picture of a program, before a run with what is planned, after it with what was measured.

Text and the generation behind it are one card; branches are lanes, in the order of time from left to right; a colour is
a shared prefix. Here: the cards, where they stand, and Mermaid. Not here: SVG (drawing_svg.py), HTML (drawing_html.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramet.errors import ConfigError, InvalidRequest
from ramet.lang.explain.explain import Explanation, NodeCost
from ramet.lang.graph import ir
from ramet.lang.passes.paths import Paths, interpret
from ramet.lang.passes.target import Target, target_of

if TYPE_CHECKING:
    from ramet.lang.graph.run_record import RunRecord
    from ramet.lang.program.function import Function
    from ramet.lang.recording.state import State

MAX_BRANCHES = 12  # of one fork that are drawn; of more, the first ones and how many there are besides
HUES = 8


@dataclass(slots=True)
class Card:
    """One box. Owner: `_Cards`, which makes it; read-only in a Drawing.

    `cached`, `computed`, `written`: tokens; None where nothing is known. `label`: the same in words. `hue`: which
    prefix it hangs on. `parent`: the card whose text precedes it; `joins` and `uses`: cards whose values it waits for.
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
    cached: int | None = None
    computed: int | None = None
    written: int | None = None
    label: str = ""
    start_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    error: str = ""
    num_readers: int = 0
    prefix_tokens: str = ""
    hue: int = 0
    column: int = 0
    lane: int = 0
    is_open: bool = True
    num_hidden: int = 0  # of a card that stands for branches that are not drawn
    num_requests: int = 0  # theirs

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        names = (
            "id",
            "kind",
            "name",
            "line",
            "parent",
            "joins",
            "uses",
            "prompt",
            "written_text",
            "cached",
            "computed",
        )
        more = ("written", "label", "start_s", "first_token_s", "end_s", "error", "num_readers", "prefix_tokens", "hue")
        return {name: getattr(self, name) for name in (*names, *more, "num_hidden")}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture in three forms. `summary`: one line about the whole program."""

    program: str
    summary: str
    cards: tuple[Card, ...]

    def mermaid(self) -> str:
        """Mermaid's flowchart text."""
        lines = ["flowchart LR"]
        for card in self.cards:
            title = " ".join(part for part in (card.kind, card.name) if part)
            rest = [card.written_text or card.prompt, card.label]
            label = "<br/>".join(_mermaid_text(part) for part in (title, *rest) if part)
            lines.append(f'    n{card.id}["{label}"]:::hue{card.hue}')
        for card in self.cards:
            if card.parent is not None:
                lines.append(f"    n{card.parent} --> n{card.id}")
            lines += [f"    n{source} -.- n{card.id}" for source in card.joins]
            lines += [f"    n{source} -.-> n{card.id}" for source in card.uses]
        fills = ("#dbe7ff", "#ffe3d1", "#d6f2e3", "#f3ddf7", "#fff0bf", "#d3f0f5", "#ffdbe2", "#e5ecd0")
        for hue in sorted({card.hue for card in self.cards}):
            lines.append(f"    classDef hue{hue} fill:{fills[hue]},stroke:#667,color:#112")
        return "\n".join(lines) + "\n"

    def svg(self) -> str:
        """A scalable picture, light or dark as its reader prefers. No scripts, no external resources."""
        from ramet.lang.explain.drawing_svg import to_svg

        return to_svg(self)

    def html(self) -> str:
        """One page without external resources, where every card can be opened."""
        from ramet.lang.explain.drawing_html import to_html

        return to_html(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the form that the name asks for: .html, .svg, or .mmd (Mermaid)."""
        forms = {".html": self.html, ".svg": self.svg, ".mmd": self.mermaid, ".mermaid": self.mermaid}
        suffix = Path(path).suffix
        if suffix not in forms:
            raise InvalidRequest(f"{path}: a drawing is saved as .html, .svg or .mmd", param="path")
        Path(path).write_text(forms[suffix](), encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg()

    @property
    def num_lanes(self) -> int:
        return 1 + max((card.lane for card in self.cards), default=0)

    @property
    def num_columns(self) -> int:
        return 1 + max((card.column for card in self.cards), default=0)


def draw_program(
    program: Function, arguments: Mapping[str, Any] | None = None, *, target: Target | None = None
) -> Drawing:
    """The graph of a program that has not run, with the counts of its plan."""
    from ramet.lang.explain.explain import _trace, explain_program

    given = dict(arguments or {})
    plan = explain_program(program, (), given, target=target)
    trace = _trace(program, (), given)
    found = target or target_of(program._split((), given, is_partial=True).options.get("backend"))
    cards = _Cards(trace.graph, _templates(trace.graph), interpret(trace.graph, found), {n.node: n for n in plan.nodes})
    more = "" if plan.is_complete else f" · up to {plan.stages[0].line.rpartition('/')[2]}, which needs a value"
    return Drawing(trace.program, _plan_summary(plan) + more, cards.arranged())


def draw_state(state: State) -> Drawing:
    """The graph of a run, with what was measured."""
    state._run.wait_all(quietly=True)
    record = state.record
    paths: Paths | None = None
    with suppress(ConfigError):  # a backend elsewhere: the picture does without the tokens of prefixes
        paths = interpret(record.graph, target_of(state._run._backend))
    texts = [_text_of(record, node) for node in record.graph.nodes]
    cards = _Cards(record.graph, texts, paths, {}, record)
    usage = sum((e.usage for e in record.events.values() if e.usage is not None), ir.Usage())
    end_s = max((e.timings.get("end_s", 0.0) for e in record.events.values() if e.timings), default=0.0)
    summary = (
        f"{usage.prompt_tokens:,} prompt tokens: {usage.cached_tokens:,} cached, {usage.computed_tokens:,} computed · "
        f"{usage.completion_tokens:,} written · {end_s * 1e3:,.0f} ms"
    )
    return Drawing(record.program, summary, cards.arranged())


def _plan_summary(plan: Explanation) -> str:
    return f"prompt {plan.prompt} tokens: {plan.shared} shared, {plan.new} new · written {plan.written}"


def _templates(graph: ir.Graph) -> list[str]:
    """The text of every node, with names in the place of values."""

    def name(ref: ir.Ref) -> str:
        node = graph.nodes[ref.node]
        if isinstance(node, ir.Argument) and node.name in graph.arguments:
            value = graph.arguments[node.name]
            return ir.render((ref,), lambda _: ir.value_text(value), lambda _: value)
        steps = "".join(f".{step}" for step in ref.path)
        return f"⟨{getattr(node, 'name', None) or f'node {ref.node}'}{steps}⟩"

    return [
        "".join(part if isinstance(part, str) else name(part) for part in node.parts)
        if isinstance(node, ir.Text)
        else _role_text(node)
        for node in graph.nodes
    ]


def _role_text(node: ir.AnyNode) -> str:
    """A message's border as a reader wants to see it, not as the template writes it."""
    if not isinstance(node, ir.Role):
        return ""
    return f"{node.role}: " if node.is_open else "\n"


def _text_of(record: RunRecord, node: ir.AnyNode) -> str:
    event = record.events.get(node.id)
    if isinstance(node, ir.Role):
        return _role_text(node)
    return event.text if event is not None else ""


class _Cards:
    """Makes the cards of a graph, and gives them their places."""

    def __init__(
        self,
        graph: ir.Graph,
        texts: Sequence[str],
        paths: Paths | None,
        costs: Mapping[int, NodeCost],
        record: RunRecord | None = None,
    ) -> None:
        self._graph, self._texts, self._paths, self._costs, self._record = graph, texts, paths, costs, record
        self._cards: list[Card] = []
        self._card_of: dict[int, int | None] = {}  # node -> its card
        self._hidden: dict[int, int] = {}  # nodes of branches that are not drawn -> the card that stands for them
        self._more: dict[int, int] = {}  # fork group -> the card that stands for its further branches
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
                self._cards[more].num_requests += isinstance(node, ir.Generate | ir.Select)
            return
        if isinstance(node, ir.Fork):
            self._fork(node)
            return
        above = None if parent is None else self._card_of[parent]
        if isinstance(node, ir.Capture):
            self._card_of[node.id] = above
            return
        if isinstance(node, ir.Role) and not node.is_open and (above is None or not self._cards[above].is_open):
            self._card_of[node.id] = above  # the end of a message is no card of its own
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
        if isinstance(node, ir.Generate | ir.Select | ir.ToolCall):
            self._close(card, node)
        else:
            card.prompt += self._texts[node.id]

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

    def _close(self, card: Card, node: ir.Generate | ir.Select | ir.ToolCall) -> None:
        card.kind = {"Generate": "gen", "Select": "select", "ToolCall": "tool"}[type(node).__name__]
        card.name = (node.name or "").partition("#")[0] or (node.tool if isinstance(node, ir.ToolCall) else "")
        card.line, card.is_open = node.line, False
        event = None if self._record is None else self._record.events.get(node.id)
        if event is not None:
            card.written_text = event.text or ("" if event.value is None else ir.value_text(event.value))
            if event.error is not None:
                card.error = f"{event.error.type}: {event.error.message}"
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
    """Columns by what must come before; lanes so that a branch stays on one and none are crossed.

    A lane is taken from a branch's first column to its last, so that another branch may have it before or behind.
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
    for found in children.values():  # small ones first: they stay near where they began
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
        """Place a branch and all that hangs on it. Returns the lowest lane that it took."""
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


def _mermaid_text(text: str) -> str:
    short = " ".join(text.split())
    short = short if len(short) <= 60 else short[:59] + "…"
    for char, code in (("&", "#amp;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;"), ("`", "#96;")):
        short = short.replace(char, code)
    return short
