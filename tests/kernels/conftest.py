"""Shared by the kernel tests: random paged caches, and attention written out position by position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


class AttentionCases:
    """What the attention tests share; the methods keep no state."""

    @staticmethod
    def paged_cache(
        kv_lens: list[int], num_kv_heads: int, head_dim: int, page_size: int = 16, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `k_cache, v_cache, page_table, rows`: pages in random order, page 0 spare, slots reversed."""
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-n // page_size) for n in kv_lens]
        num_pages = 1 + sum(counts)
        order = (1 + torch.randperm(num_pages - 1, generator=generator)).to(torch.int32)
        slots = len(kv_lens) + 1
        page_table = torch.zeros(slots, max(counts, default=1) + 2, dtype=torch.int32)
        rows = torch.arange(len(kv_lens), 0, -1, dtype=torch.int32)
        start = 0
        for b, count in enumerate(counts):
            page_table[int(rows[b]), :count] = order[start : start + count]
            start += count
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        k_cache, v_cache = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        return k_cache, v_cache, page_table, rows

    @staticmethod
    def poison_unused(k_cache: Tensor, v_cache: Tensor, page_table: Tensor, rows: Tensor, kv_lens: list[int]) -> None:
        """Write NaN wherever no sequence has a token: a kernel that reads it shows it."""
        unused = torch.ones(k_cache.shape[0], k_cache.shape[2], dtype=torch.bool)
        for row, kv_len in zip(rows.tolist(), kv_lens, strict=True):
            for j in range(kv_len):
                unused[page_table[row, j // k_cache.shape[2]], j % k_cache.shape[2]] = False
        for cache in (k_cache, v_cache):
            cache.transpose(1, 2)[unused] = torch.nan

    @staticmethod
    def naive_attention(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, position: int, scale: float, window: int | None
    ) -> Tensor:
        """Attention of one token `q [H, D]` at `position`, in fp64, one head and one key at a time."""
        page_size = k_cache.shape[2]
        group = q.shape[0] // k_cache.shape[1]
        first = 0 if window is None else max(0, position - window + 1)
        seen = range(first, position + 1)
        out = torch.empty(q.shape, dtype=torch.float64)
        for head in range(q.shape[0]):
            at = [(int(pages[j // page_size]), head // group, j % page_size) for j in seen]
            keys = torch.stack([k_cache[a] for a in at]).double()
            values = torch.stack([v_cache[a] for a in at]).double()
            out[head] = torch.softmax(scale * (keys @ q[head].double()), 0) @ values
        return out


@pytest.fixture(scope="session")
def cases() -> AttentionCases:
    return AttentionCases()
