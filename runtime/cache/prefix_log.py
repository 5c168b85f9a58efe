"""What a radix cache holds, told to others: keys of cached prefixes, and a numbered log of their coming and going.

A prefix of n whole pages has a key, 64 bits that depend on its tokens and on the cache salt alone, so every process
computes the same. The low byte of a key is n modulo 256: who keeps only some of the keys can choose them by it.

    sum(n) = sum(0) + sum over positions i < n * page_size of weight(i) * mixed(token i)     modulo 2**64
    key(n) = mixed(sum(n)), its low byte replaced by n % 256                                 sum(0): of the salt

Equal keys of different prefixes are as rare as chance makes them, though somebody could construct them: what follows
from keys may cost time, but must never decide whose KV is read.

Not here: who reads the log (`cluster`). Partial pages have no key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np
from numpy.typing import NDArray

from ramet.runtime.types import TokenIds

Keys = NDArray[np.uint64]

_ODD_1, _ODD_2, _ODD_3 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_LOW_BYTE = np.uint64(0xFF)


class CacheChanges(msgspec.Struct, frozen=True, tag="cache", omit_defaults=True):
    """Keys that a cache gained and lost since the changes numbered one less. `is_whole`: `added` are all its keys."""

    number: int
    added: list[int] = []
    removed: list[int] = []
    is_whole: bool = False


def prefix_keys(tokens: TokenIds, page_size: int, cache_salt: str = "", every: int = 1) -> list[int]:
    """Return the keys of the prefixes of `every`, 2 * `every`, ... whole pages. O(len(tokens)), vectorised."""
    sums = _sums(tokens, page_size, 0, salt_sum(cache_salt.encode()))[every - 1 :: every]
    return _keys(sums, every, every).tolist()  # type: ignore[no-any-return]


@lru_cache(maxsize=1024)
def salt_sum(cache_salt: bytes) -> int:
    """The sum of the empty prefix."""
    return int.from_bytes(hashlib.blake2b(cache_salt, digest_size=8).digest(), "little")


def _sums(tokens: TokenIds, page_size: int, start: int, before: int) -> Keys:
    """Sums at the end of each whole page of `tokens`, which begin at position `start`, where the sum is `before`."""
    num_whole = len(tokens) // page_size * page_size
    mixed = (tokens[:num_whole].astype(np.uint64) + np.uint64(1)) * _ODD_1
    mixed ^= mixed >> np.uint64(32)
    mixed *= _weights(max(4096, 1 << (start + num_whole).bit_length()))[start : start + num_whole]
    by_page = np.add.reduceat(mixed, _page_starts(num_whole, page_size)) if num_whole else mixed
    return np.cumsum(by_page, dtype=np.uint64) + np.uint64(before)


@lru_cache(maxsize=64)
def _page_starts(num_tokens: int, page_size: int) -> NDArray[np.int64]:
    return np.arange(0, num_tokens, page_size)


@lru_cache(maxsize=8)
def _weights(size: int) -> Keys:
    """Odd pseudo-random weights of the positions [0, size). Source: SplitMix64, Steele et al. 2014."""
    weights = _mixed(np.arange(1, size + 1, dtype=np.uint64) * _ODD_1) | np.uint64(1)
    weights.setflags(write=False)
    return weights


def _mixed(values: Keys) -> Keys:
    values = (values ^ (values >> np.uint64(30))) * _ODD_2
    values = (values ^ (values >> np.uint64(27))) * _ODD_3
    return values ^ (values >> np.uint64(31))


def _keys(sums: Keys, first: int, step: int = 1) -> Keys:
    """Keys of prefixes of `first`, `first + step`, ... pages."""
    num_pages = np.arange(first, first + step * len(sums), step, dtype=np.uint64)
    return (_mixed(sums) & ~_LOW_BYTE) | (num_pages & _LOW_BYTE)


class PrefixLog:
    """The changes of one radix cache since they were last taken. Owner: the cache, which writes it.

    Bounded by the pool: changes that cancel each other are dropped.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """num_pages: of the pool, page 0 included."""
        self._page_size = page_size
        self._sums = np.zeros(num_pages, dtype=np.uint64)  # by page id, as `_keys`
        self._keys = np.zeros(num_pages, dtype=np.uint64)  # 0: the page holds no whole cached page
        self._changed: dict[int, bool] = {}  # key -> True if it came, False if it went
        self._number = 0

    def add(self, salt: bytes, above: int | None, start: int, tokens: TokenIds, page_ids: Sequence[int]) -> None:
        """Note pages that are cached now. above: the page before them, None at the start of a path."""
        before = salt_sum(salt) if above is None else int(self._sums[above])
        sums = _sums(tokens, self._page_size, start, before)
        keys = _keys(sums, start // self._page_size + 1)
        where = page_ids[: len(sums)]
        self._sums[where], self._keys[where] = sums, keys
        for key in keys.tolist():
            if self._changed.pop(key, None) is None:
                self._changed[key] = True

    def remove(self, page_ids: Sequence[int]) -> None:
        """Note pages that are no longer cached. Pages without a key are ignored."""
        keys = self._keys[page_ids].tolist()
        self._keys[page_ids] = 0
        for key in keys:
            if key and self._changed.pop(key, None) is None:
                self._changed[key] = False

    def take(self) -> CacheChanges | None:
        """Return what changed since the last call; None if nothing did."""
        if not self._changed:
            return None
        self._number += 1
        added = [key for key, came in self._changed.items() if came]
        removed = [key for key, came in self._changed.items() if not came]
        self._changed = {}
        return CacheChanges(self._number, added, removed)

    def whole(self) -> CacheChanges:
        """Return all keys as of the last `take`, for a reader that comes new or has missed changes. O(pages)."""
        keys = set(self._keys[self._keys != 0].tolist())
        came = {key for key, is_there in self._changed.items() if is_there}
        return CacheChanges(self._number, [*(keys - came), *(self._changed.keys() - came)], is_whole=True)
