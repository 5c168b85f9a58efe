"""Identical nodes: generations that run once because their prompts and sampling values are equal.

They are greedy or have the same seed; a generation that samples without a seed is never shared. The executor shares
prompts that are equal at run time (runtime/programs/shared_nodes.py). This pass finds those that are always equal,
whatever is generated.
"""

from __future__ import annotations

from dataclasses import dataclass

from ramet.lang.graph import ir
from ramet.lang.passes.paths import Paths


@dataclass(frozen=True, slots=True)
class IdenticalNodes:
    """`twins`: node -> the earlier node with the same text. `unseeded`: nodes with equal prompts but without a seed."""

    twins: dict[int, int]
    unseeded: tuple[int, ...]


def identical_nodes(paths: Paths) -> IdenticalNodes:
    """Find identical nodes. O(generations)."""
    seen: dict[object, int] = {}
    unseeded = []
    for node in paths.graph.nodes:
        if isinstance(node, ir.Generate) and not ir.is_repeatable(node.sampling):
            key = (paths.prompts[node.id].position, node.sampling, node.constraint)
            if seen.setdefault(key, node.id) != node.id:
                unseeded.append(node.id)
    return IdenticalNodes(dict(paths.twins), tuple(unseeded))
