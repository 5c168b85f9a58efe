# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Rotary position embedding of q and k, optional per-head norms before it, and the write of k and v to the paged cache.

For a head vector with halves (x1, x2), and cos and sin of its position (D/2 values each):

    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin

This is Hugging Face's llama convention (halves, not interleaved pairs). Rotation is in fp32, results in model dtype. A
cache in FP8 gets each head's vector, rounded from fp32, and its scale (`kv_fp8.py`).
Kernel: one program per token and block of heads; the first programs of a token do q, the others k and v.

Not here: the tables of cos and sin (base, llama3 scaling), which the model builds once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.layers.kv_fp8 import FP8, for_kernel, round_halves, write_heads
from ramet.kernels.layers.norm import rms_norm_reference
from ramet.kernels.triton_support import cdiv, jit, next_power_of_two, tl, wait_for_previous

_HEADS_PER_PROGRAM = 8


def rope_and_write_kv_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate q and k by position, and write k and v to their cache slots. Returns the rotated q [T, H, D], contiguous.

    q: [T, H, D]; k, v: [T, K, D]; they may be views of a fused product if the last axis is contiguous.
    cos, sin: fp32 [max_pos, D/2]. positions: int32 or int64 [T]. kv_slots: int32 [T], page * P + offset.
    k_cache, v_cache: [N, K, P, D], changed in place. q_norm_weight, k_norm_weight: [D], applied before the rotation.
    Padded tokens have slot 0: page 0 has no owner, and its content is undefined.
    """
    if q_norm_weight is not None:
        q = rms_norm_reference(q, q_norm_weight, eps)
    if k_norm_weight is not None:
        k = rms_norm_reference(k, k_norm_weight, eps)
    num_heads, half = q.shape[1], q.shape[2] // 2
    # q and k are rotated as one tensor: at small batches the count of torch calls is the cost.
    heads = torch.cat((q, k), dim=1).float()
    cos = cos.index_select(0, positions).unsqueeze(1)
    sin = sin.index_select(0, positions).unsqueeze(1)
    first, second = heads[..., :half], heads[..., half:]
    rotated = torch.empty_like(heads)
    torch.mul(first, cos, out=rotated[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=rotated[..., half:]).addcmul_(first, sin)
    dtype = q.dtype if k_cache.dtype is FP8 else k_cache.dtype
    keys = rotated[:, num_heads:]
    write_kv_reference(keys if k_cache.dtype is FP8 else keys.to(dtype), v, kv_slots, k_cache, v_cache)
    return rotated[:, :num_heads].to(dtype).contiguous()


def write_kv_reference(k: Tensor, v: Tensor, kv_slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Write k and v [T, K, D] to slots int32 [T] of the caches [N, K, P, D]."""
    page_size = k_cache.shape[2]
    page = kv_slots // page_size
    index = (page, kv_slots - page * page_size)
    if k_cache.dtype is FP8:
        write_heads(k, *index, k_cache)
        write_heads(v, *index, v_cache)
        return
    k_cache.transpose(1, 2).index_put_(index, k)
    v_cache.transpose(1, 2).index_put_(index, v)


