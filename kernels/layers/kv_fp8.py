# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""KV caches in FP8 (e4m3): each head's vector has a scale of its own, in one byte beside the values.

    value = e4m3 * scale        scale = (1 + (byte mod 8) / 8) * 2^(byte div 8 - 20)

Of the eight scales from the smallest one with which the vector's largest value is at most 448, a vector has the one
with the smallest sum of squared errors. A few of a key's numbers are much larger than its others and decide the scores;
the scale is fitted to them. With SmolLM2 the smallest power of two costs 2.7 times as much perplexity.
Values and scales have four significant bits, so a cached value is exact in bfloat16, and kernels may multiply scores
and weights by the scales instead of keys and values.
A page of a head is [P * D bytes of values | P bytes of scales]. Caches are passed as the view [N, K, P, D] of the
values, like those of other dtypes; `scales_of` finds the scales behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.layers.quantize_fp8 import FP8 as FP8
from ramet.kernels.triton_support import IS_INTERPRETED, jit, tl

_LARGEST = 448.0  # of e4m3
_STEPS = 8  # scales in an octave
_BASE = (127 - 20) << 23  # a scale's byte, shifted by 20, is the top of an fp32 number but for this


def cell_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one head's key or value in a cache of this dtype."""
    return head_dim + 1 if dtype is FP8 else head_dim * dtype.itemsize


def values_of(storage: Tensor, page_size: int) -> Tensor:
    """The values fp8 [..., P, D] of pages with their scales, uint8 [..., P * (D + 1)]."""
    head_dim = storage.shape[-1] // page_size - 1
    values: Tensor = storage[..., : page_size * head_dim].unflatten(-1, (page_size, head_dim)).view(FP8)
    return values


def scales_of(cache: Tensor) -> Tensor:
    """The bytes of the scales, uint8 [N, K, P], of a cache's values fp8 [N, K, P, D]."""
    num_pages, num_heads, page_size, head_dim = cache.shape
    return for_kernel(cache)[:, page_size * head_dim :].view(num_pages, num_heads, page_size)


def round_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round head vectors fp32 [..., D] to FP8. Returns the values, as bytes, and the bytes of the scales [...]."""
    smallest = (((x.abs().amax(-1) / _LARGEST).view(torch.int32) - _BASE + 0xFFFFF) >> 20).clamp(0, 256 - _STEPS)
    best, chosen = torch.full_like(smallest, torch.inf, dtype=torch.float32), smallest
    for step in range(_STEPS):
        scale = scales_from(smallest + step)[..., None]
        error = (_rounded(x / scale) * scale - x).square().sum(-1)
        chosen = torch.where(error < best, smallest + step, chosen)
        best = torch.minimum(error, best)
    values = _rounded(x / scales_from(chosen)[..., None]).to(FP8)
    return values.view(torch.uint8), chosen.to(torch.uint8)


def scales_from(byte: Tensor) -> Tensor:
    """The scales, fp32, of their bytes (of any dtype)."""
    return ((byte.int() << 20) + _BASE).view(torch.float32)


def _rounded(x: Tensor) -> Tensor:
    """The nearest numbers of e4m3, in fp32; those beyond its largest become that."""
    x = x.clamp(-_LARGEST, _LARGEST)
    # Above 2^-6 a number keeps 3 bits behind its first; fp32 numbers near `magic` have just these.
    magic = (((x.view(torch.int32) & 0x7F800000).clamp(min=121 << 23)) + (20 << 23) | 0x400000).view(torch.float32)
    return (x + magic) - magic


def write_heads(x: Tensor, page: Tensor, offset: Tensor, cache: Tensor) -> None:
    """Write heads [T, K, D] to positions `offset` of pages `page` (int [T]) of a cache fp8 [N, K, P, D]."""
    values, scales = round_heads(x.float())
    cache.view(torch.uint8).transpose(1, 2).index_put_((page, offset), values)
    scales_of(cache).transpose(1, 2).index_put_((page, offset), scales)


def read_rows(cache: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy the heads' pages `rows` (int64 [n], page * K + head) of a cache fp8 [N, K, P, D] to `dtype` [n, P, D]."""
    page_size, head_dim = cache.shape[2:]
    chosen = for_kernel(cache).index_select(0, rows)
    scales = scales_from(chosen[:, page_size * head_dim :])
    return (values_of(chosen, page_size).float() * scales[..., None]).to(dtype)


