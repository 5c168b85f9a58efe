from __future__ import annotations

from typing import Any

import pytest
import torch

from ramet.kernels import attention_decode as module
from ramet.kernels.attention_decode import DecodeMetadata, attention_decode

# The `cases` fixture is tests/kernels/conftest.py's AttentionCases: a conftest cannot be imported, hence Any.


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("host_lens", [False, True])
@pytest.mark.parametrize("gather_bytes", [1, 8 << 20])
def test_reference_equals_the_formula(
    cases: Any, monkeypatch: pytest.MonkeyPatch, window: int | None, host_lens: bool, gather_bytes: int
) -> None:
    monkeypatch.setattr(module, "_REFERENCE_GATHER_BYTES", gather_bytes)
    lens = [1, 16, 17, 50, 0]
    k_cache, v_cache, page_table, rows = cases.paged_cache(lens, 2, 24)
    q = torch.randn(len(lens), 6, 24)
    out = torch.full_like(q, torch.nan)
    kv_lens = torch.tensor(lens, dtype=torch.int32)
    meta = DecodeMetadata(kv_lens, rows, page_table, kv_lens_host=lens if host_lens else None)
    assert attention_decode(q, k_cache, v_cache, meta, 0.3, window, out) is out
    for b, n in enumerate(lens[:-1]):
        expected = cases.naive_attention(q[b], k_cache, v_cache, page_table[rows[b]], n - 1, 0.3, window)
        torch.testing.assert_close(out[b].double(), expected, rtol=1e-5, atol=1e-5)
    assert out[-1].eq(0).all(), "padding must get zeros"
