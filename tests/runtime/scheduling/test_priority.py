from hypothesis import given
from hypothesis import strategies as st

from ramet.runtime.scheduling.priority import (
    MAX_CREDIT_S,
    MAX_PENALTY_S,
    PRIORITY_STEP_S,
    OwnerService,
    ProgramService,
    Waiting,
    WaitingQueue,
)
from ramet.runtime.testing.simulation import make_request
from ramet.runtime.types import Sequence


def waiting(number: int, queued_s: float, *, cached: float = 0.0, priority: int = 0, program: str = "") -> Waiting:
    request = make_request(f"r{number}", [1], priority=priority, program_id=program or None)
    return Waiting(Sequence(request), queued_s, number, cached)


def drain(queue: WaitingQueue) -> list[int]:
    order = []
    while (first := queue.pop()) is not None:
        order.append(first.number)
    return order


def test_arrival_decides_among_equals_and_ties_keep_their_order() -> None:
    queue = WaitingQueue(ProgramService(), OwnerService())
    for number, queued_s in enumerate((3.0, 1.0, 1.0, 2.0)):
        queue.push(waiting(number, queued_s))
    assert drain(queue) == [1, 2, 3, 0]


def test_a_removed_request_is_passed_over() -> None:
    queue = WaitingQueue(ProgramService(), OwnerService())
    first, second = waiting(0, 0.0), waiting(1, 1.0)
    queue.push(first)
    queue.push(second)
    first.is_removed = True
    assert drain(queue) == [1]


def test_service_attained_while_waiting_counts_when_it_is_looked_at() -> None:
    service = ProgramService()
    queue = WaitingQueue(service, OwnerService())
    queue.push(waiting(0, 0.0, program="p"))
    queue.push(waiting(1, 0.5, program="q"))
    service.add("p", 100_000)
    assert drain(queue) == [1, 0]


def test_programs_used_long_ago_are_forgotten() -> None:
    service = ProgramService(max_programs=2)
    for program in ("a", "b", "a", "c"):
        service.add(program, 5)
    assert [service.attained(program) for program in ("a", "b", "c", None)] == [10, 0, 5, 0]


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1), st.integers(0, 1_000_000), st.integers(-1, 1)), max_size=40)
)
def test_nobody_is_overtaken_by_a_much_later_arrival(arrivals: list[tuple[float, float, int, int]]) -> None:
    service = ProgramService()
    queue = WaitingQueue(service, OwnerService())
    entries = []
    for number, (queued_s, cached, attained, priority) in enumerate(arrivals):
        service.add(f"p{number}", attained)
        entries.append(waiting(number, queued_s, cached=cached, priority=priority, program=f"p{number}"))
        queue.push(entries[-1])
    order = [entries[number] for number in drain(queue)]
    for index, later in enumerate(order):
        for earlier in order[:index]:
            difference = later.sequence.request.priority - earlier.sequence.request.priority
            bound = MAX_CREDIT_S + MAX_PENALTY_S + max(0, difference) * PRIORITY_STEP_S
            assert earlier.queued_s <= later.queued_s + bound + 1e-6
