from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ramet.kernels.attention.extend import ExtendMetadata, attention_extend_reference
from ramet.kernels.attention.extend_triton import attention_extend_triton
from ramet.kernels.attention.plan import TileConfig

# The `cases` fixture is tests/kernels/conftest.py's AttentionCases: a conftest cannot be imported, hence Any.


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = TileConfig(block_m=16, block_n=32, num_warps=4, num_stages=2)


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
    assert attention_extend_reference(q, k_cache, v_cache, meta, 0.3, window, out) is out
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
    whole = attention_extend_reference(q, k_cache, v_cache, make_metadata([700, 30], [700, 30], rows, page_table), 0.2)
    for low, high in [(0, 1), (1, 600), (600, 700)]:
        meta = make_metadata([high - low], [high], rows[:1], page_table)
        part = attention_extend_reference(q[low:high], k_cache, v_cache, meta, 0.2)
        torch.testing.assert_close(part, whole[low:high], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (3, 1, 24), (7, 1, 64), (2, 2, 80)])
def test_kernel_equals_the_reference(
    cases: Any, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    q_lens, kv_lens = [1, 5, 33, 1, 17], [1, 70, 33, 66, 20]
    k_cache, v_cache, page_table, rows = cases.paged_cache(kv_lens, num_kv_heads, head_dim)
    cases.poison_unused(k_cache, v_cache, page_table, rows, kv_lens)
    q = torch.randn(sum(q_lens), num_heads + 2, head_dim)[:, 1:-1]  # strided, as a view of a fused projection is
    meta = make_metadata(q_lens, kv_lens, rows, page_table)
    expected = attention_extend_reference(q, k_cache, v_cache, meta, 0.3, window)
    meta = make_metadata(q_lens, kv_lens, rows.to(DEVICE), page_table.to(DEVICE))
    meta.cu_seqlens_q, meta.kv_lens = meta.cu_seqlens_q.to(DEVICE), meta.kv_lens.to(DEVICE)
    out = torch.full(expected.shape, torch.nan, device=DEVICE)
    args = q.to(DEVICE), k_cache.to(DEVICE), v_cache.to(DEVICE)
    assert attention_extend_triton(*args, meta, 0.3, window, out, TILE) is out
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-5, atol=2e-5)


def test_chunks_batches_and_tiles_do_not_change_what_the_kernel_gives(cases: Any) -> None:
    k_cache, v_cache, page_table, rows = (x.to(DEVICE) for x in cases.paged_cache([150, 40], 1, 32))
    q = torch.randn(190, 2, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run(low: int, high: int, q_lens: list[int], kv_lens: list[int], tile: TileConfig) -> Tensor:
        meta = make_metadata(q_lens, kv_lens, rows[: len(q_lens)], page_table)
        meta.cu_seqlens_q, meta.kv_lens = meta.cu_seqlens_q.to(DEVICE), meta.kv_lens.to(DEVICE)
        return attention_extend_triton(q[low:high], k_cache, v_cache, meta, 0.2, None, None, tile)

    whole = run(0, 190, [150, 40], [150, 40], TILE)
    for low, high in [(0, 1), (1, 97), (97, 150)]:
        for tile in (TILE, TileConfig(block_m=64, block_n=32, num_warps=4, num_stages=2)):
            part = run(low, high, [high - low], [high], tile)
            difference = (part - whole[low:high]).abs().max()
            # Another tile may sum in another order; so may the interpreter (numpy) for another number of rows.
            is_exact = DEVICE == "cuda" and tile == TILE
            assert difference <= (0 if is_exact else 1e-6), f"max {difference:.2e} in [{low}, {high})"


def test_tokens_before_the_first_sequence_and_sequences_without_tokens_are_left_alone(cases: Any) -> None:
    """What a graph gives: decode rows first, their results in place already, and padding behind."""
    q_lens, kv_lens = [5, 33], [50, 40]
    k_cache, v_cache, page_table, rows = cases.paged_cache([*kv_lens, 1], 2, 32)
    q = torch.randn(60, 4, 32)
    meta = make_metadata(q_lens, kv_lens, rows[:2], page_table)
    expected = attention_extend_reference(q[9:47], k_cache, v_cache, meta, 0.3)
    starts, lens = torch.tensor([9, 14, 47, 47], dtype=torch.int32), torch.tensor([50, 40, 0], dtype=torch.int32)
    starts, lens, rows, page_table = (t.to(DEVICE) for t in (starts, lens, rows, page_table))
    offset = ExtendMetadata(starts, lens, rows, page_table, 60, 50)
    on_device = (q.to(DEVICE), k_cache.to(DEVICE), v_cache.to(DEVICE), offset, 0.3, None)
    for config in (TILE, TileConfig(32, 32, 4, 2)):
        out = torch.full_like(q, 7.0).to(DEVICE)
        attention_extend_triton(*on_device, out, config)
        torch.testing.assert_close(out[9:47].cpu(), expected, rtol=2e-3, atol=2e-3)
        assert (out[:9] == 7.0).all()
        assert (out[47:] == 7.0).all()
    out = torch.full_like(q, 7.0).to(DEVICE)
    attention_extend_reference(*on_device, out)
    torch.testing.assert_close(out[9:47].cpu(), expected, rtol=1e-5, atol=1e-5)
    assert (out[:9] == 7.0).all()
