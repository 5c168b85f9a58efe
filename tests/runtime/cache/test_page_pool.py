import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.errors import CacheIntegrityError
from ramet.runtime.cache.page_pool import PagePool


def test_the_dummy_page_is_never_handed_out() -> None:
    pool = PagePool(5, 16)
    page_ids = pool.allocate(4)
    assert page_ids is not None
    assert sorted(page_ids) == [1, 2, 3, 4]
    assert pool.num_free == 0


def test_allocation_is_all_or_nothing() -> None:
    pool = PagePool(5, 16)
    assert pool.allocate(5) is None
    assert pool.num_free == 4


def test_a_page_freed_twice_is_quarantined_and_counted() -> None:
    pool = PagePool(4, 16)
    page_ids = pool.allocate(2)
    assert page_ids is not None
    pool.free(page_ids)
    pool.free(page_ids[:1])
    assert pool.num_quarantined == 1
    assert pool.num_usable == 2
    assert page_ids[0] not in (pool.allocate(2) or [])
    pool.check_integrity()


def test_a_page_id_outside_the_pool_is_ignored() -> None:
    pool = PagePool(4, 16)
    pool.free([0, 4, -1])
    assert pool.num_free == 3
    pool.check_integrity()


def test_a_broken_free_list_is_reported() -> None:
    pool = PagePool(4, 16)
    pool._stack.append(pool._stack[0])
    with pytest.raises(CacheIntegrityError, match="twice"):
        pool.check_integrity()


def test_a_listed_page_that_is_in_use_is_reported() -> None:
    pool = PagePool(4, 16)
    page_ids = pool.allocate(1)
    assert page_ids is not None
    pool._stack.append(page_ids[0])
    with pytest.raises(CacheIntegrityError, match="differ"):
        pool.check_integrity()


@given(st.lists(st.integers(0, 9), max_size=60))
def test_pages_are_never_in_two_hands(operations: list[int]) -> None:
    pool = PagePool(20, 8)
    held: list[list[int]] = []
    for operation in operations:
        if operation < 6:
            page_ids = pool.allocate(operation)
            assert (page_ids is None) == (operation > 19 - sum(map(len, held)))
            if page_ids is not None:
                held.append(page_ids)
        elif held:
            pool.free(held.pop(operation % len(held)))
        flat = [page for page_ids in held for page in page_ids]
        assert len(set(flat)) == len(flat)
        assert pool.num_free + len(flat) == 19
        assert pool.used_pages() == set(flat)
        pool.check_integrity()
