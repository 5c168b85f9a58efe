from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ramet.errors import CacheIntegrityError, ContextOverflow, InvalidRequest, Overloaded
from ramet.runtime.scheduling.priority import MAX_CREDIT_S
from ramet.runtime.testing.simulation import (
    STOP,
    SimulatedEngine,
    assert_idle_and_whole,
    assert_output_is_right,
    expected_output,
    make_request,
    make_simulation,
)
from ramet.runtime.types import Batch, FinishReason, Request, RowOutput, SamplingParams, Sequence, Status


def run_all(engine: SimulatedEngine, requests: list[Request]) -> list[Sequence]:
    sequences = [engine.scheduler.add(request) for request in requests]
    engine.run()
    assert_idle_and_whole(engine)
    for sequence in sequences:
        assert_output_is_right(sequence)
    return sequences


def shape(batch: Batch | None) -> list[tuple[str, int, int, int]]:
    assert batch is not None
    return [(i.sequence.request.request_id, i.start, i.num_tokens, i.num_samples) for i in batch.items]


def answer(batch: Batch, token: int = 9) -> list[RowOutput]:
    return [RowOutput((token,)) if item.num_samples else RowOutput() for item in batch.items]


# --- what a step holds


def test_a_prompt_is_computed_in_chunks_beside_decode_rows_that_come_first() -> None:
    scheduler = make_simulation(max_num_tokens_per_step=10).scheduler
    scheduler.add(make_request("a", range(6), 5))
    batch = scheduler.schedule()
    assert shape(batch) == [("a", 0, 6, 1)]
    assert batch is not None
    scheduler.finish_step(batch.items, answer(batch))
    scheduler.add(make_request("b", range(100, 121), 3))
    steps = []
    for _ in range(3):
        batch = scheduler.schedule()
        assert batch is not None
        steps.append(shape(batch))
        assert batch.num_decode == 1
        assert batch.num_tokens <= 10
        scheduler.finish_step(batch.items, answer(batch))
    assert steps == [  # nine tokens are left for b: chunks end at page borders (4 tokens)
        [("a", 6, 1, 1), ("b", 0, 8, 0)],
        [("a", 7, 1, 1), ("b", 8, 8, 0)],
        [("a", 8, 1, 1), ("b", 16, 5, 1)],
    ]


def test_a_step_may_be_scheduled_before_the_last_one_is_read() -> None:
    scheduler = make_simulation().scheduler
    sequence = scheduler.add(make_request("a", range(5), 3))
    batches = [scheduler.schedule() for _ in range(4)]
    assert [shape(b)[0][1:3] for b in batches[:3]] == [(0, 5), (5, 1), (6, 1)]
    assert batches[3] is None, "three tokens are in flight, and more are not wanted"
    assert sequence.num_in_flight == 3
    for batch in batches[:3]:
        assert batch is not None
        assert scheduler.finish_step(batch.items, answer(batch)) == [sequence]
    assert sequence.output_ids == [9, 9, 9]
    assert sequence.finish_reason is FinishReason.LENGTH


def test_a_held_sequence_is_in_every_second_step_and_the_others_in_all() -> None:
    scheduler = make_simulation().scheduler
    scheduler.hold(scheduler.add(make_request("held", range(5), 4)))
    scheduler.add(make_request("free", range(50, 55), 6))
    batches, names = [scheduler.schedule()], []
    for _ in range(5):
        batches.append(scheduler.schedule())  # before the one before is read
        names.append([name for name, *_ in shape(batches[-1])])
        before = batches[-2]
        assert before is not None
        scheduler.finish_step(before.items, answer(before))
    assert names == [["free"], ["held", "free"], ["free"], ["held", "free"], ["free"]]


def test_slots_are_given_out_from_the_smallest() -> None:
    scheduler = make_simulation().scheduler
    sequences = [scheduler.add(make_request(name, [i], 4)) for i, name in enumerate("abc")]
    scheduler.schedule()
    assert [s.slot for s in sequences] == [0, 1, 2]
    scheduler.abort("b")
    scheduler.abort("a")
    late = scheduler.add(make_request("d", [7], 4))
    scheduler.schedule()
    assert late.slot == 0


