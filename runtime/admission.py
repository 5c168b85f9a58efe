"""Requests that wait: the ordered queue, and sharers parked behind the owner of a prefix that is being computed.

A sequence in prefill owns the frontier page of its path: the first page of its prompt that is not in the tree yet. A
waiting request whose next uncached page is the same one is parked until that owner has computed all that they share,
so that 64 branches over one new prefix compute it once. The wait is bounded: an owner is running, and running prefills
advance in order of admission; when it ends for any reason, its sharers wake.

Not here: pages and slots (`scheduler`).
"""

from __future__ import annotations

from ramet.runtime.priority import OrderConfig, ProgramService, Waiting, WaitingQueue
from ramet.runtime.radix_cache import RadixNode
from ramet.runtime.types import Sequence

_Frontier = tuple[RadixNode, bytes]


class AdmissionQueue:
    """Every waiting request, in the queue or parked. Owner: the scheduler."""

    def __init__(self, order: OrderConfig, service: ProgramService, page_size: int) -> None:
        self._queue = WaitingQueue(order, service)
        self._waiting: dict[Sequence, Waiting] = {}
        self._page_size = page_size
        self._num_added = 0
        self._frontiers: dict[_Frontier, Sequence] = {}
        self._frontier_of: dict[Sequence, _Frontier] = {}
        self._parked: dict[Sequence, list[Waiting]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence, queued_s: float, cached_share: float) -> None:
        self._num_added += 1
        waiting = Waiting(sequence, queued_s, self._num_added, cached_share)
        self._waiting[sequence] = waiting
        self._queue.push(waiting)

    def remove(self, sequence: Sequence) -> bool:
        """Forget a waiting request. False where it does not wait."""
        waiting = self._waiting.pop(sequence, None)
        if waiting is None:
            return False
        waiting.is_removed = True
        return True

    def pop(self) -> Waiting | None:
        """Take the first in order that is not parked; it still counts as waiting until `remove`."""
        return self._queue.pop()

    def put_back(self, waiting: Waiting) -> None:
        self._queue.push(waiting)

    # --- owners of prefixes and their sharers

    def owner_of(self, node: RadixNode, sequence: Sequence) -> Sequence | None:
        """Return the sequence that computes the page of `sequence`'s tokens that follows `node` now."""
        if not self._frontiers or sequence.num_tokens - node.end < self._page_size:
            return None
        return self._frontiers.get((node, self._page_after(node, sequence)))

    def set_frontier(self, owner: Sequence, node: RadixNode, end: int) -> None:
        """Say that `owner`, whose path is in the tree down to `node`, computes its tokens up to `end` next."""
        self.clear_frontier(owner)
        if end - node.end >= self._page_size:
            frontier = (node, self._page_after(node, owner))
            if self._frontiers.setdefault(frontier, owner) is owner:
                self._frontier_of[owner] = frontier

    def clear_frontier(self, owner: Sequence) -> None:
        frontier = self._frontier_of.pop(owner, None)
        if frontier is not None:
            del self._frontiers[frontier]

    def park(self, waiting: Waiting, owner: Sequence, wake_at: int) -> None:
        """Let `waiting`, just popped, wait until `owner` has `wake_at` tokens in the tree, or ends its prefill."""
        waiting.wake_at = wake_at
        self._parked.setdefault(owner, []).append(waiting)

    def wake(self, owner: Sequence, num_tokens: int | None) -> int:
        """Queue the sharers of `owner` that wait for at most `num_tokens` tokens (None: all). Returns how many."""
        parked = self._parked.get(owner)
        if not parked:
            return 0
        still = [] if num_tokens is None else [w for w in parked if w.wake_at > num_tokens]
        if len(still) == len(parked):
            return 0
        if still:
            self._parked[owner] = still
        else:
            del self._parked[owner]
        num_woken = 0
        for waiting in parked:
            if (num_tokens is None or waiting.wake_at <= num_tokens) and not waiting.is_removed:
                waiting.cached_share = waiting.wake_at / waiting.sequence.num_tokens
                self._queue.push(waiting)
                num_woken += 1
        return num_woken

    def _page_after(self, node: RadixNode, sequence: Sequence) -> bytes:
        return sequence.tokens(node.end, node.end + self._page_size).tobytes()


def fits_beside(num_missing: int, running: list[tuple[int, int]], num_steps: int, num_pages: int) -> bool:
    """True where a request of `num_steps` steps and `num_pages` pages, admitted now, does not delay the blocked first.

    num_missing: pages that the first lacks; running: (steps left at most, pages) of each running sequence. It does not
    delay where it ends before enough pages are free at the latest, or where they are enough for both then.
    Source: EASY backfilling, Lifka 1995, "The ANL/IBM SP scheduling system".
    """
    steps_until_start = 0
    for steps, pages in sorted(running):
        if num_missing <= 0:
            break
        num_missing -= pages
        steps_until_start = steps
    return num_steps <= steps_until_start or num_pages <= -num_missing
