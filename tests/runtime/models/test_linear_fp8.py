"""FP8 products: the rounded numbers, what stays in 16 bits, and how far whole models move."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ramet.errors import ConfigError
from ramet.kernels.layers.quantize_fp8 import quantize_fp8
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.config import Experts
from ramet.runtime.models.layers import DecoderLayer, SparseFeedForward
from ramet.runtime.models.linear import PlainLinear
from ramet.runtime.models.linear_fp8 import Fp8Linear, Fp8Storage
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.models.weights import Weights
from ramet.runtime.testing.bare_cache import BareCache
from ramet.runtime.testing.dummy import describe_tiny, dummy_weights, tiny_weights
from ramet.runtime.types import SamplingParams

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 65])
def test_the_product_is_that_of_the_rounded_numbers_and_of_torchs_scaled_product(num_tokens: int) -> None:
    weight, scale = quantize_fp8(draw(48, 64, seed=1))
    method = Fp8Linear(weight, scale.reshape(-1))
    x, bias = draw(num_tokens, 64, seed=2), draw(48, seed=3)
    values, x_scale = quantize_fp8(x)
    expected = F.linear(values.float() * x_scale, weight.float() * scale, bias)
    torch.testing.assert_close(method(x, bias), expected, rtol=1e-5, atol=1e-4)
    if num_tokens:  # what a GPU computes, with bfloat16 results
        ours = method(x.bfloat16(), None)
        again, again_scale = quantize_fp8(x.bfloat16())
        theirs = torch._scaled_mm(again, weight.t(), again_scale, method.scale.unsqueeze(0), out_dtype=torch.bfloat16)
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=1e-2)


def test_a_tokens_result_does_not_depend_on_the_others() -> None:
    weight, scale = quantize_fp8(draw(48, 64))
    method = Fp8Linear(weight, scale.reshape(-1))
    x = draw(9, 64, seed=1)
    x[4] *= 1000
    torch.testing.assert_close(method(x[2:3], None), method(x, None)[2:3], rtol=0, atol=1e-5)


def test_table_head_norms_and_routers_keep_their_dtype() -> None:
    names = ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"]
    weights = Weights.from_tensors({name: draw(32, 64) for name in names})
    storage = Fp8Storage(weights, CPU, torch.float32)
    kinds = [type(storage.matrix([name])) for name in names]
    assert kinds == [Fp8Linear, PlainLinear, PlainLinear]
    odd = Fp8Storage(Weights.from_tensors({names[0]: draw(32, 40)}), CPU, torch.float32)
    assert isinstance(odd.matrix(names[:1]), PlainLinear)


def test_whole_models_move_a_little_and_are_served() -> None:
    tiny = describe_tiny()
    ids = list(range(40, 90))
    logits = []
    for quantization in (None, "fp8"):
        decoder = build_decoder(tiny.config, tiny_weights(tiny.config), device="cpu", quantization=quantization)
        assert any(isinstance(linear.method, Fp8Linear) for linear in decoder.linears()) == (quantization == "fp8")
        logits.append(BareCache(decoder, 1, 64).step([], [(0, ids)]))
        model = LoadedModel("tiny", decoder, tiny.tokenizer, tiny.config, tiny.generation)
        with Engine(model, num_kv_tokens=512) as engine:
            sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
            prompts = ["one prompt", "and another one"]
            together = [engine.submit(prompt, sampling) for prompt in prompts]
            results = [handle.result(timeout_s=60).token_ids for handle in together]
            assert results == [engine.submit(prompt, sampling).result(timeout_s=60).token_ids for prompt in prompts]
    error = (logits[0] - logits[1]).abs().mean() / logits[0].abs().mean()
    assert 0 < float(error) < 0.1, error


def test_experts_are_rounded_and_their_router_is_not() -> None:
    tiny = describe_tiny()
    config = dataclasses.replace(tiny.config, experts=Experts(4, 2, 32))
    weights = dummy_weights(config, CPU, torch.float32)
    layer = build_decoder(config, weights, device="cpu", quantization="fp8").layers[0]
    assert isinstance(layer, DecoderLayer)
    assert isinstance(layer.feed_forward, SparseFeedForward)
    assert isinstance(layer.feed_forward.router.method, PlainLinear)
    assert isinstance(layer.feed_forward.experts[0].down.method, Fp8Linear)


def test_other_kinds_are_refused_with_those_that_work() -> None:
    with pytest.raises(ConfigError, match="quantization is 'fp7' but must be fp8, int8, int4 or gguf, or None"):
        Engine("tiny-random", quantization="fp7")
    tiny = describe_tiny()
    with pytest.raises(ConfigError, match="'int8' runs on the CPU only; use fp8 or leave it out on cuda"):
        build_decoder(tiny.config, tiny_weights(tiny.config), device="cuda", quantization="int8")


def test_a_gpu_without_fp8_products_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = describe_tiny()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        ConfigError, match=r"cuda has no FP8 products \(compute capability 8.9 or later\); leave it out"
    ):
        build_decoder(tiny.config, tiny_weights(tiny.config), device="cuda", quantization="fp8")
