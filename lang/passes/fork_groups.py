"""Fork groups: branches that are decoded together after one prefix, for attention that reads the prefix once."""

from __future__ import annotations

from dataclasses import dataclass

from ramet.lang.graph import ir
from ramet.lang.passes.paths import Count, Paths


@dataclass(frozen=True, slots=True)
class ForkGroup:
    """One fork. `prefix`: tokens that all its branches read. `depth`: the number of enclosing forks.

    `branches`: the Fork nodes of its branches. `num_decoding`: branches, including those of inner forks, that generate
    text of their own.
    """

    group: int
    line: str
    branches: tuple[int, ...]
    prefix: Count
    depth: int
    num_decoding: int

    @property
    def reads_saved(self) -> int:
        """The least number of token reads that a step saves while all branches decode."""
        return max(0, self.num_decoding - 1) * self.prefix.at_least


def fork_groups(paths: Paths) -> list[ForkGroup]:
    """Return all forks with two branches or more, outermost first. O(nodes)."""
    nodes = paths.graph.nodes
    groups: dict[int, list[int]] = {}
    for node in nodes:
        if isinstance(node, ir.Fork) and node.width > 1:
            groups.setdefault(node.group, []).append(node.id)
    fork_above = _forks_above(paths.graph)
    writing: dict[int, set[int]] = {}  # fork node -> innermost forks below it (or itself) that generate
    for node in nodes:
        if node.run_by == "model" and node.id not in paths.twins:
            inner = at = fork_above[node.id]
            while at is not None and inner is not None:
                writing.setdefault(at, set()).add(inner)
                at = fork_above[at]
    found = []
    for group, branches in groups.items():
        head = nodes[group]
        depth, at = 0, fork_above[group]
        while at is not None:
            depth, at = depth + 1, fork_above[at]
        decoding = sum(len(writing.get(branch, ())) for branch in branches)
        found.append(ForkGroup(group, head.line, tuple(branches), paths.points[group].count, depth, decoding))
    return found


def _forks_above(graph: ir.Graph) -> list[int | None]:
    """Return, for every node, the nearest Fork before it on its branch, itself excluded."""
    found: list[int | None] = []
    for node in graph.nodes:
        if node.parent is None:
            found.append(None)
        else:
            found.append(node.parent if isinstance(graph.nodes[node.parent], ir.Fork) else found[node.parent])
    return found
