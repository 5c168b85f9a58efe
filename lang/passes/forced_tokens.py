"""Forced tokens: tokens that are appended instead of decoded.

Text after a generation is always appended in one forward pass; its tokens are counted here. The engine finds tokens
that a grammar forces while it runs, but those at the beginning of a constrained text are known before. The pass is an
annotation: it changes no graph.
"""

from __future__ import annotations

from ramet.lang.graph import ir
from ramet.lang.passes.masked_checks import masked_checks
from ramet.lang.passes.paths import Paths
from ramet.lang.passes.requests import RequestPlan
from ramet.lang.passes.target import Target


def appended_tokens(plan: RequestPlan) -> int:
    """Count the known tokens of text after generations."""
    return sum(one.added for one in plan.requests if one.unread.at_most and one.added is not None)


def tokens_at_start(paths: Paths, target: Target) -> dict[int, int]:
    """Return, by constrained node, how many tokens all its texts begin with.

    Compiles every constraint once, as a run would. Raises the errors of compiling.
    """
    at_start: dict[int, int] = {}
    known: dict[ir.Constraint, int] = {}
    for node in paths.graph.nodes:
        constraint = masked_checks(node, target).constraint if isinstance(node, ir.Generate) else None
        if constraint is not None:
            if constraint not in known:
                known[constraint] = len(target.forced_tokens(constraint) or ())
            if known[constraint]:
                at_start[node.id] = known[constraint]
    return at_start
