"""Forced tokens: tokens that are appended instead of decoded.

Text after a generation is always appended in one forward pass; its tokens are counted here. The engine finds tokens
that a grammar forces while it runs, but those at the beginning of a constrained text are known before. The pass is an
annotation: it changes no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from ramet.lang.graph import ir
from ramet.lang.passes.masked_checks import masked_checks
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
        constraint = masked_checks(node, target).constraint if isinstance(node, ir.Generate) else None
        if constraint is not None:
            if constraint not in known:
                known[constraint] = len(target.forced_tokens(constraint) or ())
            if known[constraint]:
                at_start[node.id] = known[constraint]
    return ForcedTokens(appended, at_start)
