"""Owners of requests share the engine: no load of one keeps another from its part."""

from __future__ import annotations

import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ramet.runtime.scheduling.priority import MAX_BEHIND_S, Flow, Flows, Waiting, WaitingQueue, equal_parts
from ramet.runtime.testing.simulation import SimulatedEngine, assert_idle_and_whole, make_request, make_simulation
from ramet.runtime.types import Batch, RowOutput, Sequence


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Served:
    """A queue and its flows, on a machine whose token takes a millisecond."""

    def __init__(self, max_kept: int = 4096) -> None:
        self.clock = Clock()
        self.flows = Flows(self.clock, token_s=1e-3, max_kept=max_kept)
        self.queue = WaitingQueue(self.flows)
        self.num = 0

    def ask(self, owner: str, task: str = "", *, queued_s: float | None = None, priority: int = 0) -> Waiting:
        self.num += 1
        request = make_request(f"r{self.num}", [1], owner=owner, task=task, priority=priority)
        self.flows.enter(request)
        found = Waiting(Sequence(request), self.clock() if queued_s is None else queued_s, self.num)
        self.queue.push(found)
        return found

    def serve(self, num_tokens: int) -> Waiting:
        """Take the first request, serve it so many tokens, and end it."""
        found = self.queue.pop()
        assert found is not None
        found.is_removed = True
        self.clock.now_s += num_tokens / 1000
        task = self.flows.task(found.sequence.request)
        self.flows.add(task, num_tokens)
        self.flows.leave(task)
        return found


def test_the_owner_with_the_least_service_goes_first_whatever_others_ask_for() -> None:
    served = Served()
    served.ask("big", "all", priority=-100)
    served.serve(300)
    big = served.ask("big", "all", queued_s=0.0, priority=-100)
    later, sooner = served.ask("small", queued_s=0.2), served.ask("small", queued_s=0.1)
    assert [served.serve(1) for _ in range(3)] == [sooner, later, big]


def test_owners_with_equal_service_go_in_order_of_arrival() -> None:
    served = Served()
    asked = [served.ask(owner, queued_s=3.0 - number) for number, owner in enumerate("abc")]
    assert [served.queue.pop() for _ in range(4)] == [*reversed(asked), None]


def test_who_was_away_does_not_take_the_time_that_others_had_meanwhile() -> None:
    served = Served()
    for _ in range(40):
        served.ask("there")
    for _ in range(20):
        served.serve(100)
    for _ in range(20):
        served.ask("new")
    owners = Counter(served.serve(100).sequence.request.owner for _ in range(20))
    assert owners["there"] >= 8, "the new one has no claim to the time before it came"


def test_who_comes_back_is_as_far_behind_as_before() -> None:
    served = Served()
    served.ask("new")
    served.ask("other")
    served.serve(2000)
    assert served.serve(1).sequence.request.owner == "other"
    served.ask("new")
    served.ask("other")
    assert served.serve(1).sequence.request.owner == "other"


def test_flows_without_requests_are_forgotten_the_oldest_first() -> None:
    served = Served(max_kept=2)
    for owner in "abc":
        served.ask(owner)
        served.serve(10)
    assert list(served.flows.root.below) == ["c"], "each has one task"
    assert served.flows.num_tasks == served.flows.num_owners == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("xy"), st.sampled_from("abc"), st.integers(1, 400)), min_size=1, max_size=12),
    st.integers(2, 60),
)
def test_flows_that_always_wait_are_served_alike_up_to_two_turns(flows: list[tuple[str, str, int]], num: int) -> None:
    """Owners among each other, and the tasks of each; a request takes up to 0.4 s, and a turn is 0.25 s."""
    served = Served()
    sizes = {flow[:2]: flow[2] for flow in flows}
    for owner, task in sizes:
        for _ in range(2):
            served.ask(owner, task)
    got = Counter[tuple[str, ...]]()
    for _ in range(num * len(sizes)):
        first = served.queue.pop()
        assert first is not None
        served.queue.push(first)
        request = first.sequence.request
        size = sizes[request.owner, request.task]
        assert served.serve(size) is first
        got[request.owner, request.task] += size
        got[(request.owner,)] += size
        served.ask(request.owner, request.task)
    levels: list[list[tuple[str, ...]]] = [[flow for flow in got if len(flow) == 1]]
    levels += [[flow for flow in sizes if flow[0] == owner] for owner in "xy"]
    for level in levels:
        if level:
            spread = max(got[one] for one in level) - min(got[one] for one in level)
            assert spread <= 2 * (250 + 400), (level, got)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 400), st.integers(1, 20))
