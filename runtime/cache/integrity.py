"""Checks of the radix cache's accounting. They raise and change nothing."""

from __future__ import annotations

from collections.abc import Iterable

from ramet.errors import CacheIntegrityError
from ramet.runtime.cache.node import RadixNode
from ramet.runtime.cache.radix_cache import RadixCache


def check_cache(cache: RadixCache, held: Iterable[list[int]] = ()) -> None:
    """Check that every page is free, owned by one node, or in one of the lists `held`, the pages owned by sequences.

    O(pages + nodes): for tests and for audits while idle.

    Raises:
        CacheIntegrityError: describes the first violation found.
    """
    cache.pool.check_integrity()
    owner: dict[int, str] = {}
    for node in cache.nodes():
        _check_node(node, cache.pool.page_size)
        _claim(owner, node.page_ids, f"node at {node.start}")
    num_cached = len(owner)
    num_evictable = sum(len(node.page_ids) for node in cache.nodes() if not node.refs)
    for index, page_ids in enumerate(held):
        _claim(owner, page_ids, f"sequence {index}")
    used = cache.pool.used_pages()
    require(owner.keys() == used, f"owned and used pages differ: {sorted(owner.keys() ^ used)[:10]}")
    require(num_cached == cache.num_cached_pages, f"{num_cached} pages cached, {cache.num_cached_pages} counted")
    require(
        num_evictable == cache.num_evictable_pages,
        f"{num_evictable} pages evictable, {cache.num_evictable_pages} counted",
    )
    require(not cache.queue.late(), "the eviction queue has a node at a higher rank than its own")


def require(ok: bool, message: str) -> None:
    """Raise CacheIntegrityError with `message` unless `ok`."""
    if not ok:
        raise CacheIntegrityError(message)


def _check_node(node: RadixNode, size: int) -> None:
    parent = node.parent
    assert parent is not None
    require(len(node.tokens) > 0 and node.start % size == 0, "a node is empty or starts inside a page")
    require(len(node.page_ids) == -(-len(node.tokens) // size), "a node's tokens and pages differ")
    require(len(node.tokens) % size == 0 or len(node.tokens) < size, "a node has whole pages and a partial one")
    require(len(node.tokens) % size == 0 or not node.children, "a tail has children")
    require(node.start == parent.end, "a node does not start at its parent's end")
    require(node.key == node.tokens[:size].tobytes(), "a node's key is not its first page")
    require(parent.children.get(node.key) is node, "a node is not its parent's child")
    require(node.keys == sorted(node.children), "a node's sorted keys are not its children's")
    require(node.refs >= sum(child.refs > 0 for child in node.children.values()), "a locked child is not counted")
    require(node.eviction_entry > 0 or not node.is_evictable, "an evictable node is not in the eviction queue")


def _claim(owner: dict[int, str], page_ids: Iterable[int], name: str) -> None:
    for page in page_ids:
        require(page not in owner, f"page {page} belongs to {owner.get(page)} and to {name}")
        owner[page] = name
