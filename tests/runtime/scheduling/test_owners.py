"""Owners of requests share the engine: no load of one keeps another from its part."""

from __future__ import annotations

import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ramet.runtime.scheduling.priority import OwnerService, ProgramService, Waiting, WaitingQueue, equal_parts
from ramet.runtime.testing.simulation import SimulatedEngine, assert_idle_and_whole, make_request, make_simulation
from ramet.runtime.types import Batch, RowOutput, Sequence


def waiting(number: int, owner: str, *, queued_s: float = 0.0, priority: int = 0) -> Waiting:
    return Waiting(Sequence(make_request(f"r{number}", [1], owner=owner, priority=priority)), queued_s, number)


def test_the_owner_with_the_least_service_goes_first_whatever_others_ask_for() -> None:
    owners = OwnerService()
    queue = WaitingQueue(ProgramService(), owners)
    for owner in ("big", "small"):
        owners.enter(owner)
    owners.add("big", 100)
    for number, (owner, queued_s, priority) in enumerate((("big", 0.0, -100), ("small", 5.0, 0), ("small", 4.0, 0))):
        queue.push(waiting(number, owner, queued_s=queued_s, priority=priority))
    order = []
    while (first := queue.pop()) is not None:
        order.append(first.number)
        owners.add(first.sequence.request.owner, 60)
    assert order == [2, 1, 0]


def test_owners_with_equal_service_go_in_order_of_arrival() -> None:
    owners = OwnerService()
    queue = WaitingQueue(ProgramService(), owners)
    for number, owner in enumerate("abc"):
        owners.enter(owner)
        queue.push(waiting(number, owner, queued_s=3.0 - number))
    assert [first.number for first in iter(queue.pop, None)] == [2, 1, 0]


def test_who_was_away_does_not_take_the_time_that_others_had_meanwhile() -> None:
    owners = OwnerService()
    owners.enter("there")
    owners.add("there", 5000)
    owners.enter("new")
    assert owners.attained("new") == 5000
    owners.add("new", 70)
    owners.leave("new")
    owners.enter("new")
    assert owners.attained("new") == 5070, "nor does it begin anew"


def test_owners_without_requests_are_forgotten_the_oldest_first() -> None:
    owners = OwnerService(max_kept=2)
    owners.enter("there")
    owners.add("there", 1)
    for owner in ("a", "b", "c"):
        owners.enter(owner)
        owners.add(owner, 10)
        owners.leave(owner)
    owners.enter("c")
    owners.enter("a")
    assert (owners.attained("c"), owners.attained("a")) == (11, 1)


def add(engine: SimulatedEngine, number: int, owner: str, num_prompt: int, max_tokens: int) -> Sequence:
    prompt = [(number * 7 + i * 13) % 49 + 1 for i in range(num_prompt)]
    return engine.scheduler.add(make_request(f"{owner}-{number}", prompt, max_tokens, owner=owner, cache_salt=owner))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from((1, 2, 8)), st.booleans())
def test_owners_that_always_have_requests_get_the_same_service(seed: int, max_running: int, overlap: bool) -> None:
    rng = random.Random(seed)
    engine = make_simulation(num_pages=200, max_running=max_running, overlap=overlap, clock=[0.0])
    owners = ("x", "y", "z")[: rng.choice((2, 3))]
    longest = {owner: rng.choice((4, 16, 40)) for owner in owners}
    waiting: dict[str, list[Sequence]] = {owner: [] for owner in owners}
    number = 0
    for _ in range(150):
        for owner in owners:
            waiting[owner] = [s for s in waiting[owner] if not s.is_finished]
            while len(waiting[owner]) < 2 * max_running:
                number += 1
                size = rng.randrange(1, longest[owner])
                waiting[owner].append(add(engine, number, owner, size, rng.randrange(1, longest[owner])))
        engine.step()
    service: dict[str, int] = dict.fromkeys(owners, 0)
    for sequence in engine.finished + [s for found in waiting.values() for s in found]:
        service[sequence.request.owner] += len(sequence.output_ids)
    least, most = min(service.values()), max(service.values())
    # equal in prompts and decoded tokens together; here decoded tokens alone, which are most of it
    assert most <= 3 * least + 200, service
    for owner in owners:
        for sequence in waiting[owner]:
            if not sequence.is_finished:
                engine.scheduler.abort(sequence.request.request_id)
    engine.drain()
    assert_idle_and_whole(engine)


