"""The scheduler's limits and its counters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step and of the queue.

    `max_num_tokens_per_step` counts decode rows and prefill chunks together. A step that has both is smaller: it has
    `mixed_tokens_per_request` tokens for each live request, but at least `min_mixed_tokens`.
    `max_step_s`: seconds that a step should take at most while rows decode; prompts are cut so that it does not take
    longer, as far as its costs are known. 0: only tokens count. `first_mixed_tokens`: new tokens that are expected to
    take so long until steps are measured. `num_few`: tokens of a step up to which other kernels compute it than larger
    ones, perhaps faster for a token; 0: the same ones.
    `reservation_ratio`: admission reserves pages for this part of a request's max_tokens; below 1, memory is
    over-committed. `max_overtakes`: number of later requests that may be admitted before the first waiting request if
    that one does not fit. `max_examined`: number of requests that a step may examine without admitting them.
    """

    context_length: int
    max_running: int = 256
    max_num_tokens_per_step: int = 2048
    min_mixed_tokens: int = 512
    mixed_tokens_per_request: int = 16
    max_step_s: float = 0.0
    first_mixed_tokens: int = 512
    num_few: int = 0
    max_waiting: int = 100_000
    reservation_ratio: float = 1.0
    max_overtakes: int = 256
    max_examined: int = 32
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        assert self.max_running >= 1, self.max_running
        assert self.max_num_tokens_per_step >= self.max_running, "a step must hold one token of every running sequence"
        assert self.max_step_s >= 0, self.max_step_s
        assert 0 <= self.reservation_ratio <= 1, self.reservation_ratio


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start. Owner: the scheduler.

    `num_cached_tokens`: tokens whose KV was found in the cache at admission. `num_computed_tokens`: tokens that were
    prefilled. `num_decoded_tokens`: tokens computed by decode rows.
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
