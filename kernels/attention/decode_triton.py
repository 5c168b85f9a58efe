# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Triton kernels of `attention_decode`: split-KV flash decoding, and the merge of the splits.

The keys [start, kv_len) of each row are cut into equal parts; a part's length is a multiple of BLOCK_N. `start` is 0,
or the page of the first key in the window, or the end of a shared prefix (done by the tree kernel). A row has its share
of `num_parts` by its share of all keys, rounded up: no part is much longer than the others, whatever the rows' lengths.
Or it has `num_parts` itself (`parts_of_a_row`): the cut, and so the row's bits, are then the same in any batch.

Grid (K, most parts). Parts are numbered row by row; each program finds its row from the lengths, without a list from
the host, so a captured graph serves any lengths. Programs past the last part stop at once. A program attends from the
G = H / K heads of one KV head, padded to 16 rows for the matrix units, to one part. The only part of a row is its
result. Of more parts, a program writes its fp32 part and base-2 log-sum-exp; they are merged in their order by the last
program of a (row, KV head) to finish, if `merge_counters` are given, otherwise by a second kernel with grid (B, H). The
counters must be zero before the first launch and are zero after each launch.

To tune on a card: `choose_num_parts` in plan.py; fused merge against the second kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.plan import LOG2_E, TileConfig, decode_config, dot_precision
from ramet.kernels.attention.tile_triton import attend_range
from ramet.kernels.attention.tree import TreePlan
from ramet.kernels.layers.kv_fp8 import FP8, for_kernel
from ramet.kernels.triton_support import jit, jit_any_value, next_power_of_two, tl, wait_for_previous


