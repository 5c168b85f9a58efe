# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Linear layers of very small batches: y = x @ W.T at memory speed, with the surrounding operations folded in.

At B <= 16 a product takes as long as one read of W [N, K]. Each program owns BLOCK_N outputs, so no two programs add to
one number, and the result does not depend on timing. A program iterates over K in tiles, several of them in flight.

    y = norm(x) @ W.T + bias + residual          norm, bias and residual optional
    y = silu(norm(x) @ G.T) * (norm(x) @ U.T)    W = [G; U]

Two kernels. "sum" (B = 1): products in registers, one fp32 sum per thread and element, reduced once at the end. "dot":
x padded to 16 rows, on the tensor cores; its order of summation does not depend on B. Accumulation in fp32. The folded
operations round to the model dtype at the same points as the separate operations, but for the norm of "sum": its scale
multiplies the sum, so that no weight waits for the whole row to be read, and nothing of it is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.kernels.layers.activation import silu_and_mul_reference
from ramet.kernels.layers.norm import rms_norm_reference
from ramet.kernels.triton_support import cdiv, jit, tl

MAX_ROWS = 16


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """A launch configuration: the kernel, outputs and depth of a tile, tiles in flight, warps.

    kernel: "sum" or "dot"; "tile", with `block_m` rows, is the one of larger batches (`gated_product_triton`).
    early_launch: start while the previous kernel is still running, and fetch weights into the L2 cache until it ends
    (programmatic dependent launch, Hopper and later).
    """

    kernel: str
    block_n: int
    block_k: int
    num_stages: int
    num_warps: int
    early_launch: bool = False
    block_m: int = 16


def gemv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Return norm(x) @ weight.T + bias + residual, [B, N], for x [B, K], B <= 16; weight [N, K].

    norm_weight: [K], weight of an RMS norm of x; None: no norm. residual: [B, N].
    """
    if norm_weight is not None:
        x = rms_norm_reference(x, norm_weight, eps)
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


def gemv_silu_and_mul_reference(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Return silu(gate) * up, [B, N / 2], where (gate, up) = norm(x) @ weight.T; weight [N, K], gate's rows first."""
    return silu_and_mul_reference(gemv_reference(x, weight, norm_weight=norm_weight, eps=eps))


def choose_config(num_rows: int, num_outputs: int, depth: int, is_gated: bool) -> GemvConfig:
    """Choose a launch configuration. `num_outputs`: number of outputs; of one half if gated."""
    if num_rows == 1:
        return GemvConfig("sum", 4 if is_gated or num_outputs <= 8192 else 8, 1024, 3, 4)
    return GemvConfig("dot", 16 if num_outputs <= 8192 else 32, 256, 4, 4)


def gemv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    config: GemvConfig | None = None,
) -> Tensor:
    """Launch the kernel of `gemv_reference`."""
    config = config or choose_config(x.shape[0], weight.shape[0], x.shape[1], is_gated=False)
    return _launch(x, weight, bias, residual, norm_weight, eps, weight.shape[0], False, config)


def gemv_silu_and_mul_triton(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    config: GemvConfig | None = None,
) -> Tensor:
    """Launch the kernel of `gemv_silu_and_mul_reference`."""
    num_outputs = weight.shape[0] // 2
    config = config or choose_config(x.shape[0], num_outputs, x.shape[1], is_gated=True)
    return _launch(x, weight, None, None, norm_weight, eps, num_outputs, True, config)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    num_outputs: int,
    is_gated: bool,
    config: GemvConfig,
) -> Tensor:
    num_rows, depth = x.shape
    assert 1 <= num_rows <= MAX_ROWS, num_rows
    assert weight.is_contiguous(), weight.stride()
    assert x.stride(1) == 1, x.stride()
    assert config.kernel == "dot" or num_rows == 1, config
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    kernel = _sum_kernel if config.kernel == "sum" else _dot_kernel
    kernel[(cdiv(num_outputs, config.block_n),)](
        x,
        weight,
        bias,
        residual,
        norm_weight,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        num_rows,
        num_outputs,
        depth,
        eps,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_NORM=norm_weight is not None,
        IS_GATED=is_gated,
        EVEN=num_outputs % config.block_n == 0 and depth % config.block_k == 0,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        EARLY=config.early_launch,
        num_warps=config.num_warps,
        launch_pdl=config.early_launch,
    )
    return out


