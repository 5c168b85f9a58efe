"""Causal, paged attention of new tokens over all cached tokens of their sequence: prefill, extend and chunks.

Row b has n = q_len new tokens and kv_len = prefix + n cached positions. Token i, at position p = kv_len - n + i, gets

    out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, h // (H / K)]) v[j, h // (H / K)]    over p - window < j <= p

The keys and values of the new tokens must already be in the cache. Position j of a sequence lies in page
`page_table[row, j // P]`, offset `j % P`, of caches `[N, K, P, D]`. Softmax and sums are in fp32. Results of tokens
before the first sequence are not written. Tokens after the last sequence are padding; a GPU does not write them either.

The GPU kernel is in `extend_triton.py`, the CPU kernel in `cpu/attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.kernels.attention.plan import AttentionTiles
from ramet.kernels.layers.kv_fp8 import FP8, read_rows

# Query rows of one masked call on the CPU: bounds the mask at 512 x kv_len and lets a call stop at its own last key.
_REFERENCE_CHUNK = 512


@dataclass(slots=True)
class ExtendMetadata:
    """The location of a step's new tokens and their caches. Owned by the step; B rows with T new tokens in all."""

    cu_seqlens_q: Tensor  # int32 [B + 1], new tokens of row b are [cu_seqlens_q[b], cu_seqlens_q[b + 1])
    kv_lens: Tensor  # int32 [B], prefix + new tokens
    rows: Tensor  # int32 [B], row of `page_table` of each sequence
    page_table: Tensor  # int32 [S, max_pages]
    max_seqlen_q: int  # upper bound of all rows' new tokens; in a CUDA graph, of every replay
    max_kv_len: int
    # The same lengths on the host, of tokens that begin at 0, so the CPU path needs no copy back. None in a CUDA graph,
    # because they change between replays.
    q_lens_host: list[int] | None = None
    kv_lens_host: list[int] | None = None
    tiles: AttentionTiles | None = None  # measured on this card


def gather_pages(cache: Tensor, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy `pages` (int [..., n]) of `cache [N, K, P, D]` into `[..., K, n * P, D]`, one copy of whole pages.

    dtype: that of the result if the cache is in FP8, else the cache's.
    """
    _, num_kv_heads, page_size, head_dim = cache.shape
    heads = torch.arange(num_kv_heads, device=cache.device)
    index = (pages.long() * num_kv_heads).unsqueeze(-2) + heads.unsqueeze(-1)  # [..., K, n]
    if cache.dtype is FP8:
        rows = read_rows(cache, index.reshape(-1), dtype)
    else:
        rows = cache.view(-1, page_size * head_dim).index_select(0, index.reshape(-1))
    return rows.view(*index.shape[:-1], index.shape[-1] * page_size, head_dim)


def attention_extend_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: ExtendMetadata,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend from `q [T, H, D]` to `k_cache, v_cache [N, K, P, D]`; returns `[T, H, D]` (`out` when given).

    softcap c: a score s becomes c * tanh(s / c). No other op has it.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    page_size = k_cache.shape[2]
    start = 0 if meta.q_lens_host is not None else int(meta.cu_seqlens_q[0])
    q_lens = meta.cu_seqlens_q.diff().tolist() if meta.q_lens_host is None else meta.q_lens_host
    all_kv_lens = meta.kv_lens.tolist() if meta.kv_lens_host is None else meta.kv_lens_host
    for b, (q_len, kv_len) in enumerate(zip(q_lens, all_kv_lens, strict=True)):
        if q_len == 0:
            continue
        prefix = kv_len - q_len
        first = 0 if window is None else max(0, prefix - window + 1) // page_size
        pages = meta.page_table[meta.rows[b], first : -(-kv_len // page_size)]
        offset = first * page_size
        keys = gather_pages(k_cache, pages, q.dtype)[:, : kv_len - offset]
        values = gather_pages(v_cache, pages, q.dtype)[:, : kv_len - offset]
        tokens = slice(start, start + q_len)
        out[tokens] = _attend(q[tokens], keys, values, prefix - offset, scale, window, softcap)
        start += q_len
    out[start:] = 0  # padding
    return out


def masked_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """torch's scaled dot-product attention with a mask, and with a cap on scores, computed in fp32, if there is one."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    scores = (q.float() @ keys.float().transpose(-1, -2)) * scale
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ values.float()).to(q.dtype)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, prefix: int, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attend causally from `q [n, H, D]`, at positions from `prefix` on, to `keys, values [K, prefix + n, D]`."""
    q_len, num_heads, head_dim = q.shape
    num_kv_heads, kv_len = keys.shape[0], keys.shape[1]
    group = num_heads // num_kv_heads
    # The query heads of one KV head become the batch dimension, so keys and values are expanded, never copied.
    queries = q.view(q_len, num_kv_heads, group, head_dim).permute(2, 1, 0, 3)
    keys, values = keys.expand(group, -1, -1, -1), values.expand(group, -1, -1, -1)
    if prefix == 0 and softcap is None and (window is None or window >= kv_len):
        result = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
        return result.permute(2, 1, 0, 3).reshape(q_len, num_heads, head_dim)
    parts = []
    for low in range(0, q_len, _REFERENCE_CHUNK):
        high = min(low + _REFERENCE_CHUNK, q_len)
        last = prefix + high  # keys [first, last) are all that these rows can see
        first = 0 if window is None else max(0, prefix + low - window + 1)
        query_positions = torch.arange(prefix + low, last, device=q.device).unsqueeze(1)
        key_positions = torch.arange(first, last, device=q.device)
        mask = key_positions <= query_positions
        if window is not None:
            mask &= key_positions > query_positions - window
        chunk = masked_attention(
            queries[:, :, low:high], keys[:, :, first:last], values[:, :, first:last], mask, scale, softcap
        )
        parts.append(chunk.permute(2, 1, 0, 3).reshape(high - low, num_heads, head_dim))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
