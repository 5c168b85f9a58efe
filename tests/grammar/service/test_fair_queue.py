"""The order of compiling, without threads: simulated jobs take turns, and time is a number."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.grammar.service.fair_queue import BUDGETS_S, Client, FairQueue, Ticket

SLICE_S = 0.01


class Simulation:
    """One interpreter that gives turns as the compile service does: one job in hand a level, the lowest level first."""

    def __init__(self, max_waiting: int = 1000) -> None:
        self.queue: FairQueue[Ticket] = FairQueue(max_waiting)
        self.now_s = 0.0
        self.worked_s = 0.0
        self.needs_s: dict[Ticket, float] = {}
        self.used_s: dict[Ticket, float] = {}
        self.in_hand: dict[int, Ticket] = {}
        self.ended_s: dict[Ticket, float] = {}

    def add(self, needs_s: float, client: Client = (), expected_s: float = 0.001) -> Ticket:
        ticket = Ticket(clients=[client], expected_s=expected_s)
        self.needs_s[ticket] = needs_s
        self.queue.push(ticket)
        return ticket

    def turn(self) -> bool:
        """Let one job work for a slice. Returns False if nothing is left."""
        ready = {
            level for level in range(len(BUDGETS_S)) if level in self.in_hand or self.queue.first(level) is not None
        }
        if not ready:
            return False
        level, _ = self.queue.next_level(ready)
        if level not in self.in_hand:
            first = self.queue.first(level)
            assert first is not None
            assert self.queue.remove(first)
            self.in_hand[level], self.used_s[first] = first, 0.0
        ticket = self.in_hand[level]
        self.now_s += SLICE_S
        self.worked_s += SLICE_S
        self.used_s[ticket] += SLICE_S
        self.queue.charge(ticket, SLICE_S, self.now_s)
        if self.used_s[ticket] >= self.needs_s[ticket]:
            self.ended_s[ticket] = self.now_s
            del self.in_hand[level]
        elif self.used_s[ticket] >= BUDGETS_S[level]:
            del self.in_hand[level]
            ticket.level = level + 1
            if level + 1 in self.in_hand or self.queue.first(level + 1) is not None:
                self.queue.push(ticket)
            else:
                self.in_hand[level + 1] = ticket
        return True

    def run(self) -> None:
        while self.turn():
            assert self.now_s < 10_000, "something is not finished"


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.001, 3.0), st.sampled_from(["a", "b", "c"]), st.floats(0.001, 3.0)),
        min_size=1,
        max_size=20,
    )
)
def test_everything_ends_and_what_is_begun_anew_is_bounded(jobs: list[tuple[float, str, float]]) -> None:
    simulation = Simulation()
    for needs_s, client, expected_s in jobs:
        simulation.add(needs_s, ("", client), expected_s)
    simulation.run()
    assert len(simulation.ended_s) == len(jobs)
    assert not len(simulation.queue)
    assert simulation.queue.room(("", "a")) == 1000
    useful_s = sum(max(needs_s, SLICE_S) for needs_s, _, _ in jobs)
    assert simulation.worked_s <= (1 + 4 / 3) * useful_s + len(jobs) * len(BUDGETS_S) * SLICE_S


@pytest.mark.parametrize("num_large", [4, 50])
@pytest.mark.parametrize("expected_s", [0.001, 10.0])
def test_a_small_source_waits_only_a_moment_behind_large_ones(num_large: int, expected_s: float) -> None:
    """Whatever is expected of the large ones. They are one client's, or they had their first moments before."""
    simulation = Simulation()
    for _ in range(num_large):
        simulation.add(10.0, ("", "greedy"), expected_s)
    waits = []
    for _ in range(40):
        for _ in range(random.Random(7).randrange(30)):
            simulation.turn()
        small, came_s = simulation.add(0.01, ("", "modest")), simulation.now_s
        while small not in simulation.ended_s:
            simulation.turn()
        waits.append(simulation.ended_s[small] - came_s)
    assert max(waits) < 0.1


