# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernel of `attention_extend`: FlashAttention-2 over paged keys, GQA heads packed with tokens into rows.

Row m of a sequence's tiles is token m // G, query head kv_head * G + m % G, where G = H / K: all heads that share keys
are rows of one matrix product. Key tiles start at multiples of BLOCK_N for every chunk. For one tile shape, a row's
order of summation therefore depends only on its own position: chunks, batches and prefix hits do not change the bits.
Short extends get smaller tiles (chosen by the longest row of the launch), whose results may differ in the last bits.

Grid (T * G // BLOCK_M + B, K). The tiles of sequence b begin at cu_seqlens_q[b] * G // BLOCK_M + b. The kernel computes
this bound itself, without a list from the host, so a captured graph serves any lengths. At most B programs per KV head
have no work. Tiles run last to first, because the last tiles of a sequence are the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.attention.extend import ExtendMetadata
from ramet.kernels.attention.plan import LOG2_E, TileConfig, dot_precision, extend_config
from ramet.kernels.attention.tile_triton import attend_range
from ramet.kernels.layers.kv_fp8 import FP8, for_kernel
from ramet.kernels.triton_support import jit_any_value, next_power_of_two, tl, wait_for_previous


def attention_extend_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: ExtendMetadata,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    config: TileConfig | None = None,
    early_launch: bool = False,
) -> Tensor:
    """Launch `attention_extend` on the device of `q`; `config` overrides the table of the card.

    early_launch: see `wait_for_previous`.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k_cache.shape[1], k_cache.shape[2]
    group = num_heads // num_kv_heads
    if num_tokens == 0:
        return out
    if config is None:
        config = extend_config(head_dim, q.dtype, meta.max_seqlen_q * group, meta.tiles)
    batch = meta.kv_lens.shape[0]
    grid = (num_tokens * group // config.block_m + batch, num_kv_heads)
    _extend_kernel[grid](
        q,
        for_kernel(k_cache),
        for_kernel(v_cache),
        out,
        meta.cu_seqlens_q,
        meta.kv_lens,
        meta.rows,
        meta.page_table,
        scale * LOG2_E,
        0 if window is None else window,
        batch,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        k_cache.stride(0),
        meta.page_table.stride(0),
        GROUP=group,
        HAS_WINDOW=window is not None,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, next_power_of_two(head_dim)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_B=256,
        PAGE_SIZE=page_size,
        PRECISION=dot_precision(q.dtype),
        IS_FP8=k_cache.dtype is FP8,
        EARLY=early_launch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=early_launch,
    )
    return out


@jit_any_value("batch", "kv_lens_ptr", "rows_ptr")  # parts of tables, behind the rows that verify drafts
def _extend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cu_seqlens_ptr,
    kv_lens_ptr,
    rows_ptr,
    page_table_ptr,
    scale_log2,
    window,
    batch,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_page,
    stride_table,
    GROUP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_FP8: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        wait_for_previous()
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)

    # The sequence of this tile: how many sequences begin at or before it.
    begun = 0
    for base in range(0, batch, BLOCK_B):
        b = base + tl.arange(0, BLOCK_B)
        starts = tl.load(cu_seqlens_ptr + b, mask=b < batch, other=0)
        begun += tl.sum(((b < batch) & (starts * GROUP // BLOCK_M + b <= tile)).to(tl.int32))
    sequence = tl.maximum(begun - 1, 0)
    token_start = tl.load(cu_seqlens_ptr + sequence)
    q_len = tl.load(cu_seqlens_ptr + sequence + 1) - token_start
    kv_len = tl.load(kv_lens_ptr + sequence)
    first_row = (tile - token_start * GROUP // BLOCK_M - sequence) * BLOCK_M
    if (begun == 0) | (first_row >= q_len * GROUP):
        return
    table_ptr = page_table_ptr + tl.load(rows_ptr + sequence).to(tl.int64) * stride_table

    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    token, head = offs_m // GROUP, kv_head * GROUP + offs_m % GROUP
    row_mask = (offs_m < q_len * GROUP)[:, None] & (offs_d < HEAD_DIM)[None, :]
    token_index = (token_start + token).to(tl.int64)
    q_offsets = (token_index * stride_q_token + head * stride_q_head)[:, None] + offs_d[None, :]
    q = tl.load(q_ptr + q_offsets, mask=row_mask, other=0.0)

    # Key positions, n the tile size:  [low, full_low) masked by the window  [full_low, full_high) seen by every row
    # [full_high, high) masked by causality.
    prefix = kv_len - q_len
    first_token = first_row // GROUP
    last_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP, q_len - 1)
    last_visible = prefix + tl.minimum(token, q_len - 1)
    high = prefix + last_token + 1
    low = 0
    full_low = 0
    full_high = (prefix + first_token + 1) // BLOCK_N * BLOCK_N
    if HAS_WINDOW:
        low = tl.maximum(prefix + first_token + 1 - window, 0) // BLOCK_N * BLOCK_N
        full_low = tl.cdiv(tl.maximum(high - window, 0), BLOCK_N) * BLOCK_N
        full_low = tl.maximum(tl.minimum(full_low, full_high), low)
        full_high = tl.maximum(full_high, full_low)

    k_head_ptr = k_ptr + kv_head * PAGE_SIZE * (HEAD_DIM + IS_FP8)
    v_head_ptr = v_ptr + kv_head * PAGE_SIZE * (HEAD_DIM + IS_FP8)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_WINDOW:
        acc, row_max, row_sum = attend_range(
            q, acc, row_max, row_sum, last_visible, low, full_low, window, table_ptr, k_head_ptr, v_head_ptr,
            stride_page, scale_log2, True, True, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, PRECISION, IS_FP8,
        )  # fmt: skip
    acc, row_max, row_sum = attend_range(
        q, acc, row_max, row_sum, last_visible, full_low, full_high, window, table_ptr, k_head_ptr, v_head_ptr,
        stride_page, scale_log2, False, False, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, PRECISION, IS_FP8,
    )  # fmt: skip
    acc, row_max, row_sum = attend_range(
        q, acc, row_max, row_sum, last_visible, full_high, high, window, table_ptr, k_head_ptr, v_head_ptr,
        stride_page, scale_log2, True, HAS_WINDOW, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, PRECISION, IS_FP8,
    )  # fmt: skip

    result = acc / row_sum[:, None]
    out_offsets = (token_index * stride_out_token + head * HEAD_DIM)[:, None] + offs_d[None, :]
    tl.store(out_ptr + out_offsets, result.to(out_ptr.dtype.element_ty), mask=row_mask)
