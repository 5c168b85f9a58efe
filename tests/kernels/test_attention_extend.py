from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ramet.kernels.attention_extend import ExtendMetadata, attention_extend

# The `cases` fixture is tests/kernels/conftest.py's AttentionCases: a conftest cannot be imported, hence Any.


def make_metadata(q_lens: list[int], kv_lens: list[int], rows: Tensor, page_table: Tensor) -> ExtendMetadata:
    starts = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    lens = torch.tensor(kv_lens, dtype=torch.int32)
    return ExtendMetadata(starts, lens, rows, page_table, max(q_lens), max(kv_lens), q_lens, kv_lens)


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (3, 1, 24), (2, 2, 64)])
def test_reference_equals_the_formula(
    cases: Any, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    q_lens, kv_lens = [1, 5, 33, 17], [1, 50, 33, 20]
    k_cache, v_cache, page_table, rows = cases.paged_cache(kv_lens, num_kv_heads, head_dim)
    q = torch.randn(sum(q_lens), num_heads, head_dim)
    meta = make_metadata(q_lens, kv_lens, rows, page_table)
    out = torch.full_like(q, torch.nan)
    assert attention_extend(q, k_cache, v_cache, meta, 0.3, window, out) is out
    start = 0
    for b, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        for i in range(q_len):
            pages, position = page_table[rows[b]], kv_len - q_len + i
            expected = cases.naive_attention(q[start + i], k_cache, v_cache, pages, position, 0.3, window)
            torch.testing.assert_close(out[start + i].double(), expected, rtol=1e-5, atol=1e-5)
        start += q_len


def test_chunks_and_batches_do_not_change_the_result(cases: Any) -> None:
    k_cache, v_cache, page_table, rows = cases.paged_cache([700, 30], 2, 32)
    q = torch.randn(730, 4, 32)
    whole = attention_extend(q, k_cache, v_cache, make_metadata([700, 30], [700, 30], rows, page_table), 0.2)
    for low, high in [(0, 1), (1, 600), (600, 700)]:
        meta = make_metadata([high - low], [high], rows[:1], page_table)
        part = attention_extend(q[low:high], k_cache, v_cache, meta, 0.2)
        torch.testing.assert_close(part, whole[low:high], rtol=1e-5, atol=1e-6)
