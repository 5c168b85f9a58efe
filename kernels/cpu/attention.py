"""Attention over the paged cache in fp32 on the CPU: compiled, on torch's threads, exact.

Up to some dozens of query rows of one KV head are computed together (`_attend`): scores against blocks of 32 keys,
softmax, weighted sum of the values directly from their pages. A block of keys lies dimension by dimension, so no sum
crosses lanes. A row has the same bits whichever rows are computed with it, so a token attends alike in a prompt, in
a chunk of one, and alone. The specifications are `attention_decode_reference` and `attention_extend_reference`.

    decode   blocks are transposed when they are used; rows of one sequence at following positions read them once
    extend   a sequence's blocks are transposed first, because hundreds of rows use each, and its values laid in a row
             (7.3 ms instead of 7.9 on a core of an AMD EPYC (Zen 5), with two maxima at a time, for the prompt below)

Measured on a core of an AMD EPYC (Zen 4), one layer with 9 query heads, 3 KV heads and head dim 64: 7.5 ms for a prompt
of 1,000 tokens, 25 us for one token that sees 500 keys, 67 us for 8 at following positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.extend import ExtendMetadata
from ramet.kernels.cpu import vectors as v
from ramet.kernels.cpu.program import KernelStream
from ramet.kernels.cpu.threads import Kernel, bits_float, float_bits, inner, num_threads, thread_count, thread_index
from ramet.kernels.cpu.vectors import KEYS, LANES, float32_at, int32_at

_ROWS = v.ROWS[0]  # query rows of an item of a prompt
_MOST_SCORES = 1 << 17  # of rows that are computed together: 512 KB
_ROW_COST = 64  # of a query row, in keys


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
    _, num_kv_heads, page_size, _ = k_cache.shape
    assert page_size % 8 == 0, page_size
    stream.launch(
        _decode_kernel,
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        page_table.data_ptr(),
        kv_lens.data_ptr(),
        rows.data_ptr(),
        page_table.stride(0),
        batch,
        num_heads,
        num_kv_heads,
        page_size,
        head_dim,
        0 if window is None else window,
        float_bits(scale),
        threads=thread_count(),
    )
    return out


def attention_extend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: ExtendMetadata,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `attention_extend_reference`, for head dims that are whole vectors. The host must know the lengths."""
    assert meta.q_lens_host is not None
    assert meta.kv_lens_host is not None
    page_table = meta.page_table
    q = q.contiguous()
    if out is None:
        out = torch.empty_like(q)
    assert out.is_contiguous()
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    assert page_size % 8 == 0, page_size
    threads = thread_count()
    start = 0
    for row, q_len, kv_len in zip(meta.rows.tolist(), meta.q_lens_host, meta.kv_lens_host, strict=True):
        if q_len == 0:
            continue
        # The first block with a key that any row sees.
        first = 0 if window is None else max(0, kv_len - q_len - window + 1) // KEYS
        num_blocks = -(-kv_len // KEYS) - first
        packed = torch.empty(2 * num_kv_heads * num_blocks * KEYS * head_dim, dtype=torch.float32)  # keys, then values
        scratch = torch.empty(threads * _scratch_size(_ROWS, head_dim, num_blocks * KEYS), dtype=torch.float32)
        arguments = (
            q.data_ptr() + start * num_heads * head_dim * 4,
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr() + start * num_heads * head_dim * 4,
            page_table.data_ptr() + row * page_table.stride(0) * 4,
            packed.data_ptr(),
            scratch.data_ptr(),
            q_len,
            kv_len,
            num_heads,
            num_kv_heads,
            page_size,
            head_dim,
            0 if window is None else window,
            float_bits(scale),
            first,
            num_blocks,
        )
        _pack_kernel(*arguments, threads=threads)
        _extend_kernel(*arguments, threads=threads)
        start += q_len
    return out


def _scratch_size(count: int, head_dim: int, stride: int) -> int:
    """Floats of `_attend`: queries and results, one block of keys, a factor and the scores of each row."""
    return count * (2 * head_dim + 1 + stride) + head_dim * KEYS


# ---- Compiled part ----


@Kernel
def _decode_kernel(pointer: Any) -> None:  # Any: int64*
    """Divide all rows' heads among the threads, by the keys that they see.

    They are in the order of rows, KV heads, and the query heads of each. Neighbouring rows of a sequence, each of which
    sees one key more, count as one with more query heads.
    """
    a = carray(pointer, 15)
    batch, num_heads, num_kv_heads, page_size, head_dim, window = a[8], a[9], a[10], a[11], a[12], a[13]
    scale = bits_float(a[14])
    lens = carray(int32_at(a[5]), (batch,))
    rows = carray(int32_at(a[6]), (batch,))
    group, row_bytes = num_heads // num_kv_heads, num_heads * head_dim * 4
    total = np.int64(0)
    for row in range(batch):
        total += _cost(np.int64(lens[row]), window) * num_heads
    index, count = np.int64(thread_index()), np.int64(num_threads())
    low, high = total * index // count, total * (index + 1) // count
    at = np.int64(0)  # the cost of all before
    b: Any = np.int64(0)
    while b < batch:
        length = np.int64(lens[b])
        end = b + 1
        cost = _cost(length, window)
        while end < batch and length > 0 and rows[end] == rows[b] and lens[end] == length + end - b:
            cost += _cost(np.int64(lens[end]), window)
            end += 1
        if length <= 0:
            if index == 0:
                nothing = carray(float32_at(a[3] + b * row_bytes), (num_heads * head_dim,))
                for i in range(num_heads * head_dim):
                    nothing[i] = np.float32(0.0)
            b = end
            continue
        pages_at = a[4] + np.int64(rows[b]) * a[7] * 4
        for kv_head in range(num_kv_heads):
            if at + cost * group <= low or at >= high:
                at += cost * group
                continue
            first: Any = np.int64(0)  # of this thread's query heads
            taken: Any = np.int64(0)  # how many they are
            for r in range(end - b):
                each = _cost(length + r, window)
                for h in range(group):
                    if low <= at < high:
                        first = r * group + h if taken == 0 else first
                        taken += 1
                    at += each
            where = b * row_bytes + kv_head * group * head_dim * 4
            offset = kv_head * page_size * head_dim * 4
            stride = (length + end - b + 2 * KEYS) // KEYS * KEYS
            most = max(_MOST_SCORES // stride // _ROWS * _ROWS, _ROWS)
            scratch = np.empty(_scratch_floats(min(most, taken), head_dim, stride), np.float32)
            while taken > 0:
                part = min(most, taken)
                _attend(
                    a[0] + where,
                    a[1] + offset,
                    a[2] + offset,
                    a[3] + where,
                    pages_at,
                    0,
                    0,
                    first,
                    part,
                    group,
                    length - 1,
                    window,
                    row_bytes,
                    page_size,
                    num_kv_heads * page_size * head_dim * 4,
                    head_dim,
                    scale,
                    scratch.ctypes.data,
                )
                first, taken = first + part, taken - part
            # Compiled code frees an array after its name's last use, whoever still has its address.
            scratch[0] = np.float32(0.0)
        b = end


@Kernel
def _pack_kernel(pointer: Any) -> None:  # Any: int64*
    """Every `count`-th block: keys dimension by dimension, values one after another."""
    a = carray(pointer, 17)
    kv_len, num_kv_heads, page_size, head_dim, first, num_blocks = a[8], a[10], a[11], a[12], a[15], a[16]
    page_bytes = num_kv_heads * page_size * head_dim * 4
    for item in range(thread_index(), num_kv_heads * num_blocks, num_threads()):
        head, block = item // num_blocks, first + item % num_blocks
        keys = a[1] + head * page_size * head_dim * 4
        target = a[5] + item * KEYS * head_dim * 4
        begin = block * KEYS
        _pack(keys, a[4], begin, keys, begin + KEYS, kv_len, page_size, page_bytes, head_dim, target)
        pages = carray(int32_at(a[4]), ((kv_len - 1) // page_size + 1,))
        for j in range(min(KEYS, kv_len - begin)):
            where = _offset(pages, begin + j, page_size, page_bytes, head_dim * 4)
            value = carray(float32_at(a[2] + head * page_size * head_dim * 4 + where), (head_dim,))
            row = carray(float32_at(target + (num_kv_heads * num_blocks * KEYS + j) * head_dim * 4), (head_dim,))
            for d in range(head_dim):
                row[d] = value[d]


@Kernel
def _extend_kernel(pointer: Any) -> None:  # Any: int64*
    """Every `count`-th item: some query rows of a KV head, head by head, so that its keys and values stay in the cache.

    Late items see more keys, so neighbours go to different threads.
    """
    a = carray(pointer, 17)
    q_len, kv_len, num_heads, num_kv_heads, page_size, head_dim = a[7], a[8], a[9], a[10], a[11], a[12]
    first, num_blocks = a[15], a[16]
    group = num_heads // num_kv_heads
    items_per_head = (q_len * group + _ROWS - 1) // _ROWS
    scratch = a[6] + thread_index() * _scratch_floats(_ROWS, head_dim, num_blocks * KEYS) * 4
    for item in range(thread_index(), num_kv_heads * items_per_head, num_threads()):
        head, low = item // items_per_head, item % items_per_head * _ROWS
        offset = head * page_size * head_dim * 4
        where = head * group * head_dim * 4
        _attend(
            a[0] + where,
            a[1] + offset,
            a[2] + offset,
            a[3] + where,
            a[4],
            a[5] + (head * num_blocks - first) * KEYS * head_dim * 4,
            num_kv_heads * num_blocks * KEYS * head_dim * 4,
            low,
            min(_ROWS, q_len * group - low),
            group,
            kv_len - q_len,
            a[13],
            num_heads * head_dim * 4,
            page_size,
            num_kv_heads * page_size * head_dim * 4,
            head_dim,
            bits_float(a[14]),
            scratch,
        )


@inner
def _scratch_floats(count: Any, head_dim: int, stride: Any) -> Any:  # np.int64
    return count * (2 * head_dim + 1 + stride) + head_dim * KEYS


@inner
def _cost(length: Any, window: int) -> Any:  # np.int64
    """The cost of a query row."""
    seen = min(length, window) if window > 0 else length
    return seen + _ROW_COST if length > 0 else np.int64(0)


@inner
def _attend(
    q: int,
    keys: int,
    values: int,
    out: int,
    pages_at: int,
    packed: int,
    to_values: int,
    low: Any,  # np.int64
    count: Any,
    group: int,
    prefix: Any,
    window: int,
    row_bytes: int,
    page_size: int,
    page_bytes: int,
    head_dim: int,
    scale: Any,  # np.float32
    scratch: int,
) -> None:
    """Attend from `count` rows of a KV head, of which row r is head (low + r) % group at token (low + r) // group.

    q, out: the KV head's first query head at token 0, which sees `prefix` + 1 keys; tokens are `row_bytes` apart. keys,
    values: that KV head in page 0. packed: its block 0 where blocks are transposed, `to_values` bytes before its value
    0 where they lie in a row; 0: they are not. scratch: see `_scratch_size`.
    """
    size = head_dim * 4
    end = prefix + (low + count - 1) // group + 1  # keys [begin, end) are all that the rows see
    begin = max(0, prefix + low // group + 1 - window) if window > 0 else np.int64(0)
    begin -= begin % KEYS  # so that a key has the same lane for every row
    stride = (end - begin + KEYS - 1) // KEYS * KEYS
    results_at = scratch + count * size
    block_at = results_at + count * size
    factors_at = block_at + KEYS * size
    scores_at = factors_at + count * 4
    pages = carray(int32_at(pages_at), ((end - 1) // page_size + 1,))
    if packed == 0:
        _fetch(keys, pages, begin, min(begin + KEYS, end), page_size, page_bytes, size)
    r: Any = np.int64(0)
    while r < count:
        num = _variant(count - r)
        queries = carray(float32_at(scratch + r * size), (head_dim, num))
        for i in range(num):
            token, head = (low + r + i) // group, (low + r + i) % group
            query = carray(float32_at(q + token * row_bytes + head * size), (head_dim,))
            for d in range(head_dim):
                queries[d, i] = query[d] * scale
        r += num
    for position in range(begin, end, KEYS):
        block = block_at
        if packed != 0:
            block = packed + position * size
        else:
            following, at = (keys, position + KEYS) if position + KEYS < end else (values, begin)
            _pack(keys, pages_at, position, following, at, end, page_size, page_bytes, head_dim, block)
        r = np.int64(0)
        while r < count:
            num = _variant(count - r)
            target = scores_at + (r * stride + position - begin) * 4
            _scores(num, scratch + r * size, block, head_dim, target, stride * 4)
            r += num
    factors = carray(float32_at(factors_at), (count,))
    for i in range(count):
        last = prefix + (low + i) // group + 1 - begin
        visible = max(np.int64(0), last - window) if window > 0 else np.int64(0)
        row_at = scores_at + i * stride * 4
        row = carray(float32_at(row_at), (stride,))
        for j in range(visible):
            row[j] = np.float32(-np.inf)
        for j in range(last, stride):
            row[j] = np.float32(-np.inf)
        largest = v.largest_of(row_at, stride // LANES)
        factors[i] = np.float32(1.0) / v.exp_sum(row_at, stride // LANES, largest)
    results = carray(float32_at(results_at), (count, head_dim))
    for i in range(count):
        for d in range(head_dim):
            results[i, d] = np.float32(0.0)
    place = begin
    while place < end:
        if packed == 0:
            num_keys = min(page_size - place % page_size, end - place)
            ahead = place + KEYS
            _fetch(values, pages, ahead, min(ahead + num_keys, end), page_size, page_bytes, size)
            value = values + _offset(pages, place, page_size, page_bytes, size)
        else:
            num_keys = end - place
            value = packed + to_values + place * size
        r = np.int64(0)
        while r < count:
            num = _variant(count - r)
            source = scores_at + (r * stride + place - begin) * 4
            _add_values(num, source, stride * 4, value, num_keys, size, results_at + r * size)
            r += num
        place += num_keys
    for i in range(count):
        token, head = (low + i) // group, (low + i) % group
        target = carray(float32_at(out + token * row_bytes + head * size), (head_dim,))
        for d in range(head_dim):
            target[d] = results[i, d] * factors[i]


@inner
def _variant(left: Any) -> Any:  # np.int64
    """How many of so many rows the next variant of `vectors` computes."""
    return np.int64(8) if left >= 8 else min(left, np.int64(4))


@inner
def _pack(
    keys: int,
    pages_at: int,
    position: Any,  # np.int64
    following: int,
    following_position: Any,
    end: Any,
    page_size: int,
    page_bytes: int,
    head_dim: int,
    target: int,
) -> None:
    """Transpose the block of keys from `position` on. What is computed with keys from `end` on is not used.

    following: keys or values of which a block is used next.
    """
    pages = carray(int32_at(pages_at), ((end - 1) // page_size + 1,))
    last, size = (end - 1) // 8 * 8, head_dim * 4
    for part in range(0, KEYS, LANES):
        v.transpose_keys(
            keys + _offset(pages, min(position + part, last), page_size, page_bytes, size),
            keys + _offset(pages, min(position + part + 8, last), page_size, page_bytes, size),
            following + _offset(pages, min(following_position + part, last), page_size, page_bytes, size),
            following + _offset(pages, min(following_position + part + 8, last), page_size, page_bytes, size),
            head_dim,
            target + part * 4,
        )


@inner
def _offset(pages: Any, position: Any, page_size: int, page_bytes: int, row_bytes: int) -> Any:  # array, np.int64
    """Byte offset of a position's row from the start of page 0."""
    return np.int64(pages[position // page_size]) * page_bytes + position % page_size * row_bytes


@inner
def _fetch(
    rows: int, pages: Any, position: Any, end: Any, page_size: int, page_bytes: int, row_bytes: int
) -> None:  # Any: int32 array, np.int64
    """Ask for the rows of positions [position, end) while those before are used."""
    while position < end:
        count = min(page_size - position % page_size, end - position)
        v.prefetch(rows + _offset(pages, position, page_size, page_bytes, row_bytes), count * row_bytes // 64)
        position += count


@inner
def _scores(num: Any, queries: int, block: int, head_dim: int, out: int, out_stride: Any) -> None:  # Any: np.int64
    if num == 8:
        v.scores_8(queries, block, head_dim, out, out_stride)
    elif num == 4:
        v.scores_4(queries, block, head_dim, out, out_stride)
    elif num == 3:
        v.scores_3(queries, block, head_dim, out, out_stride)
    elif num == 2:
        v.scores_2(queries, block, head_dim, out, out_stride)
    else:
        v.scores_1(queries, block, head_dim, out, out_stride)


@inner
def _add_values(
    num: Any, weights: int, stride: Any, values: Any, count: Any, row_bytes: int, out: int
) -> None:  # Any: np.int64
    """out [num, D] += weights [num, count] times `count` rows of values."""
    d = 0
    while d < row_bytes:
        value, target, left = values + d, out + d, row_bytes - d
        if num == 8 and left >= 128:
            v.sums_8_32(weights, stride, value, count, row_bytes, target, row_bytes)
            d += 128
        elif num < 8 and left >= 256:
            if num == 4:
                v.sums_4_64(weights, stride, value, count, row_bytes, target, row_bytes)
            elif num == 3:
                v.sums_3_64(weights, stride, value, count, row_bytes, target, row_bytes)
            elif num == 2:
                v.sums_2_64(weights, stride, value, count, row_bytes, target, row_bytes)
            else:
                v.sums_1_64(weights, stride, value, count, row_bytes, target, row_bytes)
            d += 256
        else:
            if num == 8:
                v.sums_8_16(weights, stride, value, count, row_bytes, target, row_bytes)
            elif num == 4:
                v.sums_4_16(weights, stride, value, count, row_bytes, target, row_bytes)
            elif num == 3:
                v.sums_3_16(weights, stride, value, count, row_bytes, target, row_bytes)
            elif num == 2:
                v.sums_2_16(weights, stride, value, count, row_bytes, target, row_bytes)
            else:
                v.sums_1_16(weights, stride, value, count, row_bytes, target, row_bytes)
            d += 64
