"""Decode attention over the paged cache in fp32 on the CPU: compiled, on torch's threads, without gathering pages.

Each (row, heads) takes two passes: first the scores of every cached position and their softmax, then the weighted sum
of values. If there is enough work for all threads, the heads of one KV head are one item, so each page is read once for
all of them. Otherwise each head is an item.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.cpu import vectors as v
from ramet.kernels.cpu.pointwise import exp32
from ramet.kernels.cpu.program import KernelStream
from ramet.kernels.cpu.threads import Kernel, bits_float, float_bits, inner, num_threads, thread_count, thread_index
from ramet.kernels.cpu.vectors import float32_at, int32_at


def attention_decode(
    stream: KernelStream,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: DecodeMetadata,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `attention_decode_reference`, in fp32, for head dims that are whole vectors. The kernel reads the lengths."""
    kv_lens, rows, page_table = meta.kv_lens, meta.rows, meta.page_table
    assert q.dtype is k_cache.dtype is torch.float32, (q.dtype, k_cache.dtype)
    assert kv_lens.dtype is rows.dtype is page_table.dtype is torch.int32
    q = q.contiguous()
    if out is None:
        out = stream.empty(q.shape)
    assert out.is_contiguous()
    batch, num_heads, head_dim = q.shape
    stream.launch(
        _kernel,
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        kv_lens.data_ptr(),
        rows.data_ptr(),
        page_table.data_ptr(),
        page_table.stride(0),
        batch,
        num_heads,
        k_cache.shape[1],
        k_cache.shape[2],
        head_dim,
        0 if window is None else window,
        float_bits(scale),
        threads=thread_count(),
    )
    return out


# ---- Compiled part ----


@Kernel
def _kernel(pointer: Any) -> None:  # Any: int64*
    """Every `count`-th work item: some query heads of one row."""
    a = carray(pointer, 15)
    batch, num_heads, num_kv_heads, page_size, head_dim = a[8], a[9], a[10], a[11], a[12]
    scale = bits_float(a[14])
    lens = carray(int32_at(a[4]), (batch,))
    rows = carray(int32_at(a[5]), (batch,))
    threads, group = np.int64(num_threads()), num_heads // num_kv_heads
    heads_per_item = group if batch * num_kv_heads >= 4 * threads or threads == 1 else 1
    items_per_row = num_heads // heads_per_item
    for item in range(thread_index(), batch * items_per_row, threads):
        b, head = item // items_per_row, item % items_per_row * heads_per_item
        where = (b * num_heads + head) * head_dim * 4
        pages = carray(int32_at(a[6] + np.int64(rows[b]) * a[7] * 4), (max(a[7], 1),))
        _attend(
            a[0] + where,
            a[1] + head // group * page_size * head_dim * 4,
            a[2] + head // group * page_size * head_dim * 4,
            a[3] + where,
            pages,
            np.int64(lens[b]),
            a[13],
            heads_per_item,
            page_size,
            head_dim,
            num_kv_heads * page_size * head_dim * 4,
            scale,
        )


@inner
def _attend(
    q: int,
    keys: int,
    values: int,
    out: int,
    pages: Any,  # int32 array
    kv_len: Any,  # np.int64
    window: int,
    num_heads: int,
    page_size: int,
    head_dim: int,
    page_bytes: int,
    scale: Any,  # np.float32
) -> None:
    """Attend from `num_heads` neighbouring query heads that share a KV head. keys, values: that head in page 0."""
    result = carray(float32_at(out), (num_heads * head_dim,))
    for i in range(num_heads * head_dim):
        result[i] = np.float32(0.0)
    first = max(kv_len - window, 0) if window > 0 else 0
    length = kv_len - first
    if length <= 0:
        return
    whole = -(-length // v.LANES) * v.LANES  # a head's scores fill vectors
    scores = np.zeros(num_heads * whole, np.float32)
    start = scores.ctypes.data
    row_bytes = head_dim * 4
    position = first
    while position < kv_len:
        count = min(page_size - position % page_size, kv_len - position)
        if position + count < kv_len:
            _fetch(keys, pages, position + count, kv_len, page_size, page_bytes, row_bytes)
        else:
            _fetch(values, pages, first, kv_len, page_size, page_bytes, row_bytes)
        key = keys + _offset(pages, position, page_size, page_bytes, row_bytes)
        for head in range(num_heads):
            target = start + (head * whole + position - first) * 4
            _scores(q + head * row_bytes, key, count, head_dim, target)
        position += count
    for head in range(num_heads):
        _softmax(start + head * whole * 4, length, whole, scale)
    position = first
    while position < kv_len:
        count = min(page_size - position % page_size, kv_len - position)
        _fetch(values, pages, position + count, kv_len, page_size, page_bytes, row_bytes)
        value = values + _offset(pages, position, page_size, page_bytes, row_bytes)
        for head in range(num_heads):
            # Not from `start`: compiled code frees an array after its name's last use, whoever still has its address.
            source = scores.ctypes.data + (head * whole + position - first) * 4
            _weighted_sum(source, value, count, head_dim, out + head * row_bytes)
        position += count


@inner
def _offset(pages: Any, position: Any, page_size: int, page_bytes: int, row_bytes: int) -> Any:  # array, np.int64
    """Byte offset of a position's row from the start of page 0."""
    return np.int64(pages[position // page_size]) * page_bytes + position % page_size * row_bytes


@inner
def _fetch(
    rows: int, pages: Any, position: Any, kv_len: Any, page_size: int, page_bytes: int, row_bytes: int
) -> None:  # Any: int32 array, np.int64
    """Prefetch the rest of a position's page while the page before it is used."""
    if position < kv_len:
        count = min(page_size - position % page_size, kv_len - position)
        v.prefetch(rows + _offset(pages, position, page_size, page_bytes, row_bytes), count * row_bytes // 64)


@inner
def _scores(q: int, keys: Any, count: int, head_dim: int, out: int) -> None:
    if head_dim % 64 == 0:
        for i in range(0, head_dim * 4, 256):
            v.scores_64(q + i, keys + i, count, head_dim * 4, out)
    else:
        for i in range(0, head_dim * 4, 64):
            v.scores_16(q + i, keys + i, count, head_dim * 4, out)


@inner
def _weighted_sum(p: int, values: Any, count: int, head_dim: int, out: int) -> None:
    if head_dim % 64 == 0:
        for i in range(0, head_dim * 4, 256):
            v.weighted_sum_64(p, values + i, count, head_dim * 4, out + i)
    else:
        for i in range(0, head_dim * 4, 64):
            v.weighted_sum_16(p, values + i, count, head_dim * 4, out + i)


@inner
def _softmax(start: int, length: Any, whole: Any, scale: Any) -> None:  # Any: np.int64, np.int64, np.float32
    """Softmax of `length` scores at `start`. Values after them, up to `whole`, are overwritten."""
    scores = carray(float32_at(start), (whole,))
    for i in range(length, whole):
        scores[i] = np.float32(-np.inf)
    largest = v.largest_of(start, whole // v.LANES)
    total = np.float32(0.0)
    for i in range(length):
        weight = exp32((scores[i] - largest) * scale)
        scores[i] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for i in range(length):
        scores[i] *= inverse
