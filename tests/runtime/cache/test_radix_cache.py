"""The tree by example, and against a model that knows what was written to every position of every page."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ramet.errors import CacheIntegrityError
from ramet.runtime.cache.eviction import lru_rank
from ramet.runtime.cache.integrity import check_cache
from ramet.runtime.cache.node import RadixNode
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.prefix_log import prefix_keys
from ramet.runtime.cache.probe import segments
from ramet.runtime.cache.radix_cache import PrefixMatch, RadixCache
from ramet.runtime.types import TokenIds

P = 4


def ids(*tokens: int) -> TokenIds:
    return np.asarray(tokens, dtype=np.int32)


def make(num_pages: int = 64) -> tuple[RadixCache, PagePool]:
    pool = PagePool(num_pages, P)
    return RadixCache(pool), pool


def put(cache: RadixCache, tokens: TokenIds, cache_salt: str = "") -> list[int]:
    """Cache a path as one finished sequence would, and return its pages."""
    match = cache.match(tokens, cache_salt)
    cache.lock(match.node)
    page_ids = cache.allocate(-(-(len(tokens) - match.num_tokens) // P))
    assert page_ids is not None
    node, duplicates = cache.insert(match.node, tokens[match.num_tokens :], page_ids)
    pages = pages_of(node)
    cache.pool.free(duplicates)
    cache.unlock(match.node)
    check_cache(cache)
    return pages


def pages_of(node: RadixNode) -> list[int]:
    return [page for part in node.path() for page in part.page_ids]


def found(match: PrefixMatch) -> tuple[int, int]:
    return match.num_tokens, match.num_tail_tokens


def test_the_tree_is_told_whole_parents_first_and_also_while_it_changes() -> None:
    cache, _ = make()
    rng = np.random.default_rng(0)
    for _ in range(12):
        put(cache, rng.integers(0, 2, 11).astype(np.int32), "own" if rng.random() < 0.3 else "")
    told = list(segments(cache))
    assert len(told) == len(list(cache.nodes())) + len(cache.roots())
    assert sum(-(-one.num_tokens // P) for one in told) == cache.num_cached_pages
    assert {one.salt for one in told if one.above is None} == {"", "own"}
    for index, one in enumerate(told):
        if one.above is not None:
            above = told[one.above]
            assert one.above < index
            assert one.start == above.start + above.num_tokens
    walk = segments(cache)
    begun = [next(walk), next(walk), next(walk)]
    cache.flush()
    assert [*begun, *walk] == begun, "what has left the tree meanwhile is not told"


def test_nothing_is_found_in_an_empty_tree() -> None:
    cache, _ = make()
    match = cache.match(ids(1, 2, 3))
    assert (match.page_ids, match.num_tokens, match.tail_page) == ([], 0, None)


def test_whole_pages_are_shared_and_the_rest_of_a_page_is_offered_for_copying() -> None:
    cache, _ = make()
    pages = put(cache, ids(*range(10)))
    match = cache.match(ids(*range(10), 99))
    assert match.page_ids == pages[:2]
    assert (match.tail_page, match.num_tail_tokens) == (pages[2], 2)


def test_a_match_may_end_inside_a_page_inside_a_run() -> None:
    cache, _ = make()
    pages = put(cache, ids(*range(12)))
    match = cache.match(ids(0, 1, 2, 3, 4, 5, 77))
    assert match.page_ids == pages[:1]
    assert (match.tail_page, match.num_tail_tokens) == (pages[1], 2)
    check_cache(cache)


def test_siblings_that_differ_in_their_last_token_share_the_page_by_copy() -> None:
    cache, _ = make()
    pages = put(cache, ids(1, 2, 3, 4))
    match = cache.match(ids(1, 2, 3, 5, 6))
    assert (match.page_ids, match.tail_page, match.num_tail_tokens) == ([], pages[0], 3)


def test_the_longest_common_part_is_found_among_many_siblings() -> None:
    cache, _ = make(20_000)
    prefix = list(range(8))
    for i in range(10_000):
        put_quick(cache, ids(*prefix, 10, 11, i // 100, i))
    check_cache(cache)
    assert found(cache.match(ids(*prefix, 10, 11, 37, 3_712, 5))) == (12, 0)
    assert found(cache.match(ids(*prefix, 10, 11, 37, 99_999))) == (8, 3)
    assert found(cache.match(ids(*prefix, 10, 11, 1_000, 0))) == (8, 2)
    assert found(cache.match(ids(*prefix, 12))) == (8, 0)


def put_quick(cache: RadixCache, tokens: TokenIds) -> None:
    match = cache.match(tokens)
    cache.lock(match.node)
    page_ids = cache.allocate(-(-(len(tokens) - match.num_tokens) // P))
    assert page_ids is not None
    cache.pool.free(cache.insert(match.node, tokens[match.num_tokens :], page_ids)[1])
    cache.unlock(match.node)


def test_inserting_what_is_there_returns_the_given_pages_as_duplicates() -> None:
    cache, pool = make()
    pages = put(cache, ids(*range(10)))
    root = cache.root()
    cache.lock(root)
    given = pool.allocate(3)
    assert given is not None
    node, duplicates = cache.insert(root, ids(*range(10)), given)
    assert duplicates == given
    assert pages_of(node) == pages[:2]
    pool.free(given)
    cache.unlock(root)
    check_cache(cache)


def test_a_longer_tail_replaces_the_shorter_one_that_it_repeats() -> None:
    cache, pool = make()
    put(cache, ids(1, 2))
    put(cache, ids(1, 2, 3))
    assert cache.num_cached_pages == 1
    put(cache, ids(1, 2, 3, 4, 5))
    assert cache.num_cached_pages == 2
    put(cache, ids(1, 2))
    assert cache.num_cached_pages == 2
    assert pool.num_free + cache.num_cached_pages == pool.num_total


def test_namespaces_share_nothing_and_empty_ones_are_forgotten() -> None:
    cache, _ = make()
    put(cache, ids(*range(8)), "a")
    assert cache.match_length(ids(*range(8)), "a") == 8
    assert cache.match_length(ids(*range(8)), "b") == 0
    assert cache.match_length(ids(*range(8))) == 0
    cache.flush()
    assert not cache._roots


def test_locked_pages_are_not_evicted() -> None:
    cache, pool = make(9)
    put(cache, ids(*range(16)))
    match = cache.match(ids(*range(8)))
    cache.lock(match.node)
    assert cache.evict(100) == 2
    assert found(cache.match(ids(*range(16)))) == (8, 0)
    assert cache.allocate(7) is None
    assert cache.allocate(6) is not None
    cache.unlock(match.node)
    assert cache.evict(100) == 2
    assert pool.num_free == 2


def test_eviction_takes_no_more_than_asked_and_from_the_end_of_a_path() -> None:
    cache, _ = make()
    put(cache, ids(*range(16)))
    assert cache.evict(1) == 1
    assert cache.match_length(ids(*range(16))) == 12


def test_the_least_recently_used_path_goes_first() -> None:
    cache, _ = make()
    put(cache, ids(1, 1, 1, 1))
    put(cache, ids(2, 2, 2, 2))
    cache.match(ids(1, 1, 1, 1))
    cache.evict(1)
    assert cache.match_length(ids(1, 1, 1, 1)) == 4
    assert cache.match_length(ids(2, 2, 2, 2)) == 0


def test_a_use_of_a_path_is_a_use_of_all_its_nodes() -> None:
    cache, _ = make()
    put(cache, ids(0, 1, 2, 3, 4, 5, 6, 7))
    put(cache, ids(0, 1, 2, 3, 8, 9, 10, 11))
    node = cache.match(ids(0, 1, 2, 3, 4, 5, 6, 7)).node
    cache.lock(node)
    put(cache, ids(50, 51, 52, 53))
    cache.unlock(node)  # the sequence ends: it has used its whole path until now
    assert cache.mark_dead(ids(0, 1, 2, 3, 4, 5, 6, 7), num_live=4) == 1
    assert cache.mark_dead(ids(0, 1, 2, 3, 8, 9, 10, 11), num_live=4) == 1
    assert cache.evict(3) == 3
    assert cache.match_length(ids(0, 1, 2, 3)) == 4
    assert cache.match_length(ids(50, 51, 52, 53)) == 0


def test_dead_pages_go_first_then_the_farthest_next_use() -> None:
    cache, _ = make()
    for token in (1, 2, 3, 4):
        put(cache, ids(*[token] * P))
    assert cache.set_next_use(ids(*[1] * P), 100.0) == 1
    assert cache.set_next_use(ids(*[2] * P), 5.0) == 1
    assert cache.mark_dead(ids(*[4] * P)) == 1
    gone = []
    for _ in range(4):
        cache.evict(1)
        gone.append(next(t for t in (1, 2, 3, 4) if t not in gone and not cache.match_length(ids(*[t] * P))))
    assert gone == [4, 3, 1, 2]


def test_a_path_that_dies_while_it_is_used_goes_first_afterwards() -> None:
    cache, _ = make()
    put(cache, ids(1, 1, 1, 1))
    put(cache, ids(2, 2, 2, 2))
    node = cache.match(ids(2, 2, 2, 2)).node
    cache.lock(node)
    assert cache.mark_dead(ids(2, 2, 2, 2)) == 1
    cache.unlock(node)
    check_cache(cache)
    assert cache.evict(1) == 1
    assert cache.match_length(ids(1, 1, 1, 1)) == 4
    assert cache.match_length(ids(2, 2, 2, 2)) == 0


def test_a_dead_path_that_goes_on_is_alive_again() -> None:
    cache, pool = make()
    put(cache, ids(9, 9, 9, 9))
    put(cache, ids(1, 1, 1, 1))
    node = cache.match(ids(1, 1, 1, 1)).node
    cache.lock(node)
    cache.mark_dead(ids(1, 1, 1, 1))
    cache.insert(node, ids(2, 2, 2, 2), pool.allocate(1) or [])
    cache.unlock(node)
    check_cache(cache)
    assert cache.evict(1) == 1
    assert cache.match_length(ids(9, 9, 9, 9)) == 0
    assert cache.match_length(ids(1, 1, 1, 1, 2, 2, 2, 2)) == 8


def test_only_what_nobody_else_uses_of_a_path_dies_and_a_match_revives_it() -> None:
    cache, _ = make()
    put(cache, ids(*range(8)))
    put(cache, ids(0, 1, 2, 3, 9, 9, 9, 9))
    assert cache.mark_dead(ids(*range(8))) == 1
    assert cache.mark_dead(ids(*range(8)), num_live=8) == 0
    cache.match(ids(*range(8)))
    assert not any(node.is_dead for node in cache.nodes())


def test_the_rank_is_pluggable() -> None:
    pool = PagePool(16, P)
    cache = RadixCache(pool, rank=lru_rank)
    put(cache, ids(1, 1, 1, 1))
    put(cache, ids(2, 2, 2, 2))
    cache.mark_dead(ids(2, 2, 2, 2))
    cache.evict(1)
    assert cache.match_length(ids(1, 1, 1, 1)) == 0


def test_a_running_sequence_shares_what_it_has_and_goes_on_in_its_last_page() -> None:
    cache, pool = make()
    root = cache.root()
    cache.lock(root)
    pages = pool.allocate(2)
    assert pages is not None
    tail = cache.share(root, ids(0, 1, 2, 3, 4, 5), pages)
    assert tail is not None
    assert cache.evict(10) == 0
    match = cache.match(ids(0, 1, 2, 3, 4, 5, 6))
    assert (match.page_ids, match.tail_page, match.num_tail_tokens) == (pages[:1], pages[1], 2)
    node = cache.retake_tail(tail)
    assert node.end == 4
    check_cache(cache, [pages[1:]])
    assert cache.insert(node, ids(4, 5, 6, 7), pages[1:])[1] == []
    cache.unlock(node)
    check_cache(cache)
    assert cache.match_length(ids(*range(8))) == 8


def test_a_running_sequence_keeps_its_own_pages_where_the_tree_has_others() -> None:
    cache, pool = make()
    put(cache, ids(0, 1, 2, 3))
    root = cache.root()
    cache.lock(root)
    pages = pool.allocate(1)
    assert pages is not None
    assert cache.share(root, ids(0, 1, 2, 3), pages) is None
    check_cache(cache, [pages])


def test_a_node_that_others_lock_is_not_extended() -> None:
    cache, pool = make()
    put(cache, ids(0, 1, 2, 3))
    node = cache.match(ids(0, 1, 2, 3)).node
    cache.lock(node)
    cache.lock(node)
    pages = pool.allocate(1)
    assert pages is not None
    longer = cache.share(node, ids(4, 5, 6, 7), pages)
    assert longer is not None
    assert longer is not node
    assert node.end == 4


@pytest.mark.parametrize("damage", ["evictable", "cached", "lost", "twice", "queue", "late", "refs"])
def test_broken_accounting_is_reported(damage: str) -> None:
    cache, pool = make()
    put(cache, ids(*range(8)))
    put(cache, ids(*range(4), 9))
    node = max(cache.nodes(), key=lambda n: n.start)
    assert node.parent is not None
    if damage == "evictable":
        cache.num_evictable_pages += 1
    elif damage == "cached":
        cache.num_cached_pages -= 1
    elif damage == "lost":
        pool.allocate(1)
    elif damage == "twice":
        node.page_ids[0] = node.parent.page_ids[0]
    elif damage == "queue":
        cache.queue.discard(node)
    elif damage == "late":
        node.is_dead = True
    elif damage == "refs":
        node.refs = 1
    with pytest.raises(CacheIntegrityError):
        check_cache(cache)


# --- against a model


@dataclass(eq=False)
class Path:
    """A running sequence of the model."""

    salt: str
    tokens: TokenIds
    node: RadixNode
    page_ids: list[int]
    num_shared: int
    num_written: int


@dataclass
class Model:
    """What every position of every page holds: the salt and the tokens up to and with it."""

    content: dict[tuple[int, int], tuple[str, bytes]] = field(default_factory=dict)

    def write(self, path: Path, start: int, stop: int) -> None:
        for position in range(start, stop):
            where = path.page_ids[position // P], position % P
            self.content[where] = path.salt, path.tokens[: position + 1].tobytes()

    def check(self, salt: str, tokens: TokenIds, page_ids: list[int], num_tokens: int, first: int = 0) -> None:
        for position in range(first, first + num_tokens):
            where = page_ids[(position - first) // P], position % P
            assert self.content[where] == (salt, tokens[: position + 1].tobytes()), (position, where)


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=18).map(lambda t: np.asarray(t, dtype=np.int32))
SALTS = st.sampled_from(["", "a"])


class TreeAgainstModel(RuleBasedStateMachine):
    """Random sequences in a pool of 24 pages; every page that is found must hold what it is found for."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(25, P)
        self.cache = RadixCache(self.pool)
        self.log = self.cache.start_log()
        self.told: set[int] = set()  # the keys of cached prefixes, as a reader of the log knows them
        self.num_told = 0
        self.model = Model()
        self.running: list[Path] = []

    def longest(self, salt: str, tokens: TokenIds) -> int:
        """The longest cached prefix, by brute force over all nodes."""
        best = 0
        for node in self.cache.nodes():
            path = node.path()
            above = path[0].parent
            assert above is not None
            if above.key == salt.encode():
                cached = np.concatenate([part.tokens for part in path])
                length = min(len(cached), len(tokens))
                different = np.flatnonzero(cached[:length] != tokens[:length])
                best = max(best, int(different[0]) if len(different) else length)
        return best

    @rule(tokens=TOKENS, salt=SALTS)
    def start(self, tokens: TokenIds, salt: str) -> None:
        expected = self.longest(salt, tokens)
        assert self.cache.match_length(tokens, salt) == expected
        match = self.cache.match(tokens, salt)
        assert match.num_tokens + match.num_tail_tokens == expected
        assert match.node.end == match.num_tokens == P * len(match.page_ids)
        self.model.check(salt, tokens, match.page_ids, match.num_tokens)
        if match.tail_page is not None:
            self.model.check(salt, tokens, [match.tail_page], match.num_tail_tokens, match.num_tokens)
        self.cache.lock(match.node)
        own = self.cache.allocate(-(-len(tokens) // P) - len(match.page_ids))
        if own is None:
            self.cache.unlock(match.node)
            return
        pages = match.page_ids + own
        self.running.append(Path(salt, tokens, match.node, pages, len(match.page_ids), match.num_tokens))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 10), share_tail=st.booleans())
    def compute(self, data: st.DataObject, num_tokens: int, share_tail: bool) -> None:
        path = data.draw(st.sampled_from(self.running))
        self.take_back(path)
        start = path.num_written
        path.num_written = min(len(path.tokens), start + num_tokens)
        self.model.write(path, start, path.num_written)
        first = path.num_shared * P
        stop = path.num_written if share_tail else path.num_written // P * P
        if stop > first:
            pages = path.page_ids[path.num_shared : -(-stop // P)]
            node = self.cache.share(path.node, path.tokens[first:stop], pages)
            if node is not None:
                path.node, path.num_shared = node, -(-node.end // P)

    def take_back(self, path: Path) -> None:
        if len(path.node.tokens) % P:
            path.node = self.cache.retake_tail(path.node)
            path.num_shared -= 1

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def finish(self, data: st.DataObject, keep: bool) -> None:
        path = data.draw(st.sampled_from(self.running))
        self.running.remove(path)
        self.take_back(path)
        first, kept = path.num_shared, path.num_shared
        if keep and path.num_written > first * P:
            kept = -(-path.num_written // P)
            tokens = path.tokens[first * P : path.num_written]
            node, duplicates = self.cache.insert(path.node, tokens, path.page_ids[first:kept])
            self.pool.free(duplicates)
            self.model.check(path.salt, path.tokens, pages_of(node), node.end)
        self.pool.free(path.page_ids[kept:])
        self.cache.unlock(path.node)

    @rule(num_pages=st.integers(1, 8))
    def evict(self, num_pages: int) -> None:
        expected = min(num_pages, self.cache.num_evictable_pages)
        assert self.cache.evict(num_pages) == expected

    @rule(tokens=TOKENS, salt=SALTS, num_live=st.integers(0, 8))
    def mark_dead(self, tokens: TokenIds, salt: str, num_live: int) -> None:
        self.cache.mark_dead(tokens, salt, num_live)

    @rule(tokens=TOKENS, salt=SALTS, next_use=st.floats(0, 10))
    def set_next_use(self, tokens: TokenIds, salt: str, next_use: float) -> None:
        self.cache.set_next_use(tokens, next_use, salt)

    @rule(is_lost=st.booleans())
    def read_the_log(self, is_lost: bool) -> None:
        changes = self.log.take()
        if is_lost:
            changes = self.log.whole()
            assert changes.is_whole
            self.told = set(changes.added)
        elif changes is not None:
            assert changes.number == self.num_told + 1
            assert self.told.isdisjoint(changes.added)
            assert self.told.issuperset(changes.removed)
            self.told = (self.told - set(changes.removed)) | set(changes.added)
        if changes is not None:
            self.num_told = changes.number
        expected: set[int] = set()
        for node in self.cache.nodes():
            path = node.path()
            above = path[0].parent
            assert above is not None
            expected.update(prefix_keys(np.concatenate([part.tokens for part in path]), P, above.key.decode()))
        assert self.told == expected

    @invariant()
    def every_page_has_one_owner(self) -> None:
        check_cache(self.cache, [path.page_ids[path.num_shared :] for path in self.running])
        for path in self.running:
            shared = [page for node in path.node.path() for page in node.page_ids]
            assert shared == path.page_ids[: path.num_shared]
            self.model.check(path.salt, path.tokens, path.page_ids, path.num_written)

    def teardown(self) -> None:
        for path in self.running:
            self.take_back(path)
            self.pool.free(path.page_ids[path.num_shared :])
            self.cache.unlock(path.node)
        check_cache(self.cache)
        assert self.pool.num_free + self.cache.num_cached_pages == self.pool.num_total
        assert self.cache.num_evictable_pages == self.cache.num_cached_pages
        self.cache.flush()
        assert self.pool.num_free == self.pool.num_total
        assert not list(self.cache.nodes())


TestTreeAgainstModel = TreeAgainstModel.TestCase
TestTreeAgainstModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