def test_a_newcomer_waits_for_one_turn_of_each_other_task_at_most(num_before: int, size: int, num_tasks: int) -> None:
    served = Served()
    for number in range(num_tasks):
        for _ in range(200):
            served.ask("", f"program {number}")
    for _ in range(min(num_before, 100 * num_tasks)):
        served.serve(size)
    served.clock.now_s += 1e-6
    came_s, newcomer = served.clock(), served.ask("", "newcomer")
    num_served = Counter[str]()
    while (found := served.serve(size)) is not newcomer:
        num_served[found.sequence.request.task] += size
    assert all(count <= 250 + size for count in num_served.values())
    assert served.clock() - came_s <= num_tasks * (250 + 2 * size) / 1000


def test_what_belongs_together_runs_together_for_its_turn() -> None:
    """So that a prefix that its requests share is still cached, and equal tasks do not all end at the end."""
    served = Served()
    for task in ("a", "b", "c"):
        for _ in range(4):
            served.ask("", task)
    assert "".join(served.serve(50).sequence.request.task for _ in range(12)) == "aaaabbbbcccc"


def test_a_task_that_was_far_ahead_waits_no_longer_than_its_bound() -> None:
    served = Served()
    served.ask("", "big")
    served.ask("", "big")
    served.serve(1_000_000)
    asked_s = served.clock()
    num_others = 0
    while True:
        served.ask("")
        num_others += 1
        if served.serve(100).sequence.request.task == "big":
            break
    assert served.clock() - asked_s <= MAX_BEHIND_S + 0.2
    assert num_others > 200


def test_a_decision_is_as_quick_beside_a_hundred_thousand_requests() -> None:
    """Counted in looks at flows' keys, not in seconds."""
    served = Served()
    rng = random.Random(1)
    for number in range(20_000):
        served.ask(rng.choice("xyz"), f"{number % 5000}", queued_s=rng.random())
    looks = 0
    key_of = served.queue._key_of_flow

    def counted(flow: Flow) -> tuple[float, int]:
        nonlocal looks
        looks += 1
        return key_of(flow)

    served.queue._key_of_flow = counted  # type: ignore[method-assign]
    most = 0
    for _ in range(2000):
        before = looks
        served.serve(rng.randrange(1, 400))
        most = max(most, looks - before)
    assert looks <= 8 * 2000
    assert most <= 40


def run_steps(engine: SimulatedEngine, clock: list[float], num_steps: int, step_s: float) -> None:
    """Run so many steps, each of which takes so long."""
    engine.step_s = lambda batch: step_s
    for _ in range(num_steps):
        engine.step()
        clock[0] += step_s


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
    clock = [0.0]
    engine = make_simulation(num_pages=65, max_running=32, clock=clock, max_num_tokens_per_step=64)

    def ask(owner: str, number: int) -> Sequence:
        return engine.scheduler.add(make_request(f"{owner}{number}", [number] * 8, 25, owner=owner, cache_salt=owner))

    big = [ask("big", number) for number in range(40)]  # eight pages each
    run_steps(engine, clock, 1, 0.3)
    assert [sequence.slot is not None for sequence in big].count(True) == 8
    small = [ask("small", number) for number in range(6)]
    run_steps(engine, clock, 16, 0.3)
    assert [sequence.slot is not None for sequence in small].count(True) == 4, "an equal share of 64 pages"
    engine.run()
    assert max(sequence.num_preemptions for sequence in big) <= 1
    # where there was room it took more than its share for a while, and gave that back
    assert sum(sequence.num_preemptions for sequence in small) <= 1
    assert_idle_and_whole(engine)


