"""Which tokens nobody will read again when a program is over: those of its branches beside the one that it ended on.

What the program went on with to its end may be the beginning of the next one (a conversation); a branch that was
joined, judged or given up is not. A hint, never needed for a result. Not here: what the cache does with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from ramet.lang.graph import ir
from ramet.runtime.programs.path import Path

MAX_TOKENS = 1 << 20  # of all hints of one program: they are made on the engine's thread


@runtime_checkable
class TakesHints(Protocol):
    """An engine that wants to know."""

    def mark_dead(self, tokens: list[int], cache_salt: str = "", num_live: int = 0) -> None: ...


def dead_branches(nodes: Sequence[ir.AnyNode], path_of: Callable[[int], Path]) -> Iterator[tuple[list[int], int]]:
    """The tokens of every branch that is dead, and how many of them are not: those before it left the main one."""
    main: set[int] = set()
    at = nodes[-1].id if nodes else None
    while at is not None:
        main.add(at)
        at = nodes[at].parent
    inner = {node.parent for node in nodes}
    left = MAX_TOKENS
    for node in nodes:
        if node.id in inner or node.id in main or node.parent is None:
            continue
        at = node.id
        while at is not None and at not in main:
            at = nodes[at].parent
        num_live = 0 if at is None else path_of(at).length
        tokens = path_of(node.id).token_ids()
        left -= len(tokens)
        if left < 0:
            return
        if len(tokens) > num_live:
            yield tokens, num_live
