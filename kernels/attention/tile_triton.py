# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The inner loop of all attention kernels: rows of queries attend to a run of paged keys and values.

One call processes key positions [low, high) in tiles of BLOCK_N (online softmax). For M query rows it keeps the running
maximum and sum of the softmax (base 2, scale folded in) and the weighted sum of values, all in fp32. Matrix products of
an FP8 cache are in fp16, to which its values convert exactly; the maximum is then that of weights times scales.
Source: FlashAttention-2, Dao 2023 (arXiv:2307.08691), section 3.1.
"""

from __future__ import annotations

from ramet.kernels.layers.kv_fp8 import exponents_of, load_scale_bytes, scales_of_bytes, values_from
from ramet.kernels.triton_support import jit, tl


@jit
def attend_range(
    q,  # [M, BLOCK_D]
    acc,  # [M, BLOCK_D] fp32
    row_max,  # [M] fp32, log2 units
    row_sum,  # [M] fp32
    last_visible,  # int32 [M], last key position of each row; read only when MASKED
    low,
    high,
    window,
    table_ptr,  # page-table row of the sequence
    k_ptr,  # cache + KV head
    v_ptr,
    stride_page,
    scale_log2,  # scale * log2(e)
    MASKED: tl.constexpr,  # compare positions with `last_visible` and `high`; else every row sees all of [low, high)
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_FP8: tl.constexpr,  # the cache is bytes of FP8 with scales; they multiply scores and weights
):
    if IS_FP8 and q.dtype.primitive_bitwidth == 16:
        q = q.to(tl.float16)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_head = offs_d[None, :] < HEAD_DIM
    for start in range(low, high, BLOCK_N):
        start = tl.multiple_of(start, PAGE_SIZE if PAGE_SIZE < BLOCK_N else BLOCK_N)
        positions = start + offs_n
        in_range = positions < high
        if PAGE_SIZE % BLOCK_N == 0:  # a tile lies in one page
            pages = tl.load(table_ptr + start // PAGE_SIZE)
        elif MASKED:
            pages = tl.load(table_ptr + positions // PAGE_SIZE, mask=in_range, other=0)
        else:
            pages = tl.load(table_ptr + positions // PAGE_SIZE)
        offsets = (pages.to(tl.int64) * stride_page + (positions % PAGE_SIZE) * HEAD_DIM)[:, None] + offs_d[None, :]
        if MASKED:
            # A partly filled page may hold any values, also NaN: masked positions must not be read.
            load_mask = in_range[:, None] & in_head
            k = tl.load(k_ptr + offsets, mask=load_mask, other=0.0)
        elif BLOCK_D != HEAD_DIM:
            k = tl.load(k_ptr + offsets, mask=in_head, other=0.0)
        else:
            k = tl.load(k_ptr + offsets)
        if IS_FP8:
            scale_offsets = pages.to(tl.int64) * stride_page + PAGE_SIZE * HEAD_DIM + positions % PAGE_SIZE
            scale_mask = in_range if MASKED else None
            k_scale = load_scale_bytes(k_ptr, scale_offsets, positions, scale_mask, q.shape[0] < 64)
            v_scale = load_scale_bytes(v_ptr, scale_offsets, positions, scale_mask, q.shape[0] < 64)
            k = values_from(k, q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if IS_FP8:
            scores = scores * scales_of_bytes(k_scale)[None, :]
        if MASKED:
            visible = (positions[None, :] <= last_visible[:, None]) & in_range[None, :]
            if HAS_WINDOW:
                visible = visible & (positions[None, :] > last_visible[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        if IS_FP8:
            # The weights times the values' scales become fp16: they, and not the weights, are at most about 1.
            new_max = tl.maximum(row_max, tl.max(scores * scale_log2 + exponents_of(v_scale)[None, :], 1))
        else:
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        if MASKED:
            # A row that has seen nothing yet keeps -inf; subtracting 0 instead makes its weights exp2(-inf) = 0.
            offset = tl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            offset = new_max
        weights = tl.math.exp2(scores * scale_log2 - offset[:, None])
        rescale = tl.math.exp2(row_max - offset)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
        acc = acc * rescale[:, None]
        if MASKED:
            v = tl.load(v_ptr + offsets, mask=load_mask, other=0.0)
        elif BLOCK_D != HEAD_DIM:
            v = tl.load(v_ptr + offsets, mask=in_head, other=0.0)
        else:
            v = tl.load(v_ptr + offsets)
        if IS_FP8:
            v = values_from(v, q.dtype)
            weights = weights * scales_of_bytes(v_scale)[None, :]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, row_max, row_sum
