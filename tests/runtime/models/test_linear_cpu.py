"""Weights in blocks on the CPU: which form they take, and what products of every size give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ramet.errors import ConfigError
from ramet.kernels.cpu.block_linear import dequantize, quantize
from ramet.kernels.cpu.program import KernelStream
from ramet.runtime.models.linear import PlainLinear
from ramet.runtime.models.linear_cpu import (
    BlockLinear,
    BlockStorage,
    CpuFeatures,
    block_storage,
)
from ramet.runtime.models.weights import Weights

CPU = torch.device("cpu")
NONE = CpuFeatures(False, False, False)
HERE = CpuFeatures.detect()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def storage(block_format: str | None, features: CpuFeatures, weight: torch.Tensor) -> BlockStorage:
    weights = Weights.from_tensors({"a": weight[:20], "b": weight[20:]})
    return BlockStorage(weights, CPU, torch.float32, block_format, False, features, KernelStream())


def test_few_tokens_with_fp32_weights_have_a_kernel_and_many_are_torchs() -> None:
    weight, bias = draw(48, 64), draw(48, seed=1)
    weights = Weights.from_tensors({"a": weight[:20].bfloat16(), "b": weight[20:]})
    method = block_storage(weights, CPU, torch.float32, None, KernelStream()).matrix(["a", "b"])
    assert isinstance(method, BlockLinear)
    held = torch.cat([weight[:20].bfloat16().float(), weight[20:]])
    assert torch.equal(method.blocks, held)
    for num_tokens in (1, 8, 32, 33):
        x = draw(num_tokens, 64, seed=num_tokens)
        torch.testing.assert_close(method(x, bias), F.linear(x, held, bias), rtol=1e-5, atol=1e-5)
    many = draw(33, 64)
    assert torch.equal(method(many, bias), F.linear(many, held, bias))
    alone = torch.cat([method(row[None], bias) for row in many[:32]])
    assert torch.equal(method(many[:32], bias), alone)


@pytest.mark.parametrize("block_format", ["Q8_0", "Q4_1", "BF16"])
@pytest.mark.parametrize(
    ("bf16", "int8", "tiles"),
    [(False, False, False), (True, False, False), (False, True, False), (True, True, False), (True, True, True)],
)
def test_products_of_every_size_equal_the_dequantised_product(
    block_format: str, bf16: bool, int8: bool, tiles: bool
) -> None:
    features = CpuFeatures(bf16, int8, tiles)
    if (features.bf16 and not HERE.bf16) or (features.int8 and not HERE.int8):
        pytest.skip("this CPU lacks the instructions")
    weight, bias = draw(48, 64), draw(48, seed=1)
    method = storage(block_format, features, weight).matrix(["a", "b"])
    assert isinstance(method, BlockLinear)
    is_packed = features.int8 and block_format != "BF16"
    assert method.max_few == (32 if is_packed else 4)
    assert method.rounds == (features.tiles if is_packed else features.bf16)
    restored = dequantize(quantize(weight, block_format), block_format)
    assert float((restored - weight).abs().max()) < 0.25
    for num_tokens in (1, 4, 5, 8, 33, 65):
        x = draw(num_tokens, 64, seed=num_tokens)
        difference = (method(x, bias) - F.linear(x, restored, bias)).abs()
        exact = not is_packed and (num_tokens <= 4 or not method.rounds)
        # Inputs and output lose up to 2^-9 (bfloat16) or inputs up to 1/254 of their group's largest, in 64 terms.
        assert float(difference.max()) < (1e-4 if exact else 0.3 if is_packed else 0.2), (num_tokens, difference.max())
        assert float(difference.mean()) < (1e-5 if exact else 0.04), (num_tokens, difference.mean())
        assert exact or float(difference.max()) > 1e-4, "rounding was expected to show"


# Int8 products alone are packed, by a kernel of these instructions. Where packed weights lie is tested everywhere, in
# test_huge_pages.py, and what other CPUs multiply, above.
@pytest.mark.skipif(not HERE.int8, reason="this CPU lacks the instructions")
def test_what_a_decode_step_reads_lies_together() -> None:
    held = storage("Q4_1", CpuFeatures(False, True, False), draw(48, 64))
    products = []
    for _ in range(2):
        method = held.matrix(["a", "b"])
        assert isinstance(method, BlockLinear)
        products.append(method.blocks)
    assert products[1].data_ptr() - products[0].data_ptr() == products[0].numel()


def test_embedding_rows_are_those_of_the_product() -> None:
    embedding, product = storage("Q8_0", NONE, draw(48, 64)).embedding("a", 3.0)
    assert isinstance(product, BlockLinear)
    ids = torch.tensor([3, 19, 3], dtype=torch.int32)
    torch.testing.assert_close(embedding(ids), dequantize(product.blocks, "Q8_0")[ids.long()] * 3.0)
    product.blocks.zero_()  # the same memory
    assert not embedding(ids).any()


def test_sixteen_bit_files_are_held_in_bfloat16_and_fp32_files_stay_as_they_are() -> None:
    method = storage(None, NONE, draw(48, 64).bfloat16()).matrix(["a", "b"])
    assert isinstance(method, BlockLinear)
    assert method.block_format == "BF16"
    weight = draw(48, 64)
    kept = storage(None, NONE, weight).matrix(["a", "b"])
    assert isinstance(kept, BlockLinear)
    assert torch.equal(kept.blocks, weight)
    assert not kept.rounds
    assert torch.equal(storage(None, NONE, weight).embedding("a", 1.0)[0](torch.arange(8)), weight[:8])


def test_widths_that_are_no_multiple_of_a_block_stay_in_fp32() -> None:
    assert isinstance(storage("Q8_0", NONE, draw(48, 40)).matrix(["a", "b"]), PlainLinear)


def test_gguf_blocks_are_insisted_on_where_asked() -> None:
    weights = Weights.from_tensors({"a": draw(4, 32)})
    with pytest.raises(ConfigError, match="a is not stored in blocks of type Q4_1, Q8_0, Q4_0"):
        block_storage(weights, CPU, "auto", "gguf", KernelStream()).matrix(["a"])
