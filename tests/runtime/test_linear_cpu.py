"""Weights in blocks on the CPU: which form they take, and what products of every size give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ramet.errors import ConfigError
from ramet.kernels.block_linear import dequantize
from ramet.runtime.models.linear import PlainEmbedding, PlainLinear
from ramet.runtime.models.linear_cpu import BlockEmbedding, BlockLinear, BlockStorage, block_storage
from ramet.runtime.models.weights import Weights

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def storage(block_format: str | None, has_bf16: bool, weight: torch.Tensor) -> BlockStorage:
    weights = Weights.from_tensors({"a": weight[:20], "b": weight[20:]})
    return BlockStorage(weights, block_format, False, has_bf16, CPU, torch.float32)


@pytest.mark.parametrize("block_format", ["Q8_0", "Q4_1", "BF16"])
@pytest.mark.parametrize("has_bf16", [False, True])
def test_products_of_every_size_equal_the_dequantised_product(block_format: str, has_bf16: bool) -> None:
    if has_bf16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    weight, bias = draw(48, 64), draw(48, seed=1)
    method = storage(block_format, has_bf16, weight).matrix(["a", "b"])
    assert isinstance(method, BlockLinear)
    assert (method.dense is not None) == has_bf16
    restored = dequantize(method.blocks, block_format)
    assert float((restored - weight).abs().max()) < 0.25
    for num_tokens in (1, 4, 5, 8, 33):
        x = draw(num_tokens, 64, seed=num_tokens)
        difference = (method.apply(x, bias) - F.linear(x, restored, bias)).abs()
        exact = num_tokens <= 4 or not has_bf16
        # bfloat16 keeps 8 bits of inputs, weights and output: 2^-9 of sums of 64 terms of about 1
        assert float(difference.max()) < (1e-4 if exact else 0.2), (num_tokens, difference.max())
        assert float(difference.mean()) < (1e-5 if exact else 0.03), (num_tokens, difference.mean())


def test_embedding_rows_are_those_of_the_product() -> None:
    embedding, product = storage("Q8_0", False, draw(48, 64)).embedding("a", 3.0)
    assert isinstance(embedding, BlockEmbedding)
    assert isinstance(product, BlockLinear)
    assert embedding.blocks is product.blocks
    ids = torch.tensor([3, 19, 3], dtype=torch.int32)
    torch.testing.assert_close(embedding(ids), dequantize(product.blocks, "Q8_0")[ids.long()] * 3.0)


def test_sixteen_bit_files_are_held_in_bfloat16_and_fp32_files_stay_as_they_are() -> None:
    method = storage(None, False, draw(48, 64).bfloat16()).matrix(["a", "b"])
    assert isinstance(method, BlockLinear)
    assert method.block_format == "BF16"
    weight = draw(48, 64)
    kept = storage(None, False, weight).matrix(["a", "b"])
    assert isinstance(kept, PlainLinear)
    assert torch.equal(kept.weight, weight)
    assert isinstance(storage(None, False, weight).embedding("a", 1.0)[0], PlainEmbedding)


def test_widths_that_are_no_multiple_of_a_block_stay_in_fp32() -> None:
    assert isinstance(storage("Q8_0", False, draw(48, 40)).matrix(["a", "b"]), PlainLinear)


def test_gguf_blocks_are_insisted_on_where_asked() -> None:
    weights = Weights.from_tensors({"a": draw(4, 32)})
    with pytest.raises(ConfigError, match="a is not stored in blocks of type Q4_1, Q8_0, Q4_0"):
        block_storage(weights, CPU, "auto", "gguf").matrix(["a"])
