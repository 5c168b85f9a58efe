from __future__ import annotations

import pytest

from ramet.errors import CacheIntegrityError
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import PrefixMatch, RadixCache
from ramet.runtime.scheduling.sequence_pages import SequencePages, known_end, matchable
from ramet.runtime.testing.simulation import make_request
from ramet.runtime.types import PageCopy, Sequence


def make(num_pages: int, ratio: float = 1.0) -> SequencePages:
    pool = PagePool(num_pages, 4)
    return SequencePages(pool, RadixCache(pool), reservation_ratio=ratio, share=True)


def start(pages: SequencePages, sequence: Sequence) -> PrefixMatch:
    match = pages.match(sequence)
    pages.attach(sequence, match)
    return match


def finish(pages: SequencePages, num_tokens: int, name: str = "warm") -> None:
    """Cache tokens 0..num_tokens-1."""
    sequence = Sequence(make_request(name, range(num_tokens), 1))
    start(pages, sequence)
    assert pages.take(sequence, pages.peak(sequence) - len(sequence.page_ids))
    sequence.num_computed = num_tokens
    pages.release(sequence, keep=True)
    pages.check_integrity([])


def test_the_peak_counts_every_token_but_the_last() -> None:
    pages = make(10)
    assert pages.peak(Sequence(make_request("a", range(4), 5))) == 2
    assert pages.peak(Sequence(make_request("b", range(4), 6))) == 3
    assert make(10, ratio=0.5).peak(Sequence(make_request("c", range(4), 10))) == 2


def test_a_preempted_sequence_reserves_all_it_may_need() -> None:
    pages = make(10, ratio=0.0)
    sequence = Sequence(make_request("a", range(4), 13))
    assert pages.peak(sequence) == 1
    sequence.num_preemptions = 1
    assert pages.peak(sequence) == 4


def test_pages_beyond_a_reservation_are_not_taken_from_what_others_reserved() -> None:
    pages = make(5, ratio=0.0)
    beyond, owner = Sequence(make_request("a", range(4), 9)), Sequence(make_request("b", range(50, 62), 9))
    for sequence in (beyond, owner):
        start(pages, sequence)
    assert pages.num_available == 0
    assert pages.take(beyond, 1)
    assert not pages.take(beyond, 1)
    assert pages.take(owner, 3)
    pages.check_integrity([beyond, owner])


def test_reserved_pages_can_always_be_taken_from_the_cache() -> None:
    pages = make(9)
    finish(pages, 32)
    sequence = Sequence(make_request("a", range(100, 120), 13))
    start(pages, sequence)
    assert pages.num_available == 0
    assert pages.take(sequence, 8)


def test_a_source_that_was_evicted_for_its_own_copy_is_not_the_target_of_another() -> None:
    pages = make(4)
    finish(pages, 12)
    first = Sequence(make_request("a", [0, 1, 2, 3, 4, 5, 60, 61], 1))
    second = Sequence(make_request("b", [0, 1, 2, 3, 4, 70], 1))
    copies: list[PageCopy] = []
    for sequence in (first, second):
        match = start(pages, sequence)
        copy = pages.copy_tail(sequence, match, copies)
        if copy is not None:
            copies.append(copy)
    assert copies
    assert not {c.source for c in copies} & {c.target for c in copies}
    pages.check_integrity([first, second])


def test_a_copy_that_finds_no_page_is_left_out() -> None:
    pages = make(3)
    finish(pages, 8)
    sequence = Sequence(make_request("a", [0, 1, 2, 3, 4, 5, 60], 1))
    match = start(pages, sequence)
    assert match.tail_page is not None
    assert pages.copy_tail(sequence, match, []) is None, "the only free page is the source itself"
    assert sequence.num_computed == 4
    pages.check_integrity([sequence])


def test_scoring_matches_and_computes_what_its_scores_need() -> None:
    scoring = Sequence(make_request("s", range(10), 1, score_from=6))
    assert len(matchable(scoring)) == 5
    assert known_end(scoring) == 9
    assert known_end(Sequence(make_request("t", range(10), 1, score_from=10))) == 10


def test_a_sequence_that_does_not_hold_the_pages_of_its_node_is_reported() -> None:
    pages = make(10)
    finish(pages, 12)
    sequence = Sequence(make_request("a", range(12), 1))
    start(pages, sequence)
    pages.check_integrity([sequence])
    sequence.page_ids.reverse()
    with pytest.raises(CacheIntegrityError, match="not the pages of its node"):
        pages.check_integrity([sequence])
