# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Batch-invariant products: a row's bits do not depend on the number of rows. For linear layers in `--deterministic`.

    y = x @ W.T + bias        x [T, K], W [N, K]; accumulation in fp32

W may be in FP8 (e4m3), with a scale for each row's groups of columns: the sums over a group are multiplied by it. So
files with blocks of 128 x 128 are computed as stored, and x is not rounded. For those, in any engine.

`gated_product_triton` is the same kernel over two halves of W at once, with the activation behind it, in tiles that a
card's table chooses:

    y = silu(x @ G.T) * (x @ U.T)        W = [G; U]

A library chooses its tiles and its splits of K by T, so a row's last bits change with the batch. This kernel has one
tile shape for every T, and each output is one sum over K in one order. Grid (N / BLOCK_N x T / BLOCK_M), in groups of
row blocks that share weights in the L2 cache. Small batches pay for padded rows; benchmarks/bench_kernels.py measures
the cost.
Source of the idea: He et al. 2025, "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.kernels.layers.gemv import GemvConfig, gated
from ramet.kernels.triton_support import cdiv, jit_any_value, tl

_BLOCK_M, _BLOCK_N, _BLOCK_K = 64, 128, 64
_GROUP_M = 8


def matmul_invariant(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, [T, N], for x [T, K] and weight [N, K].

    scale: fp32 [N, K / group] of a weight in FP8; a group has a multiple of 64 columns on a GPU.
    """
    return (matmul_invariant_triton if x.is_cuda else matmul_invariant_reference)(x, weight, bias, scale)


def matmul_invariant_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """CPU path, and specification of the values. The bits may differ, because the CPU's library also chooses by T."""
    if scale is None:
        return F.linear(x, weight, bias)
    exact = weight.float() * scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return F.linear(x.float(), exact, None if bias is None else bias.float()).to(x.dtype)


def matmul_invariant_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """Launch the kernel of `matmul_invariant`."""
    num_rows, depth = x.shape
    num_outputs = weight.shape[0]
    assert weight.is_contiguous(), weight.stride()
    assert x.stride(1) == 1, x.stride()
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    num_groups = 1 if scale is None else scale.shape[1]
    assert scale is None or (scale.is_contiguous() and depth % (num_groups * _BLOCK_K) == 0), (depth, num_groups)
    grid = (cdiv(num_rows, _BLOCK_M) * cdiv(num_outputs, _BLOCK_N),)
    _matmul_kernel[grid](
        x,
        weight if scale is None else weight.view(torch.uint8),
        bias,
        scale,
        out,
        x.stride(0),
        num_rows,
        num_outputs,
        depth,
        num_groups,
        depth // num_groups,
        IS_FP8=scale is not None,
        HAS_BIAS=bias is not None,
        IS_GATED=False,
        EVEN_K=depth % _BLOCK_K == 0,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        GROUP_M=_GROUP_M,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=4 if x.element_size() == 2 else 2,
    )
    return out


def gated_product_triton(x: Tensor, weight: Tensor, config: GemvConfig) -> Tensor:
    """Return what silu and product give one after the other, [T, N / 2], for x [T, K] and weight [N, K], gate first.

    The activation reads what the product has in registers: no [T, N] is written and read.
    """
    num_rows, depth = x.shape
    num_outputs = weight.shape[0] // 2
    assert weight.is_contiguous(), weight.stride()
    assert x.stride(1) == 1, x.stride()
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    _matmul_kernel[(cdiv(num_rows, config.block_m) * cdiv(num_outputs, config.block_n),)](
        x,
        weight,
        None,
        None,
        out,
        x.stride(0),
        num_rows,
        num_outputs,
        depth,
        1,
        depth,
        IS_FP8=False,
        HAS_BIAS=False,
        IS_GATED=True,
        EVEN_K=depth % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=_GROUP_M,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@jit_any_value("num_rows")
def _matmul_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, out_ptr, x_stride, num_rows, num_outputs, depth, num_groups, group,
    IS_FP8: tl.constexpr, HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N)
    in_group = GROUP_M * blocks_n
    first_m = program // in_group * GROUP_M
    height = tl.minimum(blocks_m - first_m, GROUP_M)
    block_m = first_m + program % in_group % height
    block_n = program % in_group // height

    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    output = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    # Rows and outputs past the end read the last one again, so the loop needs no masks. They are not stored.
    x_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    weight_row = tl.minimum(output, num_outputs - 1).to(tl.int64)
    x_tile_ptr = x_ptr + x_row[:, None] * x_stride + column[None, :]
    weight_tile_ptr = weight_ptr + weight_row[:, None] * depth + column[None, :]
    up_tile_ptr = weight_tile_ptr + num_outputs.to(tl.int64) * depth
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_tile_ptr + start)
            weight = tl.load(weight_tile_ptr + start)
        else:
            inside = (start + column < depth)[None, :]
            x = tl.load(x_tile_ptr + start, mask=inside, other=0.0)
            weight = tl.load(weight_tile_ptr + start, mask=inside, other=0.0)
        if IS_FP8:
            weight = weight.to(tl.float8e4nv, bitcast=True).to(x.dtype)
            scale = tl.load(scale_ptr + weight_row * num_groups + start // group)
            total += tl.dot(x, tl.trans(weight), input_precision=PRECISION) * scale[None, :]
        else:
            total = tl.dot(x, tl.trans(weight), total, input_precision=PRECISION)
        if IS_GATED:
            up = tl.load(up_tile_ptr + start) if EVEN_K else tl.load(up_tile_ptr + start, mask=inside, other=0.0)
            up_total = tl.dot(x, tl.trans(up), up_total, input_precision=PRECISION)
    if IS_GATED:
        total = gated(total, up_total, out_ptr.dtype.element_ty)
    if HAS_BIAS:
        total += tl.load(bias_ptr + output, mask=output < num_outputs, other=0.0).to(tl.float32)[None, :]
    inside = (row < num_rows)[:, None] & (output < num_outputs)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * num_outputs + output[None, :], total, mask=inside)
