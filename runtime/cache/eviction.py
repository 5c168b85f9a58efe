"""The order of eviction: the rank of a node, and a queue that finds the node of lowest rank in O(log n).

Not here: the rule that only unlocked leaves may be evicted, and the changes to the tree (`radix_cache`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from ramet.runtime.cache.node import RadixNode

# Any: a rank is any ordered value, a number or a tuple of numbers. The node of lowest rank is evicted first.
Rank = Any
RankFunction = Callable[[RadixNode], Rank]


def next_use_rank(node: RadixNode) -> Rank:
    """Rank dead nodes first, then the farthest next use (unknown counts as farthest), then the least recently used.

    The order is optimal if every next use is known. Source: Belady 1966, "A study of replacement algorithms for a
    virtual-storage computer".
    """
    return (not node.is_dead, -node.next_use, node.last_used)


def lru_rank(node: RadixNode) -> Rank:
    """Rank the least recently used node first."""
    return node.last_used


class EvictionQueue:
    """Candidates for eviction, ordered by rank.

    A node has at most one valid entry. Entries are lazy: a use raises a node's rank, and `pop` corrects its entry. A
    caller that may lower a rank (`mark_dead`, a later next use) must `renew` the entry, if the node is evictable or
    not. A locked or inner node may stay in the queue: `pop` drops it, and the caller that makes it evictable again must
    push it.
    """

    def __init__(self, rank: RankFunction = next_use_rank) -> None:
        self._rank = rank
        self._heap: list[tuple[Rank, int, RadixNode]] = []
        self._num_pushed = 0
        self._num_valid = 0

    def __len__(self) -> int:
        return self._num_valid

    def push(self, node: RadixNode) -> None:
        """Make `node` a candidate, if it is none yet."""
        if node.eviction_entry:
            return
        self._num_pushed += 1
        self._num_valid += 1
        node.eviction_entry = self._num_pushed
        heapq.heappush(self._heap, (self._rank(node), self._num_pushed, node))
        if len(self._heap) > 2 * self._num_valid + 64:
            self._heap = [entry for entry in self._heap if entry[2].eviction_entry == entry[1]]
            heapq.heapify(self._heap)

    def renew(self, node: RadixNode) -> None:
        """Note that the rank of a node may have fallen."""
        if node.eviction_entry:
            self.discard(node)
            self.push(node)

    def discard(self, node: RadixNode) -> None:
        """Remove a node that has left the tree."""
        if node.eviction_entry:
            node.eviction_entry = 0
            self._num_valid -= 1

    def pop(self) -> RadixNode | None:
        """Take the evictable node of lowest rank, or return None if there is none. O(log n) amortised."""
        while self._heap:
            rank, entry, node = heapq.heappop(self._heap)
            if node.eviction_entry != entry:
                continue
            node.eviction_entry = 0
            self._num_valid -= 1
            if not node.is_evictable:
                continue
            if self._rank(node) > rank:
                self.push(node)
                continue
            return node
        return None

    def late(self) -> list[RadixNode]:
        """Return the candidates that would come later than their rank says. There are none, unless Ramet has a bug."""
        return [node for rank, entry, node in self._heap if node.eviction_entry == entry and rank > self._rank(node)]
