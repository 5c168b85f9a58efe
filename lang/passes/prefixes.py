"""Static prefixes: text that several requests begin with, within a program and across the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ramet.lang import ir
from ramet.lang.passes.paths import Item, Opaque, Paths, Point, Trie, interpret
from ramet.lang.passes.requests import RequestPlan, plan_requests
from ramet.lang.passes.target import Target


@dataclass(frozen=True, slots=True)
class StaticPrefix:
    """The first `num_tokens` of the requests `readers` (nodes), all of them known. `line`: what wrote its last part."""

    num_tokens: int
    readers: tuple[int, ...]
    line: str


@dataclass(frozen=True, slots=True)
class BatchPrefixes:
    """What the rows of a batch share.

    `common`: known tokens that all rows begin with. `computed`: known prompt tokens that are computed when everything
    shared is computed once; `separate`: when every row runs alone. `order`: rows so that those that begin alike are
    next to each other (they are read while they are cached), and `groups` how many such groups there are.
    """

    common: int
    computed: int
    separate: int
    order: tuple[int, ...]
    groups: int
    plans: tuple[RequestPlan, ...]


def static_prefixes(paths: Paths) -> list[StaticPrefix]:
    """Maximal known prefixes that two requests or more of one program read; the most read first. O(tokens)."""
    readers: dict[int, set[int]] = {}
    ends: dict[int, tuple[Point, int]] = {}
    for node, tip in _tips(paths):
        for position, (point, length) in _known_positions(tip).items():
            readers.setdefault(position, set()).add(node)
            ends[position] = (point, length)
    longest: dict[frozenset[int], int] = {}
    for position, nodes in readers.items():
        if len(nodes) > 1:
            key = frozenset(nodes)
            if key not in longest or ends[position][1] > ends[longest[key]][1]:
                longest[key] = position
    found = []
    for key, position in longest.items():
        point, length = ends[position]
        line = "" if point.node is None else paths.graph.nodes[point.node].line
        found.append(StaticPrefix(length, tuple(sorted(key)), line))
    return sorted(found, key=lambda p: (-len(p.readers), p.num_tokens))


def batch_prefixes(graphs: Sequence[ir.Graph], target: Target) -> BatchPrefixes:
    """The prefixes of several graphs, one a row. O(tokens of all rows)."""
    trie = Trie()
    rows = [interpret(graph, target, trie, row) for row, graph in enumerate(graphs)]
    firsts = [_first_prompt(row) for row in rows]
    common = 0
    while firsts and all(
        len(f) > common and f[common] == firsts[0][common] and not isinstance(f[common], Opaque) for f in firsts
    ):
        common += 1
    plans = tuple(plan_requests(row) for row in rows)
    seen: set[int] = set()
    total = 0
    for row in rows:
        mine: set[int] = set()
        for _, tip in _tips(row):
            mine.update(_known_positions(tip))
        total += len(mine)
        seen |= mine
    keys = [tuple(item for item in first if not isinstance(item, Opaque)) for first in firsts]
    order = tuple(sorted(range(len(rows)), key=lambda i: (keys[i], i)))
    return BatchPrefixes(common, len(seen), total, order, _num_groups(keys, common), plans)


def _num_groups(keys: Sequence[tuple[int, ...]], common: int) -> int:
    """Rows by the first token in which they differ from the others."""
    return len({key[common : common + 1] for key in keys})


def _tips(paths: Paths) -> list[tuple[int, Point]]:
    found = [(node, prompt) for node, prompt in paths.prompts.items() if node not in paths.twins]
    for node, selection in paths.selections.items():
        found.extend((node, choice) for choice in selection.choices if len(selection.choices) > 1)
    return found


def _known_positions(tip: Point) -> dict[int, tuple[Point, int]]:
    """Position -> (the point that holds it, tokens up to it), up to the first token that only a run can tell."""
    found: dict[int, tuple[Point, int]] = {}
    length = 0
    for point in reversed(list(tip.chain())):
        for item, position in zip(point.items, point.positions, strict=True):
            if isinstance(item, Opaque):
                return found
            length += 1
            found[position] = (point, length)
    return found


def _first_prompt(paths: Paths) -> list[Item]:
    tips = _tips(paths)
    return min(tips, key=lambda tip: tip[0])[1].all_items() if tips else []
