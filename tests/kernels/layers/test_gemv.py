"""Small-batch products: both kernels against exact arithmetic and the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ramet.kernels.layers.gemv import (
    GemvConfig,
    choose_config,
    gemv_reference,
    gemv_silu_and_mul_reference,
    gemv_silu_and_mul_triton,
    gemv_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIGS = [GemvConfig("sum", 4, 64, 2, 2), GemvConfig("dot", 16, 32, 3, 4)]
# The interpreter computes with numpy, which has no bf16: fp16 takes its place there.
LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float16
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize(("num_outputs", "depth"), [(64, 128), (37, 100)])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kernel)
@pytest.mark.parametrize("extras", ["none", "all"])
def test_products_equal_exact_arithmetic(
    dtype: torch.dtype, num_outputs: int, depth: int, config: GemvConfig, extras: str
) -> None:
    num_rows = 1 if config.kernel == "sum" else 3
    x = torch.randn(num_rows, depth, device=DEVICE).to(dtype)
    weight = (torch.randn(num_outputs, depth, device=DEVICE) / depth**0.5).to(dtype)
    bias = residual = norm_weight = None
    exact = x.double()
    if extras == "all":
        bias = torch.randn(num_outputs, device=DEVICE).to(dtype)
        residual = torch.randn(num_rows, num_outputs, device=DEVICE).to(dtype)
        norm_weight = torch.rand(depth, device=DEVICE).to(dtype) + 0.5
        exact = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm_weight.double()
    exact = exact @ weight.double().T
    if bias is not None and residual is not None:
        exact = exact + bias.double() + residual.double()
    reference = gemv_reference(x, weight, bias, residual, norm_weight, 1e-6)
    actual = gemv_triton(x, weight, bias, residual, norm_weight, 1e-6, config)
    assert actual.dtype == dtype
    assert relative_error(reference, exact) < TOLERANCE[dtype]
    assert relative_error(actual, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kernel)
@pytest.mark.parametrize("has_norm", [False, True])
def test_gated_products_equal_the_reference(dtype: torch.dtype, config: GemvConfig, has_norm: bool) -> None:
    num_rows = 1 if config.kernel == "sum" else 4
    x = torch.randn(num_rows, 96, device=DEVICE).to(dtype)
    weight = (torch.randn(2 * 40, 96, device=DEVICE) / 5).to(dtype)
    norm_weight = torch.rand(96, device=DEVICE).to(dtype) if has_norm else None
    expected = gemv_silu_and_mul_reference(x, weight, norm_weight, 1e-5)
    actual = gemv_silu_and_mul_triton(x, weight, norm_weight, 1e-5, config)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < TOLERANCE[dtype]


def test_dot_results_do_not_depend_on_the_batch() -> None:
    x = torch.randn(9, 128, device=DEVICE)
    weight = torch.randn(48, 128, device=DEVICE)
    config = CONFIGS[1]
    together = gemv_triton(x, weight, config=config)
    for row in (0, 8):
        assert torch.equal(gemv_triton(x[row : row + 1], weight, config=config)[0], together[row])


def test_one_row_takes_the_sum_kernel_and_more_rows_the_dot_kernel() -> None:
    assert choose_config(1, 4096, 4096, is_gated=False).kernel == "sum"
    assert choose_config(2, 4096, 4096, is_gated=False).kernel == "dot"
