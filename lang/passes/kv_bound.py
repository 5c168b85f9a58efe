"""KV bound: how many tokens of keys and values a program can need, whatever its generations write.

Every part of every path counts once, shared ones too, and all branches may be alive together: no run exceeds it. Less
what liveness lets go, it is also what a scheduler must be able to hold. In tokens; times the model's bytes per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from ramet.lang.passes.paths import Paths
from ramet.lang.passes.requests import RequestPlan


@dataclass(frozen=True, slots=True)
class KvBound:
    """`tokens`: the limit. `known`: those of them that are sure to be needed. `longest`: of one request and its text.

    `is_complete` False: the graph is the first part of a program, and the limit holds for that part alone.
    """

    tokens: int
    known: int
    longest: int
    is_complete: bool


def kv_bound(paths: Paths, plan: RequestPlan, *, context_length: int, is_complete: bool = True) -> KvBound:
    """The bound of one graph. O(requests)."""
    longest = max((request.prompt.at_most + request.written.at_most for request in plan.requests), default=0)
    return KvBound(plan.kv.at_most, plan.kv.at_least, min(longest, context_length), is_complete)
