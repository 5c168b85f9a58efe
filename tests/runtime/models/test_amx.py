"""Layers that keep bfloat16 between products, on CPUs with AMX: which do, for how many tokens, and how closely."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ramet.runtime.models import linear_cpu
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.layers import DecoderLayer
from ramet.runtime.models.linear_cpu import CpuFeatures
from ramet.runtime.testing.bare_cache import BareCache
from ramet.runtime.testing.dummy import SMALL_MODELS, small_weights

MODELS = {name: fields | {"head_dim": 32} for name, fields in SMALL_MODELS.items()} | {
    "llama, small heads": SMALL_MODELS["llama"]  # no tiles of queries: attention is in fp32
}
# Only products that round to bfloat16 have these layers, and torch refuses to pack such products for a CPU without the
# instructions. That layers with other products are left alone is tested everywhere.
HERE = CpuFeatures.detect()
needs_bf16 = pytest.mark.skipif(not HERE.bf16, reason="products of this CPU do not round to bfloat16")


def decoder_of(name: str, quantization: str | None, dtype: torch.dtype = torch.float32) -> Decoder:
    config = config_from_hf(MODELS[name])
    with pytest.MonkeyPatch.context() as patch:  # products as on a CPU with tiles, layers as on one without
        patch.setattr(linear_cpu, "has_tiles", lambda: False)
        patch.setattr(CpuFeatures, "detect", lambda: dataclasses.replace(HERE, tiles=HERE.bf16))
        return build_decoder(config, small_weights(config, dtype), device="cpu", quantization=quantization)


def limits(decoder: Decoder) -> set[int | None]:
    return {layer.rounds_above for layer in decoder.layers if isinstance(layer, DecoderLayer)}


def logits_of(decoder: Decoder, num_decode: int, chunks: list[int], prefix: int = 40) -> Tensor:
    """Of one step: rows with 9 tokens that decode one more, then rows with new ones, half of them after `prefix`."""
    ids = [i * 7 % 96 for i in range(500)]
    with torch.inference_mode():
        cache = BareCache(decoder, num_decode + len(chunks), 400)
        for row in range(num_decode):
            cache.step([], [(row, ids[row : row + 9])])
        for i in range(0, len(chunks), 2):
            cache.step([], [(num_decode + i, ids[:prefix])])
        decode = [(row, ids[row]) for row in range(num_decode)]
        return cache.step(decode, [(num_decode + i, ids[i : i + count]) for i, count in enumerate(chunks)])


def with_plain_layers(decoder: Decoder) -> Decoder:
    """The same products, with fp32 between them."""
    layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
    return dataclasses.replace(decoder, layers=[dataclasses.replace(layer, rounds_above=None) for layer in layers])


def test_layers_with_fp32_weights_and_cpus_without_tiles_are_left_alone() -> None:
    assert limits(linear_cpu.round_layers(decoder_of("llama", None))) == {None}
    assert limits(decoder_of("llama", "int8")) == {None}


@needs_bf16
def test_layers_round_where_all_their_products_do() -> None:
    limit = 32 if HERE.int8 else 4
    assert limits(linear_cpu.round_layers(decoder_of("llama", "int8"))) == {limit}
    assert limits(linear_cpu.round_layers(decoder_of("llama", None, torch.bfloat16))) == {4}


@needs_bf16
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("num_decode", "chunks"), [(0, [70]), (3, [50, 1, 17]), (70, []), (5, [300])])
def test_logits_are_close_to_those_with_fp32_between_the_products(
    name: str, num_decode: int, chunks: list[int]
) -> None:
    decoder = linear_cpu.round_layers(decoder_of(name, "int8"))
    rounded = logits_of(decoder, num_decode, chunks)
    exact = logits_of(with_plain_layers(decoder), num_decode, chunks)
    assert rounded.dtype is torch.float32
    difference = (rounded - exact).abs()
    assert 0 < float(difference.max()) < 0.08 * float(exact.abs().max()), difference.max()
    assert float(difference.mean()) < 0.01 * float(exact.abs().max()), difference.mean()


@needs_bf16
def test_steps_of_few_tokens_are_not_touched() -> None:
    decoder = linear_cpu.round_layers(decoder_of("llama", "int8"))
    plain = with_plain_layers(decoder)
    assert torch.equal(logits_of(decoder, 3, [20, 5], prefix=30), logits_of(plain, 3, [20, 5], prefix=30))
