"""The order in which the rows of a batch begin: those with the same prefix next to each other.

A prefix is then read while it is in the cache, however small that is, and is let go when its last row is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ramet.lang.graph import ir

T = TypeVar("T")


def row_order(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[int]:
    """Indices of `rows` (their arguments by name), sorted by the values of `names`, of which the first counts most."""
    keys = [tuple(_text(row.get(name)) for name in names) for row in rows]
    return sorted(range(len(rows)), key=lambda index: (keys[index], index))


def in_row_order(order: Sequence[int], results: Iterable[T]) -> Iterator[T]:
    """Results that come as `order` says, in the order of the rows; each as soon as those before it are there."""
    early: dict[int, T] = {}
    due = 0
    for index, result in zip(order, results, strict=True):
        early[index] = result
        while due in early:
            yield early.pop(due)
            due += 1


def arguments_in_text(graph: ir.Graph) -> list[str]:
    """The arguments that stand in text, in the order in which the program puts them there."""
    nodes = graph.nodes
    used = (nodes[ref.node] for node in nodes if isinstance(node, ir.Text) for ref in ir.refs(node))
    return list(dict.fromkeys(node.name for node in used if isinstance(node, ir.Argument)))


def _text(value: object) -> str:
    return ir.value_text(value) if ir.is_json(value) else repr(value)
