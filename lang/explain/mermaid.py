"""A drawing as the text of a Mermaid flowchart."""

from __future__ import annotations

from collections.abc import Sequence

from ramet.lang.explain.cards import Card

FILLS = ("#dbe7ff", "#ffe3d1", "#d6f2e3", "#f3ddf7", "#fff0bf", "#d3f0f5", "#ffdbe2", "#e5ecd0")


def to_mermaid(cards: Sequence[Card]) -> str:
    """Return the text of a Mermaid flowchart."""
    lines = ["flowchart LR"]
    for card in cards:
        title = " ".join(part for part in (card.kind, card.name) if part)
        rest = [card.written_text or card.prompt, card.label]
        label = "<br/>".join(_escaped(part) for part in (title, *rest) if part)
        lines.append(f'    n{card.id}["{label}"]:::hue{card.hue}')
    for card in cards:
        if card.parent is not None:
            lines.append(f"    n{card.parent} --> n{card.id}")
        lines += [f"    n{source} -.- n{card.id}" for source in card.joins]
        lines += [f"    n{source} -.-> n{card.id}" for source in card.uses]
    for hue in sorted({card.hue for card in cards}):
        lines.append(f"    classDef hue{hue} fill:{FILLS[hue]},stroke:#667,color:#112")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    short = " ".join(text.split())
    short = short if len(short) <= 60 else short[:59] + "…"
    for char, code in (("&", "#amp;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;"), ("`", "#96;")):
        short = short.replace(char, code)
    return short
