"""The order in which the rows of a batch begin: those with the same prefix next to each other.

A prefix is then read while it is in the cache, however small that is, and is let go when its last row is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ramet.errors import RametError
from ramet.lang.graph import ir

if TYPE_CHECKING:
    from ramet.lang.program.function import Function
    from ramet.lang.recording.state import State


def row_order(program: Function, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of `rows` (their arguments by name) by what they put into text first. Traces the program once."""
    if len(rows) < 2:
        return list(range(len(rows)))
    names = [parameter.name for parameter in program.parameters]
    first = _in_text_order(program, rows[0])
    names = [*first, *(name for name in names if name not in first)]
    keys = [tuple(_text(row.get(name)) for name in names) for row in rows]
    return sorted(range(len(rows)), key=lambda index: (keys[index], index))


def in_row_order(order: Sequence[int], states: Iterable[State]) -> Iterator[State]:
    """States that come as `order` says, in the order of the rows; each as soon as those before it are there."""
    early: dict[int, State] = {}
    due = 0
    for index, state in zip(order, states, strict=True):
        early[index] = state
        while due in early:
            yield early.pop(due)
            due += 1


def _in_text_order(program: Function, row: Mapping[str, Any]) -> list[str]:
    """The arguments that stand in text, in the order in which the program puts them there."""
    try:
        nodes = program.trace(**row).graph.nodes
    except (RametError, TypeError, ValueError):  # the row's own run will say what is wrong with it
        return []
    used = (nodes[ref.node] for node in nodes if isinstance(node, ir.Text) for ref in ir.refs(node))
    return list(dict.fromkeys(node.name for node in used if isinstance(node, ir.Argument)))


def _text(value: object) -> str:
    return ir.value_text(value) if ir.is_json(value) else repr(value)
