"""Pages of running sequences: reserved, taken, shared with the tree, copied, given back.

A sequence's pages in path order: the first `num_shared_pages` belong to the tree and are kept by a lock on the node
where they end, the others belong to the sequence. Its page ids never change while it runs: devices hold copies of them.

Not here: which sequence gets pages, and who is preempted for them (`scheduler`).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from ramet.runtime.cache.integrity import check_cache, require
from ramet.runtime.cache.node import RadixNode
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import PrefixMatch, RadixCache
from ramet.runtime.types import PageCopy, Sequence, TokenIds


class SequencePages:
    """Page accounting of running sequences. Owner: the scheduler."""

    def __init__(self, pool: PagePool, cache: RadixCache, *, reservation_ratio: float, share: bool) -> None:
        self.pool = pool
        self.cache = cache
        self._page_size = pool.page_size
        self._ratio = reservation_ratio
        self._is_sharing = share
        self._num_reserved = 0  # pages that running sequences may still take
        self._nodes: dict[Sequence, RadixNode] = {}  # that each running sequence has locked

    @property
    def num_available(self) -> int:
        """Pages that may be promised: free or evictable, and reserved for nobody."""
        return self.pool.num_free + self.cache.num_evictable_pages - self._num_reserved

    def peak(self, sequence: Sequence, ratio: float | None = None) -> int:
        """Pages that are reserved for a sequence. The last token's KV is never computed."""
        request = sequence.request
        if request.score_from is not None:
            return -(-known_end(sequence) // self._page_size)
        if ratio is None:
            ratio = 1.0 if sequence.num_preemptions else self._ratio
        num_output = max(1, ceil(ratio * request.max_tokens))
        return -(-(request.num_prompt + num_output - 1) // self._page_size)

    def outstanding(self, sequence: Sequence) -> int:
        """Pages of its reservation that a running sequence has not taken yet."""
        return max(0, self.peak(sequence) - len(sequence.page_ids))

    def match(self, sequence: Sequence) -> PrefixMatch:
        """Find what the tree has of a waiting sequence, and lock it: `attach` or unlock its node afterwards."""
        cache_salt = sequence.request.cache_salt
        if self._is_sharing:
            match = self.cache.match(matchable(sequence), cache_salt)
        else:
            match = PrefixMatch(self.cache.root(cache_salt), [], 0, None, 0)
        self.cache.lock(match.node)
        return match

    def attach(self, sequence: Sequence, match: PrefixMatch) -> None:
        """Start a sequence on its (locked) match, and reserve its pages."""
        self._nodes[sequence] = match.node
        sequence.page_ids = match.page_ids
        sequence.num_shared_pages = len(match.page_ids)
        sequence.num_computed = match.num_tokens
        self._num_reserved += self.outstanding(sequence)

    def copy_tail(self, sequence: Sequence, match: PrefixMatch, earlier: Iterable[PageCopy]) -> PageCopy | None:
        """Take over the partly shared page of `match` by a copy; `earlier`: the copies of this step so far.

        All copies of a step run at once, so no page may be the target of one and the source of another: a source that
        was evicted meanwhile is not given out as a target (as anything else it may: steps run after their copies).
        """
        if match.tail_page is None:
            return None
        sources = {copy.source for copy in earlier} | {match.tail_page}
        refused: list[int] = []
        while (target := self.cache.allocate(1)) is not None and target[0] in sources:
            refused += target
        self.pool.free(refused)
        if target is None:
            return None
        self._num_reserved -= min(1, self.outstanding(sequence))
        sequence.page_ids += target
        sequence.num_computed += match.num_tail_tokens
        return PageCopy(match.tail_page, target[0], match.num_tail_tokens)

    def take(self, sequence: Sequence, num_pages: int) -> bool:
        """Give a running sequence pages; False, and nothing done, where there are not enough.

        Pages beyond its reservation come only from what is reserved for nobody.
        """
        reserved = min(num_pages, self.outstanding(sequence))
        if num_pages > reserved and num_pages - reserved > self.num_available:
            return False
        page_ids = self.cache.allocate(num_pages)
        if page_ids is None:
            return False
        self._num_reserved -= reserved
        sequence.page_ids += page_ids
        return True

    def share(self, sequence: Sequence, *, is_complete: bool) -> RadixNode:
        """Move computed pages of a running sequence to the tree: whole ones, and the partial last where `is_complete`.

        Only known tokens may have been computed. Returns the node where the tree's part of the sequence ends.
        """
        node = self._nodes[sequence]
        if not self._is_sharing:
            return node
        node = self._retake_tail(sequence)
        size, first = self._page_size, sequence.num_shared_pages
        stop = sequence.num_computed if is_complete else sequence.num_computed // size * size
        if stop > first * size:
            page_ids = sequence.page_ids[first : -(-stop // size)]
            shared = self.cache.share(node, sequence.tokens(first * size, stop), page_ids)
            if shared is not None:
                node = self._nodes[sequence] = shared
                sequence.num_shared_pages = -(-node.end // size)
        return node

    def release(self, sequence: Sequence, *, keep: bool) -> None:
        """Take all pages from a sequence; with `keep` the tree gets what was computed of its known tokens."""
        self._num_reserved -= self.outstanding(sequence)
        node = self._retake_tail(sequence)
        size, page_ids, first = self._page_size, sequence.page_ids, sequence.num_shared_pages
        num_valid = min(sequence.num_computed, sequence.num_tokens)
        kept = first
        if keep and self._is_sharing and num_valid > first * size:
            kept = -(-num_valid // size)
            tokens = sequence.tokens(first * size, num_valid)
            self.pool.free(self.cache.insert(node, tokens, page_ids[first:kept]).duplicates)
        self.pool.free(page_ids[kept:])
        self.cache.unlock(node)
        del self._nodes[sequence]
        sequence.page_ids, sequence.num_shared_pages = [], 0

    def _retake_tail(self, sequence: Sequence) -> RadixNode:
        """Take back the partial page that was lent to the tree while its sequence goes on writing it.

        Returns the node that is locked now.
        """
        node = self._nodes[sequence]
        if len(node.tokens) % self._page_size:
            node = self._nodes[sequence] = self.cache.retake_tail(node)
            sequence.num_shared_pages -= 1
        return node

    def quarantine_leaks(self) -> int:
        """Take pages that are neither free nor in the tree out of use while nothing runs. O(pages)."""
        owned = {page for node in self.cache.nodes() for page in node.page_ids}
        leaked = self.pool.used_pages() - owned
        for page in leaked:
            self.pool.quarantine(page)
        return len(leaked)

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Check that every page is free, or in the tree once, or with one of the `running` sequences. O(pages).

        Raises:
            CacheIntegrityError: the first thing found wrong.
        """
        running = list(running)
        check_cache(self.cache, [s.page_ids[s.num_shared_pages :] for s in running])
        for sequence in running:
            name, node = sequence.request.request_id, self._nodes[sequence]
            shared = [page for part in node.path() for page in part.page_ids]
            require(shared == sequence.page_ids[: sequence.num_shared_pages], f"{name}: not the pages of its node")
            require(node.refs > 0, f"{name}: its node is not locked")
            require(len(sequence.page_ids) * self._page_size >= sequence.num_computed, f"{name}: too few pages")
        require(self._nodes.keys() == set(running), "a node is locked for a sequence that does not run")
        num_reserved = sum(self.outstanding(sequence) for sequence in running)
        require(num_reserved == self._num_reserved, f"{num_reserved} pages reserved, {self._num_reserved} counted")


def known_end(sequence: Sequence) -> int:
    """Known tokens to compute: all, and of a scoring request all that predict a scored one (at least one)."""
    request = sequence.request
    if request.score_from is None:
        return sequence.num_tokens
    return max(request.num_prompt - 1, request.score_from)


def matchable(sequence: Sequence) -> TokenIds:
    """Tokens that may come from the cache: something must be computed to sample, or every scored position."""
    request = sequence.request
    return sequence.tokens(0, sequence.num_tokens - 1 if request.score_from is None else request.score_from - 1)
