"""When a running program reads a prefix again that no sequence holds at the moment.

A branch whose next generation waits for another branch, a join or a tool has its prefix in the cache alone. The graph
says that it will be read, and how many requests come before: the cache keeps it in favour of what has no later use.
Time is counted in requests that the host's programs have ended. A hint, never needed for a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from ramet.lang.graph import ir
from ramet.lang.graph.run import NodeRun
from ramet.runtime.programs.path import Path

MAX_EXAMINED = 64  # nodes looked at for one answer: this runs on the engine's thread
MAX_HINTS = 256  # of one program at a time

Hint = tuple[list[int], float]  # tokens, when they are read next


@runtime_checkable
class TakesNextUse(Protocol):
    """An engine that wants to know."""

    def set_next_use(self, tokens: list[int], next_use: float, cache_salt: str = "") -> None: ...


class NextUses:
    """The hints of one program. Owner: its executor, which calls it under its lock."""

    def __init__(self, runs: Sequence[NodeRun], path_of: Callable[[int], Path]) -> None:
        """`runs`: of all nodes so far, by id; they grow and change as the program runs."""
        self._runs, self._path_of = runs, path_of
        self._children: dict[int, list[int]] = {}
        self._hinted: dict[int, Hint] = {}  # node whose path is hinted

    def added(self, node: ir.AnyNode) -> None:
        if node.parent is not None and not isinstance(node, ir.Join | ir.Capture):
            self._children.setdefault(node.parent, []).append(node.id)

    def released(self, node: int, now: float) -> list[Hint]:
        """What changes when a node's sequence has ended: hints for its path, and for those that it branched from."""
        found: list[Hint] = []
        if any(self._is_over(one) for one in self._hinted):
            found = self.clear()
            self._hinted = {one: hint for one, hint in self._hinted.items() if not self._is_over(one)}
            found += self._hinted.values()
        at: int | None = node
        for _ in range(MAX_EXAMINED):
            if at is None or len(self._hinted) >= MAX_HINTS:
                break
            waiting = None if at in self._hinted else self._waiting_below(at)
            tokens = self._path_of(at).token_ids() if waiting is not None else []
            if waiting is not None and tokens:
                hint = (tokens, now + self._num_before(waiting))
                self._hinted[at] = hint
                found.append(hint)
            at = self._runs[at].node.parent
        return found

    def clear(self) -> list[Hint]:
        """Take back every hint."""
        return [(tokens, math.inf) for tokens, _ in self._hinted.values()]

    def _is_over(self, node: int) -> bool:
        """Nothing waits behind a hinted node any more."""
        return self._waiting_below(node) is None

    def _waiting_below(self, node: int) -> NodeRun | None:
        """A node behind `node` that waits for something else than `node`, with nothing running in between."""
        stack = [node]
        for _ in range(MAX_EXAMINED):
            if not stack:
                return None
            for child in self._children.get(stack.pop(), ())[:MAX_EXAMINED]:
                run = self._runs[child]
                if run.status == "waiting":
                    return run
                if run.status == "done" and not run.node.is_border:
                    stack.append(child)
        return None

    def _num_before(self, waiting: NodeRun) -> int:
        """How many requests must end before a node can run, as far as it was looked."""
        count, stack, seen = 1, [waiting.node.id], {waiting.node.id}
        while stack and len(seen) < MAX_EXAMINED:
            for used in ir.dependencies(self._runs[stack.pop()].node):
                if used not in seen and not self._runs[used].is_over:
                    seen.add(used)
                    stack.append(used)
                    count += self._runs[used].node.run_by == "model"
        return count