def attention_decode_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: DecodeMetadata,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    config: TileConfig | None = None,
    plan: TreePlan | None = None,
    shared: tuple[Tensor, Tensor] | None = None,
    before_merge: Callable[[], None] | None = None,
    early_launch: bool = False,
) -> Tensor:
    """Launch `attention_decode` on the device of `q`; `config` overrides the table of the card.

    With `plan` each row starts at its kv_start, and the `shared` parts fp32 [max_slots, H, D] and base-2 log-sum-exps
    fp32 [max_slots, H] of the tree kernel are merged in (not possible with a window). If they are not written yet,
    `before_merge` is called before the merge, which is then a separate kernel. early_launch: see `wait_for_previous`.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    batch, num_heads, head_dim = q.shape
    if batch == 0:
        return out
    num_kv_heads, page_size = k_cache.shape[1], k_cache.shape[2]
    group, most_parts = num_heads // num_kv_heads, meta.most_parts
    if config is None:
        config = decode_config(head_dim, q.dtype, group, meta.tiles)
    assert plan is None or window is None
    to_parts = most_parts > batch or before_merge is not None
    fused = to_parts and before_merge is None and meta.merge_counters is not None
    part, part_lse = part_buffers(q, most_parts) if to_parts else (q, q)
    has_tree = plan is not None
    shared_part, shared_lse = shared or (q, q)  # these four are not read without a plan
    slot_offsets, kv_starts = (meta.kv_lens,) * 2 if plan is None else (plan.slot_offsets, plan.kv_starts)
    block_d, block_g = max(16, next_power_of_two(head_dim)), next_power_of_two(group)
    block_b = next((size for size in (1, 16, 256) if size >= batch), max(1024, next_power_of_two(batch)))
    _decode_kernel[(num_kv_heads, most_parts)](
        q,
        for_kernel(k_cache),
        for_kernel(v_cache),
        out,
        part,
        part_lse,
        meta.merge_counters if fused else meta.kv_lens,
        meta.kv_lens,
        kv_starts,
        shared_part,
        shared_lse,
        slot_offsets,
        meta.rows,
        meta.page_table,
        scale * LOG2_E,
        0 if window is None else window,
        batch,
        meta.num_parts,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        k_cache.stride(0),
        meta.page_table.stride(0),
        GROUP=group,
        HAS_WINDOW=window is not None,
        HAS_TREE=has_tree,
        IS_FIXED=meta.parts_of_a_row,
        TO_PARTS=to_parts,
        FUSED_MERGE=fused,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_B=block_b,
        BLOCK_G=block_g,
        BLOCK_S=max(1, min(16, 8192 // (block_g * block_d))),
        BLOCK_T=max(1, min(16, 8192 // (config.block_m * block_d))),
        PAGE_SIZE=page_size,
        PRECISION=dot_precision(q.dtype),
        IS_FP8=k_cache.dtype is FP8,
        EARLY=early_launch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        launch_pdl=early_launch,
    )
    if before_merge is not None:
        before_merge()
    if to_parts and not fused:
        _merge_kernel[(batch, num_heads)](
            out,
            part,
            part_lse,
            meta.kv_lens,
            kv_starts,
            shared_part,
            shared_lse,
            slot_offsets,
            0 if window is None else window,
            batch,
            meta.num_parts,
            out.stride(0),
            HAS_WINDOW=window is not None,
            HAS_TREE=has_tree,
            IS_FIXED=meta.parts_of_a_row,
            HEAD_DIM=head_dim,
            BLOCK_B=block_b,
            BLOCK_D=block_d,
            BLOCK_N=config.block_n,
            BLOCK_S=16,
            PAGE_SIZE=page_size,
            num_warps=4,
        )
    return out


def part_buffers(q: Tensor, num_parts: int) -> tuple[Tensor, Tensor]:
    """Allocate the parts fp32 [num_parts, H, D] and their base-2 log-sum-exps fp32 [num_parts, H]."""
    _, num_heads, head_dim = q.shape
    part = torch.empty(num_parts, num_heads, head_dim, dtype=torch.float32, device=q.device)
    return part, torch.empty(num_parts, num_heads, dtype=torch.float32, device=q.device)


@jit
def part_length(keys, num_parts, BLOCK_N: tl.constexpr):
    """Length of `num_parts` equal parts of a row: a multiple of BLOCK_N, at least one tile. The last may be shorter."""
    return tl.maximum(tl.cdiv(tl.cdiv(keys, num_parts), BLOCK_N), 1) * BLOCK_N


@jit
def count_parts(
    kv_lens_ptr,
    kv_starts_ptr,
    batch,
    window,
    num_parts,
    index,  # int32 [BLOCK_B], rows
    HAS_WINDOW: tl.constexpr,
    HAS_TREE: tl.constexpr,
    IS_FIXED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Return how many parts each row has: at least one, which writes the zeros of an empty row; 0 past the batch."""
    in_batch = index < batch
    keys = tl.load(kv_lens_ptr + index, mask=in_batch, other=0)
    if HAS_WINDOW:
        keys -= window_start(keys, window, PAGE_SIZE)
    if HAS_TREE:
        keys -= tl.load(kv_starts_ptr + index, mask=in_batch, other=0)
    wanted = num_parts
    if not IS_FIXED:
        share = tl.maximum(tl.cdiv(tl.sum(keys), num_parts), 1)  # keys of a part if all were one long row's
        wanted = tl.minimum(tl.maximum(tl.cdiv(keys, share), 1), 64)  # one program merges them
    counts = tl.maximum(tl.cdiv(keys, part_length(keys, wanted, BLOCK_N)), 1)
    return tl.where(in_batch, counts, 0)


@jit
def window_start(kv_len, window, PAGE_SIZE: tl.constexpr):
    """First position of the page that holds the first key in the window."""
    return tl.maximum(kv_len - window, 0) // PAGE_SIZE * PAGE_SIZE


