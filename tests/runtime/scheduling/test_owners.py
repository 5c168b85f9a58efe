"""Owners of requests share the engine: no load of one keeps another from its part."""

from __future__ import annotations

import random

import hypothesis.strategies as st
from hypothesis import given, settings

from ramet.runtime.scheduling.priority import OwnerService, ProgramService, Waiting, WaitingQueue
from ramet.runtime.testing.simulation import SimulatedEngine, assert_idle_and_whole, make_request, make_simulation
from ramet.runtime.types import Sequence


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


def latencies(num_slots: int, seed: int, big_load: float) -> list[int]:
    """Steps from arrival to end of the small owner's requests, beside `big_load` requests of another one a step."""
    rng = random.Random(seed)
    engine = make_simulation(num_pages=700, max_running=num_slots, clock=[0.0], max_num_tokens_per_step=256)
    arrived: dict[Sequence, int] = {}
    taken: list[int] = []
    others = random.Random(seed + 1)
    for step in range(1500):
        if rng.random() < 0.1:
            arrived[add(engine, step, "small", rng.randrange(4, 40), rng.randrange(10, 60))] = step
        for index in range(int(big_load + others.random())):
            if engine.scheduler.num_waiting < 500:
                add(engine, 10 * step + index, "big", others.randrange(4, 40), others.randrange(10, 60))
        engine.step()
        taken += [step - arrived.pop(sequence) for sequence in engine.finished if sequence in arrived]
        engine.finished.clear()
    return sorted(taken)


def test_the_load_of_a_neighbour_costs_a_fair_share_and_not_more() -> None:
    """Beside ten times its own load, the small owner waits about as long as alone with half of the slots."""
    alone, beside = latencies(8, 1, 0.0), latencies(16, 1, 1.0)
    assert len(alone) > 100
    assert abs(len(alone) - len(beside)) < 10
    p95 = [found[len(found) * 95 // 100] for found in (alone, beside)]
    print(f"p95 in steps: {p95[0]} alone with half of the slots, {p95[1]} beside ten times the load")
    assert p95[1] <= 1.3 * p95[0]
