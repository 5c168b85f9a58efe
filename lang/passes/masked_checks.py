"""Masked checks: the checks of a generation that its mask ensures, and those that are retried.

The pass is an annotation: it changes no graph. Checks in Python are not in the graph; they are always retried, and the
stages of a program show them.
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