def test_a_newcomer_gets_its_part_of_the_slots_at_once() -> None:
    engine = make_simulation(num_pages=4000, max_running=8, clock=[0.0], max_num_tokens_per_step=64)
    big = [add(engine, number, "big", 8, 1000) for number in range(40)]
    for _ in range(20):
        engine.step()
    small = [add(engine, number, "small", 8, 20) for number in range(6)]
    for _ in range(6):
        engine.step()
    running = [sequence.request.owner for sequence in small + big if sequence.slot is not None]
    assert running.count("small") == 4, "an equal share of eight slots"
    for _ in range(200):
        engine.step()
    assert all(sequence.is_finished for sequence in small)
    assert sum(sequence.num_preemptions for sequence in small) == 0
    assert sum(sequence.num_preemptions for sequence in big) <= 6
    for sequence in big:
        engine.scheduler.abort(sequence.request.request_id)
    assert_idle_and_whole(engine)


def test_a_newcomer_gets_its_part_of_the_pages_at_once() -> None:
    engine = make_simulation(num_pages=65, max_running=32, clock=[0.0], max_num_tokens_per_step=64)

    def ask(owner: str, number: int) -> Sequence:
        return engine.scheduler.add(make_request(f"{owner}{number}", [number] * 8, 25, owner=owner, cache_salt=owner))

    big = [ask("big", number) for number in range(40)]  # eight pages each
    engine.step()
    assert [sequence.slot is not None for sequence in big].count(True) == 8
    small = [ask("small", number) for number in range(6)]
    for _ in range(8):
        engine.step()
    assert [sequence.slot is not None for sequence in small].count(True) == 4, "an equal share of 64 pages"
    engine.run()
    assert max(sequence.num_preemptions for sequence in big) <= 1
    assert not any(sequence.num_preemptions for sequence in small)
    assert_idle_and_whole(engine)


def test_nobody_is_asked_for_pages_of_its_own_share() -> None:
    engine = make_simulation(num_pages=65, max_running=32, clock=[0.0], max_num_tokens_per_step=64)
    big = add(engine, 1, "big", 40, 200)  # all but five pages
    engine.step()
    small = add(engine, 2, "small", 8, 25)
    engine.run()
    assert big.num_preemptions == small.num_preemptions == 0, "it would begin anew for whoever comes next"
    assert_idle_and_whole(engine)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 100))
def test_equal_parts_are_those_of_giving_one_after_another(wanted: list[int], most: int) -> None:
    owners = {str(number): count for number, count in enumerate(wanted)}
    parts = equal_parts(owners, most)
    given = dict.fromkeys(owners, 1)
    for _ in range(most - len(owners)):
        hungry = [owner for owner in owners if given[owner] < owners[owner]]
        if hungry:
            given[min(hungry, key=lambda owner: given[owner])] += 1
    # rounds that are not finished may favour any of those who want more
    assert sum(parts.values()) == sum(given.values())
    assert sorted(parts.values()) == sorted(given.values())
    assert all(1 <= parts[owner] <= owners[owner] for owner in owners)


FIXED_S, ROW_S, TOKEN_S = 8e-3, 1e-3, 0.75e-3  # of a step: like SmolLM2's on two cores


def seconds_of(batch: Batch) -> float:
    return FIXED_S + ROW_S * batch.num_decode + TOKEN_S * (batch.num_tokens - batch.num_decode)


