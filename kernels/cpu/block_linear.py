"""Product with weights stored in blocks of 32, for few tokens on the CPU: y = x @ W.T + bias, x and y in fp32.

Weights stay in the format of the GGUF file (Q4_0, Q4_1, Q8_0) or in bfloat16, and are decoded in registers. The result
equals an fp32 product with the dequantised weights, but only 0.6 to 2 bytes per weight are read. Rows are divided among
torch's OpenMP threads. One row's weights are decoded once for up to 8 tokens.

Measured on 2 cores of an AMD EPYC (Zen 4) with a [960, 576] matrix: Q4_1 takes 21 us for one token, 33 for 4, 60 for 8;
MKL takes 45 us for one token in fp32 and 39 in bf16. From about 16 tokens on, MKL's bf16 product is faster; the caller
chooses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from numba import carray, njit
from torch import Tensor

from ramet.kernels.cpu import vectors as v
from ramet.kernels.cpu.program import KernelStream
from ramet.kernels.cpu.threads import Kernel, inner, num_threads, thread_count, thread_index

# Format (GGML's names): (code in the kernel, bytes of a block of 32 weights)
FORMATS = {"Q4_1": (0, 20), "Q8_0": (1, 34), "BF16": (2, 64), "Q4_0": (3, 18)}


def block_linear(
    stream: KernelStream, x: Tensor, blocks: Tensor, block_format: str, num_rows: int, bias: Tensor | None = None
) -> Tensor:
    """Return fp32 [T, num_rows] for x fp32 [T, K] on the CPU.

    blocks: uint8 [num_rows, K / 32 * bytes per block] (bfloat16 [num_rows, K] for BF16), contiguous.
    """
    num_tokens, num_columns = x.shape
    x = x.contiguous()
    out = stream.empty((num_tokens, num_rows))
    code, _ = FORMATS[block_format]
    addresses = blocks.data_ptr(), x.data_ptr(), out.data_ptr(), 0 if bias is None else bias.data_ptr()
    sizes = num_tokens, num_rows, num_columns // v.BLOCK
    stream.launch(_kernel, *addresses, *sizes, code, threads=thread_count())
    return out


def block_linear_reference(
    x: Tensor, blocks: Tensor, block_format: str, num_rows: int, bias: Tensor | None = None
) -> Tensor:
    """Specification of `block_linear`: dequantise, then multiply."""
    return F.linear(x, dequantize(blocks, block_format).view(num_rows, -1), bias)


def dequantize(blocks: Tensor, block_format: str) -> Tensor:
    """Return the weights as fp32 [num_rows, K]."""
    if block_format == "BF16":
        return blocks.float()
    num_rows = blocks.shape[0]
    parts = blocks.view(num_rows, -1, FORMATS[block_format][1])
    scale = parts[..., :2].contiguous().view(torch.float16).float()
    if block_format == "Q8_0":
        return (parts[..., 2:].contiguous().view(torch.int8) * scale).view(num_rows, -1)
    if block_format == "Q4_0":
        minimum, packed = -8 * scale, parts[..., 2:]
    else:
        minimum, packed = parts[..., 2:4].contiguous().view(torch.float16).float(), parts[..., 4:]
    codes = torch.cat((packed & 15, packed >> 4), dim=-1).float()
    return (codes * scale + minimum).view(num_rows, -1)


def quantize(weight: Tensor, block_format: str) -> Tensor:
    """Round fp32 [N, K] (K a multiple of 32) to blocks: the nearest codes for a scale (and minimum) kept in fp16."""
    num_rows, num_columns = weight.shape
    if block_format == "BF16":
        return weight.to(torch.bfloat16).contiguous()
    groups = weight.float().view(num_rows, num_columns // v.BLOCK, v.BLOCK)
    if block_format == "Q8_0":
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
        codes = (groups / scale.float().clamp_min(1e-30)).round_().clamp_(-127, 127).to(torch.int8)
        return torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), dim=-1).view(num_rows, -1)
    if block_format != "Q4_1":
        raise ValueError(f"cannot quantise to {block_format!r}; choose Q4_1, Q8_0 or BF16")
    low = groups.amin(-1, keepdim=True).half()
    scale = ((groups.amax(-1, keepdim=True) - low.float()) / 15).half()
    codes = ((groups - low.float()) / scale.float().clamp_min(1e-30)).round_().clamp_(0, 15).to(torch.uint8)
    packed = codes[..., :16] | codes[..., 16:] << 4
    return torch.cat((scale.view(torch.uint8), low.view(torch.uint8), packed), dim=-1).view(num_rows, -1)


# ---- Compiled part ----


def _by_shape(dots: list[Any]) -> Any:  # Any: numba intrinsics
    """One function for all shapes of a format (see `vectors.SHAPES`)."""
    dot_1_1, dot_1_2, dot_1_4, dot_1_8, dot_2_4, dot_2_8 = dots

    def dot(
        rows: int, tokens: int, weights: int, x: int, x_stride: int, num_blocks: int, out: int, out_stride: int
    ) -> None:
        if rows == 2:
            if tokens == 8:
                dot_2_8(weights, x, x_stride, num_blocks, out, out_stride)
            else:
                dot_2_4(weights, x, x_stride, num_blocks, out, out_stride)
        elif tokens == 8:
            dot_1_8(weights, x, x_stride, num_blocks, out, out_stride)
        elif tokens == 4:
            dot_1_4(weights, x, x_stride, num_blocks, out, out_stride)
        elif tokens == 2:
            dot_1_2(weights, x, x_stride, num_blocks, out, out_stride)
        else:
            dot_1_1(weights, x, x_stride, num_blocks, out, out_stride)

    return njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(dot)


_dot_q4_1, _dot_q4_0 = _by_shape(v.dots_q4_1), _by_shape(v.dots_q4_0)
_dot_q8_0, _dot_bf16 = _by_shape(v.dots_q8_0), _by_shape(v.dots_bf16)


@inner
def _add_bias(out: int, bias: int, rows: int, tokens: int, out_stride: int) -> None:
    terms = carray(v.float32_at(bias), (rows,))
    for token in range(tokens):
        values = carray(v.float32_at(out + token * out_stride), (rows,))
        for i in range(rows):
            values[i] += terms[i]


@Kernel
def _kernel(pointer: Any) -> None:  # Any: int64*
    """One thread's rows [low, high)."""
    arguments = carray(pointer, 8)
    index, count = thread_index(), num_threads()
    num_tokens, num_rows, num_blocks, code = arguments[4], arguments[5], arguments[6], arguments[7]
    low, high = num_rows * index // count, num_rows * (index + 1) // count
    x_stride, out_stride = num_blocks * 128, num_rows * 4
    row_bytes = num_blocks * (20 if code == 0 else 34 if code == 1 else 64 if code == 2 else 18)
    token = 0
    while token < num_tokens:  # 8 tokens of x stay in the first-level cache while all rows are read
        left = num_tokens - token
        tokens = 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
        x = arguments[1] + token * x_stride
        row = low
        while row < high:
            rows = 2 if tokens >= 4 and high - row >= 2 else 1
            weights = arguments[0] + row * row_bytes
            out = arguments[2] + token * out_stride + row * 4
            if code == 0:
                _dot_q4_1(rows, tokens, weights, x, x_stride, num_blocks, out, out_stride)
            elif code == 1:
                _dot_q8_0(rows, tokens, weights, x, x_stride, num_blocks, out, out_stride)
            elif code == 2:
                _dot_bf16(rows, tokens, weights, x, x_stride, num_blocks, out, out_stride)
            else:
                _dot_q4_0(rows, tokens, weights, x, x_stride, num_blocks, out, out_stride)
            if arguments[3] != 0:
                _add_bias(out, arguments[3] + row * 4, rows, tokens, out_stride)
            row += rows
        token += tokens
