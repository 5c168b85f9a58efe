"""The scheduler under random work, with a model whose tokens and KV can be checked position by position."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ramet.runtime.testing.simulation import (
    STOP,
    VOCAB,
    SimulatedEngine,
    assert_idle_and_whole,
    assert_output_is_right,
    expected_output,
    make_request,
    make_simulation,
)
from ramet.runtime.types import FinishReason, Sequence


def random_prompt(rng: random.Random, longest: int) -> list[int]:
    """Prompts that share beginnings: a few stems that part at token 6, cut anywhere, with a few new tokens."""
    branch = rng.randrange(3)
    stem = [(3 * i + (branch if i >= 6 else 0)) % 40 + 1 for i in range(longest)]
    new = [rng.randrange(1, 4) for _ in range(rng.randrange(4))]
    return stem[: rng.choice((longest, rng.randrange(longest)))] + new or [1]


def drafted(rng: random.Random, sequence: Sequence) -> list[int]:
    """A draft of some tokens: the right ones, up to where it goes wrong."""
    right = expected_output(sequence.request)[len(sequence.output_ids) :]
    num_right = rng.choice((0, 1, 3, 9))
    wrong = [rng.randrange(VOCAB) for _ in range(rng.choice((0, 0, 2, 40)))]
    return [*right[:num_right], *wrong]


def drive(
    engine: SimulatedEngine,
    rng: random.Random,
    clock: list[float],
    num_operations: int,
    owners: tuple[str, ...] = ("", "", "x", "y"),
) -> list[Sequence]:
    """Add, abort, cut and step at random; returns every sequence."""
    sequences: list[Sequence] = []
    for index in range(num_operations):
        clock[0] += rng.random() * 0.3
        kind = rng.random()
        live = [s for s in sequences if not s.is_finished]
        if kind < 0.3:
            prompt = random_prompt(rng, rng.choice((8, 20, 36)))
            request = make_request(
                f"r{index}",
                prompt,
                rng.choice((1, 2, 5, 9, 20)),
                stop_ids=(STOP, 1) if rng.random() < 0.5 else (),
                cache_salt=rng.choice(("", "", "a")),
                program_id=rng.choice((None, "p", "q")),
                owner=rng.choice(owners),
                priority=rng.choice((0, 0, 1, -1)),
                deadline_s=clock[0] + 2 * rng.random() if rng.random() < 0.1 else None,
                score_from=rng.randrange(1, len(prompt) + 1) if rng.random() < 0.15 else None,
            )
            sequences.append(engine.scheduler.add(request))
            if rng.random() < 0.3:
                engine.scheduler.hold(sequences[-1])
        elif kind < 0.36 and live:
            victim = rng.choice(live)
            assert engine.scheduler.abort(victim.request.request_id)
            assert not engine.scheduler.abort(victim.request.request_id)
            assert victim.finish_reason is FinishReason.ABORT
        elif kind < 0.40 and any(s.output_ids for s in live):
            cut = rng.choice([s for s in live if s.output_ids])
            engine.scheduler.finish(cut, FinishReason.ABORT, rng.randrange(len(cut.output_ids) + 1))
        elif kind < 0.42:
            engine.scheduler.cache.evict(rng.randrange(1, 6))
        elif kind < 0.45:
            engine.scheduler.expire_deadlines()
        elif kind < 0.47:
            engine.drain()
            engine.overlap = not engine.overlap
        else:
            engine.step()
        engine.scheduler.check_integrity()
    return sequences


def check_end(engine: SimulatedEngine, sequences: list[Sequence]) -> None:
    engine.run()
    assert_idle_and_whole(engine)
    for sequence in sequences:
        assert sequence.is_finished
        assert_output_is_right(sequence)
        request = sequence.request
        if request.score_from is not None and sequence.finish_reason is FinishReason.LENGTH:
            assert engine.scores.get(sequence, []) == list(range(request.score_from, request.num_prompt))
    engine.scheduler.cache.flush()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_total


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_spare_pages=st.integers(1, 30),
    page_size=st.sampled_from((1, 2, 4, 5)),
    budget=st.integers(5, 24),
    max_running=st.integers(1, 5),
    ratio=st.sampled_from((0.0, 0.3, 1.0)),
    overlap=st.booleans(),
    prefix_cache=st.sampled_from((True, True, True, False)),
    burst=st.sampled_from((1, 1, 3, 0)),
    max_step_s=st.sampled_from((0.0, 0.01, 1.0)),
    has_drafts=st.booleans(),
)
def test_every_read_finds_its_own_path_and_everything_ends(
    seed: int,
    num_spare_pages: int,
    page_size: int,
    budget: int,
    max_running: int,
    ratio: float,
    overlap: bool,
    prefix_cache: bool,
    burst: int,
    max_step_s: float,
    has_drafts: bool,
) -> None:
    clock = [0.0]
    engine = make_simulation(
        num_pages=60 // page_size + 1 + num_spare_pages,
        page_size=page_size,
        overlap=overlap,
        clock=clock,
        max_running=max_running,
        max_num_tokens_per_step=budget,
        min_mixed_tokens=max_running + seed % 7,
        mixed_tokens_per_request=2,
        reservation_ratio=ratio,
        prefix_cache=prefix_cache,
        max_step_s=max_step_s,
        first_mixed_tokens=1 + seed % 9,
    )
    rng = random.Random(seed)
    engine.step_s = lambda batch: rng.choice((0.0, 1e-4, 0.003, 0.05, 100.0))  # whatever a step takes
    engine.burst = burst
    if has_drafts:
        engine.draft = lambda sequence: drafted(rng, sequence)
        engine.collects_first = lambda: rng.random() < 0.4
    is_alone = rng.random() < 0.5
    sequences = drive(engine, rng, clock, 80, ("",) if is_alone else ("", "x", "y"))
    engine.burst = max(engine.burst, 1)
    check_end(engine, sequences)
    if ratio == 1.0 and burst == 1 and is_alone:
        assert engine.scheduler.counters.num_preemptions == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_operations_leak_nothing() -> None:
    rng = random.Random(0)
    num_operations = 0
    while num_operations < 1_000_000:
        clock = [0.0]
        engine = make_simulation(
            num_pages=rng.randrange(66, 90),
            page_size=1 << rng.randrange(4),
            overlap=rng.random() < 0.7,
            clock=clock,
            max_running=rng.randrange(1, 9),
            max_num_tokens_per_step=rng.randrange(9, 40),
            reservation_ratio=rng.choice((0.0, 0.5, 1.0)),
        )
        engine.scheduler.check_integrity = lambda: None  # type: ignore[method-assign]
        sequences = drive(engine, rng, clock, 2_000)
        del engine.scheduler.check_integrity
        check_end(engine, sequences)
        num_operations += 2_000
