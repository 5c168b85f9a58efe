"""The constraints that a run compiles: which checks become masks, and which tokens a constrained text begins with.

A check that is no mask is retried. Checks in Python are not in the graph; they are always retried, and the stages of a
program show them. The engine finds tokens that a grammar forces while it runs, but those at the beginning of a
constrained text are known before. The passes are annotations: they change no graph.
"""

from __future__ import annotations

from ramet.errors import GrammarTooLarge
from ramet.lang.graph import ir
from ramet.lang.graph.narrowing import Narrowing
from ramet.lang.passes.target import Target


def masked_checks(node: ir.Generate, target: Target) -> Narrowing:
    """Return the constraint that a run uses. Compiles it; if it is too large, all checks are retried.

    Raises GrammarError for a constraint that a run can't compile either.
    """
    narrowed = node.narrowed()
    if narrowed.masked and narrowed.constraint is not None:
        try:
            target.forced_tokens(narrowed.constraint)
        except GrammarTooLarge:
            return Narrowing(node.constraint, (), node.checks)
    return narrowed


def tokens_at_start(graph: ir.Graph, target: Target) -> dict[int, int]:
    """Return, by constrained node, how many tokens all its texts begin with.

    Compiles every constraint once, as a run would. Raises the errors of compiling.
    """
    at_start: dict[int, int] = {}
    known: dict[ir.Constraint, int] = {}
    for node in graph.nodes:
        constraint = masked_checks(node, target).constraint if isinstance(node, ir.Generate) else None
        if constraint is not None:
            if constraint not in known:
                known[constraint] = len(target.forced_tokens(constraint) or ())
            if known[constraint]:
                at_start[node.id] = known[constraint]
    return at_start
