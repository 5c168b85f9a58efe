"""Integer products with block-quantised weights against their specification."""

from __future__ import annotations

import pytest
import torch

from ramet.kernels.cpu.block_int8 import block_int8_linear, block_int8_linear_reference, pack, takes
from ramet.kernels.cpu.block_linear import block_linear_reference, quantize
from ramet.kernels.cpu.int8 import has_int8_products
from ramet.kernels.cpu.program import KernelStream

pytestmark = pytest.mark.skipif(not has_int8_products(), reason="this CPU has no AVX512-VNNI")

STREAM = KernelStream()


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(weight: torch.Tensor, block_format: str) -> torch.Tensor:
    if block_format == "Q4_0":  # which we read but never write: codes around 8, any scale
        codes = torch.randint(0, 256, (weight.shape[0], weight.shape[1] // 32, 16), dtype=torch.uint8)
        scale = torch.full((*codes.shape[:2], 1), 0.25, dtype=torch.float16).view(torch.uint8)
        return torch.cat((scale, codes), dim=-1).view(weight.shape[0], -1)
    return quantize(weight, block_format)


@pytest.mark.parametrize("block_format", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 8, 11, 12, 16, 17, 300])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_equal_the_reference(block_format: str, num_tokens: int, threads: int) -> None:
    blocks, x = blocks_of(draw(48, 96, seed=0), block_format), draw(num_tokens, 96, seed=num_tokens)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = block_int8_linear(STREAM, x, pack(blocks, block_format, 48))
    finally:
        torch.set_num_threads(before)
    expected = block_int8_linear_reference(x, blocks, block_format, 48)
    # The minimum is kept in fp16 (that of Q8_0 is computed, and exact there): 2^-11 of a few.
    assert float((actual - expected).abs().max()) < 2e-3 if block_format == "Q8_0" else 1e-4


def test_a_token_has_the_same_product_alone_and_in_groups_of_every_size() -> None:
    packed, x = pack(quantize(draw(48, 96, seed=0), "Q4_1"), "Q4_1", 48), draw(21, 96, seed=1)
    alone = torch.cat([block_int8_linear(STREAM, row[None], packed) for row in x])
    for num_tokens in (2, 3, 7, 8, 9, 13, 21):
        assert torch.equal(block_int8_linear(STREAM, x[:num_tokens], packed), alone[:num_tokens]), num_tokens


def test_what_rounding_costs() -> None:
    blocks, x = quantize(draw(64, 576, seed=0), "Q4_1"), draw(8, 576, seed=1)
    exact = block_linear_reference(x, blocks, "Q4_1", 64)
    difference = block_int8_linear(STREAM, x, pack(blocks, "Q4_1", 64)) - exact
    assert 0 < float(difference.pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()) < 0.01


def test_zeros_outliers_and_rows_of_many_scales() -> None:
    blocks = quantize(draw(16, 64, seed=0), "Q4_1")
    x = torch.zeros(5, 64)
    x[1, 3], x[2] = 1e20, 1e-20
    x[3] = draw(64, seed=2) * torch.logspace(-6, 6, 64)
    actual, expected = (
        block_int8_linear(STREAM, x, pack(blocks, "Q4_1", 16)),
        block_int8_linear_reference(x, blocks, "Q4_1", 16),
    )
    assert torch.equal(actual[0], torch.zeros(16))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_what_it_takes() -> None:
    assert takes("Q4_1", 48)
    assert not takes("Q4_1", 40)
    assert not takes("BF16", 48)
