"""The index of what replicas hold, against the caches themselves and against sets."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.prefix_log import CacheChanges, prefix_keys
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.cluster.prefix_index import HolderTable, PrefixIndex
from ramet.runtime.types import TokenIds

P = 4


def keys(*tokens: int) -> list[int]:
    return prefix_keys(np.asarray(tokens, dtype=np.int32), P)


def small_cache(num_pages: int) -> RadixCache:
    cache = RadixCache(PagePool(num_pages, P))
    cache.start_log()
    return cache


def put(cache: RadixCache, tokens: TokenIds) -> None:
    """Cache a path as one finished sequence would, evicting where there is no room."""
    match = cache.match(tokens)
    cache.lock(match.node)
    page_ids = cache.allocate(-(-(len(tokens) - match.num_tokens) // P))
    if page_ids is not None:
        cache.pool.free(cache.insert(match.node, tokens[match.num_tokens :], page_ids)[1])
    cache.unlock(match.node)


PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=24).map(lambda t: np.asarray(t, dtype=np.int32))


@settings(deadline=None, max_examples=60)
@given(steps=st.lists(st.tuples(st.integers(0, 2), PATHS, st.sampled_from(["send", "send", "keep", "lose"]))))
def test_the_mirror_equals_the_caches_whatever_they_do(steps: list[tuple[int, TokenIds, str]]) -> None:
    caches = [small_cache(9) for _ in range(3)]  # so small that they evict all the time
    first, second = PrefixIndex(), PrefixIndex()  # two routers
    for replica, cache in enumerate(caches):
        assert cache.log is not None
        for index in (first, second):
            assert index.apply(replica, cache.log.whole())
    for replica, path, how in steps:
        put(caches[replica], path)
        log = caches[replica].log
        assert log is not None
        changes = log.take() if how != "keep" else None
        if changes is None:
            continue
        assert second.apply(replica, changes)
        if how == "lose":  # the first router misses it, and hears of the gap by the next one
            put(caches[replica], np.full(4, 7, dtype=np.int32))
            put(caches[replica], np.arange(100, 132, dtype=np.int32))
            later = log.take()
            assert later is not None
            assert second.apply(replica, later)
            assert not first.apply(replica, later)
            whole = log.whole()
            assert first.apply(replica, whole)
            assert second.apply(replica, whole)
        else:
            assert first.apply(replica, changes)
    for replica, cache in enumerate(caches):
        assert cache.log is not None
        last = cache.log.take()
        for index in (first, second):
            if last is not None:
                assert index.apply(replica, last)
            assert all(index.holds(key, replica) for key in cache.log.whole().added)
    logs = [cache.log for cache in caches if cache.log is not None]
    assert first.num_keys == second.num_keys == sum(len(log.whole().added) for log in logs)
    for _, path, _ in steps:
        prompt = prefix_keys(path, P)
        expected = [max(c.match_length(path) // P for c in caches)]
        assert [first.num_held(prompt)] == expected
        for key in prompt:
            assert sorted(first.holders(key)) == [r for r in range(3) if first.holds(key, r)]


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(0, 3))))
def test_a_table_counts_its_holders(steps: list[tuple[bool, int, int]]) -> None:
    table, expected = HolderTable(), list[tuple[int, int]]()
    for is_added, key, replica in steps:
        if is_added:
            table.add(key, replica)
            expected.append((key, replica))
        else:
            table.discard(key, replica)
            if (key, replica) in expected:
                expected.remove((key, replica))
        for each in range(1, 5):
            assert sorted(table.of(each)) == sorted(r for k, r in expected if k == each)
            assert all(table.holds(each, r) == ((each, r) in expected) for r in range(4))
    assert len(table) == len({key for key, _ in expected})


def test_changes_that_miss_their_predecessor_are_refused_and_repeated_ones_ignored() -> None:
    index = PrefixIndex()
    assert not index.apply(0, CacheChanges(1, keys(1, 2, 3, 4)))  # nobody knows what was there before
    assert index.apply(0, CacheChanges(1, keys(1, 2, 3, 4), is_whole=True))
    assert not index.apply(0, CacheChanges(3, keys(5, 6, 7, 8)))
    assert (index.num_keys, index.holds(keys(1, 2, 3, 4)[0], 0)) == (1, True)
    assert index.apply(0, CacheChanges(2, [], keys(1, 2, 3, 4)))
    assert index.apply(0, CacheChanges(1, keys(1, 2, 3, 4), is_whole=True))  # late: known to be gone
    assert index.apply(0, CacheChanges(1, keys(1, 2, 3, 4)))
    assert index.num_keys == 0


def test_a_full_index_keeps_every_second_page_and_never_more_than_it_may() -> None:
    index = PrefixIndex(max_keys=10)
    assert index.apply(0, CacheChanges(1, keys(*range(8 * P)), is_whole=True))
    assert (index.grain, index.num_keys) == (1, 8)
    assert index.apply(1, CacheChanges(1, keys(*range(6 * P)), is_whole=True))
    assert (index.grain, index.num_keys) == (2, 4 + 3)
    prompt = index.coarse(keys(*range(8 * P)))
    assert index.num_held(prompt) == 4
    assert sorted(index.holders(prompt[2])) == [0, 1]
    for replica in range(2, 40):
        assert index.apply(replica, CacheChanges(1, keys(*range(replica, replica + 40)), is_whole=True))
        assert index.num_keys <= 10
    for replica in range(40):
        index.forget(replica)
    assert (index.num_keys, index.num_held(prompt)) == (0, 0)
    assert index.holders(prompt[0]) == ()
