"""Pages of running sequences: reserve, take, share with the tree, copy, release.

A sequence lists its pages in path order. The first `num_shared_pages` belong to the tree; a lock on the node where they
end keeps them from eviction. The other pages belong to the sequence. Page ids never change while the sequence runs,
because devices hold copies of them.

Not here: the choice of the sequence that gets pages or is preempted (`scheduler`).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from ramet.errors import InvalidRequest
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
        self._nodes: dict[Sequence, RadixNode] = {}  # the node locked by each running sequence

    @property
    def num_available(self) -> int:
        """Pages that may be reserved: free or evictable, and not reserved yet."""
        return self.pool.num_free + self.cache.num_evictable_pages - self._num_reserved

    def peak(self, sequence: Sequence, ratio: float | None = None) -> int:
        """Number of pages to reserve for a sequence. The last token needs no page: its KV is never computed."""
        request = sequence.request
        if request.score_from is not None:
            return -(-known_end(sequence) // self._page_size)
        if ratio is None:
            ratio = 1.0 if sequence.num_preemptions else self._ratio
        num_output = max(1, ceil(ratio * request.max_tokens))
        return -(-(request.num_prompt + num_output - 1) // self._page_size)

    def size(self, sequence: Sequence) -> int:
        """Number of pages that a sequence has or may take, shared ones included."""
        return max(self.peak(sequence), len(sequence.page_ids))

    def fits(self, sequence: Sequence) -> bool:
        """Return whether a waiting sequence finds the pages that it would reserve. O(len(tokens))."""
        num_cached = 0
        if self._is_sharing:
            num_cached = self.cache.match_length(matchable(sequence), sequence.request.cache_salt) // self._page_size
        return self.peak(sequence) - num_cached <= self.num_available

    def outstanding(self, sequence: Sequence) -> int:
        """Number of reserved pages that a running sequence has not taken yet."""
        return max(0, self.peak(sequence) - len(sequence.page_ids))

    def match(self, sequence: Sequence) -> PrefixMatch:
        """Find and lock the cached prefix of a waiting sequence. The caller must `attach` it or unlock its node."""
        cache_salt = sequence.request.cache_salt
        if self._is_sharing:
            match = self.cache.match(matchable(sequence), cache_salt)
        else:
            match = PrefixMatch(self.cache.root(cache_salt), [], 0, None, 0)
        self.cache.lock(match.node)
        return match

    def attach(self, sequence: Sequence, match: PrefixMatch) -> None:
        """Give a sequence the pages of its locked match, and reserve the others."""
        self._nodes[sequence] = match.node
        sequence.page_ids = match.page_ids
        sequence.num_shared_pages = len(match.page_ids)
        sequence.num_computed = match.num_tokens
        self._num_reserved += self.outstanding(sequence)

    def copy_tail(self, sequence: Sequence, match: PrefixMatch, earlier: Iterable[PageCopy]) -> PageCopy | None:
        """Plan a copy of the partly shared page of `match`. `earlier`: the copies already planned for this step.

        All copies of a step run at once, so no page may be the target of one and the source of another. A source page
        that was evicted meanwhile is therefore not used as a target. Any other use is safe: the step runs after its
        copies.
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
        """Give pages to a running sequence. Returns False and changes nothing if there are not enough.

        Pages beyond its reservation come only from unreserved pages.
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

    def hold(self, tokens: TokenIds, cache_salt: str) -> PrefixMatch | None:
        """Find and lock a cached prefix, which the caller unlocks. None if running sequences may need its memory."""
        match = self.cache.match(tokens, cache_salt)
        self.cache.lock(match.node)
        if self.num_available >= 0:
            return match
        self.cache.unlock(match.node)
        return None

    def adopt(self, tokens: TokenIds, cache_salt: str) -> list[int]:
        """Let the tree have a page for each whole page of `tokens`. Returns the new pages, which are the last ones.

        The caller writes them before the next step. There are none if too few unreserved pages are left.
        Raises: InvalidRequest: the engine keeps no prefixes.
        """
        if not self._is_sharing:
            raise InvalidRequest("the engine was started with --no-radix-cache, so it can keep no pages of another one")
        match = self.cache.match(tokens, cache_salt)
        self.cache.lock(match.node)  # what is evicted for the new pages must not be what they follow
        rest = tokens[match.num_tokens :]
        num_new = len(rest) // self._page_size
        page_ids = self.cache.allocate(num_new) if num_new <= self.num_available else None
        if page_ids:
            self.cache.insert(match.node, rest, page_ids)
        self.cache.unlock(match.node)
        return page_ids or []

    def share(self, sequence: Sequence, *, is_complete: bool) -> RadixNode:
        """Move the full computed pages of a running sequence to the tree; with `is_complete` the partial last one too.

        All computed tokens must be known. Returns the node where the tree's part of the sequence ends.
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
        """Take all pages from a sequence. With `keep`, the tree gets the computed pages of its known tokens."""
        self._num_reserved -= self.outstanding(sequence)
        node = self._retake_tail(sequence)
        size, page_ids, first = self._page_size, sequence.page_ids, sequence.num_shared_pages
        num_valid = min(sequence.num_computed, sequence.num_tokens)
        kept = first
        if keep and self._is_sharing and num_valid > first * size:
            kept = -(-num_valid // size)
            tokens = sequence.tokens(first * size, num_valid)
            _, duplicates = self.cache.insert(node, tokens, page_ids[first:kept])
            self.pool.free(duplicates)
        self.pool.free(page_ids[kept:])
        self.cache.unlock(node)
        del self._nodes[sequence]
        sequence.page_ids, sequence.num_shared_pages = [], 0

    def _retake_tail(self, sequence: Sequence) -> RadixNode:
        """Take the partial last page back from the tree, because the sequence goes on writing it.

        Returns the node that is locked now.
        """
        node = self._nodes[sequence]
        if len(node.tokens) % self._page_size:
            node = self._nodes[sequence] = self.cache.retake_tail(node)
            sequence.num_shared_pages -= 1
        return node

    def quarantine_leaks(self) -> int:
        """Quarantine pages that are neither free nor in the tree. Only while nothing runs. O(pages)."""
        owned = {page for node in self.cache.nodes() for page in node.page_ids}
        leaked = self.pool.used_pages() - owned
        for page in leaked:
            self.pool.quarantine(page)
        return len(leaked)

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Check that every page is free, or once in the tree, or owned by one of the `running` sequences. O(pages).

        Raises:
            CacheIntegrityError: describes the first violation found.
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
    """Number of known tokens to compute; for a scoring request, only those that predict a scored token (at least 1).

    A pooling request computes all.
    """
    request = sequence.request
    if request.score_from is None:
        return sequence.num_tokens
    if request.pooling is not None:
        return request.num_prompt
    return max(request.num_prompt - 1, request.score_from)


def matchable(sequence: Sequence) -> TokenIds:
    """Tokens that may come from the cache. The last token, or every scored position, must be computed."""
    request = sequence.request
    return sequence.tokens(0, sequence.num_tokens - 1 if request.score_from is None else request.score_from - 1)