def rope_and_write_kv_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    early_launch: bool = False,
) -> Tensor:
    """Launch the kernel of `rope_and_write_kv_reference`. Both caches have the same strides.

    early_launch: see `wait_for_previous`.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = k.shape[1], k_cache.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    assert k_cache.stride() == v_cache.stride(), (k_cache.stride(), v_cache.stride())
    num_q_blocks = cdiv(num_heads, _HEADS_PER_PROGRAM)
    _rope_kernel[(num_tokens, num_q_blocks + cdiv(num_kv_heads, _HEADS_PER_PROGRAM))](
        q, k, v, cos, sin, positions, kv_slots, for_kernel(k_cache), for_kernel(v_cache), q_norm_weight,
        k_norm_weight, out,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        num_q_blocks, eps,
        H=num_heads, K=num_kv_heads, P=page_size, HALF=head_dim // 2, HALF_BLOCK=next_power_of_two(head_dim // 2),
        HEADS=_HEADS_PER_PROGRAM, NORM_Q=q_norm_weight is not None, NORM_K=k_norm_weight is not None,
        IS_FP8=k_cache.dtype is FP8, EARLY=early_launch, num_warps=4 if head_dim >= 128 else 2,
        launch_pdl=early_launch,
    )  # fmt: skip
    return out


@jit
def _rope_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, q_norm_ptr, k_norm_ptr,
    out_ptr, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    cache_page_stride, cache_head_stride, cache_token_stride, num_q_blocks, eps,
    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr, IS_FP8: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        wait_for_previous()
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = tl.arange(0, HALF_BLOCK)
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + column, mask=column < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + column, mask=column < HALF, other=0.0)[None, :]
    if block < num_q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)
        inside = (head < H)[:, None] & (column < HALF)[None, :]
        source = q_ptr + token * q_stride + head[:, None] * q_head_stride + column[None, :]
        first, second = _load_halves(source, q_norm_ptr, column, inside, eps, HALF, NORM_Q)
        target = out_ptr + token * (H * 2 * HALF) + head[:, None] * (2 * HALF) + column[None, :]
        tl.store(target, first * cos - second * sin, mask=inside)
        tl.store(target + HALF, second * cos + first * sin, mask=inside)
    else:
        head = (block - num_q_blocks) * HEADS + tl.arange(0, HEADS)
        inside = (head < K)[:, None] & (column < HALF)[None, :]
        slot = tl.load(slots_ptr + token)
        page = (slot // P).to(tl.int64) * cache_page_stride + head * cache_head_stride
        cell = (page + (slot % P) * cache_token_stride)[:, None] + column[None, :]
        scale_cell = page + P * 2 * HALF + slot % P
        source = k_ptr + token * k_stride + head[:, None] * k_head_stride + column[None, :]
        first, second = _load_halves(source, k_norm_ptr, column, inside, eps, HALF, NORM_K)
        rotated_first, rotated_second = first * cos - second * sin, second * cos + first * sin
        _store_halves(k_cache_ptr, cell, scale_cell, rotated_first, rotated_second, head < K, inside, HALF, IS_FP8)
        source = v_ptr + token * v_stride + head[:, None] * v_head_stride + column[None, :]
        v_first, v_second = tl.load(source, mask=inside, other=0.0), tl.load(source + HALF, mask=inside, other=0.0)
        _store_halves(v_cache_ptr, cell, scale_cell, v_first, v_second, head < K, inside, HALF, IS_FP8)


@jit
def _store_halves(
    cache_ptr, cell, scale_cell, first, second, is_head, inside, HALF: tl.constexpr, IS_FP8: tl.constexpr
):
    """Store both halves of a block of heads, in FP8 with a scale for each head."""
    if IS_FP8:
        first, second, byte = round_halves(first.to(tl.float32), second.to(tl.float32))
        tl.store(cache_ptr + scale_cell, byte, mask=is_head)
    tl.store(cache_ptr + cell, first, mask=inside)
    tl.store(cache_ptr + cell + HALF, second, mask=inside)


@jit
def _load_halves(source, weight_ptr, column, inside, eps, HALF: tl.constexpr, NORM: tl.constexpr):
    """Return both halves of a block of heads in fp32, normalised per head if NORM."""
    loaded_first = tl.load(source, mask=inside, other=0.0)
    loaded_second = tl.load(source + HALF, mask=inside, other=0.0)
    first, second = loaded_first.to(tl.float32), loaded_second.to(tl.float32)
    if NORM:
        square_sum = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(square_sum / (2 * HALF) + eps)[:, None]
        low = tl.load(weight_ptr + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        high = tl.load(weight_ptr + HALF + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        # Rounded to the model dtype between norm and rotation, as the unfused pair is.
        first = (first * scale * low).to(loaded_first.dtype).to(tl.float32)
        second = (second * scale * high).to(loaded_second.dtype).to(tl.float32)
    return first, second
