"""Steps sized by time: what a step costs is learned, and prompts beside decode rows are cut to fit."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.runtime.scheduling.step_costs import StepCosts, num_pairs, num_scored, step_amounts
from ramet.runtime.testing.simulation import (
    SimulatedEngine,
    assert_idle_and_whole,
    assert_output_is_right,
    make_request,
    make_simulation,
)
from ramet.runtime.types import Batch, RowOutput, ScheduledSequence, Sequence

TARGET_S = 0.06


class Machine:
    """The seconds of a step on some machine: a fixed part, and rates that the scheduler does not know."""

    def __init__(
        self, fixed: float, row: float, token: float, pair: float, extend: float, scored: float, noise: float = 0.0
    ) -> None:
        self.rates = row, token, pair, extend, scored
        self.fixed = fixed
        self.noise = noise
        self.rng = random.Random(0)

    def step_s(self, batch: Batch) -> float:
        _, _, *amounts, _ = step_amounts(batch.num_decode, batch.items[batch.num_decode :])
        parts = zip(self.rates, (batch.num_decode, *amounts), strict=True)
        seconds = self.fixed + sum(rate * amount for rate, amount in parts)
        return seconds * self.rng.uniform(1 - self.noise, 1 + self.noise)


SMALL_CPU = Machine(4e-3, 0.6e-3, 0.7e-3, 1e-6, 1e-3, 2e-3)
LARGE_CPU = Machine(30e-3, 2e-3, 8e-3, 4e-6, 2e-3, 10e-3)
GPU = Machine(6e-3, 10e-6, 20e-6, 3e-9, 50e-6, 20e-6)
ODD = Machine(1e-3, 0.1e-3, 0.1e-3, 0.5e-6, 8e-3, 0.0)


def make_engine(machine: Machine, **config: object) -> SimulatedEngine:
    values: dict[str, object] = {"num_pages": 3000, "page_size": 16, "max_running": 64, "max_num_tokens_per_step": 2048}
    values |= {"max_step_s": TARGET_S, "first_mixed_tokens": 64, "context_length": 16384}
    engine = make_simulation(**{**values, **config})  # type: ignore[arg-type]
    engine.step_s = machine.step_s
    return engine


class QuickEngine:
    """As a SimulatedEngine, but it has no KV: prompts may be long."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.scheduler = engine.scheduler
        self.overlap = engine.overlap
        self.step_s = engine.step_s
        self.times: list[tuple[Batch, float]] = []
        self.launched: Batch | None = None

    def step(self) -> bool:
        batch = self.scheduler.schedule()
        done = batch
        if self.overlap:
            done, self.launched = self.launched, batch
        if done is not None:
            assert self.step_s is not None
            self.times.append((done, self.step_s(done)))
            self.scheduler.note_time(*self.times[-1])
            outputs = [RowOutput((7,)) if item.num_samples else RowOutput() for item in done.items]
            self.scheduler.finish_step(done.items, outputs)
        return batch is not None or done is not None

    def run(self) -> None:
        while self.scheduler.has_work:
            assert self.step()
        self.scheduler.check_integrity()


def make_quick(machine: Machine, **config: object) -> QuickEngine:
    return QuickEngine(make_engine(machine, **config))


def mixed(engine: QuickEngine) -> list[tuple[Batch, float]]:
    """The steps with decode rows and new tokens."""
    return [(batch, seconds) for batch, seconds in engine.times if 0 < batch.num_decode < len(batch.items)]


def fresh(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(10, 1 << 20) for _ in range(length)]


@pytest.mark.parametrize("machine", [SMALL_CPU, LARGE_CPU, GPU, ODD], ids=["small CPU", "large CPU", "GPU", "odd"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("overlap", [False, True])
def test_long_prompts_keep_the_target_of_rows_that_decode(machine: Machine, noise: float, overlap: bool) -> None:
    machine.noise = noise
    engine = make_quick(machine, overlap=overlap, min_mixed_tokens=2048)
    rng = random.Random(1)
    bystander = engine.scheduler.add(make_request("bystander", fresh(rng, 20), 1000))
    for _ in range(5):
        engine.step()
    length = 400 if machine is LARGE_CPU else 3000
    prompts = [engine.scheduler.add(make_request(f"p{i}", fresh(rng, length), 3)) for i in range(2)]
    while not all(sequence.is_finished for sequence in prompts):
        assert engine.step()
    times = [seconds for _, seconds in mixed(engine)]
    assert max(times) < 2 * TARGET_S
    assert float(np.median(times)) < 1.2 * TARGET_S
    assert max(times) > 0.6 * TARGET_S  # and steps are not smaller than they may be
    engine.scheduler.abort(bystander.request.request_id)
    engine.run()


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**32),
    st.floats(1e-4, 0.2),
    st.floats(1e-6, 5e-3),
    st.floats(1e-5, 0.05),
    st.floats(0, 1e-4),
    st.floats(0, 0.02),
    st.booleans(),
)
def test_everything_ends_whatever_steps_cost(
    seed: int, fixed: float, row: float, token: float, pair: float, extend: float, overlap: bool
) -> None:
    """Also where rows that decode take longer than the target alone: prompts have a part of each step."""
    rng = random.Random(seed)
    machine = Machine(fixed, row, token, pair, extend, token, noise=0.3)
    engine = make_engine(machine, overlap=overlap, num_pages=400, max_running=8)
    sequences: list[Sequence] = []
    for number in range(12):
        length = rng.choice((3, 20, 60))
        score_from = rng.choice((None, None, 1, length - 1))
        request = make_request(f"r{number}", fresh(rng, length), rng.randrange(1, 12), score_from=score_from)
        sequences.append(engine.scheduler.add(request))
        for _ in range(rng.randrange(4)):
            engine.step()
    engine.run()
    assert_idle_and_whole(engine)
    for sequence in sequences:
        assert_output_is_right(sequence)


