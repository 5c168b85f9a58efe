"""Product with weights stored in blocks of 32, for few tokens on the CPU: y = x @ W.T + bias, x and y in fp32.

Weights stay in the format of the GGUF file (Q4_0, Q4_1, Q8_0), in bfloat16 or in fp32, and are decoded in registers.
The result equals an fp32 product with the dequantised weights, but only 0.6 to 4 bytes per weight are read. Rows are
divided among torch's OpenMP threads. One row's weights are decoded once for up to 8 tokens, and read from memory once
for 16. A token has the same bits alone and beside any others.

Measured on one core of an AMD EPYC (Zen 5) with a [3072, 576] matrix out of the cache: fp32 takes 158 us for one token,
173 for 2, 196 for 4, 221 for 8 and 597 for 32; MKL takes 405, 617, 543, 665 and 1,391. From about 16 tokens on, MKL's
bf16 product is faster than one of 16-bit weights; the caller chooses.
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
FORMATS = {"Q4_1": (0, 20), "Q8_0": (1, 34), "BF16": (2, 64), "Q4_0": (3, 18), "F32": (4, 128)}
_ROWS = 4  # a thread has a multiple of these
_TOKENS_AT_ONCE = 16  # their activations stay in the second-level cache while all rows are read


def block_linear(
    stream: KernelStream, x: Tensor, blocks: Tensor, block_format: str, num_rows: int, bias: Tensor | None = None
) -> Tensor:
    """Return fp32 [T, num_rows] for x fp32 [T, K] on the CPU.

    blocks: uint8 [num_rows, K / 32 * bytes per block] ([num_rows, K] for BF16 and F32), contiguous. A token's
    result has the same bits with any others.
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
    if block_format in ("BF16", "F32"):
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
    if block_format in ("BF16", "F32"):
        return weight.to(torch.bfloat16 if block_format == "BF16" else torch.float32).contiguous()
    groups = weight.float().view(num_rows, num_columns // v.BLOCK, v.BLOCK)
    if block_format == "Q8_0":
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half()
        codes = (groups / scale.float().clamp_min(1e-30)).round_().clamp_(-127, 127).to(torch.int8)
        return torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), dim=-1).view(num_rows, -1)
    if block_format != "Q4_1":
        raise ValueError(f"cannot quantise to {block_format!r}; choose Q4_1, Q8_0, BF16 or F32")
    low = groups.amin(-1, keepdim=True).half()
    scale = ((groups.amax(-1, keepdim=True) - low.float()) / 15).half()
    codes = ((groups - low.float()) / scale.float().clamp_min(1e-30)).round_().clamp_(0, 15).to(torch.uint8)
    packed = codes[..., :16] | codes[..., 16:] << 4
    return torch.cat((scale.view(torch.uint8), low.view(torch.uint8), packed), dim=-1).view(num_rows, -1)


# ---- Compiled part ----


def _by_shape(dots: list[Any]) -> Any:  # Any: numba intrinsics
    """One function for all shapes of a format (see `vectors.SHAPES`)."""
    dot_1_1, dot_4_1, dot_4_2, dot_2_4, dot_2_8 = dots

    def dot(
        rows: int, tokens: int, weights: int, x: int, x_stride: int, num_blocks: int, out: int, out_stride: int
    ) -> None:
        if rows == 1:
            dot_1_1(weights, x, x_stride, num_blocks, out, out_stride)
        elif tokens == 8:
            dot_2_8(weights, x, x_stride, num_blocks, out, out_stride)
        elif tokens == 4:
            dot_2_4(weights, x, x_stride, num_blocks, out, out_stride)
        elif tokens == 2:
            dot_4_2(weights, x, x_stride, num_blocks, out, out_stride)
        else:
            dot_4_1(weights, x, x_stride, num_blocks, out, out_stride)

    return njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(dot)


_dot_q4_1, _dot_q4_0 = _by_shape(v.dots_q4_1), _by_shape(v.dots_q4_0)
_dot_q8_0, _dot_bf16, _dot_f32 = _by_shape(v.dots_q8_0), _by_shape(v.dots_bf16), _by_shape(v.dots_f32)


@inner
def _add_bias(out: int, bias: int, rows: int, tokens: int, out_stride: int) -> None:
    terms = carray(v.float32_at(bias), (rows,))
    for token in range(tokens):
        values = carray(v.float32_at(out + token * out_stride), (rows,))
        for i in range(rows):
            values[i] += terms[i]


@Kernel
def _kernel(pointer: Any) -> None:  # Any: int64*
    """One thread's rows [low, high): some at a time, with all tokens of a chunk while they stay in the cache."""
    a = carray(pointer, 8)
    index, count = thread_index(), num_threads()
    num_tokens, num_rows, num_blocks, code = a[4], a[5], a[6], a[7]
    quads = (num_rows + _ROWS - 1) // _ROWS
    low, high = quads * index // count * _ROWS, min(quads * (index + 1) // count * _ROWS, num_rows)
    x_stride, out_stride = num_blocks * 128, num_rows * 4
    row_bytes = num_blocks * (20 if code == 0 else 34 if code == 1 else 64 if code == 2 else 18 if code == 3 else 128)
    for begin in range(0, num_tokens, _TOKENS_AT_ONCE):
        end = min(begin + _TOKENS_AT_ONCE, num_tokens)
        for first in range(low, high, _ROWS):
            last = min(first + _ROWS, high)
            token = begin
            while token < end:
                left = end - token
                tokens = 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
                step = 2 if tokens >= 4 else _ROWS
                row = first
                while row < last:
                    rows, group = step, tokens
                    if last - row < step:  # one row and one token at a time: few matrices have such rows
                        rows = group = 1
                    weights = a[0] + row * row_bytes
                    for part in range(token, token + tokens, group):
                        x, out = a[1] + part * x_stride, a[2] + part * out_stride + row * 4
                        if code == 0:
                            _dot_q4_1(rows, group, weights, x, x_stride, num_blocks, out, out_stride)
                        elif code == 1:
                            _dot_q8_0(rows, group, weights, x, x_stride, num_blocks, out, out_stride)
                        elif code == 2:
                            _dot_bf16(rows, group, weights, x, x_stride, num_blocks, out, out_stride)
                        elif code == 3:
                            _dot_q4_0(rows, group, weights, x, x_stride, num_blocks, out, out_stride)
                        else:
                            _dot_f32(rows, group, weights, x, x_stride, num_blocks, out, out_stride)
                    row += rows
                token += tokens
            if a[3] != 0:
                _add_bias(
                    a[2] + begin * out_stride + first * 4, a[3] + first * 4, last - first, end - begin, out_stride
                )
