import random

import numpy as np

from ramet.runtime.cache.eviction import EvictionQueue, lru_rank
from ramet.runtime.cache.node import RadixNode
from ramet.runtime.types import TokenIds

NONE: TokenIds = np.empty(0, dtype=np.int32)


def nodes(count: int) -> list[RadixNode]:
    root = RadixNode(None, b"", 0, NONE, [])
    made = [RadixNode(root, b"", 0, NONE, []) for _ in range(count)]
    for index, node in enumerate(made):
        node.last_used = index
    return made


def test_the_lowest_rank_comes_first_even_where_ranks_rose_since() -> None:
    queue = EvictionQueue(lru_rank)
    made = nodes(4)
    for node in made:
        queue.push(node)
    made[0].last_used = 10
    made[2].last_used = 11
    popped = [queue.pop() for _ in range(5)]
    assert popped == [made[1], made[3], made[0], made[2], None]


def test_a_locked_node_is_dropped_and_may_come_back() -> None:
    queue = EvictionQueue(lru_rank)
    first, second = nodes(2)
    queue.push(first)
    queue.push(second)
    first.refs = 1
    assert queue.pop() is second
    assert queue.pop() is None
    first.refs = 0
    queue.push(first)
    assert queue.pop() is first


def test_a_rank_that_fell_is_seen_once_it_is_renewed() -> None:
    queue = EvictionQueue()
    made = nodes(3)
    for node in made:
        queue.push(node)
    made[2].is_dead = True
    assert queue.late() == [made[2]]
    queue.renew(made[2])
    assert queue.late() == []
    assert queue.pop() is made[2]
    assert len(queue) == 2


def test_a_discarded_node_does_not_come() -> None:
    queue = EvictionQueue()
    (node,) = nodes(1)
    queue.push(node)
    queue.push(node)
    assert len(queue) == 1
    queue.discard(node)
    queue.discard(node)
    assert queue.pop() is None


def test_the_heap_stays_as_large_as_its_candidates() -> None:
    queue = EvictionQueue()
    made = nodes(20)
    for node in made:
        queue.push(node)
    rng = random.Random(0)
    for _ in range(10_000):
        node = rng.choice(made)
        node.is_dead = not node.is_dead
        queue.renew(node)
    assert len(queue) == 20
    assert len(queue._heap) <= 2 * 20 + 65
