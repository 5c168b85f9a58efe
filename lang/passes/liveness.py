"""Liveness: which requests read each segment, and after which one it is dead.

A segment is the tokens that one node added to its branch. Time is counted in requests, in the order of the run. The
results match the eviction order of the runtime's radix cache: dead tokens first, then those with the latest next use.
"""

from __future__ import annotations

from dataclasses import dataclass

from ramet.lang.passes.paths import Count, Paths, Point
from ramet.lang.passes.requests import run_order


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, start + count) of a branch, added by `node`. `reads`: nodes whose requests read it, in order."""

    node: int
    start: Count
    count: Count
    reads: tuple[int, ...]

    @property
    def last_use(self) -> int | None:
        return self.reads[-1] if self.reads else None


def liveness(paths: Paths) -> tuple[list[Segment], list[int]]:
    """Return the segments that hold tokens, and the nodes that make requests, in the order of the run.

    O(sum of the lengths of all branches, in segments).
    """
    reads: dict[int, list[int]] = {}
    point_of: dict[int, Point] = {}
    order: list[int] = []
    for node in run_order(paths.graph):
        if node.run_by != "model" or node.id in paths.twins:
            continue
        order.append(node.id)
        for key, point in _segments(paths.points[node.id]):
            reads.setdefault(key, []).append(node.id)
            point_of.setdefault(key, point)
    found = []
    for key, users in reads.items():
        point = point_of[key]
        before = point.parent.count if point.parent is not None else Count(0, 0)
        size = Count(point.count.at_least - before.at_least, point.count.at_most - before.at_most)
        assert point.node is not None
        found.append(Segment(point.node, before, size, tuple(users)))
    return found, order


def _segments(tip: Point) -> list[tuple[int, Point]]:
    """Return the points of a path that hold tokens, with their end positions, which are equal on sharing branches."""
    return [(point.position, point) for point in tip.chain() if point.items]
