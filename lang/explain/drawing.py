"""`graph()`: a drawing of a program, with planned costs before a run and measurements after it.

Not here: the cards and their places (cards.py), images (svg.py) and pages (html.py).
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ramet.errors import ConfigError, InvalidRequest
from ramet.lang.backends.protocol import Backend
from ramet.lang.explain.cards import Card, cards_of
from ramet.lang.explain.explanation import Explanation
from ramet.lang.explain.html import to_html
from ramet.lang.explain.svg import to_svg
from ramet.lang.graph import ir
from ramet.lang.graph.operations import path_text
from ramet.lang.graph.run_record import RunRecord
from ramet.lang.passes.paths import Paths, interpret
from ramet.lang.passes.target import Target, target_of

_FILLS = ("#dbe7ff", "#ffe3d1", "#d6f2e3", "#f3ddf7", "#fff0bf", "#d3f0f5", "#ffdbe2", "#e5ecd0")  # Mermaid, by hue


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawing with three output formats. `summary`: one line about the whole program."""

    program: str
    summary: str
    cards: tuple[Card, ...]

    def mermaid(self) -> str:
        """Return the text of a Mermaid flowchart."""
        lines = ["flowchart LR"]
        for card in self.cards:
            title = " ".join(part for part in (card.kind, card.name) if part)
            rest = [card.written_text or card.prompt, card.probs, card.label]
            label = "<br/>".join(_escaped(part) for part in (title, *rest) if part)
            lines.append(f'    n{card.id}["{label}"]:::hue{card.hue}')
        for card in self.cards:
            if card.parent is not None:
                lines.append(f"    n{card.parent} --> n{card.id}")
            lines += [f"    n{source} -.- n{card.id}" for source in card.joins]
            lines += [f"    n{source} -.-> n{card.id}" for source in card.uses]
        for hue in sorted({card.hue for card in self.cards}):
            lines.append(f"    classDef hue{hue} fill:{_FILLS[hue]},stroke:#667,color:#112")
        return "\n".join(lines) + "\n"

    def svg(self) -> str:
        """Return an SVG image, light or dark by the reader's preference, without scripts or external resources."""
        return to_svg(self.program, self.summary, self.cards)

    def html(self) -> str:
        """Return an HTML page without external resources, in which every card can be opened."""
        return to_html(self.program, self.summary, self.cards)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the format of the file name: .html, .svg, or .mmd (Mermaid)."""
        forms = {".html": self.html, ".svg": self.svg, ".mmd": self.mermaid, ".mermaid": self.mermaid}
        suffix = Path(path).suffix
        if suffix not in forms:
            raise InvalidRequest(f"{path}: a drawing is saved as .html, .svg or .mmd", param="path")
        Path(path).write_text(forms[suffix](), encoding="utf-8")

    def _repr_html_(self) -> str:
        return self.svg()


def draw_plan(traced: RunRecord, plan: Explanation, target: Target) -> Drawing:
    """Draw the graph of a trace, with the counts of its plan."""
    costs = {cost.node: cost for cost in plan.nodes}
    cards = cards_of(traced.graph, _templates(traced.graph), interpret(traced.graph, target), costs, {})
    more = "" if plan.is_complete else f" · up to {plan.stages[0].line.rpartition('/')[2]}, which needs a value"
    return Drawing(traced.program, _plan_summary(plan) + more, cards)


def draw_run(record: RunRecord, backend: Backend) -> Drawing:
    """Draw the graph of a run, with its measurements."""
    paths: Paths | None = None
    with suppress(ConfigError):  # a remote backend: the drawing lacks the tokens of prefixes
        paths = interpret(record.graph, target_of(backend))
    cards = cards_of(record.graph, _texts(record), paths, {}, record.events)
    usage = sum((e.usage for e in record.events.values() if e.usage is not None), ir.Usage())
    end_s = max((e.timings.get("end_s", 0.0) for e in record.events.values() if e.timings), default=0.0)
    summary = (
        f"{usage.prompt_tokens:,} prompt tokens: {usage.cached_tokens:,} cached, {usage.computed_tokens:,} computed · "
        f"{usage.completion_tokens:,} written · {end_s * 1e3:,.0f} ms"
    )
    return Drawing(record.program, summary, cards)


def _plan_summary(plan: Explanation) -> str:
    return f"prompt {plan.prompt} tokens: {plan.shared} shared, {plan.new} new · written {plan.written}"


def _templates(graph: ir.Graph) -> list[str]:
    """Return the text of every node, with names in place of values."""

    def value(ref: ir.Ref) -> str:
        node = graph.nodes[ref.node]
        if isinstance(node, ir.Argument) and node.name in graph.arguments:
            given = graph.arguments[node.name]
            return ir.render((ref,), lambda _: ir.value_text(given), lambda _: given)
        return f"⟨{node.label or f'node {ref.node}'}{path_text(ref.path)}⟩"

    def text(node: ir.AnyNode) -> str:
        parts = [part for template in node.templates() for part in template] if node.run_by == "runner" else []
        return "".join(part if isinstance(part, str) else value(part) for part in parts)

    return [_border(node) if isinstance(node, ir.Role) else text(node) for node in graph.nodes]


def _border(node: ir.Role) -> str:
    """Return a readable form of a message's border, instead of the chat template's marks."""
    return f"{node.role}: " if node.is_open else "\n"


def _texts(record: RunRecord) -> list[str]:
    """Return the text of every node of a run."""

    def text(node: ir.AnyNode) -> str:
        event = record.events.get(node.id)
        return event.text if event is not None else ""

    return [_border(node) if isinstance(node, ir.Role) else text(node) for node in record.graph.nodes]


def _escaped(text: str) -> str:
    """Return a short text for the label of a Mermaid node."""
    short = " ".join(text.split())
    short = short if len(short) <= 60 else short[:59] + "…"
    for char, code in (("&", "#amp;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;"), ("`", "#96;")):
        short = short.replace(char, code)
    return short
