"""The whole engine on SmolLM2-135M-Instruct against transformers on the same weights."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ramet.kernels.cpu.threads import IS_PARALLEL
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.load import open_weights
from ramet.runtime.testing.dummy import llama_of_transformers
from ramet.runtime.types import RequestOutput, SamplingParams

pytestmark = pytest.mark.model

NUM_TOKENS = 100
TOPICS = [
    "the sea", "a bicycle", "bread", "winter", "the moon", "a library", "rivers", "music", "a clock", "tea",
    "mountains", "paper", "a garden", "trains", "gold", "sleep", "maps", "a market", "rain", "numbers",
]  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[Engine]:
    with Engine(str(smollm2_path), dtype="float32", num_kv_tokens=8192) as engine:
        yield engine


@pytest.fixture(scope="module")
def oracle(smollm2_path: Path) -> Any:  # Any: a model of transformers
    return llama_of_transformers(*open_weights(smollm2_path))


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    texts = [
        engine.chat_template.render(
            [{"role": "user", "content": f"Write a few sentences about {topic}."}], add_generation_prompt=True
        )
        for topic in TOPICS
    ]
    return [engine.tokenizer.encode(text, parse_special=True) for text in texts]


@pytest.fixture(scope="module")
def batched(engine: Engine, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """What the engine writes when all prompts run at once, from an empty cache."""
    engine.flush_cache()
    handles = [engine.submit(prompt, GREEDY) for prompt in prompts]
    return [handle.result(timeout_s=200).token_ids for handle in handles]


def test_greedy_texts_are_those_of_transformers(
    prompts: list[list[int]], batched: list[tuple[int, ...]], oracle: Any
) -> None:
    """Each token is transformers' choice after the ones before it, so by induction the whole texts are the same."""
    for prompt, output in zip(prompts, batched, strict=True):
        assert len(output) == NUM_TOKENS
        with torch.inference_mode():
            logits = oracle(torch.tensor([[*prompt, *output[:-1]]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == list(output)


def test_greedy_texts_are_the_same_alone_and_from_the_cache(
    engine: Engine, prompts: list[list[int]], batched: list[tuple[int, ...]]
) -> None:
    engine.flush_cache()
    cold = engine.submit(prompts[7], GREEDY).result(timeout_s=100)
    assert cold.usage.cached_tokens == 0
    assert cold.token_ids == batched[7]
    warm = engine.submit(prompts[7], GREEDY).result(timeout_s=100)
    assert warm.usage.cached_tokens == len(prompts[7]) - 1
    assert warm.token_ids == batched[7]
    engine.check_integrity()


# Without OpenMP there are no workers that could stay; the threads that it starts are listed in Linux's /proc alone.
@pytest.mark.skipif(sys.platform != "linux" or not IS_PARALLEL, reason="counts threads in /proc, needs an OpenMP")
def test_an_idle_engine_has_no_workers_that_would_slow_another_one_down(smollm2_path: Path) -> None:
    busy: list[int] = []
    ended = threading.Event()

    def count() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    def note(output: RequestOutput) -> None:
        busy.append(count())
        if output.finish_reason is not None:
            ended.set()

    with Engine(str(smollm2_path), num_threads=2, num_kv_tokens=512) as engine:
        engine.submit("The sea", SamplingParams(max_tokens=4), on_output=note)
        assert ended.wait(100)
        deadline = time.monotonic() + 60
        while count() >= min(busy) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert count() < min(busy)
