"""The engine core on a tiny random model: however a request is run, it gives the same tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.probe import pages_of
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.constraints.states import GrammarStates
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.core import EngineCore
from ramet.runtime.engine.factory import scheduler_config
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.linear_cpu import CpuFeatures
from ramet.runtime.scheduling.scheduler import Scheduler
from ramet.runtime.steps.kv_cache import KVCache
from ramet.runtime.steps.model_runner import ModelRunner
from ramet.runtime.steps.recorded import RecordedStep
from ramet.runtime.steps.slots import RunningSlots
from ramet.runtime.testing.dummy import dummy_decoder, dummy_weights
from ramet.runtime.types import FinishReason, Request, SamplingParams, Sequence

CPU = torch.device("cpu")
VOCAB = 131
CONTEXT = 256


@pytest.fixture(scope="module", params=["eager", "recorded"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """With products of torch's, or with exact ones of ours, whose small steps are recorded programs."""
    is_recorded = request.param == "recorded"
    config = config_from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB,
            "hidden_size": 64 if is_recorded else 48,
            "intermediate_size": 96 if is_recorded else 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16 if is_recorded else 12,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        }
    )
    if not is_recorded:
        return dummy_decoder(config, CPU, torch.float32, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuFeatures, "detect", lambda: CpuFeatures(bf16=False, int8=False, tiles=False))
        weights = dummy_weights(config, CPU, torch.float32, seed=3)
        return build_decoder(config, weights, device=CPU, quantization="int8")


def make_core(
    decoder: Decoder,
    *,
    num_pages: int = 200,
    overlap: bool = False,
    chunk: int = 64,
    running: int = 16,
    cache: bool = True,
) -> EngineCore:
    # max_step_ms=0: what steps hold does not depend on how busy the machine is
    settings = EngineConfig(max_running_requests=running, chunked_prefill_size=chunk, radix_cache=cache, max_step_ms=0)
    kv_cache = KVCache(decoder.config, num_pages, 16, device=CPU, dtype=torch.float32)
    pool = PagePool(num_pages, 16)
    scheduler = Scheduler(scheduler_config(settings, CONTEXT, decoder), pool, RadixCache(pool))
    slots = RunningSlots(running, CONTEXT // 16, device=CPU)
    runner = ModelRunner(decoder, kv_cache, slots, device=CPU, max_kv_len=CONTEXT)
    grammars = GrammarStates(VOCAB, runner.computes_run)
    return EngineCore(scheduler, runner, grammars, overlap=overlap, context_length=CONTEXT)


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def request(name: str, ids: list[int], max_tokens: int = 12, seed: int = 7, **sampling: object) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **sampling})  # type: ignore[arg-type]
    return Request(name, np.asarray(ids, dtype=np.int32), params, max_tokens, seed=seed)


def run(core: EngineCore, requests: list[Request], between: Callable[[int], None] | None = None) -> list[Sequence]:
    sequences = [core.add(r) for r in requests]
    for step in range(10_000):
        if not core.has_work:
            core.scheduler.check_integrity()
            return sequences
        core.step()
        if between is not None:
            between(step)
    raise AssertionError("the engine does not come to an end")


def alone(decoder: Decoder, r: Request) -> list[int]:
    (sequence,) = run(make_core(decoder), [r])
    return sequence.output_ids


