"""Waiting requests: an ordered queue, and requests parked until a running sequence has computed their shared prefix.

A sequence in prefill owns the frontier page of its path: the first page of its prompt that is not in the tree yet. A
waiting request with the same next uncached page is a sharer of that owner. It is parked until the owner has computed
all tokens that the two have in common, so 64 branches over one new prefix compute the prefix once.
The wait is bounded: an owner is running, and running prefills advance in order of admission. When an owner ends for any
reason, its sharers are queued again.

Not here: pages and slots (`scheduler`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ramet.runtime.cache.node import RadixNode
from ramet.runtime.cache.radix_cache import PrefixMatch
from ramet.runtime.scheduling.priority import Flows, Waiting, WaitingQueue
from ramet.runtime.scheduling.sequence_pages import matchable
from ramet.runtime.types import Sequence

_Frontier = tuple[RadixNode, bytes]


class AdmissionQueue:
    """All waiting requests, queued or parked. Owner: the scheduler."""

    def __init__(self, flows: Flows, page_size: int) -> None:
        self._queue = WaitingQueue(flows)
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
        """Remove a waiting request. Returns False if the request is not waiting."""
        waiting = self._waiting.pop(sequence, None)
        if waiting is None:
            return False
        waiting.is_removed = True
        return True

    @property
    def owners(self) -> set[str]:
        """The owners of queued requests; perhaps also of some whose last one has been removed."""
        return self._queue.owners

    def pop(self) -> Waiting | None:
        """Take the first queued request. It counts as waiting until `remove`. Parked requests are not in the queue."""
        return self._queue.pop()

    def firsts(self) -> Iterator[Waiting]:
        """Yield the first queued request of each owner. They stay in the queue."""
        return self._queue.firsts()

    def put_back(self, waiting: Waiting) -> None:
        self._queue.push(waiting)

    # --- owners of prefixes and their sharers

    def try_park(self, waiting: Waiting, match: PrefixMatch) -> bool:
        """Park a popped request if a running sequence is computing more of its tokens than `match` has found."""
        sequence = waiting.sequence
        if not self._frontiers or sequence.num_tokens - match.num_tokens < self._page_size:
            return False
        owner = self._frontiers.get((match.node, self._page_after(match.node, sequence)))
        if owner is None:
            return False
        wake_at = min(_num_shared(sequence, owner, match.num_tokens), len(matchable(sequence)))
        if wake_at <= match.num_tokens + match.num_tail_tokens:
            return False  # copying the partly shared page saves as many tokens
        waiting.wake_at = wake_at
        self._parked.setdefault(owner, []).append(waiting)
        return True

    def wake(self, owner: Sequence, num_tokens: int | None) -> int:
        """Queue the sharers of `owner` that wait for at most `num_tokens` of its tokens in the tree (None: all).

        Returns the number of sharers that were queued.
        """
        parked = self._parked.get(owner)
        if not parked:
            return 0
        woken = [w for w in parked if num_tokens is None or w.wake_at <= num_tokens]
        if len(woken) == len(parked):
            del self._parked[owner]
        elif woken:
            self._parked[owner] = [w for w in parked if w.wake_at > (num_tokens or 0)]
        for waiting in woken:
            waiting.cached_share = waiting.wake_at / waiting.sequence.num_tokens
            self._queue.push(waiting)  # the queue ignores requests that were removed meanwhile
        return len(woken)

    def set_frontier(self, owner: Sequence, node: RadixNode, end: int) -> None:
        """Record that `owner` computes its tokens up to `end` next. Its path is in the tree down to `node`."""
        self.clear_frontier(owner)
        if end - node.end >= self._page_size:
            frontier = (node, self._page_after(node, owner))
            if self._frontiers.setdefault(frontier, owner) is owner:
                self._frontier_of[owner] = frontier

    def clear_frontier(self, owner: Sequence) -> None:
        frontier = self._frontier_of.pop(owner, None)
        if frontier is not None:
            del self._frontiers[frontier]

    def _page_after(self, node: RadixNode, sequence: Sequence) -> bytes:
        return sequence.tokens(node.end, node.end + self._page_size).tobytes()


def _num_shared(a: Sequence, b: Sequence, start: int) -> int:
    """Length of the common prefix of two sequences' tokens, known to be at least `start`."""
    stop = min(a.num_tokens, b.num_tokens)
    different = a.tokens(start, stop) != b.tokens(start, stop)
    return start + (int(different.argmax()) if different.any() else stop - start)


Admits = Callable[[int, int], bool]


def reservation(num_missing: int, running: list[tuple[int, int]]) -> Admits:
    """Promise the first request that does not fit that it starts at the latest when enough of the others have ended.

    num_missing: pages that it lacks. running: (maximum steps left, pages) of each running sequence. The result says of
    another request, of so many steps and pages, whether it may be admitted meanwhile: if it ends before then, or if it
    leaves enough pages for the first one. The caller has checked that it fits now; what it takes is counted.
    Source: EASY backfilling, Lifka 1995, "The ANL/IBM SP scheduling system".
    """
    start, num_spare = 0, -num_missing
    for steps, pages in sorted(running):
        if num_spare >= 0:
            break
        num_spare += pages
        start = steps

    def admits(num_steps: int, num_pages: int) -> bool:
        nonlocal num_spare
        if num_steps <= start:
            return True
        if num_pages > num_spare:
            return False
        num_spare -= num_pages
        return True

    return admits
