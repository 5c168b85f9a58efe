"""What a notebook shows of a run, of a batch, and of a program while it writes: HTML without scripts, light or dark.

Not here: the drawing (drawing.py), the table of an explanation (explanation.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ramet.lang.graph import ir

MAX_ROWS = 50
MAX_CHARACTERS = 20_000  # of one text
_HUES = {"system": "#8a63d2", "user": "#3d6ae0", "assistant": "#1c9a63", "tool": "#e0662a"}
_OTHER_HUE = "#8a8f9c"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere"
_CELL = f'style="text-align:left;vertical-align:top;{_TEXT}"'


def transcript(nodes: Iterable[ir.AnyNode], texts: Mapping[int, str]) -> str:
    """Return the turns of a program, each in the colour of its role; what the model wrote is underlined.

    `texts`: what each node added. Nodes without a text yet are left out.
    """
    boxes = []
    for role, parts in _turns(nodes, texts):
        hue = _HUES.get(role, _OTHER_HUE)
        inner = "".join(
            f'<span style="border-bottom:1px solid {hue}">{escape(text)}</span>' if is_written else escape(text)
            for text, is_written in parts
        )
        style = f"border-left:3px solid {hue};background:{hue}14;padding:4px 10px;margin:4px 0;border-radius:4px"
        head = f'<small style="color:{hue}">{escape(role)}</small>'
        boxes.append(f'<div style="{style}">{head}<div style="{_TEXT}">{inner}</div></div>')
    return "".join(boxes)


def _turns(nodes: Iterable[ir.AnyNode], texts: Mapping[int, str]) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """Yield (role, parts): the texts of a turn, each with whether the model wrote it."""
    role, parts = "text", list[tuple[str, bool]]()
    for node in nodes:
        if isinstance(node, ir.Role | ir.Fork):
            if parts:
                yield role, parts
            role, parts = "text", []
            if isinstance(node, ir.Fork):
                role = f"branch {node.index + 1} of {node.width}"
            elif node.is_open:
                role = node.role
        elif text := texts.get(node.id, ""):
            parts.append((text[:MAX_CHARACTERS], node.run_by == "model"))
    if parts:
        yield role, parts


def run_html(
    program: str, nodes: Iterable[ir.AnyNode], events: Mapping[int, ir.NodeEvent], variables: Mapping[str, Any]
) -> str:  # Any: values of any type
    """Return a branch of a run: its turns, its variables, its error if it has one, its tokens."""
    texts = {node: event.text for node, event in events.items()}
    usage = sum((event.usage for event in events.values() if event.usage is not None), ir.Usage())
    errors = [e.error for e in events.values() if e.error is not None and e.error.type != "ProgramCancelled"]
    found = [f"<b>{escape(program)}</b>", transcript(nodes, texts)]
    if variables:
        found.append(table(("variable", "value"), ((name, repr(value)) for name, value in variables.items())))
    found += [f'<div style="color:#d43d63">{escape(f"{e.type}: {e.message}")}</div>' for e in errors[:1]]
    found.append(
        f"<small>{usage.computed_tokens:,} prompt tokens computed, {usage.cached_tokens:,} from the cache, "
        f"{usage.completion_tokens:,} written</small>"
    )
    return "".join(found)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of texts, of which it shows the first `MAX_ROWS` rows."""
    every = list(rows)
    head = "".join(f'<th style="text-align:left">{escape(name)}</th>' for name in columns)
    shown = "".join(
        f"<tr>{''.join(f'<td {_CELL}>{escape(str(cell)[:MAX_CHARACTERS])}</td>' for cell in row)}</tr>"
        for row in every[:MAX_ROWS]
    )
    more = f"<small>and {len(every) - MAX_ROWS:,} more</small>" if len(every) > MAX_ROWS else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{shown}</tbody></table>{more}"