@jit
def merge_parts(
    acc,  # [R, BLOCK_D] fp32
    row_max,  # [R] fp32, log2 units
    row_sum,  # [R] fp32
    part_ptr,  # fp32 [parts, H, HEAD_DIM]
    lse_ptr,
    count,  # parts to merge
    first,  # of them
    heads,  # int [R]
    head_mask,  # bool [R]
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Fold `count` normalised parts into the running softmax of R heads, BLOCK_S at a time."""
    offs_d = tl.arange(0, BLOCK_D)
    for base in range(0, count, BLOCK_S):
        split = base + tl.arange(0, BLOCK_S)
        index = ((first + split) * num_heads)[None, :] + heads[:, None]
        mask = head_mask[:, None] & (split < count)[None, :]
        # .cg: in a fused merge other processors wrote these during this launch, so the first-level cache is no source.
        lse = tl.load(lse_ptr + index, mask=mask, other=float("-inf"), cache_modifier=".cg")
        part_mask = mask[:, :, None] & (offs_d < HEAD_DIM)[None, None, :]
        offsets = index[:, :, None] * HEAD_DIM + offs_d[None, None, :]
        part = tl.load(part_ptr + offsets, mask=part_mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, tl.max(lse, 1))
        offset = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.math.exp2(lse - offset[:, None])
        rescale = tl.math.exp2(row_max - offset)
        acc = acc * rescale[:, None] + tl.sum(part * weights[:, :, None], 1)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
    return acc, row_max, row_sum


@jit_any_value("batch", "num_parts")
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    counters_ptr,
    kv_lens_ptr,
    kv_starts_ptr,
    tree_part_ptr,
    tree_lse_ptr,
    slot_offsets_ptr,
    rows_ptr,
    page_table_ptr,
    scale_log2,
    window,
    batch,
    num_parts,
    stride_q_row,
    stride_q_head,
    stride_out_row,
    stride_page,
    stride_table,
    GROUP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_TREE: tl.constexpr,
    IS_FIXED: tl.constexpr,
    TO_PARTS: tl.constexpr,
    FUSED_MERGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_FP8: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        wait_for_previous()
    kv_head = tl.program_id(0)
    number = tl.program_id(1)
    if TO_PARTS:
        index = tl.arange(0, BLOCK_B)
        counts = count_parts(
            kv_lens_ptr, kv_starts_ptr, batch, window, num_parts, index, HAS_WINDOW, HAS_TREE, IS_FIXED, BLOCK_N,
            PAGE_SIZE,
        )  # fmt: skip
        row = tl.sum((tl.cumsum(counts, 0) <= number).to(tl.int32))  # rows whose parts have smaller numbers
        if row >= batch:
            return
        first = tl.sum(tl.where(index < row, counts, 0))
        count = tl.sum(tl.where(index == row, counts, 0))
    else:
        row, first, count = number, number, 1
    row = row.to(tl.int64)
    kv_len = tl.load(kv_lens_ptr + row)
    table_ptr = page_table_ptr + tl.load(rows_ptr + row).to(tl.int64) * stride_table
    start = 0
    if HAS_TREE:
        start = tl.load(kv_starts_ptr + row)
    if HAS_WINDOW:
        start = window_start(kv_len, window, PAGE_SIZE)
    length = part_length(kv_len - start, count, BLOCK_N)
    low = start + (number - first) * length
    high = tl.minimum(low + length, kv_len)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    head_mask = offs_m < GROUP
    row_mask = head_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    head = kv_head * GROUP + offs_m
    q = tl.load(q_ptr + row * stride_q_row + head[:, None] * stride_q_head + offs_d[None, :], mask=row_mask, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    last_visible = tl.zeros([BLOCK_M], dtype=tl.int32) + (kv_len - 1)
    k_head_ptr = k_ptr + kv_head * PAGE_SIZE * (HEAD_DIM + IS_FP8)
    v_head_ptr = v_ptr + kv_head * PAGE_SIZE * (HEAD_DIM + IS_FP8)
    # Always masked: 16 rows of comparisons cost nothing beside the loads, and a second loop would drain the pipeline.
    acc, row_max, row_sum = attend_range(
        q, acc, row_max, row_sum, last_visible, low, high, window, table_ptr, k_head_ptr, v_head_ptr,
        stride_page, scale_log2, True, HAS_WINDOW, HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, PRECISION, IS_FP8,
    )  # fmt: skip
    num_heads = tl.num_programs(0) * GROUP
    if not TO_PARTS:
        is_whole = True
    elif FUSED_MERGE:
        is_whole = count == 1
    else:
        is_whole = False
    if is_whole:
        if HAS_TREE:
            first_slot = tl.load(slot_offsets_ptr + row).to(tl.int64)
            num_slots = tl.load(slot_offsets_ptr + row + 1) - first_slot
            acc, row_max, row_sum = merge_parts(
                acc, row_max, row_sum, tree_part_ptr, tree_lse_ptr, num_slots, first_slot, head, head_mask, num_heads,
                HEAD_DIM, BLOCK_D, BLOCK_T,
            )  # fmt: skip
        result = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
        out_offsets = row * stride_out_row + head[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(out_ptr + out_offsets, result.to(out_ptr.dtype.element_ty), mask=row_mask)
    else:
        result = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
        part_index = number.to(tl.int64) * num_heads + head
        tl.store(part_ptr + part_index[:, None] * HEAD_DIM + offs_d[None, :], result, mask=row_mask)
        lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.math.log2(tl.where(row_sum == 0.0, 1.0, row_sum)))
        tl.store(lse_ptr + part_index, lse, mask=head_mask)
        if FUSED_MERGE:
            # All threads' stores come before the release, and all threads' loads after the acquire.
            tl.debug_barrier()
            counter_ptr = counters_ptr + row * tl.num_programs(0) + kv_head
            arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
            tl.debug_barrier()
            if arrived == count - 1:
                tl.store(counter_ptr, 0)
                offs_g = tl.arange(0, BLOCK_G)
                group_mask = offs_g < GROUP
                heads = kv_head * GROUP + offs_g
                merged, merged_max, merged_sum = merge_parts(
                    tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32),
                    tl.full([BLOCK_G], float("-inf"), dtype=tl.float32),
                    tl.zeros([BLOCK_G], dtype=tl.float32),
                    part_ptr, lse_ptr, count, first.to(tl.int64), heads, group_mask, num_heads, HEAD_DIM, BLOCK_D,
                    BLOCK_S,
                )  # fmt: skip
                if HAS_TREE:
                    first_slot = tl.load(slot_offsets_ptr + row).to(tl.int64)
                    num_slots = tl.load(slot_offsets_ptr + row + 1) - first_slot
                    merged, merged_max, merged_sum = merge_parts(
                        merged, merged_max, merged_sum, tree_part_ptr, tree_lse_ptr, num_slots, first_slot, heads,
                        group_mask, num_heads, HEAD_DIM, BLOCK_D, BLOCK_S,
                    )  # fmt: skip
                merged = merged / tl.where(merged_sum == 0.0, 1.0, merged_sum)[:, None]
                offsets = row * stride_out_row + heads[:, None] * HEAD_DIM + offs_d[None, :]
                mask = group_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
                tl.store(out_ptr + offsets, merged.to(out_ptr.dtype.element_ty), mask=mask)


@jit_any_value("batch", "num_parts")
def _merge_kernel(
    out_ptr,
    part_ptr,
    lse_ptr,
    kv_lens_ptr,
    kv_starts_ptr,
    tree_part_ptr,
    tree_lse_ptr,
    slot_offsets_ptr,
    window,
    batch,
    num_parts,
    stride_out_row,
    HAS_WINDOW: tl.constexpr,
    HAS_TREE: tl.constexpr,
    IS_FIXED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    index = tl.arange(0, BLOCK_B)
    counts = count_parts(
        kv_lens_ptr, kv_starts_ptr, batch, window, num_parts, index, HAS_WINDOW, HAS_TREE, IS_FIXED, BLOCK_N, PAGE_SIZE
    )
    first = tl.sum(tl.where(index < row, counts, 0)).to(tl.int64)
    count = tl.sum(tl.where(index == row, counts, 0))
    offs_one = tl.arange(0, 1)
    offs_d = tl.arange(0, BLOCK_D)
    acc, row_max, row_sum = merge_parts(
        tl.zeros([1, BLOCK_D], dtype=tl.float32),
        tl.full([1], float("-inf"), dtype=tl.float32),
        tl.zeros([1], dtype=tl.float32),
        part_ptr, lse_ptr, count, first, head + offs_one, offs_one == 0, num_heads, HEAD_DIM, BLOCK_D, BLOCK_S,
    )  # fmt: skip
    if HAS_TREE:
        first_slot = tl.load(slot_offsets_ptr + row).to(tl.int64)
        num_slots = tl.load(slot_offsets_ptr + row + 1) - first_slot
        acc, row_max, row_sum = merge_parts(
            acc, row_max, row_sum, tree_part_ptr, tree_lse_ptr, num_slots, first_slot, head + offs_one, offs_one == 0,
            num_heads, HEAD_DIM, BLOCK_D, BLOCK_S,
        )  # fmt: skip
    result = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    offsets = row * stride_out_row + head * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptr + offsets, result.to(out_ptr.dtype.element_ty), mask=(offs_d < HEAD_DIM)[None, :])
