# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Gated activations of the feed-forward block: act(gate) * up, from one fused [T, 2 * I] product (gate first).

Kernel: one program per row and block of columns. fp32 arithmetic with one rounding at the end, also on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.kernels.triton_support import cdiv, jit, tl, wait_for_previous


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [T, I], for `gate_up` [T, 2 * I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh_and_mul_reference(gate_up: Tensor) -> Tensor:
    """Return gelu(gate) * up, [T, I], with the tanh approximation of gelu, for `gate_up` [T, 2 * I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def silu_and_mul_triton(gate_up: Tensor, early_launch: bool = False) -> Tensor:
    """Launch the kernel of `silu_and_mul_reference`. early_launch: see `wait_for_previous`."""
    return _launch(gate_up, early_launch, use_gelu=False)


def gelu_tanh_and_mul_triton(gate_up: Tensor, early_launch: bool = False) -> Tensor:
    """Launch the kernel of `gelu_tanh_and_mul_reference`. early_launch: see `wait_for_previous`."""
    return _launch(gate_up, early_launch, use_gelu=True)


def _launch(gate_up: Tensor, early_launch: bool, *, use_gelu: bool) -> Tensor:
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    # Few rows need many programs to fill the card; many rows need fewer and longer ones.
    block = 512 if num_rows <= 64 else 2048
    if num_rows:
        grid = (num_rows, cdiv(width, block))
        _gated_kernel[grid](
            gate_up, out, gate_up.stride(0), width, USE_GELU=use_gelu, EARLY=early_launch, BLOCK=block, num_warps=4,
            launch_pdl=early_launch,
        )  # fmt: skip
    return out


@jit
def _gated_kernel(x_ptr, out_ptr, x_stride, width, USE_GELU: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    if EARLY:
        wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + width + column, mask=inside, other=0.0).to(tl.float32)
    if USE_GELU:
        # gelu(g) = g * sigmoid(2 u) with u = sqrt(2 / pi) * (g + 0.044715 g^3), since 1 + tanh(u) = 2 sigmoid(2 u)
        activated = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        activated = gate * tl.sigmoid(gate)
    tl.store(out_ptr + row * width + column, activated * up, mask=inside)
