"""Find the positions where cached paths differ from a prompt, to explain why the prompt was not in the cache.

Reads the tree and changes nothing, not even the order of eviction. For diagnosis: O(children along the path).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ramet.runtime.cache.node import RadixNode
from ramet.runtime.cache.radix_cache import RadixCache

MAX_TOKENS = 64  # maximum length of a continuation that is shown


@dataclass(frozen=True, slots=True)
class Difference:
    """A cached path that has its first `num_same` tokens in common with the prompt, and continues with `tokens`."""

    num_same: int
    tokens: tuple[int, ...]


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
