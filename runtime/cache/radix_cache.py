"""The radix tree of cached prefixes: the single owner of every cached page. numpy only, no torch.

Matching is by token, storage by page. Every node holds a run of tokens that starts at a page border:

    inner node or leaf   a whole number of pages
    tail (a leaf)        fewer than P tokens in one page; lookups copy from it, no sequence shares it

Siblings therefore differ within their first P tokens. A dict finds the child whose whole first page matches, in O(1).
The child with the longest partial match is a neighbour in the sorted list of the siblings' first pages, so it is found
in O(log n) for n siblings.

A node's `refs` counts the locks on the node and its locked children. Locking a node below a locked one is O(1).

Not here: sequences and the pages that they own (`scheduler`), the order of eviction (`eviction`), checks of the
accounting (`integrity`).
Source: RadixAttention, Zheng et al. 2024 (arXiv:2312.07104), section 3.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ramet.runtime.cache.eviction import EvictionQueue, RankFunction, next_use_rank
from ramet.runtime.cache.node import RadixNode
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.prefix_log import PrefixLog
from ramet.runtime.types import TokenIds

_NO_TOKENS: TokenIds = np.empty(0, dtype=np.int32)
_KEPT_EVICTIONS = 64
SHOWN_TOKENS = 24  # the first ones of a segment, to tell what it is


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest cached prefix: `num_tokens` tokens in the full pages `page_ids`, which end where `node` ends.

    `num_tail_tokens` more tokens lie at the start of page `tail_page` (None: there are none). A partly matching page
    can be copied, not shared. The result is valid until the next eviction. A lock on `node` keeps `page_ids` valid,
    but never the tail page.
    """

    node: RadixNode
    page_ids: list[int]
    num_tokens: int
    tail_page: int | None
    num_tail_tokens: int