def test_rows_with_several_tokens_have_them_computed_next() -> None:
    engine = make_simulation()
    engine.burst = 3
    (sequence,) = run_all(engine, [make_request("a", range(6), 8)])
    assert len(sequence.output_ids) == 8


def test_forced_tokens_do_not_wait_behind_a_long_prompt() -> None:
    scheduler = make_simulation(max_num_tokens_per_step=10).scheduler
    scheduler.add(make_request("a", range(6), 9))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.add(make_request("long", range(100, 160), 3))
    scheduler.finish_step(batch.items, answer(batch))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.finish_step(batch.items, [RowOutput((9, 8, 7)), RowOutput()])
    assert shape(scheduler.schedule()) == [("a", 7, 3, 1), ("long", 8, 4, 0)]


@pytest.mark.parametrize(("num_running", "num_waiting", "expected"), [(0, 3, 100), (2, 1, 10), (2, 8, 20), (2, 60, 32)])
def test_beside_decode_rows_prompts_come_in_chunks_by_live_requests(
    num_running: int, num_waiting: int, expected: int
) -> None:
    scheduler = make_simulation(
        num_pages=4000, max_running=16, max_num_tokens_per_step=100, min_mixed_tokens=12, mixed_tokens_per_request=2
    ).scheduler
    for i in range(num_running):
        scheduler.add(make_request(f"r{i}", range(1000 * i, 1000 * i + 5), 20))
    if num_running:
        scheduler.schedule()
    for i in range(num_waiting):
        scheduler.add(make_request(f"w{i}", range(50_000 + 1000 * i, 50_000 + 1000 * i + 200), 20))
    batch = scheduler.schedule()
    assert batch is not None
    assert batch.num_decode == num_running
    assert batch.num_tokens == expected


def test_a_row_without_a_token_is_computed_again() -> None:
    scheduler = make_simulation().scheduler
    scheduler.add(make_request("a", range(8), 2))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.finish_step(batch.items, [RowOutput()])
    assert shape(scheduler.schedule()) == [("a", 7, 1, 1)]


# --- prefixes


def test_64_branches_over_an_uncomputed_prefix_compute_it_once() -> None:
    engine = make_simulation(num_pages=400, page_size=16, max_running=64, max_num_tokens_per_step=256)
    prefix = list(range(1_000))
    run_all(engine, [make_request(f"b{i}", [*prefix, 5_000 + i, 1], 4) for i in range(64)])
    counters = engine.scheduler.counters
    assert counters.num_computed_tokens == 1_000 + 64 * 2
    assert counters.num_cached_tokens == 63 * 1_000


@pytest.mark.parametrize("num_prompt", [7, 100, 128])
def test_samples_of_one_prompt_compute_it_once(num_prompt: int) -> None:
    engine = make_simulation(num_pages=400, page_size=8, max_running=8, max_num_tokens_per_step=64)
    run_all(engine, [make_request(f"s{i}", range(num_prompt), 4) for i in range(8)])
    computed = engine.scheduler.counters.num_computed_tokens
    if num_prompt >= 8:  # the last token of every prompt is computed to sample from it
        assert computed == num_prompt + 7
    else:
        assert computed <= 8 * num_prompt


def test_the_last_prompt_token_is_always_computed() -> None:
    engine = make_simulation()
    run_all(engine, [make_request("a", range(8), 3)])
    (again,) = run_all(engine, [make_request("b", range(8), 3)])
    assert again.num_cached == 7


def test_the_next_turn_computes_its_new_tokens_only() -> None:
    engine = make_simulation(num_pages=200)
    text = list(range(30))
    for turn in range(6):
        before = engine.scheduler.counters.num_computed_tokens
        (sequence,) = run_all(engine, [make_request(f"t{turn}", text, 7)])
        computed = engine.scheduler.counters.num_computed_tokens - before
        # The last token of a turn was sampled and never fed, so the next turn computes it with its own.
        assert computed == (30 if turn == 0 else 5 + 1)
        text = [*text, *sequence.output_ids, *range(40, 45)]


def test_sharers_are_not_lost_when_the_owner_of_their_prefix_is_aborted() -> None:
    engine = make_simulation(num_pages=100)
    prefix = list(range(60))
    sequences = [engine.scheduler.add(make_request(f"b{i}", [*prefix, 100 + i], 3)) for i in range(4)]
    engine.step()
    assert [s.status for s in sequences] == [Status.RUNNING] + [Status.WAITING] * 3
    assert engine.scheduler.abort("b0")
    engine.run()
    assert [s.finish_reason for s in sequences[1:]] == [FinishReason.LENGTH] * 3
    assert engine.scheduler.counters.num_computed_tokens == 60 + 3
    assert_idle_and_whole(engine)