@jit
def _sum_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, norm_ptr, out_ptr, x_stride, residual_stride, num_rows, num_outputs,
    depth, eps, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr, IS_GATED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    if EARLY:
        start_early(weight_ptr, output, num_outputs, depth, IS_GATED, 2048)
    row_ptr = weight_ptr + output.to(tl.int64)[:, None] * depth + column[None, :]
    up_ptr = row_ptr + num_outputs.to(tl.int64) * depth
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    up_total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        if EVEN:
            weight = tl.load(row_ptr + start, eviction_policy="evict_first")
            part = tl.load(x_ptr + start + column)
        else:
            inside = (output < num_outputs)[:, None] & (start + column < depth)[None, :]
            weight = tl.load(row_ptr + start, mask=inside, other=0.0, eviction_policy="evict_first")
            part = tl.load(x_ptr + start + column, mask=start + column < depth, other=0.0)
        part = part.to(tl.float32)
        if HAS_NORM:
            squares += part * part
            part *= tl.load(norm_ptr + start + column, mask=start + column < depth, other=0.0).to(tl.float32)
        part = part[None, :]
        total += weight.to(tl.float32) * part
        if IS_GATED:
            if EVEN:
                weight = tl.load(up_ptr + start, eviction_policy="evict_first")
            else:
                weight = tl.load(up_ptr + start, mask=inside, other=0.0, eviction_policy="evict_first")
            up_total += weight.to(tl.float32) * part
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / depth + eps)
    y = tl.sum(total, axis=1) * scale
    if IS_GATED:
        y = gated(y, tl.sum(up_total, axis=1) * scale, out_ptr.dtype.element_ty)
    inside = output < num_outputs
    if HAS_BIAS:
        y += tl.load(bias_ptr + output, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(residual_ptr + output, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, y, mask=inside)


@jit
def _dot_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, norm_ptr, out_ptr, x_stride, residual_stride, num_rows, num_outputs,
    depth, eps, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr, IS_GATED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    if EARLY:
        start_early(weight_ptr, output, num_outputs, depth, IS_GATED, 1024)
    row = tl.arange(0, 16)
    is_row = (row < num_rows)[None, :]
    # x is read transposed, [BLOCK_K, 16], as the right operand: rows past B are zeros and are not loaded.
    x_tile_ptr = x_ptr + row[None, :] * x_stride + column[:, None]
    scale = tl.full((1, 16), 1.0, tl.float32)
    if HAS_NORM:
        squares = tl.zeros((BLOCK_K, 16), tl.float32)
        for start in tl.range(0, depth, BLOCK_K, num_stages=1):
            part = tl.load(x_tile_ptr + start, mask=is_row & (start + column < depth)[:, None], other=0.0)
            squares += part.to(tl.float32) * part.to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, axis=0) / depth + eps)[None, :]
    row_ptr = weight_ptr + output.to(tl.int64)[:, None] * depth + column[None, :]
    up_ptr = row_ptr + num_outputs.to(tl.int64) * depth
    total = tl.zeros((BLOCK_N, 16), tl.float32)
    up_total = tl.zeros((BLOCK_N, 16), tl.float32)
    for start in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        if EVEN:
            weight = tl.load(row_ptr + start, eviction_policy="evict_first")
            part = tl.load(x_tile_ptr + start, mask=is_row, other=0.0)
        else:
            inside = (output < num_outputs)[:, None] & (start + column < depth)[None, :]
            weight = tl.load(row_ptr + start, mask=inside, other=0.0, eviction_policy="evict_first")
            part = tl.load(x_tile_ptr + start, mask=is_row & (start + column < depth)[:, None], other=0.0)
        if HAS_NORM:
            gain = tl.load(norm_ptr + start + column, mask=start + column < depth, other=0.0)
            part = (part.to(tl.float32) * scale * gain.to(tl.float32)[:, None]).to(part.dtype)
        total = tl.dot(weight, part, total, input_precision="ieee")
        if IS_GATED:
            if EVEN:
                weight = tl.load(up_ptr + start, eviction_policy="evict_first")
            else:
                weight = tl.load(up_ptr + start, mask=inside, other=0.0, eviction_policy="evict_first")
            up_total = tl.dot(weight, part, up_total, input_precision="ieee")
    if IS_GATED:
        total = gated(total, up_total, out_ptr.dtype.element_ty)
    inside = (output < num_outputs)[:, None] & is_row
    if HAS_BIAS:
        total += tl.load(bias_ptr + output, mask=output < num_outputs, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        total = total.to(out_ptr.dtype.element_ty).to(tl.float32)
        residual = residual_ptr + row[None, :] * residual_stride + output[:, None]
        total += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[None, :] * num_outputs + output[:, None], total, mask=inside)


@jit
def gated(gate, up, dtype: tl.constexpr):
    """Return silu(gate) * up, both first rounded to the model dtype, as a separate product would do."""
    gate = gate.to(dtype).to(tl.float32)
    return gate * tl.sigmoid(gate) * up.to(dtype).to(tl.float32)


@jit
def start_early(weight_ptr, output, num_outputs, depth, IS_GATED: tl.constexpr, COLUMNS: tl.constexpr):
    """Let the next kernel start, fetch the first of this program's weights to L2, and wait for the previous kernel.

    Only weights may be read before the wait, because they are constants.
    """
    tl.extra.cuda.gdc_launch_dependents()
    line = tl.arange(0, COLUMNS // 64) * 64  # 128-byte lines of 2-byte weights
    inside = (output < num_outputs)[:, None] & (line < depth)[None, :]
    offset = tl.where(inside, output.to(tl.int64)[:, None] * depth + line[None, :], 0)
    fetch_line(weight_ptr + offset)
    if IS_GATED:
        fetch_line(weight_ptr + num_outputs.to(tl.int64) * depth + offset)
    tl.extra.cuda.gdc_wait()


@jit
def fetch_line(address):
    """Prefetch the cache lines at a tile of addresses. Returns before they arrive."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )
