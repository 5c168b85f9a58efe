from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from ramet.kernels.attention import decode as module
from ramet.kernels.attention.decode import DecodeMetadata, attention_decode_reference
from ramet.kernels.attention.decode_triton import attention_decode_triton, count_parts
from ramet.kernels.attention.plan import TileConfig, choose_num_parts
from ramet.kernels.triton_support import jit, tl

# The `cases` fixture is tests/kernels/conftest.py's AttentionCases: a conftest cannot be imported, hence Any.

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)


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
    assert attention_decode_reference(q, k_cache, v_cache, meta, 0.3, window, out) is out
    for b, n in enumerate(lens[:-1]):
        expected = cases.naive_attention(q[b], k_cache, v_cache, page_table[rows[b]], n - 1, 0.3, window)
        torch.testing.assert_close(out[b].double(), expected, rtol=1e-5, atol=1e-5)
    assert out[-1].eq(0).all(), "padding must get zeros"


@pytest.mark.parametrize("window", [None, 1, 9, 40])
@pytest.mark.parametrize(
    ("num_parts", "of_a_row", "fused_merge"),
    [(1, False, False), (3, True, False), (3, True, True), (5, False, True), (9, False, False), (40, False, True)],
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (3, 1, 80)])
def test_kernel_equals_the_reference(
    cases: Any,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    fused_merge: bool,
    num_parts: int,
    of_a_row: bool,
    window: int | None,
) -> None:
    lens = [1, 50, 0, 100, 16]
    k_cache, v_cache, page_table, rows = cases.paged_cache(lens, num_kv_heads, head_dim)
    q = torch.randn(len(lens), num_heads + 2, head_dim)[:, 1:-1]  # strided, as a view of a fused projection is
    kv_lens = torch.tensor(lens, dtype=torch.int32)
    expected = attention_decode_reference(q, k_cache, v_cache, DecodeMetadata(kv_lens, rows, page_table), 0.3, window)
    cases.poison_unused(k_cache, v_cache, page_table, rows, lens)
    counters = torch.zeros(len(lens) * num_kv_heads, dtype=torch.int32, device=DEVICE) if fused_merge else None
    meta = DecodeMetadata(
        kv_lens.to(DEVICE), rows.to(DEVICE), page_table.to(DEVICE), num_parts, of_a_row, merge_counters=counters
    )
    args = q.to(DEVICE), k_cache.to(DEVICE), v_cache.to(DEVICE)
    for _ in range(2):  # the counters serve the next launch as well
        out = torch.full(expected.shape, torch.nan, device=DEVICE)
        assert attention_decode_triton(*args, meta, 0.3, window, out, TILE) is out
        torch.testing.assert_close(out.cpu(), expected, rtol=2e-5, atol=2e-5)
    assert counters is None or counters.eq(0).all()


@pytest.mark.parametrize("num_parts", [1, 3])
def test_a_tile_within_a_page_gives_the_bits_of_a_tile_over_several(cases: Any, num_parts: int) -> None:
    """The same keys in pages of 64, one page id a tile of 32, and in pages of 16."""
    lens = [70, 5, 0, 200]
    k_cache, v_cache, page_table, rows = cases.paged_cache(lens, 2, 32, page_size=64)
    cases.poison_unused(k_cache, v_cache, page_table, rows, lens)
    q, kv_lens = torch.randn(len(lens), 4, 32, device=DEVICE), torch.tensor(lens, dtype=torch.int32)

    def run(k_cache: Tensor, v_cache: Tensor, table: Tensor) -> Tensor:
        meta = DecodeMetadata(kv_lens.to(DEVICE), rows.to(DEVICE), table.to(DEVICE), num_parts)
        config = TileConfig(16, 32, 4, 2)
        return attention_decode_triton(q, k_cache.to(DEVICE), v_cache.to(DEVICE), meta, 0.3, config=config)

    def in_pages_of_16(cache: Tensor) -> Tensor:
        return cache.view(-1, 2, 4, 16, 32).transpose(1, 2).reshape(-1, 2, 16, 32)

    table = (page_table.unsqueeze(-1) * 4 + torch.arange(4, dtype=torch.int32)).flatten(1)
    assert torch.equal(run(k_cache, v_cache, page_table), run(in_pages_of_16(k_cache), in_pages_of_16(v_cache), table))


