# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Root-mean-square norm, alone or fused with the preceding residual add.

    y = x / sqrt(mean(x^2) + eps) * weight          (mean over the last axis, in fp32)

Kernel: one program per row, the whole row in registers; sums in fp32.

Not here: Gemma's (1 + weight), which the loader folds into the weight, and layer norm with a mean and a bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.kernels.triton_support import jit, next_power_of_two, tl, wait_for_previous


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise the last axis of `x` [T, N] by `weight` [N]. Computed in fp32, returned in `dtype` (None: x's)."""
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(dtype or x.dtype)


def fused_add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Add `x` to `residual` (both [T, N]) and normalise the sum. Returns (normed, new_residual).

    The sum is first rounded to the residual's dtype, so the result equals an unfused add followed by a norm. `normed`
    is in `dtype` (None: the residual's).
    """
    new_residual = (x + residual).to(residual.dtype)
    return rms_norm_reference(new_residual, weight, eps, dtype), new_residual


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None, early_launch: bool = False
) -> Tensor:
    """Launch the kernel of `rms_norm_reference`. x may have a row stride; its last axis is contiguous.

    early_launch: see `wait_for_previous`.
    """
    assert dtype is None or dtype is x.dtype, "a GPU computes in one dtype"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
    _launch(rows, None, weight, out, None, eps, early_launch)
    return out


def fused_add_rms_norm_triton(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    early_launch: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `fused_add_rms_norm_reference`."""
    assert dtype is None or dtype is residual.dtype, "a GPU computes in one dtype"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = torch.empty_like(out)
    _launch(x, residual, weight, out, new_residual, eps, early_launch)
    return out, new_residual


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    new_residual: Tensor | None,
    eps: float,
    early_launch: bool,
) -> None:
    num_rows, width = x.shape
    if num_rows == 0:
        return
    block = next_power_of_two(width)
    _rms_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        out,
        new_residual,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        width,
        eps,
        HAS_RESIDUAL=residual is not None,
        EARLY=early_launch,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
        launch_pdl=early_launch,
    )


@jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    x_stride,
    residual_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        wait_for_previous()
    value = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + residual.to(tl.float32)).to(value.dtype)
        tl.store(sum_ptr + row * width + column, value, mask=inside)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    tl.store(out_ptr + row * width + column, value * scale * weight, mask=inside)
