"""Forced tokens: tokens that are appended instead of decoded.

Text after a generation is always appended in one forward pass; its tokens are counted here. The engine finds tokens
that a grammar forces while it runs, but those at the beginning of a constrained text are known before. The pass is an
annotation: it changes no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from ramet.lang.graph import ir
from ramet.lang.passes.paths import Paths
from ramet.lang.passes.requests import RequestPlan
from ramet.lang.passes.target import Target


@dataclass(frozen=True, slots=True)
class ForcedTokens:
    """`appended`: known tokens of text after generations. `at_start`: constrained node -> tokens it begins with."""

    appended: int
    at_start: dict[int, int]


def forced_tokens(paths: Paths, plan: RequestPlan, target: Target) -> ForcedTokens:
    """Count forced tokens. Compiles every constraint once, as a run would. Raises the errors of compiling."""
    appended = 0
    for request in plan.requests:
        if request.unread.at_most and request.added is not None:
            appended += request.added
    at_start: dict[int, int] = {}
    known: dict[ir.Constraint, int] = {}
    for node in paths.graph.nodes:
        if isinstance(node, ir.Generate) and node.constraint is not None:
            if node.constraint not in known:
                known[node.constraint] = len(target.forced_tokens(node.constraint) or ())
            if known[node.constraint]:
                at_start[node.id] = known[node.constraint]
    return ForcedTokens(appended, at_start)
