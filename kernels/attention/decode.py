"""Decode attention: one new token of each sequence attends to the sequence's paged cache.

    out[b, h] = sum_j softmax_j(scale * q[b, h] . k[j, g]) v[j, g]  over kv_len - window <= j < kv_len, g = h // (H / K)

The current token's key and value must already be in the cache. Position j of row b lies in page
`page_table[rows[b], j // P]`, offset `j % P`, of caches `[N, K, P, D]`. Softmax and sums are in fp32.
A row with kv_len 0 is padding and gets zeros.

The GPU kernels are in `decode_triton.py`, and in `tree_triton.py` for rows that share prefixes; the CPU kernel is in
`cpu/attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ramet.kernels.attention.extend import gather_pages, masked_attention
from ramet.kernels.attention.plan import AttentionTiles
from ramet.kernels.attention.tree import TreePlan

# Bytes of keys gathered by one call on the CPU: a few rows at a time stay in the last-level cache between copy and use.
_REFERENCE_GATHER_BYTES = 8 << 20


@dataclass(slots=True)
class DecodeMetadata:
    """The location of the cache of each row of a decode step. In a CUDA graph the tensors are static buffers."""

    kv_lens: Tensor  # int32 [B], including the current token; 0 marks padding
    rows: Tensor  # int32 [B], row of `page_table` of each sequence
    page_table: Tensor  # int32 [S, max_pages]
    # Parts that the GPU cuts the keys of all rows together into, or those of each row. Fixed for a captured graph.
    num_parts: int = 1
    parts_of_a_row: bool = False
    tree: TreePlan | None = None  # shared prefixes read once per group; None reads every row's cache by itself
    kv_lens_host: list[int] | None = None  # the same lengths on the host, so the CPU path needs no copy back
    # int32 [B * K] zeros, kept by the caller: the last program of a row then merges its parts, without a second kernel
    merge_counters: Tensor | None = None
    tiles: AttentionTiles | None = None  # measured on this card

    @property
    def most_parts(self) -> int:
        """Parts that there are at most, whatever the lengths: shares are rounded up, and every row has one."""
        batch = self.kv_lens.shape[0]
        return batch * self.num_parts if self.parts_of_a_row else batch + self.num_parts - 1


def attention_decode_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: DecodeMetadata,
    scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend from `q [B, H, D]` to `k_cache, v_cache [N, K, P, D]`; returns `[B, H, D]` (`out` when given).

    Gathers whole pages of a few rows at a time. Positions of the last page beyond kv_len are read with weight 0, so the
    caches must have finite values there. softcap: as in `attention_extend_reference`.
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    batch, num_heads, head_dim = q.shape
    _, num_kv_heads, page_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    lens = meta.kv_lens.tolist() if meta.kv_lens_host is None else meta.kv_lens_host
    firsts = [0 if window is None else max(0, n - window) // page_size for n in lens]  # first page that is read
    num_pages = [max(1, -(-n // page_size) - first) for n, first in zip(lens, firsts, strict=True)]
    page_bytes = k_cache[0].numel() * k_cache.element_size()
    queries = q.view(batch, num_kv_heads, group, head_dim)
    low = 0
    while low < batch:
        high, widest = low + 1, num_pages[low]
        while high < batch:
            wider = max(widest, num_pages[high])
            if wider * (high + 1 - low) * page_bytes > _REFERENCE_GATHER_BYTES:
                break
            high, widest = high + 1, wider
        part = slice(low, high)
        first = torch.tensor(firsts[part], device=q.device).unsqueeze(1)
        kv_lens = torch.tensor(lens[part], device=q.device).unsqueeze(1)
        page_index = first + torch.arange(widest, device=q.device)  # [b, widest]
        pages = meta.page_table[meta.rows[part].long().unsqueeze(1), page_index.clamp(max=meta.page_table.shape[1] - 1)]
        pages = torch.where(page_index * page_size < kv_lens, pages, 0)
        positions = first * page_size + torch.arange(widest * page_size, device=q.device)
        mask = positions < kv_lens
        if window is not None:
            mask &= positions >= kv_lens - window
        result = masked_attention(
            queries[part],
            gather_pages(k_cache, pages, q.dtype),
            gather_pages(v_cache, pages, q.dtype),
            mask[:, None, None, :].expand(-1, -1, group, -1),
            scale,
            softcap,
        )
        out[part] = result.reshape(high - low, num_heads, head_dim)
        low = high
    for b, n in enumerate(lens):
        if n == 0:
            out[b] = 0
    return out