def test_a_stream_of_small_sources_does_not_stop_a_large_one() -> None:
    simulation = Simulation()
    large = simulation.add(2.0, ("", "large"), 2.0)
    while large not in simulation.ended_s:
        simulation.add(0.01, ("", "small"))
        simulation.turn()
        assert simulation.now_s < 10
    assert simulation.ended_s[large] <= 2.0 * 4 + 1


def test_clients_share_the_time_whatever_they_ask_for() -> None:
    simulation = Simulation()
    for _ in range(300):
        simulation.add(0.02, ("", "many"))
    for _ in range(10):
        simulation.add(0.02, ("", "few"))
    few = [ticket for ticket in simulation.needs_s if ticket.clients == [("", "few")]]
    simulation.run()
    assert max(simulation.ended_s[ticket] for ticket in few) < 0.5  # 20 of 310 jobs, each of 0.02 s


def test_a_key_with_many_connections_has_one_share() -> None:
    simulation = Simulation()
    for i in range(300):
        simulation.add(0.02, ("key", f"connection {i}"))
    few = [simulation.add(0.02, ("other key", "connection")) for _ in range(10)]
    simulation.run()
    assert max(simulation.ended_s[ticket] for ticket in few) < 0.5


def test_the_shorter_source_of_a_client_goes_first() -> None:
    queue: FairQueue[Ticket] = FairQueue(10)
    long, short = (Ticket(clients=[()], expected_s=s) for s in (0.02, 0.01))
    queue.push(long)
    queue.push(short)
    assert queue.first(0) is short
    assert queue.remove(short)
    assert not queue.remove(short)
    assert queue.first(0) is long


def test_what_two_clients_want_goes_where_the_better_one_stands_and_both_pay() -> None:
    queue: FairQueue[Ticket] = FairQueue(10)
    first, shared = (Ticket(clients=[("", "greedy")], expected_s=0.001) for _ in range(2))
    queue.push(first)
    queue.charge(first, 1.0, 0.0)
    queue.push(shared)
    assert queue.first(0) is first
    queue.join(shared, ("", "modest"))
    assert queue.first(0) is shared
    queue.charge(shared, 4.0, 0.0)
    mine = Ticket(clients=[("", "modest")], expected_s=0.001)
    queue.push(mine)
    assert queue.remove(shared)
    assert queue.first(0) is mine  # 2 s were spent for it, 3 s for the other


def test_what_was_spent_long_ago_no_longer_counts() -> None:
    queue: FairQueue[Ticket] = FairQueue(10)
    old, new = (Ticket(clients=[("", name)], expected_s=0.001) for name in ("old", "new"))
    queue.push(old)
    queue.push(new)
    queue.charge(old, 5.0, 0.0)
    assert queue.first(0) is new
    queue.charge(new, 0.1, 1000.0)
    assert queue.first(0) is old


def test_a_client_may_take_as_many_places_as_are_left() -> None:
    queue: FairQueue[Ticket] = FairQueue(100)

    def fill(client: Client) -> int:
        count = 0
        while queue.room(client) > 0:
            queue.push(Ticket(clients=[client], expected_s=1.0))
            count += 1
        return count

    assert fill(("", "a")) == 50
    assert fill(("", "b")) == 25
    assert fill(("key", "c")) == 13
    assert fill(("key", "d")) == 0  # the key has its places, whatever its connections
    assert fill(()) == 12  # nobody's: up to the limit
    assert len(queue) == 100
    assert queue.room(("", "e")) == 0


def test_levels_begin_where_the_expected_cost_is() -> None:
    assert [Ticket(clients=[()], expected_s=s).level for s in (0.0, 0.025, 0.03, 1.0, 9.0, math.inf)] == [
        0,
        0,
        1,
        3,
        4,
        4,
    ]