class Clocked:
    """A scheduler whose steps take time on a machine that is `slow` times as slow; there is no model."""

    def __init__(self, slow: float = 1.0, num_slots: int = 64) -> None:
        self.clock = [0.0]
        self.slow = slow
        self.scheduler = make_simulation(
            num_pages=20_000,
            page_size=16,
            clock=self.clock,
            max_running=num_slots,
            max_num_tokens_per_step=2048,
            max_step_s=0.06 * slow,
            first_mixed_tokens=64,
        ).scheduler
        self.num_tokens: Counter[str] = Counter()
        self.steps: list[tuple[Batch, float]] = []
        self._rng = random.Random(7)
        self._num = 0

    def add(self, owner: str, num_prompt: int, max_tokens: int) -> Sequence:
        self._num += 1
        prompt = [self._rng.randrange(10, 1 << 20) for _ in range(num_prompt)]
        return self.scheduler.add(make_request(f"{owner}{self._num}", prompt, max_tokens, owner=owner))

    def step(self) -> list[Sequence]:
        """Run one step, and return the sequences that it ended."""
        batch = self.scheduler.schedule()
        assert batch is not None
        seconds = self.slow * seconds_of(batch)
        self.clock[0] += seconds
        self.steps.append((batch, seconds))
        self.scheduler.note_time(batch, seconds)
        self.num_tokens.update(item.sequence.request.owner for item in batch.items if item.num_samples)
        outputs = [RowOutput((7,)) if item.num_samples else RowOutput() for item in batch.items]
        return [one for one in self.scheduler.finish_step(batch.items, outputs) if one.is_finished]


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.sampled_from("abcde"), st.integers(1, 40), min_size=2))
def test_a_step_is_no_longer_than_each_owner_may_have_it_and_nobody_starves(rows: dict[str, int]) -> None:
    engine = Clocked(num_slots=256)
    owners = [owner for owner, count in rows.items() for _ in range(count)]
    sequences = []
    for owner in random.Random(1).sample(owners, len(owners)):  # one after another, so the costs of steps are learned
        sequences.append(engine.add(owner, 4, 1000))
        engine.step()
    while any(not sequence.output_ids for sequence in sequences):
        engine.step()
    engine.steps.clear()
    engine.num_tokens.clear()
    before = {sequence: len(sequence.output_ids) for sequence in sequences}
    for _ in range(200):
        engine.step()
    num_owners, fewest = len(rows), min(rows.values())
    longest_s = num_owners * (FIXED_S + ROW_S * fewest)
    assert max(seconds for _, seconds in engine.steps) <= 1.2 * longest_s, "as far as costs are known"
    for owner, count in rows.items():
        if count == fewest:
            assert engine.num_tokens[owner] == 200 * count, "who has the fewest rows is part of every step"
        written = [len(s.output_ids) - before[s] for s in sequences if s.request.owner == owner]
        assert max(written) - min(written) <= 1, "rows of one owner skip steps in turn"
    # together they write at least so much of what they would without shares
    whole = sum(rows.values()) / (FIXED_S + ROW_S * sum(rows.values()))
    found = sum(engine.num_tokens.values()) / sum(seconds for _, seconds in engine.steps)
    assert found >= 0.95 * (1 - 1 / num_owners) * whole


def test_who_is_alone_has_every_row_in_every_step() -> None:
    engine = Clocked()
    sequences = [engine.add("x", 4, 100) for _ in range(50)]
    other = engine.add("y", 4, 3)
    while not other.is_finished:
        engine.step()
    engine.steps.clear()
    while not any(sequence.is_finished for sequence in sequences):
        engine.step()
    assert {batch.num_decode for batch, _ in engine.steps} == {50}


def latencies(slow: float, num_others: int) -> list[float]:
    """Seconds of the small owner's requests, beside so many of another one at any time."""
    rng, others = random.Random(3), random.Random(4)
    engine = Clocked(slow)
    arrival_s, taken, live = rng.expovariate(0.4), list[float](), 0
    arrived: dict[Sequence, float] = {}
    while engine.clock[0] < 200 * slow:
        while arrival_s <= engine.clock[0]:
            arrived[engine.add("small", rng.randrange(20, 120), rng.randrange(20, 120))] = arrival_s
            arrival_s += rng.expovariate(0.4)
        while live < num_others:
            engine.add("big", others.randrange(20, 120), others.randrange(20, 120))
            live += 1
        if not engine.scheduler.has_work:
            engine.clock[0] = arrival_s
            continue
        for ended in engine.step():
            if ended in arrived:
                taken.append(engine.clock[0] - arrived[ended])
            else:
                live -= 1
    return sorted(taken)


@pytest.mark.parametrize("num_others", [10, 60])
def test_the_load_of_a_neighbour_costs_a_fair_share_and_not_more(num_others: int) -> None:
    """Beside ten times its own load and more, the small owner waits about as long as alone with half of the time."""
    alone, beside = latencies(2.0, 0), latencies(1.0, num_others)
    p95 = [found[len(found) * 95 // 100] for found in (alone, beside)]
    print(f"p95: {p95[0]:.2f} s alone with half of the time, {p95[1]:.2f} s beside {num_others} requests of another")
    assert p95[1] <= 1.3 * p95[0]
