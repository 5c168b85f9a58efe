# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Rounding of rows to FP8 (e4m3), each with its own scale: the inputs of FP8 products.

    scale = max |x| / 448      values = x / scale      (a row of zeros has a tiny scale)

Kernel: one program per row, which reads it twice: for its largest value, and to round it. Arithmetic in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.triton_support import jit, next_power_of_two, tl

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0
_SMALLEST = 1e-12  # of a row's largest value
_MAX_BLOCK = 8192


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of x [T, K] to FP8. Returns the values and their scales, fp32 [T, 1]: x is values * scales."""
    return (quantize_fp8_triton if x.is_cuda else quantize_fp8_reference)(x)


def quantize_fp8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """CPU path, and specification."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=_SMALLEST) / _LARGEST
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(FP8), scale


def quantize_fp8_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `quantize_fp8`. x may have a row stride; its last axis is contiguous."""
    num_rows, width = x.shape
    values = torch.empty((num_rows, width), dtype=FP8, device=x.device)
    scale = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device)
    if num_rows:
        block = min(next_power_of_two(width), _MAX_BLOCK)
        warps = 4 if block <= 2048 else 8
        _quantize_kernel[(num_rows,)](x, values, scale, x.stride(0), width, BLOCK=block, num_warps=warps)
    return values, scale


@jit
def _quantize_kernel(x_ptr, values_ptr, scale_ptr, x_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        value = tl.load(x_ptr + row * x_stride + start + column, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    scale = tl.div_rn(tl.maximum(tl.max(largest, axis=0), 1e-12), 448.0)
    tl.store(scale_ptr + row, scale)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        value = tl.load(x_ptr + row * x_stride + start + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.minimum(tl.maximum(tl.div_rn(value, scale), -448.0), 448.0)
        tl.store(values_ptr + row * width + start + column, value.to(tl.float8e4nv), mask=inside)
