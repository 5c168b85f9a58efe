"""Static prefixes: known prefixes shared by several requests, in a program or across the rows of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ramet.lang.graph import ir
from ramet.lang.passes.paths import Item, Opaque, Paths, Point, Trie, interpret
from ramet.lang.passes.requests import RequestPlan, plan_requests
from ramet.lang.passes.target import Target


@dataclass(frozen=True, slots=True)
class StaticPrefix:
    """The first `num_tokens` of `num_readers` requests, all of them known. `line`: the line of its last part."""

    num_tokens: int
    num_readers: int
    line: str


@dataclass(frozen=True, slots=True)
class BatchPrefixes:
    """The shared tokens of a batch's rows.

    `common`: known tokens that all rows begin with. `computed`: known prompt tokens that are computed if shared ones
    are computed once. `separate`: the same if every row runs alone. `order`: the rows, sorted so that equal prefixes
    are next to each other and are read while they are cached. `groups`: the number of such groups.
    """

    common: int
    computed: int
    separate: int
    order: tuple[int, ...]
    groups: int
    plans: tuple[RequestPlan, ...]


def static_prefixes(paths: Paths) -> list[StaticPrefix]:
    """Return the maximal known prefixes that several requests of a program read, most read first. O(own tokens)."""
    known = _KnownTokens()
    readers: Counter[int] = Counter(known.add(tip) for tip in _tips(paths))
    most_below: dict[int, int] = {}
    for position in sorted(known.parents, reverse=True):  # those below have higher numbers
        parent, count = known.parents[position], readers[position]
        readers[parent] += count
        most_below[parent] = max(most_below.get(parent, 0), count)
    found = []
    for position, point in known.points.items():
        if readers[position] > max(1, most_below.get(position, 0)):
            line = "" if point.node is None else paths.graph.nodes[point.node].line
            found.append(StaticPrefix(known.depths[position], readers[position], line))
    return sorted(found, key=lambda p: (-p.num_readers, p.num_tokens))


def batch_prefixes(graphs: Sequence[ir.Graph], target: Target) -> BatchPrefixes:
    """Find the prefixes of several graphs, one for each row. O(tokens of all rows)."""
    trie: Trie = {}
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
        known = _KnownTokens()
        for tip in _tips(row):
            known.add(tip)
        total += len(known.points)
        seen.update(known.points)
    keys = [tuple(item for item in first if not isinstance(item, Opaque)) for first in firsts]
    order = tuple(sorted(range(len(rows)), key=lambda i: (keys[i], i)))
    return BatchPrefixes(common, len(seen), total, order, _num_groups(keys, common), plans)


def _num_groups(keys: Sequence[tuple[int, ...]], common: int) -> int:
    """Count the groups of rows by their first token after the common ones."""
    return len({key[common : common + 1] for key in keys})


def _tips(paths: Paths) -> list[Point]:
    found = [prompt for node, prompt in paths.prompts.items() if node not in paths.twins]
    for selection in paths.selections.values():
        found.extend(choice for choice in selection.choices if len(selection.choices) > 1)
    return found


class _KnownTokens:
    """The positions of the known tokens at the start of paths. Every point is walked once."""

    def __init__(self) -> None:
        self.parents: dict[int, int] = {}
        self.depths: dict[int, int] = {0: 0}
        self.points: dict[int, Point] = {}  # position -> the point that holds it
        self._ends: dict[int, tuple[int, bool, Point]] = {}  # id of a point -> last known position, all known, itself

    def add(self, tip: Point) -> int:
        """Add the path to `tip`, and return the position up to which it is known."""
        todo: list[Point] = []
        end, is_known = 0, True
        for point in tip.chain():
            if id(point) in self._ends:
                end, is_known, _ = self._ends[id(point)]
                break
            todo.append(point)
        for point in reversed(todo):
            for item, position in zip(point.items, point.positions, strict=True):
                is_known = is_known and not isinstance(item, Opaque)
                if not is_known:
                    break
                self.parents[position], self.depths[position] = end, self.depths[end] + 1
                self.points.setdefault(position, point)
                end = position
            self._ends[id(point)] = (end, is_known, point)
        return end


def _first_prompt(paths: Paths) -> list[Item]:
    tips = _tips(paths)
    return min(tips, key=lambda tip: tip.node or 0).all_items() if tips else []
