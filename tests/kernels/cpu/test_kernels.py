"""The compiled CPU kernels against the torch references."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata, attention_decode_reference
from ramet.kernels.attention.extend import ExtendMetadata, attention_extend_reference
from ramet.kernels.cpu import pointwise as cpu_pointwise
from ramet.kernels.cpu.ops import cpu_ops
from ramet.kernels.cpu.program import KernelStream
from ramet.kernels.layers import activation, norm, rope
from ramet.kernels.ops import REFERENCE
from ramet.kernels.sampling.sample import unpack_mask

OPS = cpu_ops(KernelStream(), torch.float32, head_dim=64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    difference = (actual - expected).abs()
    assert actual.shape == expected.shape
    assert difference.max() < tolerance, f"max {difference.max():.2e}, mean {difference.mean():.2e}"


@pytest.fixture(params=[1, 2])
def on_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows shared out among so many threads, however few they are."""
    monkeypatch.setattr(cpu_pointwise, "_PARALLEL_VALUES", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("on_threads")
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 576), (3, 7), (32, 64), (5, 16)])
def test_norms_equal_the_references(num_tokens: int, size: int) -> None:
    x, residual, weight = draw(num_tokens, size), draw(num_tokens, size, seed=1), draw(size, seed=2)
    assert_close(OPS.rms_norm(x, weight, 1e-5, None), norm.rms_norm_reference(x, weight, 1e-5))
    actual = OPS.fused_add_rms_norm(x, residual, weight, 1e-5, None)
    expected = norm.fused_add_rms_norm_reference(x, residual, weight, 1e-5)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1])


@pytest.mark.usefixtures("on_threads")
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1536), (3, 5), (8, 48)])
def test_gated_activations_equal_the_references(num_tokens: int, size: int) -> None:
    gate_up = draw(num_tokens, 2 * size) * 6
    gate_up[0, 0], gate_up[0, 1] = 300.0, -300.0  # saturate: no infinity, no NaN
    scale = float(gate_up.abs().max())
    silu = activation.silu_and_mul_reference(gate_up)
    assert_close(OPS.silu_and_mul(gate_up), silu, 2e-6 * scale)
    gelu = activation.gelu_tanh_and_mul_reference(gate_up)
    assert_close(OPS.gelu_tanh_and_mul(gate_up), gelu, 2e-6 * scale)


@pytest.mark.usefixtures("on_threads")
@pytest.mark.parametrize("head_dim", [64, 20])
@pytest.mark.parametrize("with_norms", [False, True])
def test_rope_and_cache_write_equal_the_reference(head_dim: int, with_norms: bool) -> None:
    num_tokens, num_heads, num_kv_heads, page_size = 5, 6, 2, 4
    qkv = draw(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    angles = draw(50, head_dim // 2, seed=1)
    positions = torch.tensor([7, 0, 49, 13, 14], dtype=torch.int32)
    slots = torch.tensor([9, 30, 4, 17, 18], dtype=torch.int32)
    norms = (draw(head_dim, seed=2), draw(head_dim, seed=3)) if with_norms else (None, None)
    caches = [[draw(9, num_kv_heads, page_size, head_dim, seed=s) for s in (4, 5)] for _ in range(2)]
    cos, sin = angles.cos(), angles.sin()
    where = (cos, sin, positions, slots)
    actual = OPS.rope_and_write_kv(q, k, v, *where, caches[0][0], caches[0][1], norms[0], norms[1], 1e-6)
    expected = rope.rope_and_write_kv_reference(q, k, v, *where, caches[1][0], caches[1][1], norms[0], norms[1], 1e-6)
    assert_close(actual, expected)
    assert_close(caches[0][0], caches[1][0])
    assert_close(caches[0][1], caches[1][1])


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (8, 1, 128), (2, 1, 48)])
@pytest.mark.parametrize("threads", [1, 2])
def test_decode_attention_equals_the_reference(
    window: int | None, num_heads: int, num_kv_heads: int, head_dim: int, threads: int
) -> None:
    lens = [1, 37, 0, 16, 50]
    table = (1 + torch.randperm(7 * 8, generator=torch.Generator().manual_seed(0))).view(7, 8).to(torch.int32)
    k_cache, v_cache = draw(57, num_kv_heads, 8, head_dim, seed=1), draw(57, num_kv_heads, 8, head_dim, seed=2)
    q = draw(len(lens), num_heads, head_dim)
    rows, kv_lens = torch.tensor([5, 0, 1, 6, 2], dtype=torch.int32), torch.tensor(lens, dtype=torch.int32)
    meta = DecodeMetadata(kv_lens, rows, table, kv_lens_host=lens)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = OPS.attention_decode(q, k_cache, v_cache, meta, 0.3, window, None)
    finally:
        torch.set_num_threads(before)
    assert_close(actual, attention_decode_reference(q, k_cache, v_cache, meta, 0.3, window))