def for_kernel(cache: Tensor) -> Tensor:
    """A cache as kernels take it: one in FP8 as bytes, with the scales, uint8 [N * K, P * (D + 1)]."""
    if cache.dtype is not FP8:
        return cache
    size = cache.shape[2] * cell_bytes(cache.shape[3], FP8)
    return cache.view(torch.uint8).as_strided((cache.shape[0] * cache.shape[1], size), (size, 1))


@jit
def load_scale_bytes(pages_ptr, offsets, positions, mask, IN_WORDS: tl.constexpr):
    """Bytes of scales at `offsets`, int32.

    IN_WORDS: load the words that hold them, which Triton copies ahead, as it does not copy bytes. Not for many rows:
    Triton 3.6 copies a word for each column that a thread has.
    """
    if IN_WORDS:
        words_ptr = (pages_ptr + (offsets - positions % 4)).to(tl.pointer_type(tl.int32), bitcast=True)
        words = tl.load(words_ptr) if mask is None else tl.load(words_ptr, mask=mask, other=0)
        return (words >> (positions % 4 * 8)) & 0xFF
    byte = tl.load(pages_ptr + offsets) if mask is None else tl.load(pages_ptr + offsets, mask=mask, other=0)
    return byte.to(tl.int32)


@jit
def exponents_of(byte):
    """The powers of two in scales, fp32: a scale is at least 2^exponent, and below twice that."""
    return ((byte >> 3) - 20).to(tl.float32)


@jit
def values_from(byte, dtype: tl.constexpr):
    """Values of bytes of FP8, exactly: in fp16 for a dtype of 16 bits, else in `dtype`.

    Hopper converts FP8 to fp16 two by two, and has no quick way on to bfloat16. The assembler is what keeps Triton from
    moving the conversion behind the layout change of a matrix operand, which would read shared memory byte by byte.
    """
    if dtype.primitive_bitwidth == 16:
        if IS_INTERPRETED:
            return byte.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
            " cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }",
            "=r,=r,r", [byte], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip
    return byte.to(tl.float8e4nv, bitcast=True).to(dtype)


@jit
def round_halves(first, second):
    """Round vectors, given as two halves fp32 [R, D / 2], to FP8. Returns both as bytes, and the scales' bytes."""
    largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
    bits = tl.div_rn(largest, 448.0).to(tl.int32, bitcast=True)
    smallest = tl.minimum(tl.maximum((bits - 0x35800000 + 0xFFFFF) >> 20, 0), 248)
    best = tl.full(smallest.shape, float("inf"), tl.float32)
    chosen = smallest
    for step in range(8):
        scale = scales_of_bytes(smallest + step)[:, None]
        first_error = _round_e4m3(tl.div_rn(first, scale)) * scale - first
        second_error = _round_e4m3(tl.div_rn(second, scale)) * scale - second
        error = tl.sum(first_error * first_error + second_error * second_error, axis=1)
        chosen = tl.where(error < best, smallest + step, chosen)
        best = tl.minimum(error, best)
    scale = scales_of_bytes(chosen)[:, None]
    first = _round_e4m3(tl.div_rn(first, scale)).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    second = _round_e4m3(tl.div_rn(second, scale)).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return first, second, chosen.to(tl.uint8)


@jit
def scales_of_bytes(byte):
    """Scales, fp32, of their bytes, int32."""
    return ((byte << 20) + 0x35800000).to(tl.float32, bitcast=True)


@jit
def _round_e4m3(x):
    """As `_rounded`."""
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    magic = ((power + (20 << 23)) | 0x400000).to(tl.float32, bitcast=True)
    return (x + magic) - magic
