"""Product with weights in blocks of 32 by integer instructions, for batches and prompts on the CPU.

Activations are rounded to int8 with one scale for 32 values, as in GGML's quantised products; the codes of weights stay
exact. 16 weight rows lie in the lanes of a vector, so no sum crosses lanes, and weights are unpacked once for all
tokens.
y = sum over blocks of d * s * (codes . x) + m * s * sum(x), for weights d * code + m and activations s * x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from ramet.kernels.cpu import int8 as cpu_int8
from ramet.kernels.cpu import vectors as v
from ramet.kernels.cpu.block_linear import FORMATS, dequantize
from ramet.kernels.cpu.program import KernelStream
from ramet.kernels.cpu.threads import Kernel, barrier, inner, num_threads, thread_count, thread_index

# Bits of a code.
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_GROUP = cpu_int8.TOKENS[-1]  # tokens that share unpacked weights
_TOKENS_AT_ONCE = 256  # their activations stay in the second-level cache while all weights are read


def takes(block_format: str, num_rows: int) -> bool:
    """True if `pack` and `block_int8_linear` accept this format and size (on a CPU that `has_int8_products`)."""
    return block_format in _BITS and num_rows % v.LANES == 0


def pack(blocks: Tensor, block_format: str, num_rows: int) -> Tensor:
    """Lay out blocks (see `block_linear`) for `block_int8_linear`.

    Returns uint8 [num_rows / 16, K / 32, 64 + 64 * bits]. Each entry holds 16 rows and 32 columns: scales and minimums
    in fp16, then codes by 4 columns, 16 rows each. With 4-bit codes, columns 16 to 31 are the high halves.
    """
    parts = blocks.view(num_rows, -1, FORMATS[block_format][1])
    scale = parts[..., :2].contiguous().view(torch.float16)
    if block_format == "Q8_0":
        codes, minimum = parts[..., 2:] ^ 128, -128 * scale.float()
    elif block_format == "Q4_0":
        codes, minimum = parts[..., 2:], -8 * scale.float()
    else:
        codes, minimum = parts[..., 4:], parts[..., 2:4].contiguous().view(torch.float16).float()
    by_tile = codes.reshape(num_rows // v.LANES, v.LANES, parts.shape[1], -1, 4)  # tile, row, block, group, column
    packed = by_tile.permute(0, 2, 3, 1, 4).reshape(num_rows // v.LANES, parts.shape[1], -1)
    heads = [
        value.half().reshape(-1, v.LANES, parts.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)
        for value in (scale, minimum)
    ]
    return torch.cat((*heads, packed), dim=-1).contiguous()


def block_int8_linear(stream: KernelStream, x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return fp32 [T, num_rows] for x fp32 [T, K], plus bias [num_rows]. Any number of tokens."""
    num_tokens = x.shape[0]
    tiles, num_blocks, block_bytes = packed.shape
    x = x.contiguous()
    padded = num_tokens if num_tokens <= 2 else -(-num_tokens // 4) * 4
    workspace = stream.empty((padded, num_blocks * cpu_int8.TOKEN_BLOCK_BYTES // 4))  # rounded activations
    out = stream.empty((padded, tiles * v.LANES))
    stream.launch(
        _kernel,
        packed.data_ptr(),
        x.data_ptr(),
        workspace.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        num_tokens,
        padded,
        tiles,
        num_blocks,
        (block_bytes - 64) // 64,
        threads=thread_count(),
    )
    return out[:num_tokens]


def block_int8_linear_reference(x: Tensor, blocks: Tensor, block_format: str, num_rows: int) -> Tensor:
    """Specification of `block_int8_linear`, on blocks before `pack`: round activations, multiply in fp32."""
    groups = x.view(x.shape[0], -1, v.BLOCK)
    largest = groups.abs().amax(-1, keepdim=True)
    codes = torch.where(largest > 1e-30, groups * (127 / largest), 0).round()
    rounded = (codes * (largest / 127)).view_as(x)
    return rounded @ dequantize(blocks, block_format).view(num_rows, -1).T


# ---- Compiled part ----


def _by_tokens(dots: list[Any]) -> Any:  # Any: numba intrinsics
    dot_1, dot_2, dot_4, dot_8 = dots

    def dot(tokens: int, weights: int, x: int, num_blocks: int, out: int, out_stride: int) -> None:
        if tokens == 8:
            dot_8(weights, x, num_blocks, out, out_stride)
        elif tokens == 4:
            dot_4(weights, x, num_blocks, out, out_stride)
        elif tokens == 2:
            dot_2(weights, x, num_blocks, out, out_stride)
        else:
            dot_1(weights, x, num_blocks, out, out_stride)

    return njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(dot)


_dot_4_bits, _dot_8_bits = _by_tokens(cpu_int8.dots[4]), _by_tokens(cpu_int8.dots[8])


@inner
def _quantize(x: int, rounded: int, num_tokens: int, padded: int, num_blocks: int) -> None:
    """One thread's share of the blocks of all tokens, in groups of tokens (see `int8.dots`)."""
    index, count = np.int64(thread_index()), np.int64(num_threads())
    low, high = padded * num_blocks * index // count, padded * num_blocks * (index + 1) // count
    token: Any = low // num_blocks  # Any: np.int64
    block: Any = low % num_blocks
    for i in range(low, high):
        lane = token % _GROUP
        tokens = min(padded - token + lane, _GROUP)
        group = rounded + ((token - lane) * num_blocks + block * tokens) * cpu_int8.TOKEN_BLOCK_BYTES
        scales = group + tokens * v.BLOCK + lane * 8
        if token < num_tokens:
            cpu_int8.quantize_block(x + i * v.BLOCK * 4, group + lane * v.BLOCK, scales)
        else:  # products of padding are not read, but with denormal numbers they would be slow
            pair = carray(v.float32_at(scales), (2,))
            pair[0] = pair[1] = np.float32(0.0)
        block += 1
        if block == num_blocks:
            token, block = token + 1, 0


@inner
def _add_bias(out: int, bias: int, tokens: int, out_stride: int) -> None:
    terms = carray(v.float32_at(bias), (v.LANES,))
    for token in range(tokens):
        row = carray(v.float32_at(out + token * out_stride), (v.LANES,))
        for i in range(v.LANES):
            row[i] += terms[i]


@Kernel
def _kernel(pointer: Any) -> None:  # Any: int64*
    """One thread's tiles of 16 rows; the padded number of tokens is 1, 2 or a multiple of 4."""
    a = carray(pointer, 10)
    num_tokens, padded, tiles, num_blocks, bits = a[5], a[6], a[7], a[8], a[9]
    _quantize(a[1], a[2], num_tokens, padded, num_blocks)
    barrier()
    low, high = tiles * thread_index() // num_threads(), tiles * (thread_index() + 1) // num_threads()
    token_bytes, out_stride = num_blocks * cpu_int8.TOKEN_BLOCK_BYTES, tiles * 64
    tile_bytes = num_blocks * (64 + 64 * bits)
    for begin in range(0, padded, _TOKENS_AT_ONCE):
        end = min(begin + _TOKENS_AT_ONCE, padded)
        for tile in range(low, high):
            weights = a[0] + tile * tile_bytes
            for token in range(begin, end, _GROUP):
                tokens = min(end - token, _GROUP)
                x, out = a[2] + token * token_bytes, a[3] + token * out_stride + tile * 64
                if bits == 4:
                    _dot_4_bits(tokens, weights, x, num_blocks, out, out_stride)
                else:
                    _dot_8_bits(tokens, weights, x, num_blocks, out, out_stride)
                if a[4] != 0:
                    _add_bias(out, a[4] + tile * 64, tokens, out_stride)
