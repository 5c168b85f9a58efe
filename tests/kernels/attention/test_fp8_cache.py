"""KV caches in FP8: what is stored, and that each reader sees the numbers that were stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata, attention_decode_reference
from ramet.kernels.attention.decode_triton import attention_decode_triton
from ramet.kernels.attention.extend import ExtendMetadata, attention_extend_reference, gather_pages
from ramet.kernels.attention.extend_triton import attention_extend_triton
from ramet.kernels.attention.plan import TileConfig
from ramet.kernels.attention.tree import TreePlan, find_shared_segments, plan_tree
from ramet.kernels.attention.tree_triton import attention_tree_triton
from ramet.kernels.layers.kv_fp8 import FP8, cell_bytes, round_heads, scales_from, scales_of, values_of, write_heads
from ramet.kernels.layers.rope import rope_and_write_kv_reference, rope_and_write_kv_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def empty_cache(num_pages: int, num_heads: int, page_size: int, head_dim: int) -> Tensor:
    storage = torch.zeros(num_pages, num_heads, page_size * cell_bytes(head_dim, FP8), dtype=torch.uint8, device=DEVICE)
    return values_of(storage, page_size)


def in_fp8(cache: Tensor) -> Tensor:
    """A cache fp32 [N, K, P, D], rounded."""
    num_pages, num_heads, page_size, head_dim = cache.shape
    found = empty_cache(num_pages, num_heads, page_size, head_dim)
    slots = torch.arange(num_pages * page_size)
    heads = cache.transpose(1, 2).reshape(-1, num_heads, head_dim)
    write_heads(heads.to(DEVICE), (slots // page_size).to(DEVICE), (slots % page_size).to(DEVICE), found)
    return found


def exact(cache: Tensor) -> Tensor:
    """The numbers of a cache, fp32 [N, K, P, D]."""
    pages = torch.arange(cache.shape[0], device=DEVICE)[:, None]
    return gather_pages(cache, pages, torch.float32)


def test_a_head_has_the_scale_with_the_least_error_of_an_octave() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator) * torch.logspace(-3, 5, 200)[:, None]
    x[7] = 0
    x[8] = torch.tensor([448.0, -449.0] * 16)
    x[9, 0] = 500.0 * float(x[9].abs().max())
    values, byte = round_heads(x)
    scale = scales_from(byte)[:, None]
    restored = values.view(FP8).float() * scale
    # Three bits of mantissa: at most half a step from each value, or from the smallest normal one.
    assert bool(((restored - x).abs() <= torch.maximum(x.abs() / 16, scale * 2**-10) * 1.001).all())
    assert not restored[7].any()
    assert torch.equal(restored.bfloat16().float(), restored), "a value is exact in 16 bits"
    error = (restored - x).square().sum(1)
    every = scales_from(torch.arange(256))
    fits = every >= x.abs().amax(1, keepdim=True) / 448 * (1 - 1e-6)
    for first_scales in range(8):  # torch's own conversion with each of the scales that a head may have
        other = every[fits.int().argmax(1) + first_scales][:, None]
        theirs = (x / other).clamp(-448, 448).to(FP8).float() * other
        assert bool((error <= (theirs - x).square().sum(1) * (1 + 1e-5)).all())


def test_a_head_beyond_all_scales_keeps_what_fits() -> None:
    values, byte = round_heads(torch.tensor([[1e9, -1.0], [1e-12, 0.0], [float("inf"), 1.0]]))
    restored = values.view(FP8).float() * scales_from(byte)[:, None]
    assert torch.equal(restored[0], torch.tensor([448.0 * 1.875 * 2**11, 0.0]))
    assert not restored[1].any()
    assert bool(restored.isfinite().all())


def test_a_cache_returns_what_was_written_and_nothing_else_changes() -> None:
    cache = empty_cache(4, 2, 8, 24)
    x = torch.randn(3, 2, 24, device=DEVICE)
    write_heads(x, torch.tensor([2, 1, 3], device=DEVICE), torch.tensor([7, 0, 4], device=DEVICE), cache)
    found = exact(cache)
    written = torch.stack([found[2, :, 7], found[1, :, 0], found[3, :, 4]])
    torch.testing.assert_close(written, x, rtol=1 / 15, atol=0.01)
    assert int((scales_of(cache) != 0).sum()) == 6
    assert int((found != 0).any(-1).sum()) == 6
    assert torch.equal(gather_pages(cache, torch.tensor([2], device=DEVICE), torch.bfloat16).float()[:, 7], written[0])


@pytest.mark.parametrize("has_norm", [False, True])
def test_the_writer_rounds_as_its_reference_does(has_norm: bool) -> None:
    num_tokens, num_heads, num_kv_heads, head_dim, page_size = 5, 6, 2, 24, 8
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(num_tokens, n, head_dim, generator=generator) for n in (num_heads, num_kv_heads, num_kv_heads)
    )
    k *= torch.logspace(-3, 3, num_tokens)[:, None, None]
    angles = torch.rand(64, head_dim // 2, generator=generator)
    norm = torch.rand(head_dim, generator=generator).to(DEVICE) if has_norm else None
    positions, slots = torch.arange(9, 9 + num_tokens), torch.tensor([9, 31, 8, 16, 30])
    found = []
    run: Any
    for run in (rope_and_write_kv_reference, rope_and_write_kv_triton):
        caches = [empty_cache(4, num_kv_heads, page_size, head_dim) for _ in range(2)]
        arguments = (q, k, v, angles.cos(), angles.sin(), positions.int(), slots.int())
        rotated = run(*(x.to(DEVICE) for x in arguments), *caches, norm, norm)
        found.append((rotated, *(exact(cache) for cache in caches), *(scales_of(cache) for cache in caches)))
    expected, ours = found
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    for i in (1, 2):  # sums of errors may differ in their last bits, and two scales be as good
        is_same = ours[i + 2] == expected[i + 2]
        assert float(is_same.float().mean()) > 0.9
        assert torch.equal(ours[i][is_same], expected[i][is_same])
        torch.testing.assert_close(ours[i], expected[i], rtol=1 / 7, atol=1e-3)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (3, 1, 80)])
def test_decode_and_extend_attend_to_the_stored_numbers(
    cases: Any, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None
) -> None:
    lens = [3, 50, 0, 100, 16]
    k, v, page_table, rows = cases.paged_cache(lens, num_kv_heads, head_dim)
    k_cache, v_cache = in_fp8(k * 3), in_fp8(v / 7)
    q = torch.randn(len(lens), num_heads, head_dim, device=DEVICE)
    kv_lens, rows, page_table = (x.to(DEVICE) for x in (torch.tensor(lens, dtype=torch.int32), rows, page_table))
    for num_parts in (1, 3):
        meta = DecodeMetadata(kv_lens, rows, page_table, num_parts)
        expected = attention_decode_reference(q, exact(k_cache), exact(v_cache), meta, 0.3, window)
        for run in (attention_decode_reference, attention_decode_triton):
            found = run(q, k_cache, v_cache, meta, 0.3, window)
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    q_lens = [2, 7, 0, 30, 16]
    q = torch.randn(sum(q_lens), num_heads, head_dim, device=DEVICE)
    starts = torch.tensor([0, *np.cumsum(q_lens)], dtype=torch.int32, device=DEVICE)
    extend = ExtendMetadata(starts, kv_lens, rows, page_table, max(q_lens), max(lens), q_lens, lens)
    expected = attention_extend_reference(q, exact(k_cache), exact(v_cache), extend, 0.3, window)
    found = attention_extend_reference(q, k_cache, v_cache, extend, 0.3, window)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    found = attention_extend_triton(q, k_cache, v_cache, extend, 0.3, window, config=TILE)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [1e-4, 1.0, 3e3])
def test_values_of_any_size_are_weighed_in_16_bits(cases: Any, size: float) -> None:
    """Weights are multiplied by the values' scales: small products must not vanish, nor large ones overflow."""
    lens = [3, 50, 0, 100]
    k, v, page_table, rows = cases.paged_cache(lens, 2, 32)
    v *= size * torch.logspace(-2, 0, v.shape[2])[:, None]
    k_cache, v_cache = in_fp8(k), in_fp8(v)
    q = torch.randn(len(lens), 4, 32, device=DEVICE)
    kv_lens, rows, page_table = (x.to(DEVICE) for x in (torch.tensor(lens, dtype=torch.int32), rows, page_table))
    for num_parts in (1, 3):
        meta = DecodeMetadata(kv_lens, rows, page_table, num_parts)
        expected = attention_decode_reference(q, exact(k_cache), exact(v_cache), meta, 0.3) / size
        found = attention_decode_triton(q.half(), k_cache, v_cache, meta, 0.3).float() / size
        torch.testing.assert_close(found, expected, rtol=3e-3, atol=1e-3)


def test_tree_attention_attends_to_the_stored_numbers(cases: Any) -> None:
    lens, page_size, num_shared = [70, 66, 90], 16, 4
    k, v, page_table, rows = cases.paged_cache(lens, 2, 32)
    page_table[rows[1:].long(), :num_shared] = page_table[rows[0].long(), :num_shared]
    k_cache, v_cache = in_fp8(k), in_fp8(v)
    q = torch.randn(len(lens), 4, 32, device=DEVICE)
    kv_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    plan = TreePlan(8, TILE, torch.device(DEVICE))
    table = page_table[rows.long()].numpy()
    segments = find_shared_segments(table, np.asarray(lens, dtype=np.int32), page_size, lambda members, tokens: True)
    assert segments
    plan.load(plan_tree(segments, len(lens), group=2, num_kv_heads=2, config=TILE, target_programs=4))
    meta = DecodeMetadata(kv_lens, rows.to(DEVICE), page_table.to(DEVICE))
    expected = attention_decode_reference(q, exact(k_cache), exact(v_cache), meta, 0.3)
    found = attention_tree_triton(q, k_cache, v_cache, meta, plan, 0.3, suffix_config=TILE)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