REQUESTS = [request(f"r{i}", prompt(i % 5, 20 + 13 * (i % 5)) + prompt(100 + i, i % 4), 5 + i % 9) for i in range(12)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunk", [16, 200])
@pytest.mark.parametrize("cache", [False, True])
def test_greedy_tokens_are_the_same_alone_and_in_any_batch(
    decoder: Decoder, overlap: bool, chunk: int, cache: bool
) -> None:
    core = make_core(decoder, overlap=overlap, chunk=chunk, cache=cache)
    for sequence, r in zip(run(core, REQUESTS), REQUESTS, strict=True):
        assert sequence.output_ids == alone(decoder, r), r.request_id
        assert len(sequence.output_ids) == r.max_tokens
        assert sequence.finish_reason is FinishReason.LENGTH


def test_pages_that_are_held_for_another_engine_outlive_evictions_but_not_a_failed_step(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(decoder, num_pages=20)
    ids = np.asarray(prompt(1, 100), dtype=np.int32)
    run(core, [request("first", ids.tolist(), 1)])
    cache = core.scheduler.cache
    held = core.hold_pages(ids, "", 4)
    assert held is not None
    before = core.runner.kv_cache.read(held.page_ids)
    run(core, [request(f"r{n}", prompt(50 + n, 150), 20) for n in range(4)])  # more than the other pages hold
    assert pages_of(cache, ids) == held.page_ids
    assert torch.equal(core.runner.kv_cache.read(held.page_ids), before)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(core.runner, "launch", fail)
        (failed,) = run(core, [request("fails", ids.tolist(), 5)])
    assert failed.finish_reason is FinishReason.ERROR
    core.scheduler.check_integrity()
    core.let_go(held)
    assert cache.num_cached_pages == 0
    core.scheduler.check_integrity()


@pytest.mark.parametrize("overlap", [False, True])
def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch(decoder: Decoder, overlap: bool) -> None:
    requests = [
        request(f"r{i}", prompt(i % 3, 40), 10, seed=i, temperature=0.9, top_p=0.95, top_k=50 * (i % 2))
        for i in range(8)
    ]
    sequences = run(make_core(decoder, overlap=overlap), requests)
    outputs = [tuple(s.output_ids) for s in sequences]
    assert [list(o) for o in outputs] == [alone(decoder, r) for r in requests]
    assert len(set(outputs)) > 4


@pytest.mark.parametrize("overlap", [False, True])
def test_a_second_run_takes_its_prompt_from_the_cache_and_gives_the_same_tokens(
    decoder: Decoder, overlap: bool
) -> None:
    core = make_core(decoder, overlap=overlap)
    first = run(core, REQUESTS)
    again = run(core, [request("again" + r.request_id, r.prompt_ids.tolist(), r.max_tokens) for r in REQUESTS])
    for a, b in zip(first, again, strict=True):
        assert b.output_ids == a.output_ids
        assert b.num_cached == b.request.num_prompt - 1


@pytest.mark.parametrize("decoder", ["recorded"], indirect=True)
def test_short_prompts_are_recorded_alone_and_beside_decode_rows(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(decoder)
    steps: list[list[int]] = []  # rows of each recorded step with new tokens
    run(core, [request("long", prompt(1, 100), 2)])
    core.add(request("beside", prompt(2, 100), 20))
    for _ in range(4):
        core.step()
    hidden = RecordedStep.hidden

    def counted(step: RecordedStep, rows: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        steps.append(rows.tolist())
        return hidden(step, rows, *inputs)

    monkeypatch.setattr(RecordedStep, "hidden", counted)
    monkeypatch.setattr(decoder.__class__, "forward", None)  # what runs eagerly calls it
    run(core, [request("short", prompt(1, 100) + prompt(3, 5), 2)])
    assert steps == [[0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("decoder", ["recorded"], indirect=True)
def test_short_runs_of_known_tokens_are_computed_together_where_that_step_is_recorded(decoder: Decoder) -> None:
    runner = make_core(decoder).runner
    assert runner.computes_run(1, 1, 100)
    assert runner.computes_run(1, 32, 100)
    assert not runner.computes_run(1, 64, 100)  # a step of 65 tokens
    assert not runner.computes_run(1, 24, 1_000_000)
    assert runner.computes_run(22, 64, 100)


def test_the_next_turn_computes_only_its_new_tokens(decoder: Decoder) -> None:
    core = make_core(decoder)
    (first,) = run(core, [request("turn0", prompt(1, 37), 9)])
    history = first.tokens(0, first.num_tokens).tolist()
    new = prompt(50, 11)
    before = core.scheduler.counters.num_computed_tokens
    (second,) = run(core, [request("turn1", history + new, 3)])
    # the last generated token was sampled, but never fed: it counts as new
    assert second.num_cached == len(history) - 1
    assert core.scheduler.counters.num_computed_tokens - before == len(new) + 1


@pytest.mark.parametrize("overlap", [False, True])
def test_branches_over_an_uncomputed_prefix_compute_it_once(decoder: Decoder, overlap: bool) -> None:
    core = make_core(decoder, overlap=overlap, chunk=32)
    shared = prompt(9, 150)
    run(core, [request(f"b{i}", [*shared, i], 4) for i in range(12)])
    computed = core.scheduler.counters.num_computed_tokens
    assert computed < len(shared) + 12 * 17  # a page at most for each branch beside the one shared prefix


def test_a_small_pool_preempts_or_queues_and_changes_no_token(decoder: Decoder) -> None:
    core = make_core(decoder, num_pages=18, overlap=True)
    for sequence, r in zip(run(core, REQUESTS), REQUESTS, strict=True):
        assert sequence.output_ids == alone(decoder, r)


def test_a_sequence_preempted_and_readmitted_to_its_slot_reads_its_new_pages(decoder: Decoder) -> None:
    core = make_core(decoder)

    def between(step: int) -> None:
        idle = [s for s in core.scheduler._decoding if not s.num_in_flight]
        if step % 3 == 2 and idle:
            core.scheduler._preempt(idle[-1])

    for sequence, r in zip(run(core, REQUESTS, between), REQUESTS, strict=True):
        assert sequence.output_ids == alone(decoder, r)
    assert core.scheduler.counters.num_preemptions > 3


@pytest.mark.parametrize("overlap", [False, True])
def test_aborting_in_the_middle_frees_the_pages_and_leaves_the_others_alone(decoder: Decoder, overlap: bool) -> None:
    core = make_core(decoder, overlap=overlap)

    def between(step: int) -> None:
        core.scheduler.check_integrity()
        if step == 3:
            assert core.abort("r1")
            assert core.abort("r10")
            assert not core.abort("r")  # exact ids only

    sequences = run(core, REQUESTS, between)
    for sequence, r in zip(sequences, REQUESTS, strict=True):
        if r.request_id in ("r1", "r10"):
            assert sequence.finish_reason is FinishReason.ABORT
        else:
            assert sequence.output_ids == alone(decoder, r)


def test_a_stop_token_ends_a_sequence_while_its_next_step_is_launched(decoder: Decoder) -> None:
    expected = alone(decoder, REQUESTS[3])
    stop = expected[2]
    params = SamplingParams(temperature=0.0, max_tokens=12)
    r = Request("stopped", REQUESTS[3].prompt_ids, params, 12, stop_ids=frozenset([stop]))
    (sequence,) = run(make_core(decoder, overlap=True), [r])
    assert sequence.output_ids == expected[: expected.index(stop) + 1]
    assert sequence.finish_reason is FinishReason.STOP


def test_scores_equal_the_log_probabilities_of_a_full_forward_pass(decoder: Decoder) -> None:
    ids = prompt(4, 60)
    core = make_core(decoder, chunk=16)
    run(core, [request("warm", ids[:30], 2)])
    params = SamplingParams(temperature=0.0)
    core.add(Request("score", np.asarray(ids, dtype=np.int32), params, 0, score_from=22))
    scores = []
    while core.has_work:
        scores += [o.prompt_logprobs for _, o in core.step() if o.prompt_logprobs is not None]
    got = np.concatenate(scores)
    whole = make_core(decoder, chunk=200)
    whole.add(Request("whole", np.asarray(ids, dtype=np.int32), params, 0, score_from=1))
    (expected,) = [o.prompt_logprobs for _, o in whole.step() if o.prompt_logprobs is not None]
    assert len(got) == len(ids) - 22
    np.testing.assert_allclose(got, expected[21:], atol=1e-4)


@pytest.mark.parametrize("chunk", [16, 200])
def test_a_score_comes_with_the_likeliest_tokens_that_were_asked_for(decoder: Decoder, chunk: int) -> None:
    ids = prompt(4, 60)
    core = make_core(decoder, chunk=chunk)
    requests = {
        count: Request(
            f"top {count}", np.asarray(ids, dtype=np.int32), SamplingParams(logprobs=count), 0, score_from=first
        )
        for count, first in ((None, 3), (0, 1), (2, 40), (5, 22))
    }
    tops: dict[str, list[Any]] = {r.request_id: [] for r in requests.values()}
    scores: dict[str, list[float]] = {r.request_id: [] for r in requests.values()}
    for r in [request("generates", prompt(1, 9), 30), *requests.values()]:
        core.add(r)
    while core.has_work:
        for sequence, output in core.step():
            if output.prompt_logprobs is not None:
                scores[sequence.request.request_id] += list(output.prompt_logprobs)
                tops[sequence.request.request_id] += output.prompt_tops or ()
    assert tops["top None"] == tops["top 0"] == []
    for count, first in ((2, 40), (5, 22)):
        found = tops[f"top {count}"]
        assert [len(top) for top in found] == [count] * (len(ids) - first)
        for place, (top, score) in enumerate(zip(found, scores[f"top {count}"], strict=True), first):
            (sequence,) = run(make_core(decoder), [request("next", ids[:place], 1)])
            assert top[0][0] == sequence.output_ids[0]  # greedy
            assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
            assert dict(top).get(ids[place], score) == score <= top[0][1]


@pytest.mark.parametrize(("most", "largest"), [(16, 16), (512, 64)])
def test_scoring_a_long_prompt_never_holds_logits_for_all_of_it(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, most: int, largest: int
) -> None:
    monkeypatch.setattr("ramet.runtime.steps.sampler._SCORE_ROWS", most)
    core = make_core(decoder, chunk=200)
    logits, rows = Decoder.logits, []

    def counted(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(Decoder, "logits", counted)
    ids = np.asarray(prompt(4, 100), dtype=np.int32)
    core.add(Request("score", ids, SamplingParams(temperature=0.0), 0, score_from=1))
    while core.has_work:
        core.step()
    assert sum(rows) >= 99
    assert max(rows) == largest


def test_penalties_bias_and_log_probabilities_take_the_slow_path_and_end_with_it(decoder: Decoder) -> None:
    core = make_core(decoder, overlap=True)
    plain, banned = alone(decoder, REQUESTS[0]), {}
    for token in set(plain):
        banned[token] = -100.0
    requests = [
        REQUESTS[0],
        request("biased", REQUESTS[0].prompt_ids.tolist(), 5, logit_bias=banned, logprobs=3),
        request("penalised", REQUESTS[0].prompt_ids.tolist(), 20, presence_penalty=2.0, frequency_penalty=2.0),
    ]
    sequences = [core.add(r) for r in requests]
    outputs = []
    while core.has_work:
        outputs += [output for sequence, output in core.step() if sequence is sequences[1]]
    assert sequences[0].output_ids == plain
    assert not set(sequences[1].output_ids) & set(plain)
    assert all(output.logprobs is not None and len(output.logprobs) == 1 for output in outputs)
    tops = [output.top_logprobs[0] for output in outputs if output.top_logprobs]
    assert all(len(top) == 3 and top[0][1] >= top[1][1] >= top[2][1] for top in tops)
    assert len(set(sequences[2].output_ids)) == 20
