"""What the scheduler is told, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ramet.runtime.scheduling.priority import OrderConfig


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step and of the queue.

    `max_num_tokens_per_step`: decode rows and prefill chunks together. A step that has both is smaller: it has room for
    `mixed_tokens_per_request` tokens of each live request, and for `min_mixed_tokens`. `reservation_ratio`: part of a
    request's max_tokens that its admission reserves pages for; below 1 memory is over-committed. `max_overtakes`:
    requests that may be admitted past a first one that does not fit. `max_examined`: requests looked at in vain in one
    step.
    """

    context_length: int
    max_running: int = 256
    max_num_tokens_per_step: int = 2048
    min_mixed_tokens: int = 512
    mixed_tokens_per_request: int = 16
    max_waiting: int = 100_000
    reservation_ratio: float = 1.0
    max_overtakes: int = 256
    max_examined: int = 32
    prefix_cache: bool = True
    order: OrderConfig = field(default_factory=OrderConfig)

    def __post_init__(self) -> None:
        assert self.max_running >= 1, self.max_running
        assert self.max_num_tokens_per_step >= self.max_running, "a step must hold one token of every running sequence"
        assert 0 <= self.reservation_ratio <= 1, self.reservation_ratio


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start. Owner: the scheduler.

    `num_cached_tokens` and `num_computed_tokens`: known tokens whose KV was found in the cache at admission, and
    prefilled; decode rows count in `num_decoded_tokens`.
    """

    num_steps: int = 0
    num_admitted: int = 0
    num_finished: int = 0
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_decoded_tokens: int = 0
    num_preemptions: int = 0
    num_overtakes: int = 0
    num_parked: int = 0
