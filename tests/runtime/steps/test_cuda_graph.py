"""The step graphs, with a capture that runs the captured function again: padding, buckets and buffers, not CUDA."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ramet.runtime.engine.engine import Engine
from ramet.runtime.handle import RequestResult
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.steps.cuda_graph import GraphBuffers, GraphKey, StepGraphs, cuda_capture, decode_buckets
from ramet.runtime.steps.eager import EagerSteps
from ramet.runtime.types import SamplingParams


class Rerun:
    """Stands in for a CUDA graph on the CPU: a replay runs the body again, on the same buffers."""

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        self.num_captures += 1
        body()

        def replay() -> None:
            self.num_replays += 1
            body()

        return replay


def make_engine(model: LoadedModel, capture: Rerun | None, *, overlap: bool = False, max_extend: int = 64) -> Engine:
    engine = Engine(model, num_kv_tokens=8192, max_running_requests=6, chunked_prefill_size=128)
    if capture is not None:
        engine._core.runner.capture_graphs(max_extend, capture)
    engine._core.overlap = overlap
    return engine


def run_all(engine: Engine, *, sampling: dict[str, float] | None = None) -> list[list[int]]:
    shared = "all of them begin with the same words, which are in the cache after the first. "
    handles = []
    for i in range(14):
        prompt = shared[: 20 * (i % 5)] + "x" * (1 + 37 * i % 90)
        temperature = 0.0 if i % 2 else 1.0
        params = SamplingParams(temperature=temperature, max_tokens=3 + i % 7, seed=i, ignore_eos=True)
        handles.append(engine.submit(prompt, params))
    return [list(handle.result(timeout_s=60).token_ids) for handle in handles]


@pytest.mark.parametrize("overlap", [False, True])
def test_graphs_give_the_tokens_of_eager_steps(tiny_model: LoadedModel, overlap: bool) -> None:
    capture = Rerun()
    with make_engine(tiny_model, None) as eager, make_engine(tiny_model, capture, overlap=overlap) as graphs:
        captured = capture.num_captures
        expected = run_all(eager)
        assert run_all(graphs) == expected
        assert run_all(graphs) == expected  # from a warm cache: most prompts are short now
        assert capture.num_captures == captured, "a graph was captured while requests ran"
        assert capture.num_replays > 20
        graphs.check_integrity()


def test_prompts_too_long_for_a_graph_run_eagerly(tiny_model: LoadedModel) -> None:
    capture = Rerun()
    with make_engine(tiny_model, None) as eager, make_engine(tiny_model, capture, max_extend=16) as graphs:
        graphed = graphs._core.runner.graphed
        assert graphed is not None
        assert graphed.graphs.mixed_tokens == [16]
        assert run_all(graphs) == run_all(eager)


def test_log_probabilities_come_from_what_a_graph_kept(tiny_model: LoadedModel) -> None:
    """Also those of rows between others, in overlapped steps, beside prompts."""

    def ask(engine: Engine) -> list[RequestResult]:
        handles = []
        for i in range(7):
            params = SamplingParams(temperature=0.0, max_tokens=4 + i, logprobs=i % 3 or None, ignore_eos=True)
            handles.append(engine.submit("a prompt" + "x" * i, params))
        return [handle.result(timeout_s=60) for handle in handles]

    capture = Rerun()
    with make_engine(tiny_model, None) as eager, make_engine(tiny_model, capture, overlap=True) as graphs:
        captured = capture.num_captures
        for actual, expected in zip(ask(graphs), ask(eager), strict=True):
            assert actual.token_ids == expected.token_ids
            assert (actual.logprobs is None) == (expected.logprobs is None)
            if expected.logprobs is not None:
                assert actual.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
                tops = [[token for token, _ in top] for top in expected.top_logprobs or ()]
                assert [[token for token, _ in top] for top in actual.top_logprobs or ()] == tops
        assert capture.num_captures == captured
        assert capture.num_replays > 10


def test_scores_come_from_what_a_graph_kept(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside decode rows and prompts that are not scored, and of several rows, some with the likeliest tokens."""

    def ask(engine: Engine) -> list[RequestResult]:
        plain = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
        handles = [engine.submit("not scored" + "y" * i, plain) for i in range(2)]
        for i in range(4):
            params = SamplingParams(max_tokens=1, logprobs=2 * (i % 2) or None)
            handles.append(engine.submit("what is scored" + "z" * i, params, score_from=3 + i))
        return [handle.result(timeout_s=60) for handle in handles]

    with make_engine(tiny_model, None) as eager:
        expected = ask(eager)
    monkeypatch.setattr(EagerSteps, "run", lambda self, step: pytest.fail("an eager step"))
    with make_engine(tiny_model, Rerun(), overlap=True, max_extend=128) as graphs:
        actual = ask(graphs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.prompt_logprobs is None) == (theirs.prompt_logprobs is None)
        if theirs.prompt_logprobs is not None:
            assert ours.prompt_logprobs == pytest.approx(theirs.prompt_logprobs, abs=1e-5)
        assert [[t for t, _ in top] for top in ours.prompt_tops or ()] == [
            [t for t, _ in top] for top in theirs.prompt_tops or ()
        ]


