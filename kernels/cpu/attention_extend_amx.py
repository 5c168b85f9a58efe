"""Extend attention over the paged fp32 cache in bfloat16 tiles on CPUs with AMX, for queries in bfloat16.

Each sequence takes two passes. The first rounds the visible keys and values to bfloat16 and lays them out as tiles. The
second handles 32 query rows at a time, the heads of one KV head at neighbouring tokens. They iterate over panels of
keys: scores, running softmax in fp32, weights in bfloat16, weighted sum of values in fp32. Panels begin at the same
positions for every chunk, so a row's bits do not depend on the other new tokens.
The specification is `attention_extend_reference`, except for the rounding of queries, keys, weights and values.

CPU time on an Intel Xeon (Emerald Rapids) of one layer with 9 query heads, 3 KV heads and head dim 64: 3.8 ms for 1,000
new tokens (fp32 kernel: 13.1), 0.27 ms for 16 tokens after 1,000 (0.52). The softmax takes half of the time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.extend import ExtendMetadata
from ramet.kernels.cpu import amx
from ramet.kernels.cpu.threads import (
    Kernel,
    bits_float,
    float_bits,
    inner,
    num_threads,
    thread_count,
    thread_index,
)
from ramet.kernels.cpu.vectors import LANES, float32_at, int32_at
from ramet.kernels.ops import Ops

_ROWS = _KEYS = amx.TILE  # query rows of an item, keys of a packed block
_PANEL = 256  # keys between two looks at the softmax: scores, weights and results stay in the first-level cache
_HIDDEN, _LEAST = np.float32(-1e30), np.float32(-1e20)  # a score that weighs nothing; the largest before any


def with_bf16_queries(ops: Ops) -> Ops:
    """Return ops whose attention also accepts bfloat16 queries over an fp32 cache. The result is then in bfloat16.

    New tokens attend in tiles. Shapes that do not fit tiles, and decode rows beside new tokens, attend in fp32.
    """

    def decode(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: DecodeMetadata,
        scale: float,
        window: int | None,
        out: Tensor | None,
    ) -> Tensor:
        if q.dtype is torch.float32:
            return ops.attention_decode(q, k_cache, v_cache, meta, scale, window, out)
        return _rounded(ops.attention_decode(q.float(), k_cache, v_cache, meta, scale, window, None), out)

    def extend(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        meta: ExtendMetadata,
        scale: float,
        window: int | None,
        out: Tensor | None,
    ) -> Tensor:
        if q.dtype is torch.float32:
            return ops.attention_extend(q, k_cache, v_cache, meta, scale, window, out)
        if amx.has_tiles() and q.shape[2] % amx.TILE == 0 and meta.q_lens_host is not None:
            return attention_extend(q, k_cache, v_cache, meta, scale, window, out)
        return _rounded(ops.attention_extend(q.float(), k_cache, v_cache, meta, scale, window, None), out)

    return dataclasses.replace(ops, attention_decode=decode, attention_extend=extend)


def _rounded(result: Tensor, out: Tensor | None) -> Tensor:
    return result.to(torch.bfloat16) if out is None else out.copy_(result)


def attention_extend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: ExtendMetadata,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `attention_extend_reference`, for head dims that are whole tiles. The host must know the lengths."""
    assert meta.q_lens_host is not None
    assert meta.kv_lens_host is not None
    page_table = meta.page_table
    q = q.contiguous()
    if out is None:
        out = torch.empty_like(q)
    assert out.is_contiguous()
    assert out.dtype is torch.bfloat16
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    threads = thread_count()
    # Of each thread, in bytes a row: query, scores, weights, sums, largest score.
    row_bytes = 2 * head_dim + 4 * _PANEL + 2 * _PANEL + 4 * (LANES + head_dim) + 4
    scratch = torch.empty(threads * _ROWS * row_bytes, dtype=torch.uint8)
    start = 0
    for row, q_len, kv_len in zip(meta.rows.tolist(), meta.q_lens_host, meta.kv_lens_host, strict=True):
        if q_len == 0:
            continue
        # The panel of the first key that any row sees.
        first = 0 if window is None else max(0, kv_len - q_len - window + 1) // _PANEL * _PANEL
        num_blocks = -(-(kv_len - first) // _KEYS)
        packed = torch.empty((2, num_kv_heads * num_blocks * _KEYS * head_dim), dtype=torch.bfloat16)
        arguments = (
            q.data_ptr() + start * num_heads * head_dim * 2,
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr() + start * num_heads * head_dim * 2,
            page_table.data_ptr() + row * page_table.stride(0) * 4,
            packed[0].data_ptr(),
            packed[1].data_ptr(),
            scratch.data_ptr(),
            q_len,
            kv_len,
            first,
            num_heads,
            num_kv_heads,
            page_size,
            head_dim,
            0 if window is None else window,
            float_bits(scale),
        )
        _pack_kernel(*arguments, threads=threads)
        _kernel(*arguments, threads=threads)
        start += q_len
    return out


# ---- Compiled part ----


@Kernel
def _pack_kernel(pointer: Any) -> None:  # Any: int64*
    """Every `count`-th block of keys, and of values; keys past the last one are zero.

    Keys of a block: [D / 32][2][16 pairs of dimensions][16 keys]; values: [D / 16][16 pairs of keys][16 dimensions].
    """
    a = carray(pointer, 17)
    kv_len, first, num_kv_heads, page_size, head_dim = a[9], a[10], a[12], a[13], a[14]
    pages = carray(int32_at(a[4]), (kv_len // page_size + 1,))
    num_blocks = (kv_len - first + _KEYS - 1) // _KEYS
    zeros = np.zeros(head_dim, np.float32)
    line = np.empty(LANES, np.int32)
    where = np.empty(_KEYS, np.int64)  # of each key, in the cache
    for item in range(thread_index(), num_kv_heads * num_blocks, num_threads()):
        head, begin = item // num_blocks, first + item % num_blocks * _KEYS
        for j in range(_KEYS):
            position = begin + j
            where[j] = -1
            if position < kv_len:
                page = np.int64(pages[position // page_size])
                where[j] = ((page * num_kv_heads + head) * page_size + position % page_size) * head_dim * 4
        offset = item * _KEYS * head_dim * 2
        keys = carray(int32_at(a[5] + offset), (head_dim // 32, 2, LANES, LANES))
        for j in range(_KEYS):
            key = zeros.ctypes.data if where[j] < 0 else a[1] + where[j]
            for step in range(head_dim // 32):
                amx.round_16(key + step * 128, line.ctypes.data)
                amx.round_16(key + step * 128 + 64, line.ctypes.data + 32)
                for pair in range(LANES):
                    keys[step, j // LANES, pair, j % LANES] = line[pair]
        for j in range(0, _KEYS, 2):
            even = zeros.ctypes.data if where[j] < 0 else a[2] + where[j]
            odd = zeros.ctypes.data if where[j + 1] < 0 else a[2] + where[j + 1]
            target = a[6] + offset + j * LANES * 2
            for part in range(head_dim // LANES):
                amx.pair_16(even + part * 64, odd + part * 64, target + part * amx.TILE_BYTES)


@Kernel
def _kernel(pointer: Any) -> None:  # Any: int64*
    """Every `count`-th item: 32 query rows of a KV head, head by head, so that its keys and values stay in the cache.

    Late items see more keys, so neighbours go to different threads.
    """
    a = carray(pointer, 17)
    q_len, num_heads, num_kv_heads, head_dim = a[8], a[11], a[12], a[14]
    items_per_head = (q_len * (num_heads // num_kv_heads) + _ROWS - 1) // _ROWS
    scratch = a[7] + thread_index() * _ROWS * (6 * head_dim + 6 * _PANEL + 4 * LANES + 4)
    amx.configure()
    for item in range(thread_index(), num_kv_heads * items_per_head, num_threads()):
        _attend_item(a, item // items_per_head, item % items_per_head * _ROWS, scratch)
    amx.release()


@inner
def _attend_item(a: Any, kv_head: int, low: int, scratch: int) -> None:  # a: int64 array of the kernel
    """Rows [low, low + 32) of a KV head: row r is head r % group at token r // group; past the last, it is repeated."""
    q_len, kv_len, first, num_heads, num_kv_heads = a[8], a[9], a[10], a[11], a[12]
    head_dim, window = a[14], a[15]
    group = num_heads // num_kv_heads
    prefix = kv_len - q_len
    last_row = q_len * group - 1
    factor = bits_float(a[16]) * np.float32(1.44269504)  # softmax in powers of 2
    queries = carray(int32_at(scratch), (_ROWS, head_dim // 2))
    scores_at = scratch + _ROWS * 2 * head_dim
    weights_at = scores_at + _ROWS * 4 * _PANEL
    # Of each row: the sum of weights in 16 parts, the weighted sum of values.
    sums_at = weights_at + _ROWS * 2 * _PANEL
    width = LANES + head_dim
    sums = carray(float32_at(sums_at), (_ROWS, width))
    largest_at = sums_at + _ROWS * 4 * width
    largest = carray(float32_at(largest_at), (_ROWS,))
    for r in range(_ROWS):
        row = min(low + r, last_row)
        where = (row // group * num_heads + kv_head * group + row % group) * head_dim * 2
        query = carray(int32_at(a[0] + where), (head_dim // 2,))
        for d in range(head_dim // 2):
            queries[r, d] = query[d]
        for d in range(width):
            sums[r, d] = np.float32(0.0)
        largest[r] = _LEAST
    # Keys [begin, end) are all that the item sees, counted from `first`; whole panels, then blocks, are walked.
    end = prefix + min(low + _ROWS - 1, last_row) // group + 1 - first
    begin = max(0, prefix + low // group - window + 1 - first) if window > 0 else np.int64(0)
    blocks_at = kv_head * ((kv_len - first + _KEYS - 1) // _KEYS) * _KEYS * head_dim * 2
    for panel in range(begin - begin % _PANEL, end, _PANEL):
        num_blocks = (min(_PANEL, end - panel) + _KEYS - 1) // _KEYS
        offset = blocks_at + panel * head_dim * 2
        for block in range(num_blocks):
            keys = a[5] + offset + block * _KEYS * head_dim * 2
            scores = scores_at + block * _KEYS * 4
            amx.multiply(scratch, head_dim * 2, keys, 2 * amx.TILE_BYTES, head_dim // 32, scores, _PANEL * 4)
        for r in range(_ROWS):
            last = prefix + min(low + r, last_row) // group + 1 - first - panel
            from_key = max(0, last - window) if window > 0 else np.int64(0)
            scores = scores_at + r * _PANEL * 4
            if from_key > 0 or last < num_blocks * _KEYS:
                _hide(scores, num_blocks * _KEYS, from_key, last)
            sums_of = sums_at + r * width * 4
            weights = weights_at + r * _PANEL * 2
            amx.soften(scores, num_blocks * 2, factor, largest_at + r * 4, sums_of, head_dim // LANES, weights)
        for d in range(0, head_dim, amx.TILE):
            values, target = a[6] + offset + d * 64, sums_at + (LANES + d) * 4
            amx.multiply_add(weights_at, _PANEL * 2, values, head_dim * 64, num_blocks, target, width * 4)
    for r in range(min(_ROWS, last_row + 1 - low)):
        row = low + r
        target = a[3] + (row // group * num_heads + kv_head * group + row % group) * head_dim * 2
        amx.divide(sums_at + r * width * 4, head_dim // LANES, target)


@inner
def _hide(scores_at: int, width: int, low: Any, high: int) -> None:  # Any: np.int64
    """Make a row's scores outside [low, high) weigh nothing."""
    scores = carray(float32_at(scores_at), (width,))
    for i in range(min(low, width)):
        scores[i] = _HIDDEN
    for i in range(max(high, 0), width):
        scores[i] = _HIDDEN
