"""Rotary position embedding of q and k, optional per-head norms before it, and the write of k and v to the paged cache.

For a head vector with halves (x1, x2), and cos and sin of its position (D/2 values each):

    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin

which is Hugging Face's llama convention (halves, not interleaved pairs). Rotation is in fp32, results in model dtype.
Not here: the tables themselves (base, llama3 scaling): the model builds them once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.norm import rms_norm_reference


def rope_and_write_kv(
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
    """Rotate q and k by position, write k and v to their cache slots, return the rotated q [T, H, D] (contiguous).

    q: [T, H, D]; k, v: [T, K, D]; views of a fused product are fine as long as the last axis is contiguous.
    cos, sin: fp32 [max_pos, D/2]. positions: int32 or int64 [T]. kv_slots: int32 [T], page * P + offset.
    k_cache, v_cache: [N, K, P, D], changed in place. q_norm_weight, k_norm_weight: [D], applied before the rotation.
    Padded tokens carry slot 0: page 0 is nobody's, so what lies there is undefined.
    """
    return rope_and_write_kv_reference(
        q, k, v, cos, sin, positions, kv_slots, k_cache, v_cache, q_norm_weight, k_norm_weight, eps
    )


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
    """Specification of `rope_and_write_kv` and its CPU path."""
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
    rotated = rotated.to(k_cache.dtype)
    write_kv_reference(rotated[:, num_heads:], v, kv_slots, k_cache, v_cache)
    return rotated[:, :num_heads].contiguous()


def write_kv_reference(k: Tensor, v: Tensor, kv_slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Write k and v [T, K, D] to slots int32 [T] of the caches [N, K, P, D]."""
    page_size = k_cache.shape[2]
    page = kv_slots // page_size
    index = (page, kv_slots - page * page_size)
    k_cache.transpose(1, 2).index_put_(index, k)
    v_cache.transpose(1, 2).index_put_(index, v)
