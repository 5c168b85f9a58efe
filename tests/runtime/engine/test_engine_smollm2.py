"""The whole engine on SmolLM2-135M-Instruct against transformers on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.load import open_model
from ramet.runtime.types import SamplingParams

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
def oracle(smollm2_path: Path) -> transformers.LlamaForCausalLM:
    files = open_model(smollm2_path)
    config = files.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope.theta,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    model.load_state_dict(dict(files.weights), strict=False)
    model.tie_weights()
    return model.float().eval()


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
    prompts: list[list[int]], batched: list[tuple[int, ...]], oracle: transformers.LlamaForCausalLM
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
