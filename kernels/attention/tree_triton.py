# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernel of tree attention's shared part; the suffixes and the merge are in decode_triton.py.

Grid (K, max_items); programs past num_items stop at once. With G = H / K, one program attends from the M = members x G
query rows of one item and KV head to the item's keys: row m is member m // G, query head kv_head * G + m % G. For each
member it writes the normalised fp32 part and the part's base-2 log-sum-exp to the member's slot.

The decode kernel then attends to each row's keys from kv_starts on and merges all parts, either itself (one split, or
the last split to finish) or in a third kernel, if the shared part runs at the same time on a side stream.

To tune on a card: sequential against side stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.decode_triton import attention_decode_triton
from ramet.kernels.attention.plan import LOG2_E, TileConfig, dot_precision
from ramet.kernels.attention.tile_triton import attend_range
from ramet.kernels.attention.tree import ITEM_FIELDS, TreePlan
from ramet.kernels.layers.kv_fp8 import FP8, for_kernel
from ramet.kernels.triton_support import jit, next_power_of_two, tl, wait_for_previous


def attention_tree_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: DecodeMetadata,
    plan: TreePlan,
    scale: float,
    out: Tensor | None = None,
    suffix_config: TileConfig | None = None,
    early_launch: bool = False,
) -> Tensor:
    """Launch `attention_decode`, reading keys shared in `plan` once per group. `suffix_config`: the decode tile.

    early_launch: see `wait_for_previous`; not with a side stream, whose kernels wait for an event.
    """
    _, num_heads, head_dim = q.shape
    part = torch.empty(plan.max_slots, num_heads, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(plan.max_slots, num_heads, dtype=torch.float32, device=q.device)
    side = plan.side_stream
    if side is None:
        launch_shared_part(q, k_cache, v_cache, meta, plan, scale, part, lse, early_launch)
        return attention_decode_triton(
            q, k_cache, v_cache, meta, scale, None, out, suffix_config, plan, (part, lse), early_launch=early_launch
        )
    current = torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        launch_shared_part(q, k_cache, v_cache, meta, plan, scale, part, lse)
    return attention_decode_triton(
        q, k_cache, v_cache, meta, scale, None, out, suffix_config, plan, (part, lse), lambda: current.wait_stream(side)
    )


def launch_shared_part(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: DecodeMetadata,
    plan: TreePlan,
    scale: float,
    part: Tensor,
    lse: Tensor,
    early_launch: bool = False,
) -> None:
    """Fill the slots that the plan uses of `part` fp32 [max_slots, H, D] and `lse` fp32 [max_slots, H]."""
    num_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads, page_size = k_cache.shape[1], k_cache.shape[2]
    _tree_kernel[(num_kv_heads, plan.max_items)](
        q,
        for_kernel(k_cache),
        for_kernel(v_cache),
        part,
        lse,
        plan.items,
        plan.num_items,
        plan.members,
        plan.member_slots,
        meta.rows,
        meta.page_table,
        scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        k_cache.stride(0),
        meta.page_table.stride(0),
        GROUP=num_heads // num_kv_heads,
        ITEM_FIELDS=ITEM_FIELDS,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, next_power_of_two(head_dim)),
        BLOCK_M=plan.config.block_m,
        BLOCK_N=plan.config.block_n,
        PAGE_SIZE=page_size,
        PRECISION=dot_precision(q.dtype),
        IS_FP8=k_cache.dtype is FP8,
        EARLY=early_launch,
        num_warps=plan.config.num_warps,
        num_stages=plan.config.num_stages,
        launch_pdl=early_launch,
    )


@jit
def _tree_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    part_ptr,
    lse_ptr,
    items_ptr,
    num_items_ptr,
    members_ptr,
    slots_ptr,
    rows_ptr,
    page_table_ptr,
    scale_log2,
    stride_q_row,
    stride_q_head,
    stride_page,
    stride_table,
    GROUP: tl.constexpr,
    ITEM_FIELDS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_FP8: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        wait_for_previous()
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    if item >= tl.load(num_items_ptr):
        return
    item_ptr = items_ptr + item * ITEM_FIELDS
    representative = tl.load(item_ptr)
    low = tl.load(item_ptr + 1)
    high = tl.load(item_ptr + 2)
    first_member = tl.load(item_ptr + 3)
    num_members = tl.load(item_ptr + 4)
    table_ptr = page_table_ptr + tl.load(rows_ptr + representative).to(tl.int64) * stride_table

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    is_row = offs_m < num_members * GROUP
    member = first_member + offs_m // GROUP
    head = kv_head * GROUP + offs_m % GROUP
    row = tl.load(members_ptr + member, mask=is_row, other=0).to(tl.int64)
    slot = tl.load(slots_ptr + member, mask=is_row, other=0).to(tl.int64)
    row_mask = is_row[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(
        q_ptr + (row * stride_q_row + head * stride_q_head)[:, None] + offs_d[None, :], mask=row_mask, other=0.0
    )

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    last_visible = tl.zeros([BLOCK_M], dtype=tl.int32) + (high - 1)
    k_head_ptr = k_ptr + kv_head * PAGE_SIZE * (HEAD_DIM + IS_FP8)
    v_head_ptr = v_ptr + kv_head * PAGE_SIZE * (HEAD_DIM + IS_FP8)
    # The planner cuts at multiples of BLOCK_N, so only the end of a segment can leave something for the second loop.
    full_high = low + (high - low) // BLOCK_N * BLOCK_N
    acc, row_max, row_sum = attend_range(
        q, acc, row_max, row_sum, last_visible, low, full_high, 0, table_ptr, k_head_ptr, v_head_ptr,
        stride_page, scale_log2, False, False, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, PRECISION, IS_FP8,
    )  # fmt: skip
    acc, row_max, row_sum = attend_range(
        q, acc, row_max, row_sum, last_visible, full_high, high, 0, table_ptr, k_head_ptr, v_head_ptr,
        stride_page, scale_log2, True, False, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, PRECISION, IS_FP8,
    )  # fmt: skip
    part_index = slot * (tl.num_programs(0) * GROUP) + head
    tl.store(part_ptr + part_index[:, None] * HEAD_DIM + offs_d[None, :], acc / row_sum[:, None], mask=row_mask)
    tl.store(lse_ptr + part_index, row_max + tl.math.log2(row_sum), mask=is_row)
