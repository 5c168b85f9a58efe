from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata, attention_decode_reference
from ramet.kernels.attention.plan import TileConfig, TreeCostModel, TreeCosts, tree_config
from ramet.kernels.attention.tree import SharedSegment, TreePlan, TreeWork, find_shared_segments, plan_tree
from ramet.kernels.attention.tree_triton import attention_tree_triton

# The `cases` fixture is tests/kernels/conftest.py's AttentionCases: a conftest cannot be imported, hence Any.

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)
PAGE = 16


def always(num_members: int, num_tokens: int) -> bool:
    return True


def share(page_table: Tensor, rows: Tensor, members: list[int], num_pages: int) -> None:
    """Give batch rows `members` the first `num_pages` pages of the first of them."""
    for row in members[1:]:
        page_table[rows[row], :num_pages] = page_table[rows[members[0]], :num_pages]


def batch_table(page_table: Tensor, rows: Tensor) -> np.ndarray[Any, np.dtype[np.int32]]:
    return page_table[rows.long()].numpy()


def as_sets(segments: list[SharedSegment]) -> set[tuple[int, int, tuple[int, ...]]]:
    return {(s.start, s.end, tuple(sorted(s.member_rows.tolist()))) for s in segments}


def three_levels(cases: Any, head_dim: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Rows 0-5 share two pages, of them 1-4 three more, of them 2 and 3 one more; row 6 is alone, row 7 is padding."""
    lens = [70, 90, 120, 104, 81, 33, 50, 0]
    k_cache, v_cache, page_table, rows = cases.paged_cache(lens, 2, head_dim, PAGE)
    share(page_table, rows, [0, 1, 2, 3, 4, 5], 2)
    share(page_table, rows, [1, 2, 3, 4], 5)
    share(page_table, rows, [2, 3], 6)
    return k_cache, v_cache, page_table, rows, lens


def test_levels_are_found_from_page_tables(cases: Any) -> None:
    _, _, page_table, rows, lens = three_levels(cases)
    kv_lens = np.array(lens, dtype=np.int32)
    found = find_shared_segments(batch_table(page_table, rows), kv_lens, PAGE, always)
    assert as_sets(found) == {(0, 32, (0, 1, 2, 3, 4, 5)), (32, 80, (1, 2, 3, 4)), (80, 96, (2, 3))}
    assert all(s.representative_row in s.member_rows for s in found)


def test_a_segment_that_is_not_worth_it_is_left_to_those_below(cases: Any) -> None:
    _, _, page_table, rows, lens = three_levels(cases)
    kv_lens = np.array(lens, dtype=np.int32)
    found = find_shared_segments(batch_table(page_table, rows), kv_lens, PAGE, lambda n, tokens: n < 6 and tokens > 16)
    assert as_sets(found) == {(0, 80, (1, 2, 3, 4))}


def test_the_page_of_the_last_token_is_never_shared() -> None:
    table = np.tile(np.arange(1, 5, dtype=np.int32), (3, 1))
    found = find_shared_segments(table, np.array([32, 33, 49], dtype=np.int32), PAGE, always)
    assert as_sets(found) == {(0, 16, (0, 1, 2)), (16, 32, (1, 2))}


def test_stale_entries_beyond_a_row_are_not_shared() -> None:
    table = np.full((2, 6), 9, dtype=np.int32)
    table[:, 0] = 3
    assert as_sets(find_shared_segments(table, np.array([17, 20], dtype=np.int32), PAGE, always)) == {(0, 16, (0, 1))}
    assert find_shared_segments(table, np.array([1, 1], dtype=np.int32), PAGE, always) == []


@pytest.mark.parametrize("seed", range(20))
def test_found_segments_equal_a_brute_force_trie(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_rows, width = int(rng.integers(1, 12)), 8
    paths = rng.integers(0, 2, (num_rows, width))
    kv_lens = rng.integers(0, width * PAGE, num_rows).astype(np.int32)
    ids: dict[tuple[int, ...], int] = {}
    table = np.array(
        [[ids.setdefault(tuple(p[: i + 1]), len(ids) + 1) for i in range(width)] for p in paths.tolist()],
        dtype=np.int32,
    )
    expected: dict[tuple[int, ...], list[int]] = {}  # members -> pages that exactly they share
    for page in ids.values():
        members = [b for b in range(num_rows) if page in table[b, : max(0, int(kv_lens[b]) - 1) // PAGE].tolist()]
        if len(members) > 1:
            expected.setdefault(tuple(members), []).append(page)
    found = find_shared_segments(table, kv_lens, PAGE, always)
    assert {tuple(sorted(s.member_rows.tolist())): (s.end - s.start) // PAGE for s in found} == {
        members: len(pages) for members, pages in expected.items()
    }


def test_finding_segments_of_a_full_batch_takes_about_a_millisecond() -> None:
    table = np.arange(256 * 544, dtype=np.int32).reshape(256, 544)
    table[:, :256] = table[0, :256]
    for first in range(0, 256, 64):
        table[first : first + 64, :512] = table[first, :512]
    kv_lens = np.full(256, 540 * PAGE, dtype=np.int32)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        found = find_shared_segments(table, kv_lens, PAGE, always)
        times.append(time.perf_counter() - begin)
    assert len(found) == 5
    assert min(times) < 5e-3, f"fastest of ten: {min(times) * 1e3:.2f} ms"  # five times what an idle machine takes


def check_work(work: TreeWork, segments: list[SharedSegment], group: int) -> None:
    """Every member sees every key of its segments exactly once, and every slot is written exactly once."""
    seen: dict[int, list[int]] = {}
    for representative, low, high, first, count in work.items.tolist():
        assert low < high
        assert 0 < count * group <= max(TILE.block_m, group)
        members = work.members[first : first + count].tolist()
        segment = next(s for s in segments if set(members) <= set(s.member_rows.tolist()) and s.start <= low < s.end)
        assert representative == segment.representative_row
        assert (low - segment.start) % TILE.block_n == 0
        for row in members:
            seen.setdefault(row, []).extend(range(low, high))
    for row, start in enumerate(work.kv_starts.tolist()):
        assert sorted(seen.get(row, [])) == list(range(start))
    assert sorted(work.member_slots.tolist()) == list(range(len(work.members)))
    for slot, row in zip(work.member_slots, work.members, strict=True):
        assert work.slot_offsets[row] <= slot < work.slot_offsets[row + 1]


@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("target_programs", [1, 16, 64, 1000])
def test_plan_covers_every_shared_key_once(cases: Any, group: int, target_programs: int) -> None:
    _, _, page_table, rows, lens = three_levels(cases)
    segments = find_shared_segments(batch_table(page_table, rows), np.array(lens, dtype=np.int32), PAGE, always)
    work = plan_tree(segments, len(lens), group, 2, TILE, target_programs)
    assert work is not None
    check_work(work, segments, group)


def test_plan_lengthens_items_until_they_fit_and_gives_up_when_they_cannot() -> None:
    segments = [SharedSegment(0, 0, 160, np.arange(8, dtype=np.int32))]
    work = plan_tree(segments, 8, 4, 1, TILE, 1000, max_items=4, max_slots=16)
    assert work is not None
    assert len(work.items) <= 4
    assert len(work.members) <= 16
    check_work(work, segments, 4)
    assert plan_tree(segments, 8, 4, 1, TILE, 1000, max_items=1) is None
    assert plan_tree([], 8, 4, 1, TILE, 1000) is None


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "num_parts", "merge", "target_programs"),
    [
        (4, 32, 1, "fused", 1),
        (6, 24, 1, "kernel", 64),
        (4, 32, 2, "fused", 64),
        (6, 24, 2, "fused", 1),
        (4, 32, 2, "kernel", 64),
        (2, 64, 2, "kernel", 1),
    ],
)
def test_tree_equals_plain_attention(
    cases: Any, num_heads: int, head_dim: int, num_parts: int, merge: str, target_programs: int
) -> None:
    k_cache, v_cache, page_table, rows, lens = three_levels(cases, head_dim)
    kv_lens = torch.tensor(lens, dtype=torch.int32)
    q = torch.randn(len(lens), num_heads, head_dim)
    plan = TreePlan(len(lens) + 3, TILE, torch.device(DEVICE), max_items=64, max_slots=128)
    segments = find_shared_segments(batch_table(page_table, rows), kv_lens.numpy(), PAGE, always)
    work = plan_tree(segments, len(lens), num_heads // 2, 2, TILE, target_programs, 64, 128)
    assert work is not None
    args = k_cache.to(DEVICE), v_cache.to(DEVICE)
    counters = torch.zeros(len(lens) * 2, dtype=torch.int32, device=DEVICE) if merge == "fused" else None
    for load, growth in ((work, 0), (work, 1), (None, 1)):  # suffixes grow under one plan; then the plan is dropped
        plan.load(load)
        longer = torch.where(kv_lens % PAGE == 0, kv_lens, kv_lens + growth)
        expected = attention_decode_reference(q, k_cache, v_cache, DecodeMetadata(longer, rows, page_table), 0.3)
        meta = DecodeMetadata(
            longer.to(DEVICE), rows.to(DEVICE), page_table.to(DEVICE), num_parts, False, plan, merge_counters=counters
        )
        out = torch.full_like(expected, torch.nan).to(DEVICE)
        assert attention_tree_triton(q.to(DEVICE), *args, meta, plan, 0.3, out, TILE) is out
        torch.testing.assert_close(out.cpu(), expected, rtol=2e-5, atol=2e-5)


def test_groups_of_one_row_are_correct(cases: Any) -> None:
    lens = [70, 50]
    k_cache, v_cache, page_table, rows = cases.paged_cache(lens, 1, 32, PAGE)
    q = torch.randn(2, 2, 32)
    kv_lens = torch.tensor(lens, dtype=torch.int32)
    segments = [SharedSegment(0, 0, 64, np.array([0], dtype=np.int32))]
    plan = TreePlan(2, TILE, torch.device(DEVICE), max_items=8, max_slots=16)
    plan.load(plan_tree(segments, 2, 2, 1, TILE, 2))
    expected = attention_decode_reference(q, k_cache, v_cache, DecodeMetadata(kv_lens, rows, page_table), 0.3)
    meta = DecodeMetadata(kv_lens.to(DEVICE), rows.to(DEVICE), page_table.to(DEVICE), 1, False, plan)
    out = attention_tree_triton(
        q.to(DEVICE), k_cache.to(DEVICE), v_cache.to(DEVICE), meta, plan, 0.3, suffix_config=TILE
    )
    torch.testing.assert_close(out.cpu(), expected, rtol=2e-5, atol=2e-5)


def test_cost_model_takes_long_shared_prefixes_and_leaves_short_ones() -> None:
    model = TreeCostModel(32, 8, 128, tree_config(128, torch.bfloat16, 4))
    assert model.is_worth(64, 8192)
    assert not model.is_worth(1, 8192)
    assert model.should_use_tree([(64, 8192)], 64 * 100)
    assert not model.should_use_tree([(2, 64)], 2 * 100)
    assert not model.should_use_tree([], 1000)
    assert not model.should_use_tree([(64, 256)], 64 * 100_000), "a gain lost in the rest is not taken"


def test_cost_model_counts_the_parts_that_the_plan_writes() -> None:
    """The time of parts alone, at one byte a second, is their bytes; a cut of fixed length predicted other numbers."""
    config = tree_config(128, torch.bfloat16, 4)
    costs = TreeCosts(tree_bandwidth=1e30, tree_rate=1e30, part_bandwidth=1.0)
    for sizes in ([(64, 8192)], [(256, 512)], [(32, 4096), (7, 300), (7, 40)], [(2, 64)]):
        segments, row = [], 0
        for count, tokens in sizes:
            segments.append(SharedSegment(row, 0, tokens, np.arange(row, row + count, dtype=np.int32)))
            row += count
        work = plan_tree(segments, row, 4, 8, config, 132)
        assert work is not None
        seconds = TreeCostModel(32, 8, 128, config, costs).tree_s(sizes)
        assert seconds == pytest.approx(len(work.members) * 32 * 129 * 8)


def test_cost_model_reads_what_the_cache_holds_from_the_cache() -> None:
    config = tree_config(128, torch.bfloat16, 4)
    rates = TreeCosts(tree_bandwidth=1e12, tree_rate=1e30, part_bandwidth=1e12)
    plain, cached = (TreeCostModel(32, 8, 128, config, replace(rates, l2_bandwidth=rate)) for rate in (None, 4e12))
    read, parts = 8192 * 2 * 8 * 128 * 2 / 1e12, 2 * 64 * 8 * 32 * 129 * 4 / 1e12
    assert plain.tree_s([(64, 8192)]) == pytest.approx(2 * read + parts), "two tiles of members"
    assert cached.tree_s([(64, 8192)]) == pytest.approx(1.25 * read + parts / 4)
    small = TreeCostModel(32, 8, 128, config, replace(rates, l2_bandwidth=4e12, l2_bytes=1 << 20))
    assert small.tree_s([(64, 8192)]) == pytest.approx(1.25 * read + parts), "the parts do not fit"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("has_side_stream", [False, True])
def test_a_captured_graph_follows_later_plans_and_lengths(cases: Any, has_side_stream: bool) -> None:
    k_cache, v_cache, page_table, rows, lens = three_levels(cases)
    kv_lens = torch.tensor(lens, dtype=torch.int32)
    q = torch.randn(len(lens), 4, 32)
    segments = find_shared_segments(batch_table(page_table, rows), kv_lens.numpy(), PAGE, always)
    stream = torch.cuda.Stream() if has_side_stream else None  # type: ignore[no-untyped-call]
    plan = TreePlan(len(lens), TILE, torch.device(DEVICE), max_items=64, max_slots=128, side_stream=stream)
    static_lens = kv_lens.to(DEVICE)
    meta = DecodeMetadata(static_lens, rows.to(DEVICE), page_table.to(DEVICE), 2, False, plan)
    args = q.to(DEVICE), k_cache.to(DEVICE), v_cache.to(DEVICE), meta, plan, 0.3
    attention_tree_triton(*args, suffix_config=TILE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_tree_triton(*args, suffix_config=TILE)
    for target_programs, growth in ((1, 0), (64, 1), (0, 1)):
        work = plan_tree(segments, len(lens), 2, 2, TILE, target_programs, 64, 128) if target_programs else None
        plan.load(work)
        longer = torch.where(kv_lens % PAGE == 0, kv_lens, kv_lens + growth)
        static_lens.copy_(longer)
        out.fill_(torch.nan)
        graph.replay()
        expected = attention_decode_reference(q, k_cache, v_cache, DecodeMetadata(longer, rows, page_table), 0.3)
        torch.testing.assert_close(out.cpu(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [1, 3, 8, 71])
def test_a_tile_holds_at_least_one_member(dtype: torch.dtype, group: int) -> None:
    for head_dim in (64, 128, 256):
        assert tree_config(head_dim, dtype, group).block_m >= group
