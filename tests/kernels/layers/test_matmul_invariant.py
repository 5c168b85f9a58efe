"""Batch-invariant products: right, and the same bits for a row whatever stands beside it."""

from __future__ import annotations

import pytest
import torch

from ramet.kernels.layers.activation import silu_and_mul_reference
from ramet.kernels.layers.gemv import GemvConfig
from ramet.kernels.layers.matmul_invariant import (
    gated_product_triton,
    matmul_invariant_reference,
    matmul_invariant_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float16
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("dots_in_one_order"),
]


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("rows", "outputs", "depth"), [(1, 128, 64), (70, 130, 100), (3, 257, 128)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_equal_exact_arithmetic(
    dtype: torch.dtype, rows: int, outputs: int, depth: int, has_bias: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, depth, device=DEVICE).to(dtype)
    weight = (torch.randn(outputs, depth, device=DEVICE) / depth**0.5).to(dtype)
    bias = torch.randn(outputs, device=DEVICE).to(dtype) if has_bias else None
    exact = matmul_invariant_reference(x.double(), weight.double(), None if bias is None else bias.double())
    actual = matmul_invariant_triton(x, weight, bias)
    assert actual.shape == (rows, outputs)
    error = float((actual.double() - exact).norm() / exact.norm())
    assert error < (2e-5 if dtype == torch.float32 else 2e-2), error


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(80, 96, device=DEVICE), torch.randn(140, 96, device=DEVICE)
    together = matmul_invariant_triton(x, weight)
    order = torch.randperm(80)
    assert torch.equal(matmul_invariant_triton(x[order], weight), together[order])
    for row in (0, 63, 64, 79):
        assert torch.equal(matmul_invariant_triton(x[row : row + 1], weight)[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("rows", "outputs", "depth"), [(1, 64, 64), (70, 90, 100), (16, 33, 128)])
def test_a_gated_product_is_the_product_and_its_activation(
    dtype: torch.dtype, rows: int, outputs: int, depth: int
) -> None:
    torch.manual_seed(2)
    x = torch.randn(rows, depth, device=DEVICE).to(dtype)
    weight = (torch.randn(2 * outputs, depth, device=DEVICE) / depth**0.5).to(dtype)
    expected = silu_and_mul_reference((x.double() @ weight.double().T).to(dtype))
    for block_m in (16, 64):
        actual = gated_product_triton(x, weight, GemvConfig("tile", 32, 32, 2, 4, block_m=block_m))
        assert actual.shape == (rows, outputs)
        error = float((actual.double() - expected.double()).norm() / expected.double().norm())
        assert error < (2e-5 if dtype == torch.float32 else 2e-2), error
    assert gated_product_triton(x[:0], weight, GemvConfig("tile", 32, 32, 2, 4)).shape == (0, outputs)


def test_no_rows_give_no_rows() -> None:
    assert matmul_invariant_triton(torch.zeros(0, 64, device=DEVICE), torch.zeros(8, 64, device=DEVICE)).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("rows", "outputs", "groups"), [(1, 128, 1), (70, 130, 3)])
def test_fp8_weights_are_multiplied_as_stored_by_groups_of_columns(
    dtype: torch.dtype, rows: int, outputs: int, groups: int
) -> None:
    torch.manual_seed(2)
    weight = (torch.randn(outputs, 128 * groups, device=DEVICE) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(outputs, groups, device=DEVICE) * torch.logspace(-3, 0, groups, device=DEVICE)
    x, bias = torch.randn(rows, 128 * groups, device=DEVICE).to(dtype), torch.randn(outputs, device=DEVICE).to(dtype)
    exact = x.double() @ (weight.double() * scale.double().repeat_interleave(128, 1)).T + bias.double()
    for run in (matmul_invariant_reference, matmul_invariant_triton):
        error = float((run(x, weight, bias, scale).double() - exact).norm() / exact.norm())
        assert error < (2e-5 if dtype == torch.float32 else 2e-2), error
    together = matmul_invariant_triton(x, weight, bias, scale)
    assert torch.equal(matmul_invariant_triton(x[:1], weight, bias, scale)[0], together[0])
