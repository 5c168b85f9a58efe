"""Ordinary requests that once made everybody's steps long: long prompts, and many rows that begin at once.

What steps cost is simulated, on machines that the scheduler does not know. Other machines, noise and overlapped steps:
tests/runtime/scheduling/test_step_costs.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.scheduling.config import SchedulerConfig
from ramet.runtime.scheduling.scheduler import Scheduler
from ramet.runtime.scheduling.step_costs import step_amounts
from ramet.runtime.testing.simulation import make_request
from ramet.runtime.types import Batch, RowOutput

TARGET_S = 0.06
# Seconds of: a step, a decode row, a new token, a pair of a new token and a key, a row with new tokens.
MACHINES = {"two cores": (4e-3, 1e-3, 0.75e-3, 0.2e-6, 0.5e-3), "sixteen": (3e-3, 0.2e-3, 0.1e-3, 0.05e-6, 0.2e-3)}


def seconds_of(batch: Batch, rates: tuple[float, ...]) -> float:
    _, _, new, pairs, extends, *_ = step_amounts(batch.num_decode, batch.items[batch.num_decode :])
    return float(np.dot(rates, (1, batch.num_decode, new, pairs, extends)))


class Bystander:
    """A row that decodes, on a machine with these rates. `gaps_s`: the steps between its tokens."""

    def __init__(self, rates: tuple[float, ...]) -> None:
        config = SchedulerConfig(16_384, max_num_tokens_per_step=2048, max_step_s=TARGET_S, first_mixed_tokens=64)
        pool = PagePool(6000, 16)
        self.scheduler = Scheduler(config, pool, RadixCache(pool))
        self.rates = rates
        self.gaps_s: list[float] = []
        self.rng = np.random.default_rng(0)
        self.add("bystander", 20, 2000)
        self.run(20)

    def add(self, name: str, num_prompt: int, max_tokens: int) -> None:
        self.scheduler.add(make_request(name, self.rng.integers(1 << 20, size=num_prompt).tolist(), max_tokens))

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            batch = self.scheduler.schedule()
            assert batch is not None
            self.gaps_s.append(seconds_of(batch, self.rates))
            self.scheduler.note_time(batch, self.gaps_s[-1])
            outputs = [RowOutput((7,)) if item.num_samples else RowOutput() for item in batch.items]
            self.scheduler.finish_step(batch.items, outputs)
            assert "bystander" in {item.sequence.request.request_id for item in batch.items}


@pytest.mark.parametrize("rates", MACHINES.values(), ids=MACHINES)
def test_two_prompts_of_8000_tokens_keep_a_bystander_under_twice_the_target(rates: tuple[float, ...]) -> None:
    row = Bystander(rates)
    row.gaps_s.clear()
    for name in ("first", "second"):
        row.add(name, 8000, 4)
    row.run(600)
    assert row.scheduler.counters.num_computed_tokens > (16_000 if rates is MACHINES["sixteen"] else 10_000)
    assert max(row.gaps_s) < 2 * TARGET_S


@pytest.mark.parametrize("rates", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("num_rows", [64, 128])
def test_many_rows_that_begin_at_once_are_admitted_in_parts(rates: tuple[float, ...], num_rows: int) -> None:
    row = Bystander(rates)
    row.gaps_s.clear()
    for i in range(num_rows):
        row.add(f"row {i}", 30, 60)
    row.run(60)
    assert row.scheduler.num_running > 16
    longest_decode_s = rates[0] + (num_rows + 1) * rates[1]
    assert max(row.gaps_s) < max(2 * TARGET_S, 1.5 * longest_decode_s)
