"""Products with block-quantised weights against dequantise-then-multiply."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from ramet.kernels.cpu.block_linear import FORMATS, block_linear, block_linear_reference, dequantize, quantize
from ramet.kernels.cpu.program import KernelStream


def blocks_of(weight: torch.Tensor, block_format: str) -> torch.Tensor:
    if block_format in ("BF16", "F32"):
        return quantize(weight, block_format)
    return torch.from_numpy(quants.quantize(weight.numpy(), GGMLQuantizationType[block_format]))


@pytest.mark.parametrize("block_format", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 7, 8, 15, 16, 17])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_equal_the_reference(block_format: str, num_tokens: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    blocks = blocks_of(torch.randn(37, 96, generator=generator), block_format)
    x, bias = torch.randn(num_tokens, 96, generator=generator), torch.randn(37, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = block_linear(KernelStream(), x, blocks, block_format, 37, bias)
    finally:
        torch.set_num_threads(before)
    expected = block_linear_reference(x, blocks, block_format, 37, bias)
    difference = (actual - expected).abs()
    assert difference.max() < 1e-4, f"max {difference.max():.2e}, mean {difference.mean():.2e}"


@pytest.mark.parametrize("block_format", FORMATS)
def test_a_token_has_the_same_product_alone_and_in_groups_of_every_size(block_format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = blocks_of(torch.randn(39, 96, generator=generator), block_format)
    x, stream = torch.randn(21, 96, generator=generator), KernelStream()
    alone = torch.cat([block_linear(stream, row[None], blocks, block_format, 39) for row in x])
    for num_tokens in (2, 3, 4, 6, 8, 13, 21):
        together = block_linear(stream, x[:num_tokens], blocks, block_format, 39)
        assert torch.equal(together, alone[:num_tokens]), num_tokens


@pytest.mark.parametrize("block_format", ["Q4_0", "Q4_1", "Q8_0"])
def test_dequantising_equals_gguf(block_format: str) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    blocks = blocks_of(weight, block_format)
    expected = quants.dequantize(blocks.numpy(), GGMLQuantizationType[block_format])
    np.testing.assert_array_equal(dequantize(blocks, block_format).numpy(), expected)


@pytest.mark.parametrize(("block_format", "tolerance"), [("Q4_1", 0.21), ("Q8_0", 0.02), ("BF16", 0.02)])
def test_quantising_rounds_to_the_nearest_code(block_format: str, tolerance: float) -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    weight[0, :32] = 0.25  # a block without spread
    restored = dequantize(quantize(weight, block_format), block_format)
    assert float((restored - weight).abs().max()) < tolerance
    assert float((restored[0, :32] - 0.25).abs().max()) < 1e-3


def test_quantising_to_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="choose Q4_1"):
        quantize(torch.zeros(1, 32), "Q4_0")
