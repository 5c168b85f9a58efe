"""One node of the radix tree: a run of cached tokens, the pages that hold their KV, and its place in the tree.

Not here: operations on nodes. The radix cache links, splits and locks nodes; the eviction queue orders them.
"""

from __future__ import annotations

import math

from ramet.runtime.types import TokenIds


class RadixNode:
    """The tokens [start, end) of every path through this node. Owner: the cache; others only read.

    A locked node keeps its identity and its `end`: a split makes a new parent for the first part. Only an insertion
    by the single holder of its lock may move `end` forward.
    """

    __slots__ = (
        "children",
        "eviction_entry",
        "is_dead",
        "key",
        "keys",
        "last_used",
        "next_use",
        "page_ids",
        "parent",
        "refs",
        "start",
        "tokens",
    )

    def __init__(self, parent: RadixNode | None, key: bytes, start: int, tokens: TokenIds, page_ids: list[int]) -> None:
        self.parent = parent
        self.key = key  # the first page's tokens, as bytes; of a root: the cache salt
        self.start = start  # tokens from the root, a multiple of the page size
        self.tokens = tokens
        self.page_ids = page_ids
        self.children: dict[bytes, RadixNode] = {}
        self.keys: list[bytes] = []  # keys of the children, sorted
        self.refs = 0
        self.last_used = 0
        self.is_dead = False
        self.next_use = math.inf
        self.eviction_entry = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def is_evictable(self) -> bool:
        """True for an unlocked leaf."""
        return not self.refs and not self.children and self.parent is not None

    def path(self) -> list[RadixNode]:
        """Nodes from below the root down to this one."""
        nodes = []
        node: RadixNode = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]