def test_kernel_gives_a_row_the_same_bits_in_any_batch(cases: Any) -> None:
    lens = [70, 5, 120]
    k_cache, v_cache, page_table, rows = (x.to(DEVICE) for x in cases.paged_cache(lens, 1, 32))
    q = torch.randn(3, 2, 32, device=DEVICE)
    kv_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    whole = attention_decode_triton(
        q, k_cache, v_cache, DecodeMetadata(kv_lens, rows, page_table, 3, True), 0.2, config=TILE
    )
    for b in range(3):
        meta = DecodeMetadata(kv_lens[b : b + 1], rows[b : b + 1], page_table, 3, True)
        alone = attention_decode_triton(q[b : b + 1], k_cache, v_cache, meta, 0.2, config=TILE)
        assert torch.equal(alone[0], whole[b])


def cut(kv_lens: list[int], num_parts: int, of_a_row: bool, kv_starts: list[int] | None = None) -> list[int]:
    """The number of parts of each row, with tiles of 64 keys."""
    batch, block = len(kv_lens), 1 << (len(kv_lens) - 1).bit_length()
    counts = torch.full((block,), -1, dtype=torch.int32, device=DEVICE)
    lens, starts = (torch.tensor(x or [0], dtype=torch.int32, device=DEVICE) for x in (kv_lens, kv_starts))
    _store_counts[(1,)](lens, starts, counts, batch, num_parts, kv_starts is not None, of_a_row, block)
    assert counts[batch:].eq(0).all()
    return counts[:batch].tolist()


@jit
def _store_counts(  # type: ignore[no-untyped-def]
    lens_ptr, starts_ptr, out_ptr, batch, num_parts, HAS_TREE: tl.constexpr, IS_FIXED: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.arange(0, BLOCK)
    counts = count_parts(lens_ptr, starts_ptr, batch, 0, num_parts, index, False, HAS_TREE, IS_FIXED, 64, 16)
    tl.store(out_ptr + index, counts)


def test_one_long_row_among_short_ones_has_most_parts() -> None:
    """No program reads much more keys than the others: on 132 processors, 49 parts for each of 8 KV heads."""
    num_parts = choose_num_parts(8, 132)
    assert num_parts == 49
    lens = [500] * 20 + [16_384] + [500] * 43
    counts = cut(lens, num_parts, False)
    assert counts == [1] * 20 + [16] + [1] * 43
    assert 1.1 * sum(lens) / num_parts >= 16_384 / 16
    assert cut([1100] * 256, num_parts, False) == [1] * 256, "the card is full without"
    assert cut([8192], num_parts, False) == [43], "parts are whole tiles"
    assert cut([130], num_parts, False) == [3]
    assert cut([1_000_000], 400, False) == [64], "one program merges them"
    assert cut([0, 0, 0, 0], num_parts, False) == [1] * 4, "an empty row has a part, which writes its zeros"


def test_parts_are_of_what_a_row_does_not_share() -> None:
    assert cut([4196, 4196, 1100], 4, False, [4096, 4096, 0]) == [1, 1, 4]
    assert cut([4196, 4196, 1100], 4, True, [4096, 4096, 0]) == [2, 2, 4]


@pytest.mark.parametrize("of_a_row", [False, True])
def test_there_is_a_program_for_every_part(of_a_row: bool) -> None:
    numbers = random.Random(0)
    for _ in range(30):
        lens = [int(numbers.paretovariate(0.6) * 20) % 50_000 for _ in range(numbers.randrange(1, 17))]
        num_parts = numbers.randrange(1, 60)
        counts = cut(lens, num_parts, of_a_row)
        kv_lens = torch.tensor(lens, dtype=torch.int32)
        assert sum(counts) <= DecodeMetadata(kv_lens, kv_lens, kv_lens, num_parts, of_a_row).most_parts
        assert min(counts) >= 1
        if of_a_row:
            assert [cut([n], num_parts, True)[0] for n in lens] == counts, "other rows change nothing"
