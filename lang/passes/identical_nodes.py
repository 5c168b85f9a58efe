"""Identical nodes: generations with the same prompt, the same values and greedy or the same seed are run once.

The executor does it where prompts turn out to be equal at run time (runtime/programs/shared_nodes.py); this says which
are equal whatever is generated. A generation that samples without a seed is never shared.
"""

from __future__ import annotations

from dataclasses import dataclass

from ramet.lang.graph import ir
from ramet.lang.passes.paths import Paths


@dataclass(frozen=True, slots=True)
class IdenticalNodes:
    """`twins`: node -> the earlier node that writes the same. `unseeded`: equal prompts that sample without a seed."""

    twins: dict[int, int]
    unseeded: tuple[int, ...]


def identical_nodes(paths: Paths) -> IdenticalNodes:
    """Find them. O(generations)."""
    seen: dict[object, int] = {}
    unseeded = []
    for node in paths.graph.nodes:
        if isinstance(node, ir.Generate) and not ir.is_repeatable(node.sampling):
            key = (paths.prompts[node.id].position, node.sampling, node.constraint)
            if seen.setdefault(key, node.id) != node.id:
                unseeded.append(node.id)
    return IdenticalNodes(dict(paths.twins), tuple(unseeded))