def test_keys_are_the_smallest_buckets_that_hold_a_step() -> None:
    graphs = StepGraphs(
        lambda key, buffers: None,
        100,
        100,
        torch.device("cpu"),
        max_extend=256,
        capture=Rerun(),
    )
    assert graphs.mixed_rows == [0, 8, 32, 64, 100]
    assert graphs.mixed_tokens == [16, 32, 64, 96, 144, 192, 256]
    assert graphs.key(9, 17, 2, uses_tree=False) == GraphKey(32, 32, False)
    assert graphs.key(50, 40, 2, uses_tree=False) == GraphKey(64, 96, False)
    assert graphs.key(70, 10, 2, uses_tree=False) == GraphKey(96, 96, False), "rows are among tokens"
    assert graphs.key(0, 1, 1, uses_tree=True) == GraphKey(0, 16, True)
    assert graphs.key(0, 129, 1, uses_tree=False) == GraphKey(0, 144, False)
    assert graphs.key(100, 156, 64, uses_tree=False) == GraphKey(100, 256, False)
    assert graphs.key(9, 0, 0, uses_tree=False) == GraphKey(16, 0, False), "without new tokens: more sizes of rows"
    assert graphs.key(1, 256, 1, uses_tree=False) is None, "too many tokens"
    assert graphs.key(1, 80, 65, uses_tree=False) is None, "too many sequences"


def test_every_step_that_verifies_few_drafts_has_a_graph_with_as_many_turns_as_it_needs() -> None:
    graphs = StepGraphs(
        lambda key, buffers: None, 8, 8, torch.device("cpu"), max_extend=0, verifies=True, capture=Rerun()
    )
    keys = graphs.keys(with_tree=True)
    for num_tokens in range(2, 40):
        for num_drafted in range(1, min(num_tokens, 12)):
            key = graphs.verifying_key(num_tokens, num_drafted)
            if num_tokens > 32 or num_drafted > 8:
                assert key is None
                continue
            assert key in keys
            assert num_tokens <= key.num_tokens <= 2 * num_tokens
            assert num_drafted <= key.num_drafted <= max(2, 2 * num_drafted)
            # The most rows that have a position in each turn: all others have one token.
            for turn, size in enumerate(key.turn_sizes):
                assert 1 <= size == key.num_tokens // (turn + 1)
    without = StepGraphs(lambda key, buffers: None, 8, 8, torch.device("cpu"), max_extend=0, capture=Rerun())
    assert without.verifying_key(2, 1) is None
    assert not any(key.num_drafted for key in without.keys(with_tree=True))


@pytest.mark.parametrize("with_tree", [False, True])
def test_every_key_of_a_step_is_captured_ahead(with_tree: bool) -> None:
    capture = Rerun()
    graphs = StepGraphs(
        lambda key, buffers: None, 100, 100, torch.device("cpu"), max_extend=256,
        capture=capture,
    )  # fmt: skip
    keys = set(graphs.keys(with_tree=with_tree))
    for num_decode in range(101):
        assert not num_decode or graphs.key(num_decode, 0, 0, uses_tree=with_tree and num_decode > 1) in keys
        for num_new in (1, 15, 16, 100, 156, 256 - num_decode):
            uses_tree = with_tree and num_decode > 1
            key = graphs.key(num_decode, num_new, 1, uses_tree=uses_tree)
            assert key is None or key in keys
            assert key is not None or num_decode + num_new > 256
            assert key is None or num_decode <= key.num_decode <= key.num_tokens >= num_decode + num_new


@pytest.mark.parametrize("max_batch", [1, 3, 8, 100, 256, 700])
def test_every_batch_has_a_bucket(max_batch: int) -> None:
    buckets = decode_buckets(max_batch)
    assert buckets == sorted(set(buckets))
    assert buckets[-1] == max_batch


def test_packed_blocks_pad_with_what_does_nothing() -> None:
    buffers = GraphBuffers(GraphKey(2, 16, False), dummy_slot=9, device=torch.device("cpu"))
    rows, cu_seqlens, slots = (np.array(values, dtype=np.int32) for values in ([4], [1, 3, 5], [70, 71, 80, 81]))
    packed = buffers.pack({"rows": rows, "cu_seqlens": cu_seqlens, "kv_slots": slots}, num_decode=1)
    buffers.block.copy_(torch.from_numpy(packed))
    assert buffers.part("rows").tolist() == [4, 9]
    assert buffers.part("cu_seqlens").tolist() == [1, 3, *[5] * 15]
    assert set(buffers.part("sample_rows").tolist()) == {9}
    assert buffers.part("kv_slots").tolist() == [0, 70, 71, 80, 81, *[0] * 11]
    assert all(section.start % 32 == 0 for section in buffers.sections.values())


def test_only_a_numbered_device_is_made_current(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device refuses a device without a number, and "cuda" means the current one anyway."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    with make_engine(tiny_model, None) as engine:
        runner = engine._core.runner
        for name in ("cpu", "cuda", "cuda:1"):
            runner.device = torch.device(name)
            runner.use_device()
        runner.device = torch.device("cpu")
    assert made == [torch.device("cuda:1")]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_during_a_capture_whose_error_is_told(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    collects: list[bool] = []

    def capture_end() -> None:
        if fails:
            raise RuntimeError("operation failed due to a previous error during capture")

    def body() -> None:
        collects.append(gc.isenabled())
        if fails and len(collects) == 2:
            raise torch.OutOfMemoryError("the body fails while it is captured")

    nothing = SimpleNamespace(capture_begin=lambda **options: None, capture_end=capture_end, replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: nothing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    capture = cuda_capture(torch.device("cuda"))
    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        capture(body)
    assert collects == [False, False]
    assert gc.isenabled()
