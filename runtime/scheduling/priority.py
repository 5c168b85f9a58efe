"""The waiting queue and its order: first among owners, then among the requests of one owner.

The owner with the least attained service goes first, whatever its requests' priorities are: nobody can ask for more
than a fair part of the engine. Among the requests of one owner, a request's key is a time in seconds, and the request
with the lowest key goes first:

    key = arrival + priority * PRIORITY_STEP_S + service penalty of its program - credit for its cached prefix

Penalty and credit are bounded. A request is therefore never overtaken by one that arrived more than
`priority difference * PRIORITY_STEP_S + MAX_PENALTY_S + MAX_CREDIT_S` later, so cached prefixes cannot starve other
requests. Among programs, the one that has received the least service goes first.
Sources: fairness between owners, Sheng et al. 2024, "Fairness in serving large language models" (arXiv:2401.00588),
algorithm 2; least attained service for programs, Luo et al. 2025, "Autellix" (arXiv:2502.13965), section 4; the bounded
credit is ours.

Not here: whether a request fits (`scheduler`).
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import KeysView, Mapping
from dataclasses import dataclass

from ramet.runtime.types import Sequence

PRIORITY_STEP_S = 30.0
MAX_CREDIT_S = 2.0
MAX_PENALTY_S = 2.0
_HALF_PENALTY = 16_384  # tokens that a program has received when its penalty is half of the largest


@dataclass(slots=True, eq=False)
class Waiting:
    """A waiting request. Owner: the scheduler.

    `is_removed`: it was admitted or aborted. `cached_share`: the part of its tokens that was in the cache at the last
    lookup. `wake_at`: the number of the owner's tokens that must be in the tree before this parked request wakes.
    `num_overtaken`: number of requests admitted before it while it was first and did not fit.
    """

    sequence: Sequence
    queued_s: float
    number: int
    cached_share: float = 0.0
    key: float = 0.0
    is_removed: bool = False
    wake_at: int = 0
    num_overtaken: int = 0


class OwnerService:
    """Tokens computed for each owner of requests, and its running requests. Owner of this object: the scheduler.

    An owner that comes back begins with at least what those have attained who were there all the time: who asked for
    nothing for an hour may not take the next hour alone. Of owners without requests only the `max_kept` last ones are
    remembered.
    """

    def __init__(self, max_kept: int = 4096) -> None:
        self._tokens: OrderedDict[str, int] = OrderedDict()
        self._num_live: Counter[str] = Counter()
        self.num_running: Counter[str] = Counter()
        self._max_kept = max_kept

    @property
    def num_owners(self) -> int:
        """Number of owners that have requests."""
        return len(self._num_live)

    @property
    def num_served(self) -> int:
        """Number of owners that have running requests."""
        return sum(count > 0 for count in self.num_running.values())

    def enter(self, owner: str) -> None:
        """Note a new request."""
        if owner not in self._num_live:
            least = min((self._tokens[other] for other in self._num_live), default=0)
            self._tokens[owner] = max(self._tokens.get(owner, 0), least)
            self._tokens.move_to_end(owner)
        self._num_live[owner] += 1

    def leave(self, owner: str) -> None:
        """Note the end of a request."""
        self._num_live[owner] -= 1
        if not self._num_live[owner]:
            del self._num_live[owner], self.num_running[owner]
            idle = [other for other in self._tokens if other not in self._num_live] if self._is_full else []
            for other in idle[: len(self._tokens) - self._max_kept]:
                del self._tokens[other]

    @property
    def _is_full(self) -> bool:
        return len(self._tokens) > self._max_kept

    def add(self, owner: str, num_tokens: int) -> None:
        """Count tokens for an owner that has a request."""
        self._tokens[owner] += num_tokens

    def attained(self, owner: str) -> int:
        return self._tokens[owner]


def equal_parts(wanted: Mapping[str, int], most: int) -> dict[str, int]:
    """Divide `most` among owners that want so much: equally, but what one does not want is the others'.

    Each gets at least 1. Source: max-min fairness.
    """
    parts: dict[str, int] = {}
    for index, (owner, count) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        parts[owner] = min(count, max(most // (len(wanted) - index), 1))
        most -= parts[owner]
    return parts


class ProgramService:
    """Tokens computed for each program. Only the `max_programs` most recently used are kept. Owner: the scheduler."""

    def __init__(self, max_programs: int = 4096) -> None:
        self._tokens: OrderedDict[str, int] = OrderedDict()
        self._max_programs = max_programs

    def add(self, program_id: str | None, num_tokens: int) -> None:
        if program_id is None:
            return
        self._tokens[program_id] = self._tokens.get(program_id, 0) + num_tokens
        self._tokens.move_to_end(program_id)
        if len(self._tokens) > self._max_programs:
            self._tokens.popitem(last=False)

    def attained(self, program_id: str | None) -> int:
        return 0 if program_id is None else self._tokens.get(program_id, 0)


_Heap = list[tuple[float, int, Waiting]]


class WaitingQueue:
    """Waiting requests by owner, ordered by key. Push and pop are O(log n + owners). Removal is lazy and O(1)."""

    def __init__(self, service: ProgramService, owners: OwnerService) -> None:
        self._service = service
        self._owners = owners
        self._heaps: dict[str, _Heap] = {}

    def key_of(self, waiting: Waiting) -> float:
        """Compute the request's current key."""
        request = waiting.sequence.request
        attained = self._service.attained(request.program_id)
        penalty = MAX_PENALTY_S * attained / (attained + _HALF_PENALTY)
        credit = MAX_CREDIT_S * waiting.cached_share
        return waiting.queued_s + request.priority * PRIORITY_STEP_S + penalty - credit

    @property
    def owners(self) -> KeysView[str]:
        """The owners of the requests here, removed ones included."""
        return self._heaps.keys()

    def push(self, waiting: Waiting) -> None:
        waiting.key = self.key_of(waiting)
        heap = self._heaps.setdefault(waiting.sequence.request.owner, [])
        heapq.heappush(heap, (waiting.key, waiting.number, waiting))

    def pop(self) -> Waiting | None:
        """Take the first request, or None if the queue is empty. Keys that rose since the push are corrected first."""
        while self._heaps:
            owner = next(iter(self._heaps))
            if len(self._heaps) > 1:
                self._drop_removed()
                owner = min(self._heaps, key=self._rank, default=owner)
            waiting = self._pop_of(owner)
            if waiting is not None:
                return waiting
        return None

    def _rank(self, owner: str) -> tuple[int, int, float]:
        owners = self._owners
        return owners.attained(owner), owners.num_running[owner], self._heaps[owner][0][0]

    def _drop_removed(self) -> None:
        """Forget the owners whose requests have all been removed: their service is not known any longer."""
        for owner, heap in list(self._heaps.items()):
            while heap and (heap[0][2].is_removed or heap[0][0] != heap[0][2].key):
                heapq.heappop(heap)
            if not heap:
                del self._heaps[owner]

    def _pop_of(self, owner: str) -> Waiting | None:
        """Take the first request of one owner, who is forgotten if there is none."""
        heap = self._heaps.get(owner, [])
        while heap:
            key, _, waiting = heapq.heappop(heap)
            if waiting.is_removed or key != waiting.key:
                continue
            now = self.key_of(waiting)
            if now > key and heap and heap[0][0] < now:
                self.push(waiting)
                continue
            return waiting
        self._heaps.pop(owner, None)
        return None
