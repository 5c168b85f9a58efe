"""The waiting queue and its order.

A request's key is a time in seconds. The request with the lowest key goes first:

    key = arrival + priority * priority_step + service penalty of its program - credit for its cached prefix

Penalty and credit are bounded. A request is therefore never overtaken by one that arrived more than
`priority difference * priority_step + max_penalty + max_credit` later, so cached prefixes cannot starve other requests.
Among programs, the one that has received the least service goes first.
Source: least attained service for programs, Luo et al. 2025, "Autellix" (arXiv:2502.13965), section 4; the bounded
credit is ours.

Not here: whether a request fits (`scheduler`).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from dataclasses import dataclass

from ramet.runtime.types import Sequence


@dataclass(frozen=True, slots=True)
class OrderConfig:
    """Weights of the waiting order, in seconds; `service_scale` is in tokens."""

    max_credit_s: float = 2.0
    max_penalty_s: float = 2.0
    service_scale: float = 16_384.0
    priority_step_s: float = 30.0


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


class WaitingQueue:
    """Waiting requests ordered by key. Push and pop are O(log n). Removal is lazy and O(1)."""

    def __init__(self, config: OrderConfig, service: ProgramService) -> None:
        self._config = config
        self._service = service
        self._heap: list[tuple[float, int, Waiting]] = []

    def key_of(self, waiting: Waiting) -> float:
        """Compute the request's current key."""
        config, request = self._config, waiting.sequence.request
        attained = self._service.attained(request.program_id)
        penalty = config.max_penalty_s * attained / (attained + config.service_scale)
        credit = config.max_credit_s * waiting.cached_share
        return waiting.queued_s + request.priority * config.priority_step_s + penalty - credit

    def push(self, waiting: Waiting) -> None:
        waiting.key = self.key_of(waiting)
        heapq.heappush(self._heap, (waiting.key, waiting.number, waiting))

    def pop(self) -> Waiting | None:
        """Take the first request, or None if the queue is empty. Keys that rose since the push are corrected first."""
        while self._heap:
            key, _, waiting = heapq.heappop(self._heap)
            if waiting.is_removed or key != waiting.key:
                continue
            now = self.key_of(waiting)
            if now > key and self._heap and self._heap[0][0] < now:
                self.push(waiting)
                continue
            return waiting
        return None
