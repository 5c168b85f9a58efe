"""bfloat16 on the CPU: compiled kernels that read and write it beside fp32, against the torch references."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata, attention_decode
from ramet.kernels.attention.extend import ExtendMetadata, attention_extend, attention_extend_reference
from ramet.kernels.cpu import amx as cpu_amx
from ramet.kernels.cpu import attention_extend_amx
from ramet.kernels.cpu import pointwise as cpu_pointwise
from ramet.kernels.cpu.amx import has_tiles
from ramet.kernels.layers import activation, norm, rope

BF16 = torch.bfloat16
# The kernel is these instructions, which no other CPU can run; that those are left to others is tested everywhere.
needs_tiles = pytest.mark.skipif(not has_tiles(), reason="this CPU has no tiles of bfloat16")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    """`actual` is `expected`, which is in fp32, rounded to bfloat16: but for ties that fp32 noise decides."""
    assert actual.dtype is BF16
    assert actual.shape == expected.shape
    relative = (actual.float() - expected).abs() / expected.abs().clamp(min=1e-6)
    assert float(relative.max()) < 2**-8 * 1.01
    assert float((actual != expected.to(BF16)).float().mean()) < 0.01


@pytest.fixture(params=[1, 2], autouse=True)
def on_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work shared out among so many threads, however little it is."""
    monkeypatch.setattr(cpu_pointwise, "_PARALLEL_VALUES", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("reads", [torch.float32, BF16])
@pytest.mark.parametrize("writes", [torch.float32, BF16])
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 576), (3, 7), (32, 64)])
def test_norms_beside_an_fp32_residual(reads: torch.dtype, writes: torch.dtype, num_tokens: int, size: int) -> None:
    x, residual, weight = draw(num_tokens, size).to(reads), draw(num_tokens, size, seed=1), draw(size, seed=2)
    alone = norm.rms_norm(x, weight, 1e-5, writes)
    normed, total = norm.fused_add_rms_norm(x, residual, weight, 1e-5, writes)
    expected_normed, expected_total = norm.fused_add_rms_norm_reference(x.float(), residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    for actual, expected in (
        (alone, norm.rms_norm_reference(x.float(), weight, 1e-5)),
        (normed, expected_normed),
    ):
        if writes is BF16:
            assert_rounded(actual, expected)
        else:
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def test_norms_return_the_dtype_of_what_they_normalise_unless_told() -> None:
    x, residual, weight = draw(2, 8).to(BF16), draw(2, 8, seed=1), draw(8, seed=2)
    assert norm.rms_norm(x, weight, 1e-5).dtype is BF16
    assert norm.fused_add_rms_norm(x, residual, weight, 1e-5)[0].dtype is torch.float32


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1536), (3, 5), (8, 48)])
def test_gated_activations(num_tokens: int, size: int) -> None:
    gate_up = (draw(num_tokens, 2 * size) * 3).to(BF16)
    exact = gate_up.float()
    assert_rounded(activation.silu_and_mul(gate_up), activation.silu_and_mul_reference(exact))
    actual, expected = activation.gelu_tanh_and_mul(gate_up), activation.gelu_tanh_and_mul_reference(exact)
    torch.testing.assert_close(actual.float(), expected, atol=1e-3, rtol=2**-8 * 1.01)  # 1 + tanh cancels in fp32


@pytest.mark.parametrize("with_norms", [False, True])
def test_rope_writes_an_fp32_cache(with_norms: bool) -> None:
    num_tokens, num_heads, num_kv_heads, page_size, head_dim = 5, 6, 2, 4, 64
    qkv = draw(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(BF16)
    q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    angles = draw(50, head_dim // 2, seed=1)
    positions = torch.tensor([7, 0, 49, 13, 14], dtype=torch.int32)
    slots = torch.tensor([9, 30, 4, 17, 18], dtype=torch.int32)
    norms = (draw(head_dim, seed=2), draw(head_dim, seed=3)) if with_norms else (None, None)
    caches = [[draw(9, num_kv_heads, page_size, head_dim, seed=s) for s in (4, 5)] for _ in range(2)]
    where = angles.cos(), angles.sin(), positions, slots
    actual = rope.rope_and_write_kv(q, k, v, *where, caches[0][0], caches[0][1], *norms)
    heads = q.float(), k.float(), v.float()
    expected = rope.rope_and_write_kv_reference(*heads, *where, caches[1][0], caches[1][1], *norms)
    assert_rounded(actual, expected)
    torch.testing.assert_close(caches[0][0], caches[1][0], atol=2e-5, rtol=0)
    assert torch.equal(caches[0][1], caches[1][1])


@pytest.mark.parametrize("head_dim", [16, 64])
def test_decode_attention_of_bf16_queries_is_that_of_fp32_ones_rounded(head_dim: int) -> None:
    table = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
    k_cache, v_cache = draw(7, 2, 8, head_dim, seed=1), draw(7, 2, 8, head_dim, seed=2)
    q, lens = draw(2, 4, head_dim).to(BF16), [17, 24]
    meta = DecodeMetadata(torch.tensor(lens).int(), torch.tensor([0, 1]).int(), table, kv_lens_host=lens)
    actual, expected = (attention_decode(x, k_cache, v_cache, meta, 0.3) for x in (q, q.float()))
    assert torch.equal(actual, expected.to(BF16))
    out = torch.empty_like(q)
    assert attention_decode(q, k_cache, v_cache, meta, 0.3, None, out) is out
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
        return attention_extend(self.q, self.k_cache, self.v_cache, meta, 0.2, window)

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
    assert attention_extend_amx.takes(sequences.q, sequences.k_cache, sequences.table)
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
            parts.append(attention_extend(whole.q[begin:end], whole.k_cache, whole.v_cache, meta, 0.2, window))
        assert torch.equal(torch.cat(parts), expected), chunk


@pytest.mark.parametrize("head_dim", [16, 48])
def test_extend_attention_of_other_head_sizes_is_that_of_fp32_queries_rounded(head_dim: int) -> None:
    sequences = Sequences([5, 20], [9, 20], 4, 2, head_dim)
    assert not attention_extend_amx.takes(sequences.q, sequences.k_cache, sequences.table)
    actual, expected = sequences.attend(None), sequences.reference(None)
    torch.testing.assert_close(actual.float(), expected, atol=1e-4, rtol=2**-8 * 1.01)


def test_without_tiles_bfloat16_queries_are_those_of_fp32_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_amx, "has_tiles", lambda: False)
    sequences = Sequences([5, 20], [9, 20], 4, 2, 64)
    assert not attention_extend_amx.takes(sequences.q, sequences.k_cache, sequences.table)
    torch.testing.assert_close(sequences.attend(None).float(), sequences.reference(None), atol=1e-4, rtol=2**-8 * 1.01)
