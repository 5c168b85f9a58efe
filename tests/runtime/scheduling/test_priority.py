from hypothesis import given
from hypothesis import strategies as st

from ramet.runtime.scheduling.priority import (
    MAX_BEHIND_S,
    MAX_CREDIT_S,
    PRIORITY_STEP_S,
    Flows,
    Waiting,
    WaitingQueue,
)
from ramet.runtime.testing.simulation import make_request
from ramet.runtime.types import Sequence


def waiting(number: int, queued_s: float, *, cached: float = 0.0, priority: int = 0, program: str = "") -> Waiting:
    request = make_request(f"r{number}", [1], priority=priority, task=program)
    return Waiting(Sequence(request), queued_s, number, cached)


def drain(queue: WaitingQueue) -> list[int]:
    order = []
    while (first := queue.pop()) is not None:
        order.append(first.number)
    return order


def test_arrival_decides_among_equals_and_ties_keep_their_order() -> None:
    queue = WaitingQueue(Flows(lambda: 0.0))
    for number, queued_s in enumerate((3.0, 1.0, 1.0, 2.0)):
        queue.push(waiting(number, queued_s))
    assert drain(queue) == [1, 2, 3, 0]


def test_a_removed_request_is_passed_over() -> None:
    queue = WaitingQueue(Flows(lambda: 0.0))
    first, second = waiting(0, 0.0), waiting(1, 1.0)
    queue.push(first)
    queue.push(second)
    first.is_removed = True
    assert drain(queue) == [1]


def test_service_had_while_waiting_counts_when_it_is_looked_at() -> None:
    flows = Flows(lambda: 0.0)
    queue = WaitingQueue(flows)
    first = waiting(0, 0.0, program="p")
    queue.push(first)
    queue.push(waiting(1, 0.5, program="q"))
    flows.add(flows.task(first.sequence.request), 100_000)
    assert drain(queue) == [1, 0]


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1), st.integers(0, 1_000_000), st.integers(-1, 1)), max_size=40)
)
def test_nobody_is_overtaken_by_a_much_later_arrival(arrivals: list[tuple[float, float, int, int]]) -> None:
    flows = Flows(lambda: 100.0)
    queue = WaitingQueue(flows)
    entries = []
    for number, (queued_s, cached, attained, priority) in enumerate(arrivals):
        entries.append(waiting(number, queued_s, cached=cached, priority=priority, program=f"p{number}"))
        flows.add(flows.task(entries[-1].sequence.request), attained)
        queue.push(entries[-1])
    order = [entries[number] for number in drain(queue)]
    for index, later in enumerate(order):
        for earlier in order[:index]:
            difference = later.sequence.request.priority - earlier.sequence.request.priority
            bound = MAX_CREDIT_S + max(0, difference) * PRIORITY_STEP_S
            last_turn_s = 100.0 + MAX_BEHIND_S  # of each, at the latest
            assert earlier.queued_s <= max(later.queued_s, last_turn_s) + bound + 1e-6