def test_sharers_start_in_the_step_after_their_part_of_the_prefix_is_computed() -> None:
    engine = make_simulation(num_pages=100, max_num_tokens_per_step=18)
    engine.scheduler.add(make_request("owner", range(60), 30))
    engine.step()
    early = engine.scheduler.add(make_request("early", [*range(30), 100], 3))
    late = engine.scheduler.add(make_request("late", [*range(59), 100], 3))
    started = []
    for _ in range(5):
        engine.step()
        started.append([s.first_scheduled_s is not None for s in (early, late)])
    # 16 tokens of the owner are computed in each step; what they leave of the budget admits.
    assert started == [[False, False], [True, False], [True, False], [True, True], [True, True]]
    assert (early.num_cached, late.num_cached) == (30, 59)
    engine.run()
    assert_idle_and_whole(engine)


def test_a_parked_request_can_be_aborted() -> None:
    engine = make_simulation(num_pages=100, max_num_tokens_per_step=30)
    for i in range(3):
        engine.scheduler.add(make_request(f"b{i}", [*range(30 + 20), 100 + i], 3))
    engine.step()
    engine.step()
    assert engine.scheduler.counters.num_parked == 2
    assert engine.scheduler.abort("b1")
    engine.run()
    assert_idle_and_whole(engine)


def test_salts_share_nothing() -> None:
    engine = make_simulation()
    requests = [make_request(f"r{i}", range(12), 2, cache_salt=f"{i}") for i in range(3)]
    run_all(engine, requests)
    assert engine.scheduler.counters.num_computed_tokens == 36


def test_without_the_prefix_cache_nothing_is_kept() -> None:
    engine = make_simulation(prefix_cache=False)
    run_all(engine, [make_request("a", range(12), 3)])
    run_all(engine, [make_request("b", range(12), 3), make_request("c", range(12), 3)])
    assert engine.scheduler.cache.num_cached_pages == 0
    assert engine.scheduler.counters.num_computed_tokens == 36


# --- scoring


def test_scoring_computes_from_the_token_before_the_first_scored_and_never_samples() -> None:
    engine = make_simulation()
    run_all(engine, [make_request("a", range(12), 2)])
    before = engine.scheduler.num_waiting, engine.scheduler.counters.num_computed_tokens
    assert before[0] == 0
    (sequence,) = run_all(engine, [make_request("s", [*range(12), 30, 31, 32], 1, score_from=12)])
    assert engine.scores[sequence] == [12, 13, 14]
    assert sequence.num_cached == 11
    assert sequence.output_ids == []
    assert sequence.finish_reason is FinishReason.LENGTH
    assert engine.scheduler.counters.num_computed_tokens - before[1] == 3


@pytest.mark.parametrize("score_from", [1, 2, 19, 40])
@pytest.mark.parametrize("overlap", [False, True])
def test_scores_come_once_for_each_position_over_all_chunks(score_from: int, overlap: bool) -> None:
    engine = make_simulation(max_num_tokens_per_step=9, overlap=overlap)
    (sequence,) = run_all(engine, [make_request("s", range(40), 1, score_from=score_from)])
    assert engine.scores[sequence] == list(range(score_from, 40))


# --- ends


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stop_token_ends_a_sequence_and_what_it_computed_is_cached(overlap: bool) -> None:
    engine = make_simulation(overlap=overlap)
    request = make_request("a", range(6), 40, stop_ids=tuple(range(STOP, 25)))
    (sequence,) = run_all(engine, [request])
    assert sequence.finish_reason is FinishReason.STOP
    assert sequence.output_ids[-1] in request.stop_ids
    path = np.asarray([*range(6), *sequence.output_ids], dtype=np.int32)
    assert engine.scheduler.cache.match_length(path) >= len(path) - 1