def test_many_that_begin_at_once_are_admitted_in_parts() -> None:
    machine = Machine(4e-3, 0.1e-3, 0.1e-3, 0.0, 10e-3, 0.0)  # a row that begins takes 10 ms
    engine = make_quick(machine)
    rng = random.Random(1)
    engine.scheduler.add(make_request("bystander", fresh(rng, 20), 500))
    prompt = fresh(rng, 40)
    for i in range(4):  # such rows as the machine has seen before
        engine.scheduler.add(make_request(f"before {i}", fresh(rng, 20), 2))
        engine.step()
    for i in range(40):
        engine.scheduler.add(make_request(f"choice {i}", prompt, 20))
    engine.times.clear()
    while engine.scheduler.num_running > 1 or engine.scheduler.num_waiting:
        engine.step()
    assert max(seconds for _, seconds in mixed(engine)) < 2 * TARGET_S
    assert max(len(batch.items) - batch.num_decode for batch, _ in mixed(engine)[3:]) <= 6


def test_scores_are_computed_in_parts() -> None:
    machine = Machine(4e-3, 0.1e-3, 0.1e-3, 0.0, 0.0, 2e-3)
    engine = make_quick(machine)
    rng = random.Random(1)
    engine.scheduler.add(make_request("bystander", fresh(rng, 20), 500))
    engine.step()
    for i in range(3):
        engine.scheduler.add(make_request(f"score {i}", fresh(rng, 400), 1, score_from=1))
    while engine.scheduler.num_running > 1 or engine.scheduler.num_waiting:
        engine.step()
    assert max(seconds for _, seconds in mixed(engine)[3:]) < 1.3 * TARGET_S


def test_without_a_target_only_tokens_count() -> None:
    engine = make_quick(LARGE_CPU, max_step_s=0.0, min_mixed_tokens=512)
    rng = random.Random(1)
    engine.scheduler.add(make_request("bystander", fresh(rng, 20), 50))
    engine.step()
    engine.scheduler.add(make_request("prompt", fresh(rng, 2000), 1))
    for _ in range(4):
        engine.step()
    assert [batch.num_tokens for batch, _ in mixed(engine)[:2]] == [497, 497]  # 512, cut at a border of a page


def test_where_nothing_decodes_prompts_are_not_cut() -> None:
    engine = make_quick(LARGE_CPU)
    engine.scheduler.add(make_request("prompt", fresh(random.Random(1), 3000), 1))
    engine.run()
    assert [batch.num_tokens for batch, _ in engine.times] == [2048, 952]


# --- what is learned


def batch_of(num_decode: int, extends: list[tuple[int, int]]) -> Batch:
    sequence = Sequence(make_request("r", [1], 1))
    rows = [ScheduledSequence(sequence, 5, 1, 1)] * num_decode
    rows += [ScheduledSequence(sequence, start, count, 1) for start, count in extends]
    return Batch(1, tuple(rows), num_decode, num_decode + sum(count for _, count in extends))


def predicted(costs: StepCosts, batch: Batch) -> float:
    return costs.seconds(step_amounts(batch.num_decode, batch.items[batch.num_decode :]))


