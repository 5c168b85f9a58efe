"""Attention of bfloat16 queries over an fp32 cache: in tiles where the CPU has them, against the torch reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.extend import ExtendMetadata, attention_extend_reference
from ramet.kernels.cpu import amx
from ramet.kernels.cpu.attention_extend_amx import with_bf16_queries
from ramet.kernels.cpu.ops import cpu_ops
from ramet.kernels.cpu.program import KernelStream

BF16 = torch.bfloat16
OPS = with_bf16_queries(cpu_ops(KernelStream(), torch.float32, head_dim=64))
# The kernel is these instructions, which no other CPU can run; that those are left to others is tested everywhere.
needs_tiles = pytest.mark.skipif(not amx.has_tiles(), reason="this CPU has no tiles of bfloat16")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[1, 2], autouse=True)
def on_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Work shared out among so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("head_dim", [16, 64])
def test_decode_attention_of_bf16_queries_is_that_of_fp32_ones_rounded(head_dim: int) -> None:
    table = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
    k_cache, v_cache = draw(7, 2, 8, head_dim, seed=1), draw(7, 2, 8, head_dim, seed=2)
    q, lens = draw(2, 4, head_dim).to(BF16), [17, 24]
    meta = DecodeMetadata(torch.tensor(lens).int(), torch.tensor([0, 1]).int(), table, kv_lens_host=lens)
    actual, expected = (OPS.attention_decode(x, k_cache, v_cache, meta, 0.3, None, None) for x in (q, q.float()))
    assert torch.equal(actual, expected.to(BF16))
    out = torch.empty_like(q)
    assert OPS.attention_decode(q, k_cache, v_cache, meta, 0.3, None, out) is out
    assert torch.equal(out, actual)


class Sequences:
    """New tokens of some sequences over their pages; whatever no sequence holds is NaN."""

    def __init__(self, q_lens: list[int], kv_lens: list[int], num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        count, page_size = len(q_lens), 8
        width = -(-max(kv_lens) // page_size)
        order = 1 + torch.randperm(count * width, generator=torch.Generator().manual_seed(0))
        self.table = order.view(count, width).to(torch.int32)
        shape = 1 + count * width, num_kv_heads, page_size, head_dim
        self.k_cache, self.v_cache = draw(*shape, seed=1), draw(*shape, seed=2)
        for cache in (self.k_cache, self.v_cache):
            held = torch.zeros(shape[0], page_size, dtype=torch.bool)
            for row, kv_len in enumerate(kv_lens):
                for position in range(kv_len):
                    held[self.table[row, position // page_size], position % page_size] = True
            cache.masked_fill_(~held[:, None, :, None], torch.nan)
        # Strided, as a view of a fused projection is; scores far apart, so that a largest one is often replaced.
        self.q = (draw(sum(q_lens), num_heads + 2, head_dim) * 4).to(BF16)[:, 1:-1]
        self.q_lens, self.kv_lens = q_lens, kv_lens

    def meta(self, q_lens: list[int], kv_lens: list[int]) -> ExtendMetadata:
        starts = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
        rows = torch.arange(len(q_lens), dtype=torch.int32)
        lens = torch.tensor(kv_lens, dtype=torch.int32)
        return ExtendMetadata(starts, lens, rows, self.table, max(q_lens), max(kv_lens), q_lens, kv_lens)

    def attend(self, window: int | None) -> Tensor:
        meta = self.meta(self.q_lens, self.kv_lens)
        return OPS.attention_extend(self.q, self.k_cache, self.v_cache, meta, 0.2, window, None)

    def reference(self, window: int | None) -> Tensor:
        meta = self.meta(self.q_lens, self.kv_lens)
        return attention_extend_reference(self.q.float(), self.k_cache, self.v_cache, meta, 0.2, window)


@needs_tiles
@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 32), (8, 1, 128), (2, 1, 96)])
def test_extend_attention_in_tiles_equals_the_reference(
    window: int | None, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    sequences = Sequences([1, 37, 0, 16, 90, 3], [1, 37, 5, 600, 95, 320], num_heads, num_kv_heads, head_dim)
    actual, expected = sequences.attend(window), sequences.reference(window)
    assert actual.dtype is BF16
    difference = (actual.float() - expected).abs()
    assert float(difference.max()) < 0.06, f"max {difference.max():.1e}, mean {difference.mean():.1e}"
    assert float(difference.mean()) < 0.003, f"max {difference.max():.1e}, mean {difference.mean():.1e}"


@needs_tiles
@pytest.mark.parametrize("window", [None, 130])
def test_a_token_attends_alike_in_every_chunk(window: int | None) -> None:
    whole = Sequences([700], [700], 6, 2, 64)
    expected = whole.attend(window)
    for chunk in (1, 33, 256, 300):
        parts = []
        for begin in range(0, 700, chunk):
            end = min(begin + chunk, 700)
            meta = whole.meta([end - begin], [end])
            parts.append(
                OPS.attention_extend(whole.q[begin:end], whole.k_cache, whole.v_cache, meta, 0.2, window, None)
            )
        assert torch.equal(torch.cat(parts), expected), chunk


@pytest.mark.parametrize("head_dim", [16, 48])
def test_extend_attention_of_other_head_sizes_is_that_of_fp32_queries_rounded(head_dim: int) -> None:
    sequences = Sequences([5, 20], [9, 20], 4, 2, head_dim)
    actual, expected = sequences.attend(None), sequences.reference(None)
    torch.testing.assert_close(actual.float(), expected, atol=1e-4, rtol=2**-8 * 1.01)


def test_without_tiles_bfloat16_queries_are_those_of_fp32_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "has_tiles", lambda: False)
    sequences = Sequences([5, 20], [9, 20], 4, 2, 64)
    torch.testing.assert_close(sequences.attend(None).float(), sequences.reference(None), atol=1e-4, rtol=2**-8 * 1.01)
