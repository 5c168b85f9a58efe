# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""KV caches in FP8 (e4m3): each head's vector has a scale of its own, a power of two, in one byte beside the values.

    value = e4m3 * 2^(byte - 127)       the smallest scale with which the vector's largest value is at most 448

A page of a head is [P * D bytes of values | P bytes of scales]. Caches are passed as the view [N, K, P, D] of the
values, like those of other dtypes; `scales_of` finds the scales behind them. A power of two rounds nothing, so a cached
value is exact in 16 bits, and kernels may multiply scores and weights by the scales instead of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.layers.quantize_fp8 import FP8 as FP8
from ramet.kernels.triton_support import jit, tl

_BIAS = 127  # of a scale's byte
_SMALLEST_BYTE, _LARGEST_BYTE = 1, 253  # so that a scale and its inverse are normal numbers


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
    bits = x.abs().amax(-1).view(torch.int32)
    # largest = mantissa * 2^power; 448 = 1.75 * 2^8
    byte = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()).clamp(_SMALLEST_BYTE, _LARGEST_BYTE)
    values = torch.ldexp(x, (_BIAS - byte)[..., None]).to(FP8)
    return values.view(torch.uint8), byte.to(torch.uint8)


def write_heads(x: Tensor, page: Tensor, offset: Tensor, cache: Tensor) -> None:
    """Write heads [T, K, D] to positions `offset` of pages `page` (int [T]) of a cache fp8 [N, K, P, D]."""
    values, scales = round_heads(x.float())
    cache.view(torch.uint8).transpose(1, 2).index_put_((page, offset), values)
    scales_of(cache).transpose(1, 2).index_put_((page, offset), scales)


def read_rows(cache: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy the heads' pages `rows` (int64 [n], page * K + head) of a cache fp8 [N, K, P, D] to `dtype` [n, P, D]."""
    page_size, head_dim = cache.shape[2:]
    chosen = for_kernel(cache).index_select(0, rows)
    scales = chosen[:, page_size * head_dim :].int() - _BIAS
    return torch.ldexp(values_of(chosen, page_size).float(), scales[..., None]).to(dtype)


def for_kernel(cache: Tensor) -> Tensor:
    """A cache as kernels take it: one in FP8 as bytes, with the scales, uint8 [N * K, P * (D + 1)]."""
    if cache.dtype is not FP8:
        return cache
    size = cache.shape[2] * cell_bytes(cache.shape[3], FP8)
    return cache.view(torch.uint8).as_strided((cache.shape[0] * cache.shape[1], size), (size, 1))


@jit
def load_scales(pages_ptr, offsets, mask):
    """Scales, in fp32, from their bytes at `offsets` of a cache that is passed as uint8."""
    byte = tl.load(pages_ptr + offsets, mask=mask, other=127).to(tl.int32)
    return (byte << 23).to(tl.float32, bitcast=True)


@jit
def scale_byte(largest):
    """The byte of the scale for vectors whose largest value is `largest` (fp32)."""
    bits = largest.to(tl.int32, bitcast=True)
    byte = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.minimum(tl.maximum(byte, 1), 253)
