from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.scheduling.admission import AdmissionQueue, reservation
from ramet.runtime.scheduling.priority import Flows
from ramet.runtime.scheduling.sequence_pages import matchable
from ramet.runtime.testing.simulation import make_request
from ramet.runtime.types import Sequence


def test_the_first_starts_when_enough_of_the_running_have_ended() -> None:
    admits = reservation(5, [(30, 9), (10, 3), (20, 4)])
    assert admits(20, 1_000)
    assert not admits(21, 3)
    assert admits(21, 2)


def test_what_ends_in_time_passes_whatever_its_size() -> None:
    admits = reservation(5, [(10, 8)])
    assert admits(10, 1_000)
    assert admits(11, 3), "it took none of the spare pages"


def test_what_ends_later_passes_only_on_spare_pages_and_uses_them_up() -> None:
    admits = reservation(5, [(10, 8)])
    assert admits(11, 2)
    assert not admits(11, 2)
    assert admits(11, 1)
    assert not admits(11, 1)


def test_nothing_running_promises_nothing_beyond_what_is_there() -> None:
    assert not reservation(5, [])(1, 1)


class Parking:
    """A queue in which `owner` computes tokens 0..15, in pages of 4."""

    def __init__(self) -> None:
        self.cache = RadixCache(PagePool(20, 4))
        self.queue = AdmissionQueue(Flows(lambda: 0.0), 4)
        self.owner = Sequence(make_request("owner", range(16)))
        self.queue.set_frontier(self.owner, self.cache.root(), 16)

    def arrive(self, *prompt: int) -> bool:
        """Add a request and look at it. True where it is parked."""
        sequence = Sequence(make_request("sharer", list(prompt)))
        self.queue.add(sequence, 0.0, 0.0)
        waiting = self.queue.pop()
        assert waiting is not None
        return self.queue.try_park(waiting, self.cache.match(matchable(sequence)))


def test_a_request_is_parked_until_its_owner_has_what_they_share() -> None:
    parking = Parking()
    assert parking.arrive(*range(10), 99, 98)
    assert parking.queue.pop() is None
    assert parking.queue.wake(parking.owner, 8) == 0
    assert parking.queue.wake(parking.owner, 12) == 1
    assert parking.queue.pop() is not None
    assert len(parking.queue) == 1, "it still waits"


def test_a_request_with_another_next_page_is_not_parked() -> None:
    assert not Parking().arrive(0, 1, 2, 9, 4, 5)


def test_a_request_shorter_than_a_page_is_not_parked() -> None:
    assert not Parking().arrive(0, 1, 2)


def test_nobody_is_parked_behind_an_owner_that_has_ended() -> None:
    parking = Parking()
    parking.queue.clear_frontier(parking.owner)
    assert not parking.arrive(*range(16))


def test_a_removed_request_is_not_woken() -> None:
    parking = Parking()
    assert parking.arrive(*range(10))
    (sequence,) = parking.queue._waiting
    assert parking.queue.remove(sequence)
    assert not parking.queue.remove(sequence)
    parking.queue.wake(parking.owner, None)
    assert parking.queue.pop() is None
    assert len(parking.queue) == 0