@pytest.mark.parametrize("machine", [SMALL_CPU, LARGE_CPU, GPU, ODD], ids=["small CPU", "large CPU", "GPU", "odd"])
def test_a_step_is_predicted_from_steps_of_its_kinds(machine: Machine) -> None:
    rng = random.Random(0)
    machine.noise = 0.05
    costs = StepCosts(64, TARGET_S)

    def step() -> Batch:
        """A step that takes less than four times the target."""
        while True:
            longest = 1 << rng.randrange(1, 12)
            extends = [(rng.randrange(4000), rng.randrange(1, longest)) for _ in range(rng.choice((0, 0, 1, 3)))]
            batch = batch_of(rng.randrange(1, 60), extends)
            if machine.step_s(batch) < 4 * TARGET_S:
                return batch

    for _ in range(300):
        batch = step()
        costs.note(batch, machine.step_s(batch))
    machine.noise = 0.0
    batches = [step() for _ in range(100)]
    errors = [abs(predicted(costs, batch) - machine.step_s(batch)) / TARGET_S for batch in batches]
    assert float(np.median(errors)) < 0.15
    assert max(errors) < 0.8


def test_one_prompt_tells_the_scale_of_everything() -> None:
    costs = StepCosts(64, TARGET_S)
    assert predicted(costs, batch_of(0, [(0, 100)])) > 0.09
    costs.note(batch_of(0, [(0, 100)]), 7.0)
    assert predicted(costs, batch_of(0, [(0, 100)])) == pytest.approx(7.0, rel=0.05)
    assert predicted(costs, batch_of(0, [(0, 200)])) == pytest.approx(14.0, rel=0.25)


def test_a_slower_machine_is_noticed_within_a_few_steps() -> None:
    costs = StepCosts(64, TARGET_S)
    for _ in range(200):
        costs.note(batch_of(4, []), 0.005)
        costs.note(batch_of(4, [(0, 50)]), 0.04)
    for _ in range(40):
        costs.note(batch_of(4, [(0, 50)]), 0.4)
    assert predicted(costs, batch_of(4, [(0, 50)])) > 0.2


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_times_that_cannot_be_are_ignored(seconds: float) -> None:
    costs = StepCosts(60, TARGET_S)
    before = predicted(costs, batch_of(3, [(0, 50)]))
    for _ in range(40):
        costs.note(batch_of(3, [(0, 50)]), seconds)
    assert predicted(costs, batch_of(3, [(0, 50)])) == before


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20_000), st.floats(1e-4, 10), st.integers(1, 5000), st.sampled_from((None, 1, 500)))
def test_the_tokens_that_fit_are_as_many_as_fit(
    start: int, seconds: float, first_tokens: int, score_from: int | None
) -> None:
    costs = StepCosts(first_tokens, TARGET_S)
    sequence = Sequence(make_request("r", range(600), 1, score_from=score_from))
    count = costs.tokens_within(seconds, sequence, start)
    assert count >= 0
    if count:
        assert costs.extend_s(sequence, start, count) <= seconds * 1.01 + 1e-12
    if score_from is None:
        assert costs.extend_s(sequence, start, count + 2) >= seconds * 0.99


@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 60))
def test_pairs_and_scored_positions_are_counted_as_by_hand(start: int, count: int, score_from: int) -> None:
    assert num_pairs(start, count) == sum(position + 1 for position in range(start, start + count))
    sequence = Sequence(make_request("r", range(120), 1, score_from=score_from))
    assert num_scored(sequence, start, count) == sum(p + 1 >= score_from for p in range(start, start + count))


class TwoKernels(Machine):
    """A machine that takes 8.5 ms more for any step of more than 64 tokens, if some are new ones."""

    def step_s(self, batch: Batch) -> float:
        has_many = batch.num_tokens > 64 and len(batch.items) > batch.num_decode
        return super().step_s(batch) + (8.5e-3 if has_many else 0.0)


def total_s(machine: Machine, **config: object) -> tuple[float, float]:
    """The time of 75 prompts of 128 tokens, 50 at once, 16 tokens of each; and the longest step beside decode rows."""
    engine = make_quick(machine, max_running=50, **config)
    rng = random.Random(3)
    for i in range(75):
        engine.scheduler.add(make_request(f"{i}", fresh(rng, 128), 16))
    engine.run()
    return sum(seconds for _, seconds in engine.times), max(seconds for _, seconds in mixed(engine))


def test_steps_of_few_tokens_are_preferred_where_they_compute_more_tokens_a_second() -> None:
    machine = TwoKernels(3.5e-3, 1e-3, 0.72e-3, 0.0, 0.3e-3, 0.0)
    unbounded_s, _ = total_s(machine, max_step_s=0.0)
    blind_s, _ = total_s(machine, num_few=0)
    seconds, longest_s = total_s(machine, num_few=64)
    assert blind_s > 1.08 * unbounded_s
    assert seconds < 1.06 * unbounded_s
    assert longest_s < 1.5 * TARGET_S


def test_steps_of_many_tokens_are_preferred_where_they_cost_no_more() -> None:
    machine = Machine(3.5e-3, 1e-3, 0.3e-3, 0.0, 0.3e-3, 0.0)
    blind_s, _ = total_s(machine, num_few=0)
    seconds, _ = total_s(machine, num_few=64)
    assert seconds < 1.03 * blind_s