class RadixCache:
    """The cached pages of all namespaces (cache salts). Not thread-safe: the engine's thread owns it."""

    def __init__(self, pool: PagePool, rank: RankFunction = next_use_rank) -> None:
        self.pool = pool
        self.log: PrefixLog | None = None  # see start_log
        self.num_cached_pages = 0
        self.num_evictable_pages = 0  # pages of unlocked nodes
        self.num_evicted_pages = 0  # counter
        # The last evictions, to be drawn: the first token's position, the number of tokens, the first ones.
        self.evictions: deque[tuple[int, int, TokenIds]] = deque(maxlen=_KEPT_EVICTIONS)
        self._page_size = pool.page_size
        self._roots: dict[bytes, RadixNode] = {}
        self.queue = EvictionQueue(rank)
        self._now = 0

    # --- lookup

    def match(self, tokens: TokenIds, cache_salt: str = "") -> PrefixMatch:
        """Find the longest cached prefix of `tokens`, and mark it as used. May split a node. O(len(tokens))."""
        self._now += 1
        node = self.root(cache_salt)
        node.last_used = self._now
        page_ids: list[int] = []
        tail_page, num_tail = None, 0
        for child, num_same in self.walk(tokens, cache_salt):
            child.last_used = self._now
            num_pages, num_tail = divmod(num_same, self._page_size)
            tail_page = child.page_ids[num_pages] if num_tail else None
            if num_pages:
                node = self._split(child, num_pages)
                node.is_dead = False
                page_ids += node.page_ids
        return PrefixMatch(node, page_ids, len(page_ids) * self._page_size, tail_page, num_tail)

    def walk(self, tokens: TokenIds, cache_salt: str) -> Iterator[tuple[RadixNode, int]]:
        """Yield the nodes on the path of `tokens` from the top, with how many tokens each has in common with them.

        All but the last are whole pages and lie within the path entirely. Changes nothing. O(len(tokens)).
        """
        node, position = self._roots.get(cache_salt.encode()), 0
        while node is not None:
            node, num_same = self._descend(node, tokens[position:])
            if node is not None:
                is_last = num_same < len(node.tokens) or num_same % self._page_size > 0
                yield node, num_same
                position += num_same
                node = None if is_last else node

    def match_length(self, tokens: TokenIds, cache_salt: str = "") -> int:
        """Return the number of tokens that `match` would find, tail included. Changes nothing."""
        return sum(num_same for _, num_same in self.walk(tokens, cache_salt))

    def _descend(self, node: RadixNode, tokens: TokenIds) -> tuple[RadixNode | None, int]:
        """Find the child of `node` with the longest common prefix with `tokens`, and its length (0: None)."""
        if not node.keys or not len(tokens):
            return None, 0
        key = tokens[: self._page_size].tobytes()
        child = node.children.get(key)
        if child is not None:
            return child, num_common(child.tokens, tokens)
        child, best = None, 0
        place = bisect_left(node.keys, key)
        for neighbour in node.keys[max(place - 1, 0) : place + 1]:
            num_same = _num_common_bytes(neighbour, key)
            if num_same > best:
                child, best = node.children[neighbour], num_same
        return child, best

    # --- locks

    def root(self, cache_salt: str = "") -> RadixNode:
        """Return the root of a namespace. A root exists while it is locked or has children."""
        key = cache_salt.encode()
        node = self._roots.get(key)
        if node is None:
            node = self._roots[key] = RadixNode(None, key, 0, _NO_TOKENS, [])
        return node

    def lock(self, node: RadixNode) -> None:
        """Keep `node` and its ancestors from eviction until `unlock`."""
        node.refs += 1
        current: RadixNode | None = node
        while current is not None and current.refs == 1:
            self.num_evictable_pages -= len(current.page_ids)
            current = current.parent
            if current is not None:
                current.refs += 1

    def unlock(self, node: RadixNode) -> None:
        """Take back one `lock`. Counts as a use of the whole path."""
        assert node.refs > 0, "unlocked more often than locked"
        self._now += 1
        node.last_used = self._now
        current: RadixNode | None = node
        while current is not None:
            current.refs -= 1
            if current.refs:
                break
            self.num_evictable_pages += len(current.page_ids)
            current = current.parent
        self._settle(node)

    def start_log(self) -> PrefixLog:
        """Begin to write down which prefixes come and go. The cache must be empty."""
        assert not self.num_cached_pages, "a log must know of every page"
        self.log = PrefixLog(self.pool.num_pages, self._page_size)
        return self.log

    # --- insertion

    def insert(self, node: RadixNode, tokens: TokenIds, page_ids: list[int]) -> tuple[RadixNode, list[int]]:
        """Add `tokens`, which follow the end of `node`, with their pages. The tree takes the pages of new tokens.

        The caller must have locked `node`, which must not be a tail (`retake_tail` first). A partial last page becomes
        a tail. Returns the node where the tokens end, and the given pages whose tokens the tree already had: the caller
        still owns them. If the tail is among these, the node is the one that would be its parent. O(len(tokens)).
        """
        size = self._page_size
        assert len(node.tokens) % size == 0, "nothing can follow a tail"
        assert len(page_ids) == -(-len(tokens) // size), (len(page_ids), len(tokens))
        self._now += 1
        duplicates: list[int] = []
        num_whole = len(tokens) // size * size
        given_node = node
        position = 0
        while position < num_whole:
            node.last_used, node.is_dead = self._now, False
            child = node.children.get(tokens[position : position + size].tobytes())
            if child is None:
                new_pages = page_ids[position // size : num_whole // size]
                node = self._append(node, tokens[position:num_whole], new_pages, in_place=node is given_node)
                break
            num_pages = num_common(child.tokens, tokens[position:num_whole]) // size
            node = self._split(child, num_pages)
            given = page_ids[position // size : position // size + num_pages]
            duplicates += [page for page, kept in zip(given, node.page_ids, strict=True) if page != kept]
            position += num_pages * size
        node.last_used, node.is_dead = self._now, False
        if num_whole < len(tokens):
            tail = self._add_tail(node, tokens[num_whole:], page_ids[-1])
            if tail is None:
                duplicates.append(page_ids[-1])
            else:
                node = tail
        return node, duplicates

    def share(self, node: RadixNode, tokens: TokenIds, page_ids: list[int]) -> RadixNode | None:
        """Add the tokens that a running sequence computed after `node`, and move its lock to their end.

        The sequence must keep exactly the given pages. If the tree already has other pages for their first tokens,
        nothing is inserted and the result is None. A partial last page becomes a tail, in which the sequence goes on
        writing after these tokens; `retake_tail` takes it back.
        """
        size = self._page_size
        if len(tokens) >= size and tokens[:size].tobytes() in node.children:
            return None
        end, _ = self.insert(node, tokens, page_ids)
        if end is not node:
            self.lock(end)
            self.unlock(node)
        return end

    def retake_tail(self, node: RadixNode) -> RadixNode:
        """Remove a tail from the tree. Its page is the caller's again. Its single lock moves to the parent."""
        assert len(node.tokens) % self._page_size
        assert node.refs == 1
        assert node.parent is not None
        parent = node.parent
        self._remove(node)
        return parent

    def _append(self, node: RadixNode, tokens: TokenIds, page_ids: list[int], *, in_place: bool) -> RadixNode:
        """Add new full pages after `node`; with `in_place`, extend the node itself if nothing else uses its end."""
        if in_place and node.parent is not None and not node.children and node.refs <= 1:
            self._note_added(node, tokens, page_ids)
            node.tokens = np.concatenate([node.tokens, tokens])
            node.page_ids = node.page_ids + page_ids
            self.num_cached_pages += len(page_ids)
            if not node.refs:
                self.num_evictable_pages += len(page_ids)
            return node
        return self._add_child(node, tokens.copy(), page_ids)

    def _add_tail(self, node: RadixNode, tokens: TokenIds, page: int) -> RadixNode | None:
        """Add a partial page as a child of `node`. Returns None if the tree already has its tokens."""
        _, num_same = self._descend(node, tokens)
        return None if num_same == len(tokens) else self._add_child(node, tokens.copy(), [page])

    def _note_added(self, above: RadixNode, tokens: TokenIds, page_ids: list[int]) -> None:
        """Tell the log of pages that follow the end of `above`. A tail is no whole page, so it has nothing to tell."""
        if self.log is not None and len(tokens) >= self._page_size:
            self.log.add(above.key, above.page_ids[-1] if above.page_ids else None, above.end, tokens, page_ids)

    def _add_child(self, parent: RadixNode, tokens: TokenIds, page_ids: list[int]) -> RadixNode:
        self._note_added(parent, tokens, page_ids)
        node = RadixNode(parent, tokens[: self._page_size].tobytes(), parent.end, tokens, page_ids)
        node.last_used = self._now
        self.num_cached_pages += len(page_ids)
        self.num_evictable_pages += len(page_ids)
        place = bisect_left(parent.keys, node.key)
        before = parent.children[parent.keys[place - 1]] if place else None
        parent.keys.insert(place, node.key)
        parent.children[node.key] = node
        if before is not None and not before.refs and node.key.startswith(before.key):
            self._remove(before)  # a tail that the new node repeats
            self.pool.free(before.page_ids)
        self.queue.push(node)
        return node

    def _split(self, node: RadixNode, num_pages: int) -> RadixNode:
        """Split `node` after `num_pages` pages and return the new parent, or `node` itself if it has no more pages."""
        if num_pages == len(node.page_ids):
            return node
        assert 0 < num_pages < len(node.page_ids)
        assert node.parent is not None
        border = num_pages * self._page_size
        upper = RadixNode(node.parent, node.key, node.start, node.tokens[:border], node.page_ids[:num_pages])
        upper.last_used, upper.is_dead, upper.next_use = node.last_used, node.is_dead, node.next_use
        upper.refs = int(node.refs > 0)
        node.parent.children[node.key] = upper
        node.parent = upper
        node.start += border
        node.tokens = node.tokens[border:]
        node.page_ids = node.page_ids[num_pages:]
        node.key = node.tokens[: self._page_size].tobytes()
        upper.children[node.key] = node
        upper.keys.append(node.key)
        return upper

    def _remove(self, node: RadixNode) -> None:
        """Unlink a leaf. The caller then owns its pages."""
        parent = node.parent
        assert parent is not None
        assert not node.children
        self.num_cached_pages -= len(node.page_ids)
        if not node.refs:
            self.num_evictable_pages -= len(node.page_ids)
        if self.log is not None:
            self.log.remove(node.page_ids)
        del parent.children[node.key]
        del parent.keys[bisect_left(parent.keys, node.key)]
        self.queue.discard(node)
        node.parent = None
        parent.last_used = max(parent.last_used, node.last_used)  # every use of a node used its whole path

    def _settle(self, node: RadixNode) -> None:
        """Queue a node for eviction if it has become an unlocked leaf. Drops an empty namespace."""
        if node.refs or node.children:
            return
        if node.parent is not None:
            self.queue.push(node)
        elif self._roots.get(node.key) is node:
            del self._roots[node.key]

    # --- eviction

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` pages, evicting if needed. Returns None, and evicts nothing, if too few can be freed."""
        missing = count - self.pool.num_free
        if missing > 0:
            if missing > self.num_evictable_pages:
                return None
            self.evict(missing)
        return self.pool.allocate(count)

    def evict(self, num_pages: int) -> int:
        """Free up to `num_pages` unlocked pages, from the end of the leaf of lowest rank. Returns their number."""
        num_freed = 0
        while num_freed < num_pages:
            node = self.queue.pop()
            if node is None:
                break
            count = min(num_pages - num_freed, len(node.page_ids))
            num_freed += count
            page_ids = node.page_ids[-count:]
            num_kept = (len(node.page_ids) - count) * self._page_size
            gone = node.tokens[num_kept : num_kept + SHOWN_TOKENS].copy()  # a view would keep all of them
            self.evictions.append((node.start + num_kept, len(node.tokens) - num_kept, gone))
            parent = node.parent
            assert parent is not None
            if count == len(node.page_ids):
                self._remove(node)
                self._settle(parent)
            else:
                node.page_ids = node.page_ids[:-count]
                node.tokens = node.tokens[: len(node.page_ids) * self._page_size]
                self.num_cached_pages -= count
                self.num_evictable_pages -= count
                if self.log is not None:
                    self.log.remove(page_ids)
                self.queue.push(node)
            self.pool.free(page_ids)
        self.num_evicted_pages += num_freed
        return num_freed

    def flush(self) -> int:
        """Free every unlocked page. Returns their number."""
        return self.evict(self.num_evictable_pages)

    def mark_dead(self, tokens: TokenIds, cache_salt: str = "", num_live: int = 0) -> int:
        """Mark `tokens[num_live:]` as dead: the pages that only this path uses are evicted first.

        A later match or insertion revives them. Returns the number of pages marked. O(len(tokens)).
        """
        num_marked = 0
        for node in reversed(self._whole_nodes(tokens, cache_salt)):
            if node.start < num_live or any(not child.is_dead for child in node.children.values()):
                break
            node.is_dead = True
            num_marked += len(node.page_ids)
            self.queue.renew(node)
        return num_marked

    def set_next_use(self, tokens: TokenIds, next_use: float, cache_salt: str = "") -> int:
        """Set the time of the next use of `tokens`, in any monotonic unit (steps, seconds); inf: unknown.

        Returns the number of pages affected. O(len(tokens)).
        """
        num_pages = 0
        for node in self._whole_nodes(tokens, cache_salt):
            node.next_use = next_use
            num_pages += len(node.page_ids)
            self.queue.renew(node)
        return num_pages

    def _whole_nodes(self, tokens: TokenIds, cache_salt: str) -> list[RadixNode]:
        """Nodes on the path `tokens`, from the top, that lie entirely within it."""
        return [node for node, num_same in self.walk(tokens, cache_salt) if num_same == len(node.tokens)]

    # --- for checks and diagnosis

    def roots(self) -> list[RadixNode]:
        """The roots of all namespaces."""
        return list(self._roots.values())

    def nodes(self) -> Iterator[RadixNode]:
        """All nodes except the roots."""
        stack = self.roots()
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())


def num_common(a: TokenIds, b: TokenIds) -> int:
    """Length of the common prefix of two token arrays."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    index = int(different.argmax()) if length else 0
    return index if length and different[index] else length


def _num_common_bytes(a: bytes, b: bytes) -> int:
    return num_common(np.frombuffer(a, dtype=np.int32), np.frombuffer(b, dtype=np.int32))
