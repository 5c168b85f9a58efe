"""Rows rounded to FP8: the reference by its bounds, the kernel by the reference."""

from __future__ import annotations

import pytest
import torch

from ramet.kernels.layers.quantize_fp8 import FP8, quantize_fp8_reference, quantize_fp8_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random rows of magnitudes far apart."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    return (x * torch.logspace(-3, 3, shape[0])[:, None]).to(DEVICE, dtype)


def test_each_row_has_its_own_scale_and_keeps_its_largest_value() -> None:
    x = rows(5, 64)
    x[3] = 0.0
    values, scale = quantize_fp8_reference(x)
    assert values.dtype is FP8
    restored = values.float() * scale
    torch.testing.assert_close(restored.abs().amax(1), x.abs().amax(1), rtol=1e-6, atol=0)
    # Three bits of mantissa: half a step is at most 1/16 of a value, or of the smallest normal one.
    assert bool(((restored - x).abs() <= x.abs() / 16 + scale * 2**-7).all())
    assert not restored[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 64), (5, 100), (3, 9000), (0, 16)])
def test_the_kernel_rounds_as_the_reference_does(dtype: torch.dtype, num_rows: int, width: int) -> None:
    x = rows(max(num_rows, 1), 2 * width, dtype=dtype)[:num_rows, :width]  # a row stride
    expected, expected_scale = quantize_fp8_reference(x)
    values, scale = quantize_fp8_triton(x)
    assert values.shape == x.shape
    assert torch.equal(scale, expected_scale)
    found, wanted, exact = values.float(), expected.float(), x.float() / expected_scale
    is_right = found == wanted
    if DEVICE == "cpu":  # Triton's interpreter rounds halves away from zero, and loses the carry to a power of two
        is_half = (found - exact).abs() == (wanted - exact).abs()
        is_carried = (wanted.abs() > exact.abs()) & (torch.frexp(wanted)[0].abs() == 0.5)
        assert num_rows == 0 or float(is_right.float().mean()) > 0.9
        is_right |= is_half | is_carried
    assert bool(is_right.all())
