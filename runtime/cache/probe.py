"""Look into the tree: what is cached after a text, what was used last, where cached paths differ, what can be drawn.

Reads the tree and changes nothing, not even the order of eviction.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from operator import attrgetter

import msgspec
import numpy as np

from ramet.runtime.cache.node import RadixNode
from ramet.runtime.cache.radix_cache import SHOWN_TOKENS, RadixCache
from ramet.runtime.types import TokenIds

MAX_TOKENS = 64  # maximum length of a continuation that is shown
_MOST_SIBLINGS = 16  # texts that go on from a page in different ways, of which the newest are looked for


@dataclass(frozen=True, slots=True)
class Difference:
    """A cached path that has its first `num_same` tokens in common with the prompt, and continues with `tokens`."""

    num_same: int
    tokens: tuple[int, ...]


class TreeNode(msgspec.Struct, array_like=True):
    """A node of the tree, to be drawn. `above`: the index of its parent among the segments; None for a namespace.

    `start`: tokens before it. `refs`: its readers, and its children that have some. `last_used`: the tree's clock.
    `last_page`: the id of its last page, by which a sequence says where it reads. `tokens`: its first ones; `salt`: of
    a namespace.
    """

    above: int | None
    start: int
    num_tokens: int
    refs: int
    last_used: int
    is_dead: bool
    last_page: int | None
    tokens: list[int]
    salt: str = ""


def pages_of(cache: RadixCache, tokens: TokenIds, cache_salt: str = "") -> list[int]:
    """Return the whole pages of the longest cached prefix of `tokens`, valid until the next step."""
    size = cache.pool.page_size
    return [page for node, num_same in cache.walk(tokens, cache_salt) for page in node.page_ids[: num_same // size]]


def latest_paths(cache: RadixCache, most_tokens: int) -> list[tuple[str, TokenIds]]:
    """Return the cached paths of whole pages with their cache salts, the last used first: about `most_tokens`."""
    found: list[tuple[str, TokenIds]] = []
    size = cache.pool.page_size
    leaves = [
        node
        for node in cache.nodes()
        if len(node.tokens) >= size and not any(len(child.tokens) >= size for child in node.children.values())
    ]
    for leaf in sorted(leaves, key=attrgetter("last_used"), reverse=True):
        most_tokens -= leaf.end
        if most_tokens < 0:
            break
        path = leaf.path()
        assert path[0].parent is not None
        found.append((path[0].parent.key.decode(), np.concatenate([node.tokens for node in path])))
    return found


def following(
    cache: RadixCache, tokens: TokenIds, cache_salt: str, *, most_texts: int, most_tokens: int
) -> list[TokenIds]:
    """Return what is cached after `tokens`, the newest text last, each up to `most_tokens` long.

    O(len(tokens) + most_texts * most_tokens).
    """
    size, path = cache.pool.page_size, list(cache.walk(tokens, cache_salt))
    if not path or sum(num_same for _, num_same in path) < len(tokens):
        return []
    node, num_same = path[-1]
    if size <= num_same < len(node.tokens):
        return _texts_of([node], num_same, most_texts, most_tokens)
    if num_same % size:
        above, rest = node.parent, tokens[-num_same:].tobytes()
        assert above is not None
    else:
        above, rest, num_same = node, b"", 0
    keys = takewhile(lambda key: key.startswith(rest), islice(above.keys, bisect_left(above.keys, rest), None))
    children = [above.children[key] for key in islice(keys, _MOST_SIBLINGS)]
    children.sort(key=attrgetter("last_used"))
    return _texts_of(children, num_same, most_texts, most_tokens)


def segments(cache: RadixCache) -> Iterator[TreeNode]:
    """Yield every node after its parent, level by level. The tree may change between two of them.

    What has left it by then is not told, and what a split has made is told with its lower part. 2 µs a node.
    """
    num_told = 0
    waiting: deque[tuple[RadixNode, int | None]] = deque((root, None) for root in cache.roots())
    while waiting:
        node, above = waiting.popleft()
        if node.parent is None and above is not None:
            continue
        waiting.extend([(child, num_told) for child in node.children.values()])
        num_told += 1
        pages, salt = node.page_ids, "" if above is not None else node.key.decode()
        yield TreeNode(
            above,
            node.start,
            len(node.tokens),
            node.refs,
            node.last_used,
            node.is_dead,
            pages[-1] if pages else None,
            node.tokens[:SHOWN_TOKENS].tolist(),
            salt,
        )


def differences(cache: RadixCache, tokens: Sequence[int], cache_salt: str = "") -> list[Difference]:
    """Return every cached path that differs from `tokens`, the one with the longest common prefix first."""
    wanted = np.asarray(tokens, dtype=np.int32)
    found: list[Difference] = []
    node: RadixNode | None = cache.root(cache_salt)
    position = 0
    while node is not None and position < len(wanted):
        rest = wanted[position:]
        following: RadixNode | None = None
        for child in node.children.values():
            size = min(len(child.tokens), len(rest))
            differ = np.flatnonzero(child.tokens[:size] != rest[:size])
            if len(differ):
                same = int(differ[0])
                found.append(Difference(position + same, tuple(map(int, child.tokens[same : same + MAX_TOKENS]))))
            elif following is None or len(child.tokens) > len(following.tokens):
                following = child
        if following is not None:
            position += len(following.tokens)
        node = following
    return sorted(found, key=lambda one: -one.num_same)


def trie_differences(edges: Mapping[tuple[int, int], int], root: int | None, tokens: Sequence[int]) -> list[Difference]:
    """As `differences`, for a trie with one token per edge: (node, token) -> node."""
    children: dict[int, list[tuple[int, int]]] = {}
    for (node, token), below in list(edges.items()):
        children.setdefault(node, []).append((token, below))
    found: list[Difference] = []
    at = root
    for position, wanted in enumerate(tokens):
        if at is None:
            break
        for token, below in children.get(at, ()):
            if token != wanted:
                found.append(Difference(position, (token, *_first_path(children, below))))
        at = edges.get((at, wanted))
    return sorted(found, key=lambda one: -one.num_same)


def _first_path(children: Mapping[int, list[tuple[int, int]]], node: int) -> list[int]:
    found: list[int] = []
    while node in children and len(found) < MAX_TOKENS - 1:
        token, node = children[node][-1]
        found.append(token)
    return found


def _texts_of(nodes: Sequence[RadixNode], num_known: int, most_texts: int, most_tokens: int) -> list[TokenIds]:
    """The texts of nodes without their first `num_known` tokens, with what follows them, the newest last."""
    texts: list[TokenIds] = []
    open_ones = [(node, [node.tokens[num_known:]]) for node in nodes]  # the newest last
    while open_ones and len(texts) < most_texts:
        node, parts = open_ones.pop()
        if sum(map(len, parts)) < most_tokens and node.children:
            newest = list(islice(reversed(node.children.values()), most_texts))
            open_ones += [(child, [*parts, child.tokens]) for child in reversed(newest)]
            continue
        text = np.concatenate(parts)[:most_tokens]
        if len(text):
            texts.append(text)
    return texts[::-1]
