"""bfloat16 on the CPU: compiled kernels that read and write it beside fp32, against the torch references."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ramet.kernels.cpu import pointwise as cpu_pointwise
from ramet.kernels.cpu.ops import cpu_ops
from ramet.kernels.cpu.program import KernelStream
from ramet.kernels.layers import activation, norm, rope

BF16 = torch.bfloat16
OPS = cpu_ops(KernelStream(), torch.float32, head_dim=64)


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
    alone = OPS.rms_norm(x, weight, 1e-5, writes)
    normed, total = OPS.fused_add_rms_norm(x, residual, weight, 1e-5, writes)
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
    assert OPS.rms_norm(x, weight, 1e-5, None).dtype is BF16
    assert OPS.fused_add_rms_norm(x, residual, weight, 1e-5, None)[0].dtype is torch.float32


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1536), (3, 5), (8, 48)])
def test_gated_activations(num_tokens: int, size: int) -> None:
    gate_up = (draw(num_tokens, 2 * size) * 3).to(BF16)
    exact = gate_up.float()
    assert_rounded(OPS.silu_and_mul(gate_up), activation.silu_and_mul_reference(exact))
    actual, expected = OPS.gelu_tanh_and_mul(gate_up), activation.gelu_tanh_and_mul_reference(exact)
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
    actual = OPS.rope_and_write_kv(q, k, v, *where, caches[0][0], caches[0][1], norms[0], norms[1], 1e-6)
    heads = q.float(), k.float(), v.float()
    expected = rope.rope_and_write_kv_reference(*heads, *where, caches[1][0], caches[1][1], *norms)
    assert_rounded(actual, expected)
    torch.testing.assert_close(caches[0][0], caches[1][0], atol=2e-5, rtol=0)
    assert torch.equal(caches[0][1], caches[1][1])
