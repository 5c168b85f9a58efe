"""A program's hints to the cache: the tokens that it will read again, and those that are dead. No result depends on it.

*Next use*: if a branch's next generation waits for another branch, a join or a tool, no sequence holds its prefix; only
the cache does. The graph tells that the prefix will be read, and after how many requests. The cache evicts tokens
without a later use first. Time is counted in ended requests of the host's programs.

*Dead branches*: the branch that reached the program's end may be the prefix of the next program (a conversation). A
branch that was joined, judged or cancelled is dead.

Not here: the cache's use of a hint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from ramet.lang.graph import ir
from ramet.lang.graph.run import NodeRun
from ramet.runtime.programs.engine import ProgramEngine
from ramet.runtime.programs.path import Path

MAX_EXAMINED = 64  # nodes visited for one answer: this runs on the engine's thread
MAX_HINTS = 256  # next uses of one program at a time
MAX_DEAD_TOKENS = 1 << 20  # of one program: the hints are made on the engine's thread
MAX_DEAD = 2048  # branches of one program, for the same reason

NextUse = tuple[list[int], float]  # tokens, and the time of their next use; inf: never


class CacheHints:
    """The hints of one program. Its executor calls `added`, `ended` and `take` under its lock, the others without."""

    def __init__(
        self, engine: ProgramEngine, cache_salt: str, runs: Sequence[NodeRun], path_of: Callable[[int], Path]
    ) -> None:
        """`runs`: of all nodes so far, by id; they grow and change as the program runs."""
        self._engine, self._salt, self._runs, self._path_of = engine, cache_salt, runs, path_of
        self._children: dict[int, list[int]] = {}
        self._ended: list[int] = []
        self._hinted: dict[int, NextUse] = {}  # node whose path is hinted

    def added(self, node: ir.AnyNode) -> None:
        """Note a new node of the program."""
        if node.parent is not None and not isinstance(node, ir.Join | ir.Capture):
            self._children.setdefault(node.parent, []).append(node.id)

    def ended(self, node: int) -> None:
        """Note that no sequence holds the path of this node any more."""
        self._ended.append(node)

    def take(self, now: float) -> list[NextUse]:
        """Return the changes since the last call, for `give`."""
        ended, self._ended = self._ended, []
        return [hint for node in ended for hint in self._changes(node, now)]

    def give(self, hints: Sequence[NextUse]) -> None:
        """Pass the hints to the engine."""
        for tokens, when in hints:
            self._engine.set_next_use(tokens, when, self._salt)

    def program_ended(self) -> None:
        """Withdraw every next use, and tell the engine which branches are dead. This is the last call."""
        self.give(self._none())
        nodes = [run.node for run in self._runs]
        for tokens, num_live in dead_branches(nodes, self._path_of):
            self._engine.mark_dead(tokens, self._salt, num_live)

    def _changes(self, node: int, now: float) -> list[NextUse]:
        """Return the next uses of a node's path, and of the paths that it branched from."""
        found: list[NextUse] = []
        if any(self._is_over(one) for one in self._hinted):
            found = self._none()
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

    def _none(self) -> list[NextUse]:
        """Return hints that withdraw all given ones."""
        return [(tokens, math.inf) for tokens, _ in self._hinted.values()]

    def _is_over(self, node: int) -> bool:
        """Return whether nothing waits after a hinted node any more."""
        return self._waiting_below(node) is None

    def _waiting_below(self, node: int) -> NodeRun | None:
        """Return a node after `node` that waits for something other than `node`, with nothing running in between."""
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
        """Return the number of requests that must end before a node can run, within the search limit."""
        count, stack, seen = 1, [waiting.node.id], {waiting.node.id}
        while stack and len(seen) < MAX_EXAMINED:
            for used in ir.dependencies(self._runs[stack.pop()].node):
                if used not in seen and not self._runs[used].is_over:
                    seen.add(used)
                    stack.append(used)
                    count += self._runs[used].node.run_by == "model"
        return count


def dead_branches(nodes: Sequence[ir.AnyNode], path_of: Callable[[int], Path]) -> Iterator[tuple[list[int], int]]:
    """Yield the tokens of every dead branch, and how many of them are live: those shared with the main branch."""
    main: set[int] = set()
    at = nodes[-1].id if nodes else None
    while at is not None:
        main.add(at)
        at = nodes[at].parent
    inner = {node.parent for node in nodes}
    left, num_dead = MAX_DEAD_TOKENS, 0
    for node in nodes:
        if node.id in inner or node.id in main or node.parent is None:
            continue
        at = node.id
        while at is not None and at not in main:
            at = nodes[at].parent
        num_live = 0 if at is None else path_of(at).length
        tokens = path_of(node.id).token_ids()
        left -= len(tokens)
        if left < 0 or num_dead == MAX_DEAD:
            return
        if len(tokens) > num_live:
            num_dead += 1
            yield tokens, num_live