FREED = """
import torch
from ramet.kernels.attention.decode import DecodeMetadata, attention_decode_reference
from ramet.kernels.cpu.ops import cpu_ops
from ramet.kernels.cpu.program import KernelStream

q, cache = torch.randn(2, 9, 64), torch.randn(200, 3, 8, 64)
rows, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([700, 90], dtype=torch.int32)
meta = DecodeMetadata(lens, rows, (1 + torch.arange(198)).view(2, 99).to(torch.int32), 1)
actual = cpu_ops(KernelStream(), torch.float32, head_dim=64).attention_decode(q, cache, cache, meta, 0.1, None, None)
print((actual - attention_decode_reference(q, cache, cache, meta, 0.1, None)).abs().max() < 2e-5)
"""


def test_decode_attention_does_not_use_memory_that_it_freed() -> None:
    environment = {**os.environ, "MALLOC_PERTURB_": "85"}  # glibc fills what is freed with this byte
    found = subprocess.run(
        [sys.executable, "-c", FREED], capture_output=True, text=True, timeout=200, env=environment, check=True
    )
    assert found.stdout.strip() == "tensor(True)"


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (8, 1, 128), (2, 1, 48)])
@pytest.mark.parametrize("threads", [1, 2])
def test_extend_attention_equals_the_reference(
    window: int | None, num_heads: int, num_kv_heads: int, head_dim: int, threads: int
) -> None:
    q_lens, kv_lens = [1, 37, 0, 16, 50, 3], [1, 37, 5, 60, 55, 64]
    table = (1 + torch.randperm(7 * 9, generator=torch.Generator().manual_seed(0))).view(7, 9).to(torch.int32)
    k_cache, v_cache = draw(64, num_kv_heads, 8, head_dim, seed=1), draw(64, num_kv_heads, 8, head_dim, seed=2)
    rows = [5, 0, 1, 6, 2, 4]
    for cache in (k_cache, v_cache):  # what no sequence holds must not be read
        held = torch.zeros(64, 8, dtype=torch.bool)
        for row, kv_len in zip(rows, kv_lens, strict=True):
            for position in range(kv_len):
                held[table[row, position // 8], position % 8] = True
        cache.masked_fill_(~held[:, None, :, None], torch.nan)
    q = draw(sum(q_lens), num_heads + 2, head_dim)[:, 1:-1]  # strided, as a view of a fused projection is
    starts = torch.tensor([0, *q_lens]).cumsum(0).to(torch.int32)
    lens = torch.tensor(kv_lens, dtype=torch.int32)
    meta = ExtendMetadata(starts, lens, torch.tensor(rows, dtype=torch.int32), table, 50, 64, q_lens, kv_lens)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = OPS.attention_extend(q, k_cache, v_cache, meta, 0.3, window, None)
    finally:
        torch.set_num_threads(before)
    assert_close(actual, attention_extend_reference(q, k_cache, v_cache, meta, 0.3, window))


@pytest.mark.usefixtures("on_threads")
@pytest.mark.parametrize("window", [None, 1, 45])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (7, 1, 128), (2, 1, 48)])
@pytest.mark.parametrize("page_size", [8, 32])
def test_a_token_attends_alike_in_a_prompt_in_every_chunk_and_alone(
    window: int | None, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int
) -> None:
    length, num_others = 150, 2
    num_pages = -(-length // page_size)
    order = 1 + torch.randperm((1 + num_others) * num_pages, generator=torch.Generator().manual_seed(0))
    table = order.view(1 + num_others, num_pages).to(torch.int32)
    shape = 1 + len(order), num_kv_heads, page_size, head_dim
    k_cache, v_cache, q = draw(*shape, seed=1), draw(*shape, seed=2), draw(length, num_heads, head_dim) * 3

    def extend(begin: int, end: int) -> Tensor:
        starts, lens, rows = (torch.tensor(x, dtype=torch.int32) for x in ([0, end - begin], [end], [0]))
        meta = ExtendMetadata(starts, lens, rows, table, end - begin, end, [end - begin], [end])
        return OPS.attention_extend(q[begin:end], k_cache, v_cache, meta, 0.3, window, None)

    def decode(rows: list[int], lens: list[int]) -> Tensor:
        meta = DecodeMetadata(torch.tensor(lens).int(), torch.tensor(rows).int(), table)
        queries = q[torch.tensor([kv_len - 1 for kv_len in lens])]
        return OPS.attention_decode(queries, k_cache, v_cache, meta, 0.3, window, None)

    whole = extend(0, length)
    for size in (1, 5, 64):
        parts = [extend(begin, min(begin + size, length)) for begin in range(0, length, size)]
        assert torch.equal(torch.cat(parts), whole), size
    for begin, size in [(0, 1), (149, 1), (31, 2), (60, 7), (100, 50)]:
        following = list(range(begin + 1, begin + size + 1))
        assert torch.equal(decode([0] * size, following), whole[begin : begin + size]), (begin, size)
        with_others = decode([1, *[0] * size, 2], [80, *following, 33])
        assert torch.equal(with_others[1:-1], whole[begin : begin + size]), (begin, size)


@pytest.mark.usefixtures("on_threads")
@pytest.mark.parametrize(("num_rows", "size"), [(1, 100), (3, 33), (2, 40_000)])
def test_masked_logits_equal_the_reference(num_rows: int, size: int) -> None:
    logits, shape = draw(num_rows, size), (num_rows, -(-size // 32))
    generator = torch.Generator().manual_seed(size)
    mask = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
    expected = logits.masked_fill(~unpack_mask(mask, size), float("-inf"))
    assert torch.equal(cpu_pointwise.mask_logits(logits, mask), expected)


def test_what_is_not_compiled_is_the_reference() -> None:
    assert cpu_ops(KernelStream(), torch.float16, head_dim=64).rms_norm is REFERENCE.rms_norm
    assert cpu_ops(KernelStream(), torch.bfloat16, head_dim=64).attention_decode is REFERENCE.attention_decode
    small = cpu_ops(KernelStream(), torch.float32, head_dim=20)
    assert small.attention_decode is REFERENCE.attention_decode
    assert small.rms_norm is not REFERENCE.rms_norm
    assert OPS.attention_decode is not REFERENCE.attention_decode


def test_only_compiled_code_brings_numba() -> None:
    """What stands outside of `kernels/cpu` runs on a GPU, too."""
    code = (
        "import sys, pkgutil, importlib, ramet.kernels, ramet.runtime.steps.model_runner\n"
        "for module in pkgutil.walk_packages(ramet.kernels.__path__, 'ramet.kernels.'):\n"
        "    if not module.name.startswith('ramet.kernels.cpu'):\n"
        "        importlib.import_module(module.name)\n"
        "print([name for name in sys.modules if name == 'numba' or name.startswith('ramet.kernels.cpu.')])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert found.stdout.strip() == "[]", found.stderr
