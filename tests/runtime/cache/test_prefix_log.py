"""Keys of prefixes, and what a cache tells of itself. Against the tree itself: test_radix_cache.py."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from ramet.runtime.cache.prefix_log import CacheChanges, PrefixLog, prefix_keys
from ramet.runtime.types import TokenIds

P = 4


def ids(*tokens: int) -> TokenIds:
    return np.asarray(tokens, dtype=np.int32)


def test_a_key_depends_on_the_whole_prefix_its_order_and_the_salt() -> None:
    keys = prefix_keys(ids(*range(12)), P)
    assert prefix_keys(ids(*range(8), 99, 9, 10, 11), P)[:2] == keys[:2]
    assert prefix_keys(ids(*range(8), 99, 9, 10, 11), P)[2] != keys[2]
    assert prefix_keys(ids(1, 0, *range(2, 12)), P)[2] != keys[2]
    assert set(prefix_keys(ids(*range(12)), P, "salt")).isdisjoint(keys)
    assert prefix_keys(ids(*range(15)), P) == keys
    assert prefix_keys(ids(1, 2), P) == []


def test_a_million_prefixes_have_a_million_keys() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, 1_000_000 * P).astype(np.int32)
    keys = prefix_keys(tokens, P) + prefix_keys(tokens[::-1].copy(), P)
    assert len(set(keys)) == len(keys)


def test_the_low_byte_of_a_key_counts_pages() -> None:
    keys = prefix_keys(ids(*range(300 * P)), P)
    assert [key & 0xFF for key in keys] == [n % 256 for n in range(1, 301)]


def test_keys_of_every_few_pages_are_among_those_of_all() -> None:
    tokens = np.arange(16 * 37 + 5, dtype=np.int32)
    whole = prefix_keys(tokens, 16, "salt")
    for every in (1, 2, 4, 16, 64):
        assert prefix_keys(tokens, 16, "salt", every) == whole[every - 1 :: every]
    assert prefix_keys(tokens[:15], 16) == []


def test_another_process_computes_the_same_keys() -> None:
    code = "import numpy as np; from ramet.runtime.cache.prefix_log import prefix_keys as k; "
    code += "print(k(np.arange(8, dtype=np.int32), 4, 'ä'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(prefix_keys(ids(*range(8)), 4, "ä"))


def test_a_log_that_goes_on_after_a_page_gives_the_keys_of_the_whole_prefix() -> None:
    log = PrefixLog(16, P)
    log.add(b"s", None, 0, ids(*range(8)), [3, 7])
    log.add(b"s", 7, 8, ids(*range(8, 16)), [1, 2])
    changes = log.take()
    assert changes is not None
    assert changes.added == prefix_keys(ids(*range(16)), P, "s")


def test_what_comes_and_goes_between_two_readings_is_not_told() -> None:
    log = PrefixLog(16, P)
    log.add(b"", None, 0, ids(*range(8)), [3, 7])
    log.remove([7])
    changes = log.take()
    assert changes is not None
    assert (changes.number, changes.added, changes.removed) == (1, prefix_keys(ids(*range(4)), P), [])
    log.remove([3])
    log.add(b"", None, 0, ids(*range(4)), [5])
    assert log.take() is None
    assert log.whole() == CacheChanges(1, changes.added, is_whole=True)


def test_a_whole_list_leaves_the_next_changes_to_all_readers() -> None:
    log = PrefixLog(16, P)
    log.add(b"", None, 0, ids(*range(8)), [3, 7])
    assert log.take() is not None
    log.remove([7])
    log.add(b"", None, 0, ids(*range(20, 24)), [9])
    assert (log.whole().number, set(log.whole().added)) == (1, set(prefix_keys(ids(*range(8)), P)))
    changes = log.take()
    assert changes is not None
    assert changes.number == 2
    assert set(log.whole().added) == set(prefix_keys(ids(*range(4)), P) + prefix_keys(ids(*range(20, 24)), P))


def test_a_page_without_a_key_goes_silently() -> None:
    log = PrefixLog(16, P)
    log.remove([4])
    assert log.take() is None