def test_a_stop_token_before_min_tokens_does_not_end() -> None:
    scheduler = make_simulation().scheduler
    request = make_request("a", range(3), 5, stop_ids=(9,))
    request = replace(request, sampling=SamplingParams(min_tokens=2))
    sequence = scheduler.add(request)
    for _ in range(2):
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.finish_step(batch.items, answer(batch))
    assert (sequence.output_ids, sequence.finish_reason) == ([9, 9], FinishReason.STOP)


def test_an_abort_frees_pages_and_slot_within_the_call_and_its_row_in_flight_is_ignored() -> None:
    scheduler = make_simulation().scheduler
    sequence = scheduler.add(make_request("a", range(10), 8))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    scheduler.finish_step(first.items, answer(first))
    assert scheduler.abort("a")
    assert scheduler.num_running == 0
    assert scheduler.pool.num_free + scheduler.cache.num_evictable_pages == scheduler.pool.num_total
    assert scheduler.finish_step(second.items, answer(second)) == []
    assert sequence.output_ids == [9]
    scheduler.check_integrity()


def test_ids_are_exact() -> None:
    scheduler = make_simulation().scheduler
    scheduler.add(make_request("ab", [1]))
    assert not scheduler.abort("a")
    assert not scheduler.abort("abc")
    assert scheduler.abort("ab")
    assert not scheduler.abort("ab")


def test_a_sequence_cut_by_its_owner_keeps_and_caches_only_what_is_left() -> None:
    engine = make_simulation()
    sequence = engine.scheduler.add(make_request("a", range(6), 20))
    while len(sequence.output_ids) < 10:
        engine.step()
    whole = [*range(6), *sequence.output_ids]
    engine.scheduler.finish(sequence, FinishReason.STOP, 4)
    assert sequence.output_ids == whole[6:10]
    assert engine.scheduler.cache.match_length(np.asarray(whole, dtype=np.int32)) == 10
    assert_idle_and_whole(engine)


def test_deadlines_abort_waiting_and_running_alike() -> None:
    clock = [0.0]
    engine = make_simulation(clock=clock, max_running=1)
    late = [engine.scheduler.add(make_request(f"r{i}", [i], 50, deadline_s=5.0)) for i in range(2)]
    kept = engine.scheduler.add(make_request("k", [9], 3))
    engine.step()
    assert engine.scheduler.expire_deadlines() == []
    clock[0] = 5.0
    assert engine.scheduler.expire_deadlines() == late
    assert {s.finish_reason for s in late} == {FinishReason.ABORT}
    engine.run()
    assert kept.finish_reason is FinishReason.LENGTH
    assert_idle_and_whole(engine)


def test_a_failed_step_ends_what_runs_and_caches_nothing_of_it() -> None:
    engine = make_simulation(max_running=2)
    sequences = [engine.scheduler.add(make_request(f"r{i}", range(100 * i, 100 * i + 9), 5)) for i in range(3)]
    engine.scheduler.schedule()
    error = RuntimeError("the step")
    assert engine.scheduler.fail_running(error) == sequences[:2]
    assert [s.error for s in sequences] == [error, error, None]
    assert engine.scheduler.cache.num_cached_pages == 0
    assert sequences[0].finish_reason is FinishReason.ERROR
    engine.run()
    assert_output_is_right(sequences[2])
    assert_idle_and_whole(engine)


def test_what_a_failed_sequence_computed_since_its_prompt_is_not_cached() -> None:
    engine = make_simulation()
    sequence = engine.scheduler.add(make_request("a", range(8), 20))
    while len(sequence.output_ids) < 9:
        engine.step()
    engine.scheduler.finish(sequence, FinishReason.ERROR)
    path = np.asarray([*range(8), *sequence.output_ids], dtype=np.int32)
    assert engine.scheduler.cache.match_length(path) == 8
    assert_idle_and_whole(engine)


# --- limits


def test_a_request_beyond_the_context_is_refused_with_the_numbers() -> None:
    scheduler = make_simulation(context_length=20).scheduler
    with pytest.raises(ContextOverflow, match=r"15 tokens.*up to 6.*context of 20"):
        scheduler.add(make_request("a", range(15), 6))
    assert not scheduler.has_work


def test_a_request_that_never_fits_the_pool_is_refused_with_the_numbers() -> None:
    scheduler = make_simulation(num_pages=9).scheduler
    with pytest.raises(ContextOverflow, match=r"30 tokens.*need 9 KV pages of 4 tokens but the pool has 8"):
        scheduler.add(make_request("a", range(30), 4))
    scheduler.add(make_request("b", range(30), 3))


