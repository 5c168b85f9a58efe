"""Where requests go."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from ramet.errors import EngineStopped
from ramet.runtime.cache.prefix_log import CacheChanges, prefix_keys
from ramet.runtime.cluster.router import Breaker, Placement, RoutedRequest, Router, RouterConfig

P = 16
ALL = 64  # draws that make sure that every replica is looked at


def prompt(*tokens: int, pages: int = 8) -> RoutedRequest:
    ids = np.resize(np.asarray(tokens, dtype=np.int32), pages * P + 1)
    return RoutedRequest(len(ids), prefix_keys(ids, P))


def member(group: str, work: RoutedRequest) -> RoutedRequest:
    return RoutedRequest(work.num_tokens, work.keys, group)


def make(count: int, **values: object) -> Router:
    router = Router(RouterConfig(**{"num_drawn": ALL, **values}))  # type: ignore[arg-type]
    for replica in range(count):
        router.add(replica)
        assert router.apply(replica, CacheChanges(1, is_whole=True))
    return router


def cache(router: Router, replica: int, work: RoutedRequest, number: int = 2) -> None:
    assert router.apply(replica, CacheChanges(number, list(work.keys)))


def load(router: Router, replica: int, num_tokens: int) -> Placement:
    """Let a prompt of so many tokens wait on a replica."""
    others = {other for other in router.replicas if other != replica}
    return router.place(RoutedRequest(num_tokens), 0.0, avoid=others)


def run(router: Router, work: RoutedRequest, now_s: float = 0.0) -> Placement:
    """Place a request and let it finish at once."""
    placement = router.place(work, now_s)
    router.begun(placement, now_s)
    router.finished(placement)
    return placement


def test_a_request_goes_where_its_prefix_is() -> None:
    router = make(4)
    cache(router, 2, prompt(1))
    placement = router.place(prompt(1), 0.0)
    assert (placement.replica, placement.num_cached, placement.num_lacking) == (2, 8 * P, 1)


def test_the_last_token_is_never_counted_as_cached() -> None:
    router = make(1)
    ids = np.arange(2 * P, dtype=np.int32)
    work = RoutedRequest(len(ids), prefix_keys(ids, P))
    cache(router, 0, work)
    assert router.place(work, 0.0).num_cached == 2 * P - 1


def test_without_a_cached_prefix_the_less_busy_one_gets_it() -> None:
    router = make(2)
    first = router.place(prompt(1), 0.0)
    assert router.place(prompt(2), 0.0).replica != first.replica


def test_requests_that_wait_for_the_same_prefix_wait_where_it_is_being_computed() -> None:
    router = make(8)
    placements = [router.place(prompt(1), 0.0) for _ in range(4)]
    assert len({placement.replica for placement in placements}) == 1
    assert [placement.num_lacking for placement in placements] == [8 * P + 1, 1, 1, 1]


def test_a_busy_holder_gets_company_when_computing_again_is_cheaper() -> None:
    router = make(4)
    cache(router, 0, prompt(1))
    waiting = load(router, 0, 10 * 8 * P)  # ten times the prefix waits there
    moved = router.place(prompt(1), 0.0)
    assert moved.replica != 0
    assert router.place(prompt(1), 0.0).replica == moved.replica  # the copy is used from now on
    router.finished(waiting)
    assert router.place(RoutedRequest(8 * P + 65, prompt(1).keys), 0.0).replica == 0


def test_a_group_stays_together_unless_moving_pays() -> None:
    router = make(8)
    home = run(router, member("chat", prompt(1))).replica
    for turn in range(2, 6):
        cache(router, home, prompt(1, pages=turn), turn)
        assert run(router, member("chat", prompt(1, pages=turn + 1))).replica == home
    waiting = load(router, home, 1_000_000)
    moved = run(router, member("chat", prompt(1, pages=8))).replica
    assert moved != home
    router.finished(waiting)
    cache(router, moved, prompt(1, pages=8))
    assert run(router, member("chat", prompt(1, pages=9))).replica == moved


def test_a_group_goes_home_even_where_nothing_of_it_is_cached() -> None:
    router = make(8, num_drawn=1)
    home = run(router, member("a program", prompt(3))).replica
    assert {run(router, member("a program", prompt(n))).replica for n in range(4, 24)} == {home}


def test_running_sequences_make_a_replica_dearer() -> None:
    router = make(2)
    for _ in range(200):
        router.begun(load(router, 0, 1), 0.0)
    assert {run(router, prompt(n)).replica for n in range(10)} == {1}


def test_a_prompt_that_was_cached_says_nothing_about_speed() -> None:
    router = make(2)
    cache(router, 0, prompt(1))
    slow = router.place(prompt(1), 0.0)
    router.begun(slow, 5.0)
    router.finished(slow)
    assert run(router, prompt(1), 6.0).replica == slow.replica == 0


def test_a_slow_replica_gets_less() -> None:
    router = make(2)
    now_s, shares = 0.0, Counter[int]()
    for n in range(200):
        placement = router.place(prompt(n), now_s)
        shares[placement.replica] += 1
        now_s += 0.1 if placement.replica == 0 else 0.01
        router.begun(placement, now_s)
        router.finished(placement)
    assert shares[1] > 150


def test_one_slow_start_does_not_keep_work_away() -> None:
    router = make(2)
    first = router.place(prompt(1000), 0.0)
    router.begun(first, 30.0)  # code was compiled
    router.finished(first)
    shares = Counter(router.place(prompt(n), 30.0).replica for n in range(20))
    assert min(shares[0], shares[1]) >= 9


def test_a_failing_replica_is_left_out_and_tried_again_later() -> None:
    router = make(2, max_failures=2, pause_s=1.0)
    cache(router, 0, prompt(1))
    for _ in range(2):
        router.failed(router.place(prompt(1), 0.0), 0.0)
    assert run(router, prompt(1), 0.5).replica == 1
    trial = router.place(prompt(1), 1.5)
    assert trial.replica == 0
    assert run(router, prompt(1), 1.5).replica == 1  # one on trial at a time
    router.begun(trial, 1.6)
    assert run(router, prompt(1), 1.7).replica == 0


def test_a_failed_trial_doubles_the_pause() -> None:
    breaker = Breaker(1, 1.0, 3.0)
    breaker.note_failure(0.0)
    assert [breaker.allows(t) for t in (0.0, 0.9, 1.0)] == [False, False, True]
    breaker.note_sent(1.0)
    assert not breaker.allows(1.1)
    breaker.note_failure(1.1)
    assert [breaker.allows(t) for t in (3.0, 3.2)] == [False, True]
    breaker.note_sent(3.2)
    assert [breaker.allows(t) for t in (6.1, 6.3)] == [False, True]  # nothing was heard of it
    breaker.note_success()
    assert breaker.allows(0.0)


def test_what_failed_once_goes_elsewhere_and_nowhere_left_is_an_error_that_says_why() -> None:
    router = make(2)
    cache(router, 0, prompt(1))
    assert router.place(prompt(1), 0.0, avoid={0}).replica == 1
    with pytest.raises(EngineStopped, match=r"none of 2 replicas .* 2 have failed it already; retry later"):
        router.place(prompt(1), 0.0, avoid={0, 1})
    router.drain(0)
    router.drain(1)
    with pytest.raises(EngineStopped, match="2 are drained"):
        router.place(prompt(1), 0.0)
    with pytest.raises(EngineStopped, match="none of 0 replicas"):
        Router().place(prompt(1), 0.0)


def test_a_drained_replica_keeps_what_it_has_and_gets_nothing_new() -> None:
    router = make(2)
    cache(router, 0, prompt(1))
    placement = router.place(member("chat", prompt(1)), 0.0)
    router.drain(placement.replica)
    assert run(router, member("chat", prompt(1))).replica == 1
    router.begun(placement, 0.1)
    router.finished(placement)
    assert router.load(0) == (0, 0)
    router.add(0)  # it was restarted
    assert router.apply(0, CacheChanges(1, list(prompt(1).keys), is_whole=True))
    assert router.place(prompt(1), 0.0).replica == 0


def test_a_restarted_replica_has_nothing() -> None:
    router = make(2)
    cache(router, 0, prompt(1))
    late = router.place(prompt(1), 0.0)
    router.add(0)
    assert router.index.num_keys == 0
    router.begun(late, 0.1)  # words about the old one
    router.finished(late)
    assert router.load(0) == (0, 0)
    assert not router.apply(0, CacheChanges(3, list(prompt(1).keys)))
    assert router.apply(0, CacheChanges(1, list(prompt(1).keys), is_whole=True))


def test_a_second_router_that_hears_the_events_decides_alike() -> None:
    first, second = make(16), make(16)
    for n in range(16):
        for router in (first, second):
            cache(router, n, prompt(n))
    third = make(0)
    for n in range(16):
        third.add(n)
        assert third.apply(n, CacheChanges(2, list(prompt(n).keys), is_whole=True))  # it was started later
    for n in range(16):
        assert run(first, prompt(n)).replica == run(second, prompt(n)).replica == run(third, prompt(n)).replica == n


def test_a_placement_among_a_thousand_looks_at_few() -> None:
    router = make(1_000, num_drawn=2)
    shared = prompt(1)
    for replica in range(1_000):
        cache(router, replica, shared)
    looked: set[int] = set()
    seconds = router.seconds

    def counted(state: Any, num_tokens: float, of_all: float) -> float:  # Any: the router's view of a replica
        looked.add(id(state))
        return seconds(state, num_tokens, of_all)

    router.seconds = counted  # type: ignore[method-assign]
    for _ in range(20):
        looked.clear()
        run(router, shared)
        assert len(looked) <= 2 + 3


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["place", "begin", "end", "fail", "restart", "cache", "drain"]), st.integers(0, 3)),
    max_size=60,
)


@settings(deadline=None, max_examples=100)
@given(actions=ACTIONS)
def test_accounts_are_empty_when_all_has_ended(actions: list[tuple[str, int]]) -> None:
    router = make(4, max_failures=1_000)
    live: list[Placement] = []
    for number, (action, n) in enumerate(actions):
        if action == "place":
            live.append(router.place(member(f"g{n}", prompt(n)), float(number)))
        elif action == "restart":
            router.add(n)
            assert router.apply(n, CacheChanges(1, is_whole=True))
        elif action == "cache":
            assert router.apply(n, CacheChanges(10 + number, list(prompt(n).keys), is_whole=True))
        elif action == "drain" and n:
            router.drain(n)
        elif live:
            placement = live[n % len(live)]
            if action == "begin":
                router.begun(placement, float(number))
            elif action == "end":
                router.finished(live.pop(n % len(live)))
            elif action == "fail":
                router.failed(live.pop(n % len(live)), float(number))
    for placement in live:
        router.finished(placement)
    for replica in range(4):
        assert router.load(replica) == (0, 0)
        router.add(replica)  # its cache is empty
    assert {router.place(prompt(n), 100.0, avoid={1, 2, 3}).num_cached for n in range(4)} == {0}
