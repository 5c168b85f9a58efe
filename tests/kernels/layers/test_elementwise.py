"""Norm, rope, activation and page copy: reference against formulas, kernel against reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ramet.kernels.layers import activation, norm, rope
from ramet.kernels.slots import copy_pages

# The interpreter computes with numpy, which warns where the device's exp saturates to infinity, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """fp32: every element within 1e-5. bf16: 1e-2 in the 2-norm (the interpreter cuts off, not rounds)."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs()
    if actual.dtype == torch.float32:
        largest = float((difference / expected.double().abs().clamp(min=1)).max())
        assert largest <= 1e-5, f"max {largest:.2e}, mean {float(difference.mean()):.2e}"
    else:
        error = float(difference.norm() / expected.double().norm())
        assert error <= 1e-2, f"2-norm {error:.2e}, max {float(difference.max()):.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 576), (3, 64), (5, 1000)])
def test_norm_kernels_equal_the_formula(dtype: torch.dtype, num_rows: int, width: int) -> None:
    x, residual = (torch.randn(num_rows, width, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.rand(width, device=DEVICE).to(dtype) + 0.5
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(norm.rms_norm_reference(x, weight, 1e-5), exact.to(dtype))
    assert_close(norm.rms_norm_triton(x, weight, 1e-5), exact.to(dtype))
    normed, total = norm.fused_add_rms_norm_triton(x, residual, weight, 1e-5)
    expected_normed, expected_total = norm.fused_add_rms_norm_reference(x, residual, weight, 1e-5)
    assert_close(total, expected_total)
    if dtype == torch.float32 or DEVICE == "cuda":  # the interpreter cuts bf16 off instead of rounding it
        assert torch.equal(total, expected_total)
    assert_close(normed, expected_normed)


def test_norm_takes_strided_rows() -> None:
    wide = torch.randn(4, 3 * 64, device=DEVICE)
    weight = torch.rand(64, device=DEVICE)
    x = wide[:, 64:128]
    assert_close(norm.rms_norm_triton(x, weight, 1e-6), norm.rms_norm_reference(x, weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_kernels_equal_the_reference(dtype: torch.dtype) -> None:
    gate_up = (torch.randn(3, 2 * 700, device=DEVICE) * 3).to(dtype)
    assert_close(activation.silu_and_mul_triton(gate_up), activation.silu_and_mul_reference(gate_up))
    assert_close(activation.gelu_tanh_and_mul_triton(gate_up), activation.gelu_tanh_and_mul_reference(gate_up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 128), (12, 1, 96)])
@pytest.mark.parametrize("has_norms", [False, True])
def test_rope_kernel_equals_the_reference(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, has_norms: bool
) -> None:
    num_tokens, page_size = 5, 16
    widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    fused = torch.randn(num_tokens, sum(widths), device=DEVICE).to(dtype)
    q, k, v = (part.view(num_tokens, -1, head_dim) for part in torch.split(fused, widths, dim=1))
    angles = torch.outer(torch.arange(50.0), torch.rand(head_dim // 2)).to(DEVICE)
    positions = torch.tensor([0, 7, 8, 49, 3], dtype=torch.int32, device=DEVICE)
    kv_slots = torch.tensor([16, 40, 41, 79, 30], dtype=torch.int32, device=DEVICE)
    weights = [torch.rand(head_dim, device=DEVICE).to(dtype) + 0.5 if has_norms else None for _ in range(2)]
    results = []
    for run in (rope.rope_and_write_kv_reference, rope.rope_and_write_kv_triton):
        k_cache = torch.zeros(5, num_kv_heads, page_size, head_dim, dtype=dtype, device=DEVICE)
        v_cache = torch.zeros_like(k_cache)
        tables = angles.cos(), angles.sin()
        rotated = run(q, k, v, *tables, positions, kv_slots, k_cache, v_cache, weights[0], weights[1])
        assert rotated.is_contiguous()
        results.append((rotated, k_cache, v_cache))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected)
    assert torch.equal(results[1][2][40 // 16, :, 40 % 16], v[1])
    if not has_norms and dtype == torch.float32:
        turned = torch.view_as_complex(torch.stack((q[..., : head_dim // 2], q[..., head_dim // 2 :]), -1).contiguous())
        turned = turned * torch.polar(torch.ones_like(angles), angles)[positions.long()].unsqueeze(1)
        assert_close(results[0][0], torch.cat((turned.real, turned.imag), -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_page_copies_take_the_first_tokens_of_every_layer(dtype: torch.dtype) -> None:
    caches = torch.randn(3, 2, 6, 2, 16, 24, device=DEVICE).to(dtype)
    before, expected = caches.clone(), caches.clone()
    source, target, count = (
        torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in ([1, 1, 4], [2, 3, 5], [16, 1, 7])
    )
    copy_pages.copy_pages_reference(expected, source, target, count)
    copy_pages.copy_pages_triton(caches, source, target, count)
    assert torch.equal(caches, expected)
    assert torch.equal(caches[:, :, 5, :, :7], before[:, :, 4, :, :7])
    assert torch.equal(caches[:, :, 5, :, 7:], before[:, :, 5, :, 7:])