def test_an_id_in_use_is_refused() -> None:
    scheduler = make_simulation().scheduler
    scheduler.add(make_request("a", [1]))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        scheduler.add(make_request("a", [2]))


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    scheduler = make_simulation(max_waiting=2, max_running=1).scheduler
    for i in range(2):
        scheduler.add(make_request(f"r{i}", [i]))
    with pytest.raises(Overloaded, match="2 requests wait already") as caught:
        scheduler.add(make_request("r2", [2]))
    assert 1 <= caught.value.retry_after_s <= 60


# --- memory


def test_with_full_reservation_memory_is_waited_for_and_nothing_is_preempted() -> None:
    engine = make_simulation(num_pages=21, max_running=8)
    sequences = run_all(engine, [make_request(f"r{i}", range(50 * i, 50 * i + 9), 20) for i in range(12)])
    assert engine.scheduler.counters.num_preemptions == 0
    assert all(s.finish_reason is FinishReason.LENGTH for s in sequences)


@pytest.mark.parametrize("overlap", [False, True])
def test_overcommitted_memory_preempts_the_newest_and_every_output_is_right(overlap: bool) -> None:
    engine = make_simulation(num_pages=21, max_running=8, reservation_ratio=0.0, overlap=overlap)
    sequences = run_all(engine, [make_request(f"r{i}", range(50 * i, 50 * i + 9), 20) for i in range(12)])
    assert engine.scheduler.counters.num_preemptions > 0
    assert sequences[0].num_preemptions == 0


def test_what_a_step_computes_already_is_not_preempted_in_it() -> None:
    clock = [0.0]
    engine = make_simulation(num_pages=4, reservation_ratio=0.0, clock=clock)
    engine.burst = 3
    first = engine.scheduler.add(make_request("first", range(4), 8, priority=5))
    clock[0] = 1_000.0
    second = engine.scheduler.add(make_request("second", range(50, 54), 8))
    engine.step()
    assert shape(engine.scheduler.schedule()) == [("first", 4, 3, 1)], "three pages: one is left for one"
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)


def test_the_lowest_priority_is_preempted_first() -> None:
    engine = make_simulation(num_pages=13, reservation_ratio=0.0)
    low = engine.scheduler.add(make_request("low", range(9), 30, priority=5))
    engine.step()
    high = engine.scheduler.add(make_request("high", range(50, 59), 30))
    engine.run()
    assert (low.num_preemptions > 0, high.num_preemptions) == (True, 0)
    assert_output_is_right(low)
    assert_idle_and_whole(engine)


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    engine = make_simulation(num_pages=40)
    sequence = engine.scheduler.add(make_request("a", range(9), 20))
    for _ in range(8):
        engine.step()
    engine.scheduler._preempt(sequence)
    assert sequence.status is Status.WAITING
    engine.step()
    assert sequence.num_cached == sequence.num_tokens - 2
    engine.run()
    assert sequence.output_ids == expected_output(sequence.request)
    assert_idle_and_whole(engine)


def test_pages_that_nobody_owns_are_quarantined_and_counted() -> None:
    engine = make_simulation(num_pages=10)
    engine.scheduler.pool.allocate(2)
    with pytest.raises(CacheIntegrityError):
        engine.scheduler.check_integrity()
    assert engine.scheduler.quarantine_leaks() == 2
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.num_quarantined == 2
    run_all_small = [make_request("a", range(9), 3)]
    engine.scheduler.add(run_all_small[0])
    engine.run()


# --- order


def admissions(engine: SimulatedEngine, sequences: list[Sequence]) -> list[str]:
    """Request ids in order of admission."""
    order: list[str] = []
    while engine.scheduler.has_work:
        engine.step()
        order += [
            s.request.request_id
            for s in sequences
            if s.first_scheduled_s is not None and s.request.request_id not in order
        ]
    return order


def test_lower_priority_values_go_first_then_earlier_arrivals() -> None:
    engine = make_simulation(max_running=1)
    sequences = [engine.scheduler.add(make_request(f"{i}", [i], 2, priority=p)) for i, p in enumerate((1, 0, 1, -1))]
    assert admissions(engine, sequences) == ["3", "1", "0", "2"]


