"""How many replicas there should be."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import given

from ramet.runtime.cluster.autoscaler import Autoscaler, Load, ScalingRule

RULE = ScalingRule(1, 4, ttft_s=1.0, up_s=5.0, down_s=30.0)


def follow(rule: ScalingRule, count: int, load: Callable[[int, int], Load], seconds: int) -> list[int]:
    """Ask every second; a change is done at once. load: of a second and a number of replicas."""
    scaler, counts = Autoscaler(rule), [count]
    for second in range(seconds):
        counts.append(scaler.decide(float(second), counts[-1], load(second, counts[-1])))
    return counts


def served(rates: list[float], *, each: float = 10.0) -> Callable[[int, int], Load]:
    """Requests arrive at a rate, take a second, and a replica begins `each` of them a second; the others queue."""
    queue = 0.0

    def load(second: int, count: int) -> Load:
        nonlocal queue
        rate, most = rates[second], each * count
        queue = max(queue + rate - most, 0.0)
        return Load(int(min(rate, most) + queue), queue, 0.1, 0.05 + queue / most)

    return load


def test_a_load_that_rises_and_falls_is_followed_up_and_down_without_swinging() -> None:
    rates = [5.0] * 60 + [25.0] * 300 + [5.0] * 300
    counts = follow(RULE, 1, served(rates), len(rates))
    assert set(counts[:61]) == {1}
    assert max(counts) in (3, 4)
    assert set(counts[200:360]) <= {3, 4}, "it stays while the load lasts; three are enough"
    assert counts[-1] == 1
    assert sum(before != after for before, after in pairwise(counts)) <= 6


def test_one_bad_moment_changes_nothing() -> None:
    counts = follow(RULE, 2, lambda second, count: Load(10, ttft_s=9.0 if second % 5 == 0 else 0.1), 100)
    assert max(counts) == 2


def test_each_of_the_three_signs_of_too_much_adds_a_replica() -> None:
    for load in (Load(4, ttft_s=1.1), Load(40, waiting=30.0), Load(4, kv_usage=0.95)):
        counts = follow(RULE, 2, lambda second, count, load=load: load, 6)  # type: ignore[misc]
        assert (counts[:6], counts[6] > 2) == ([2] * 6, True), load


def test_after_a_change_it_rests() -> None:
    counts = follow(RULE, 1, lambda second, count: Load(1, ttft_s=5.0), 12)
    assert counts == [1] * 6 + [2] * 6 + [3]
    counts = follow(RULE, 3, lambda second, count: Load(0), 100)
    assert (counts[30], counts[31], counts[60], counts[61], counts[-1]) == (3, 2, 2, 1, 1)


def test_what_a_replica_bore_is_remembered_and_slowly_forgotten() -> None:
    scaler = Autoscaler(RULE)
    for second in range(6):
        scaler.decide(float(second), 1, Load(10, ttft_s=2.0))
    assert scaler.bearable == 10.0
    wanted = [scaler.decide(6.0 + second, 3, Load(15)) for second in range(30)]
    assert set(wanted) == {3}, "two would be at 75 % of what they bear"
    for second in range(1_000):
        scaler.decide(36.0 + second, 3, Load(15))
    assert scaler.bearable > 20.0


LOADS = st.builds(Load, st.integers(0, 500), st.floats(0, 300), st.floats(0, 1), st.floats(0, 20))


@given(loads=st.lists(LOADS, max_size=200), start=st.integers(1, 4))
def test_the_number_stays_within_its_limits_and_falls_one_by_one(loads: list[Load], start: int) -> None:
    counts = follow(RULE, start, lambda second, count: loads[second], len(loads))
    for before, after in pairwise(counts):
        assert 1 <= after <= 4
        assert after >= before - 1
