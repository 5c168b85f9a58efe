"""The decoder on SmolLM2's GGUF file against transformers on the same dequantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from ramet.errors import ConfigError
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.description import ModelDescription
from ramet.runtime.models.linear import PlainLinear
from ramet.runtime.models.linear_cpu import BlockLinear, CpuFeatures
from ramet.runtime.models.load import open_model
from ramet.runtime.models.weights import Weights
from ramet.runtime.testing.bare_cache import BareCache
from ramet.runtime.testing.dummy import llama_of_transformers

pytestmark = pytest.mark.model

NUM_GREEDY = 24
PROMPTS = [
    "The capital of France is",
    "Water boils at 100 degrees Celsius because",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
]
Files = tuple[ModelDescription, Weights]


@pytest.fixture(scope="module")
def files(smollm2_path: Path) -> Files:
    return open_model(smollm2_path)


@pytest.fixture(scope="module")
def oracle(files: Files) -> transformers.LlamaForCausalLM:
    return llama_of_transformers(files[0].config, files[1])


@pytest.fixture(scope="module")
def plain(files: Files) -> Decoder:
    return build_decoder(files[0].config, files[1], device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def blocks(files: Files) -> Decoder:
    return build_decoder(files[0].config, files[1], device="cpu", dtype="auto")


@pytest.fixture(scope="module")
def exact(files: Files) -> Decoder:
    """What a CPU without products of bytes or bfloat16 gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuFeatures, "detect", lambda: CpuFeatures(bf16=False, int8=False, tiles=False))
        return build_decoder(files[0].config, files[1], device="cpu", dtype="auto")


def tokens(files: Files, prompt: str) -> list[int]:
    return files[0].tokenizer.encode(prompt, parse_special=True)


def expected_logits(oracle: transformers.LlamaForCausalLM, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = oracle(torch.tensor([ids])).logits[0]
    return logits


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max())


def generate(decoder: Decoder, prompt: list[int], chunk: int) -> list[int]:
    """Greedy tokens, with the prompt computed `chunk` tokens at a time."""
    cache = BareCache(decoder, 1, len(prompt) + NUM_GREEDY)
    for low in range(0, len(prompt), chunk):
        logits = cache.step([], [(0, prompt[low : low + chunk])])
    output = [int(logits[-1].argmax())]
    while len(output) < NUM_GREEDY:
        output.append(int(cache.step([(0, output[-1])], [])[0].argmax()))
    return output


@torch.inference_mode()
def test_fp32_logits_equal_transformers(files: Files, oracle: transformers.LlamaForCausalLM, plain: Decoder) -> None:
    ids = tokens(files, PROMPTS[1] + PROMPTS[2])
    cache = BareCache(plain, 1, len(ids))
    logits = torch.cat([cache.step([], [(0, ids[:11])]), *(cache.step([(0, token)], []) for token in ids[11:])])
    assert largest_difference(logits, expected_logits(oracle, ids)) < 1e-3


@torch.inference_mode()
def test_logits_from_the_files_own_blocks_equal_transformers(
    files: Files, oracle: transformers.LlamaForCausalLM, exact: Decoder
) -> None:
    assert all(isinstance(linear.method, BlockLinear) for linear in exact.linears())
    ids = tokens(files, PROMPTS[1] + PROMPTS[2])
    cache = BareCache(exact, 1, len(ids))
    logits = torch.cat([cache.step([], [(0, ids[:4])]), *(cache.step([(0, token)], []) for token in ids[4:])])
    assert largest_difference(logits, expected_logits(oracle, ids)) < 1e-3


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [16, 300])
def test_rounded_products_stay_close_to_transformers(
    files: Files, oracle: transformers.LlamaForCausalLM, blocks: Decoder, chunk: int
) -> None:
    ids = tokens(files, "".join(PROMPTS) + Path("README.md").read_text())[:300]
    takes_bf16 = CpuFeatures.detect().tiles and chunk > 32
    bound = 2e-3 if takes_bf16 else 5e-3  # activations in groups of 8 bits
    expected = expected_logits(oracle, ids)
    cache = BareCache(blocks, 1, len(ids))
    logits = torch.cat([cache.step([], [(0, ids[low : low + chunk])]) for low in range(0, len(ids), chunk)])
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert float(divergence.mean()) < bound, divergence


@torch.inference_mode()
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_equal_transformers(
    prompt: str, files: Files, oracle: transformers.LlamaForCausalLM, plain: Decoder, exact: Decoder
) -> None:
    ids = tokens(files, prompt)
    output = generate(plain, ids, chunk=1000)
    assert generate(exact, ids, chunk=4) == output
    # Each token is transformers' choice after the ones before it, so by induction the texts are the same.
    logits = expected_logits(oracle, ids + output[:-1])
    assert logits[len(ids) - 1 :].argmax(-1).tolist() == output


def test_precision_choices(files: Files) -> None:
    config, weights = files[0].config, files[1]
    int8 = build_decoder(config, weights, device="cpu", quantization="int8")
    assert {m.block_format for m in (linear.method for linear in int8.linears()) if isinstance(m, BlockLinear)} == {
        "Q8_0"
    }
    bf16 = build_decoder(config, weights, device="cpu", dtype=torch.bfloat16)
    assert all(isinstance(linear.method, PlainLinear) for linear in bf16.linears())
    with pytest.raises(ConfigError, match="int8, int4, gguf"):
        build_decoder(config, weights, device="cpu", quantization="int3")
    with pytest.raises(ConfigError, match="make it auto"):
        build_decoder(config, weights, device="cpu", dtype=torch.bfloat16, quantization="int8")
    with pytest.raises(ConfigError, match="on the CPU only"):
        build_decoder(config, weights, device="meta", quantization="int8")