def test_a_cached_prefix_goes_first_among_equals() -> None:
    engine = make_simulation(max_running=1)
    run_all(engine, [make_request("warm", range(20), 2)])
    sequences = [
        engine.scheduler.add(make_request("cold", range(50, 70), 2)),
        engine.scheduler.add(make_request("hot", range(20), 2)),
    ]
    assert admissions(engine, sequences) == ["hot", "cold"]


def test_hot_traffic_overtakes_a_cold_request_for_no_longer_than_its_credit() -> None:
    clock = [0.0]
    engine = make_simulation(max_running=2, clock=clock)
    run_all(engine, [make_request("warm", range(20), 2)])
    hot = [engine.scheduler.add(make_request(f"h{i}", range(20), 4)) for i in range(4)]
    cold = engine.scheduler.add(make_request("cold", range(50, 70), 4))
    arrivals = dict.fromkeys(hot, 0.0)
    while cold.first_scheduled_s is None:
        clock[0] += 0.05
        sequence = engine.scheduler.add(make_request(f"h{clock[0]:.2f}", range(20), 4))
        arrivals[sequence] = clock[0]
        engine.step()
    overtaking = [arrivals[s] for s in arrivals if s.first_scheduled_s is not None]
    assert max(overtaking) <= MAX_CREDIT_S + 1e-9
    assert max(overtaking) > 0.0, "a cached prefix is worth something"


def test_the_program_that_had_least_service_goes_first() -> None:
    engine = make_simulation(max_running=1)
    engine.step_s = lambda batch: 0.1
    run_all(engine, [make_request("before", range(100, 130), 4, task="big")])
    sequences = [
        engine.scheduler.add(make_request("big", [1], 2, task="big")),
        engine.scheduler.add(make_request("small", [2], 2, task="small")),
    ]
    assert admissions(engine, sequences) == ["small", "big"]


def test_small_requests_pass_a_big_one_that_does_not_fit_and_do_not_starve_it() -> None:
    engine = make_simulation(num_pages=33, max_running=8)
    long = engine.scheduler.add(make_request("long", range(60), 20))
    engine.step()
    big = engine.scheduler.add(make_request("big", range(100, 180), 20))
    num_small = 0
    while big.first_scheduled_s is None:
        assert num_small < 200
        engine.scheduler.add(make_request(f"s{num_small}", [200 + num_small], 4))
        num_small += 1
        engine.step()
    assert engine.scheduler.counters.num_overtakes > 3
    assert long.is_finished
    engine.run()
    assert_idle_and_whole(engine)


def test_a_long_request_does_not_pass_a_big_one_whose_pages_it_would_take() -> None:
    engine = make_simulation(num_pages=33, max_running=8)
    engine.scheduler.add(make_request("first", range(60), 10))
    engine.step()
    big = engine.scheduler.add(make_request("big", range(100, 200), 20))
    long = engine.scheduler.add(make_request("long", [7], 40))
    engine.step()
    assert (big.status, long.status) == (Status.WAITING, Status.WAITING)
    engine.run()
    assert big.first_scheduled_s is not None
    assert_idle_and_whole(engine)


def test_overtaking_is_counted_and_ends() -> None:
    engine = make_simulation(num_pages=33, max_running=8, max_overtakes=2)
    engine.scheduler.add(make_request("first", range(60), 40))
    engine.step()
    big = engine.scheduler.add(make_request("big", range(100, 180), 20))
    small = [engine.scheduler.add(make_request(f"s{i}", [200 + i], 2)) for i in range(5)]
    for _ in range(20):
        engine.step()
    assert not big.is_finished
    assert sum(s.is_finished for s in small) == 2
    engine.run()
    assert_idle_and_whole(engine)


def test_thousands_of_waiting_requests_are_looked_at_a_few_at_a_time() -> None:
    engine = make_simulation(num_pages=200, max_running=4, max_examined=8)
    prefix = list(range(40))
    for i in range(3_000):
        engine.scheduler.add(make_request(f"r{i}", [*prefix, 1_000 + i], 1))
    engine.step()
    assert engine.scheduler.counters.num_parked <= 8
    engine.run()
    assert engine.scheduler.counters.num_computed_tokens == 40 + 3_000
    assert_idle_and_whole(engine)