def test_a_task_gets_its_part_of_the_slots_of_its_owner_and_not_of_others() -> None:
    clock = [0.0]
    engine = make_simulation(num_pages=4000, max_running=8, clock=clock, max_num_tokens_per_step=64)

    def ask(owner: str, task: str, number: int) -> Sequence:
        prompt = [(number * 7 + i * 13) % 49 + 1 for i in range(8)]
        request = make_request(f"{owner}-{task}-{number}", prompt, 200, owner=owner, task=task, cache_salt=owner)
        return engine.scheduler.add(request)

    big = [ask("x", "program", number) for number in range(40)]
    other = [ask("y", "program", number) for number in range(40)]
    run_steps(engine, clock, 20, 0.1)
    small = [ask("x", "chat 0", 100)]
    run_steps(engine, clock, 8, 0.1)
    running = [sequence.request.task for sequence in small + big if sequence.slot is not None]
    assert running.count("chat 0") == 1
    assert [sequence.slot is not None for sequence in other].count(True) == 4, "the other owner keeps its half"
    assert running.count("program") == 3
    for sequence in [*big, *other, *small]:
        if not sequence.is_finished:
            engine.scheduler.abort(sequence.request.request_id)
    assert_idle_and_whole(engine)


@pytest.mark.parametrize("max_tokens", [1, 40])
def test_a_small_request_beside_twenty_thousand_branches_is_answered_soon(max_tokens: int) -> None:
    """The program waits in front of it, holds all slots, and its owner is the same."""
    engine = Clocked()
    prefix = list(range(50, 114))

    def ask(task: str, number: int, max_tokens: int) -> Sequence:
        prompt = [*prefix, *(10 + (number * 7919 + i * 104729) % 50_000 for i in range(12))]
        return engine.scheduler.add(make_request(f"{task}-{number}", prompt, max_tokens, task=task))

    branches = [ask("program", number, max_tokens) for number in range(20_000)]
    for _ in range(60):
        engine.step()
    came_s = engine.clock[0]
    small = ask("chat", 1 << 20, 10)
    while not small.output_ids:
        engine.step()
    assert engine.clock[0] - came_s <= 1.0
    while not small.is_finished:
        engine.step()
    assert engine.clock[0] - came_s <= 10 * 0.2 + 1.0
    assert small.num_preemptions == 0
    assert sum(branch.num_preemptions for branch in branches) <= 1


def test_a_stream_sees_no_long_gap_beside_hundreds_of_rows_and_they_lose_little() -> None:
    engine = Clocked(num_slots=512)
    many = [engine.scheduler.add(make_request(f"b{i}", [i + 10, 5], 600, task="program")) for i in range(500)]
    while any(not sequence.output_ids for sequence in many):
        engine.step()
    engine.steps.clear()
    for _ in range(20):
        engine.step()
    alone = sum(batch.num_decode for batch, _ in engine.steps) / sum(seconds for _, seconds in engine.steps)
    small = engine.add("", 4, 100)
    while len(small.output_ids) < 20:
        engine.step()
    engine.steps.clear()
    before = len(small.output_ids)
    had = [len(sequence.output_ids) for sequence in many]
    for _ in range(40):
        engine.step()
    assert len(small.output_ids) - before == 40, "it is part of every step"
    assert max(seconds for _, seconds in engine.steps) <= 0.21
    beside = sum(batch.num_decode for batch, _ in engine.steps) / sum(seconds for _, seconds in engine.steps)
    assert beside >= 0.95 * alone
    grown = [len(sequence.output_ids) - num for sequence, num in zip(many, had, strict=True)]
    assert max(grown) - min(grown) <= 1, "its rows skip steps in turn"


def test_a_short_prompt_does_not_wait_for_the_whole_of_a_long_one() -> None:
    clock = [0.0]
    engine = make_simulation(num_pages=2000, clock=clock, max_num_tokens_per_step=64)
    long = engine.scheduler.add(make_request("long", range(4000), 4))
    run_steps(engine, clock, 10, 0.1)
    short = engine.scheduler.add(make_request("short", range(5000, 5080), 4))
    run_steps(engine, clock, 6, 0.1)
    assert short.output_ids, "it takes two steps, and a turn of the long one"
    assert 0 < long.num_computed < long.num_tokens
    engine.run()
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
