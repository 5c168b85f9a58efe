"""Recorded kernels: the same results as called ones, on new inputs; what cannot be recorded is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from ramet.kernels.cpu.block_linear import block_linear, quantize
from ramet.kernels.cpu.ops import cpu_ops
from ramet.kernels.cpu.program import KernelStream, Pool
from ramet.kernels.cpu.threads import release_threads
from ramet.kernels.ops import NotRecordableError

WIDTH = 64
STREAM = KernelStream()
OPS = cpu_ops(STREAM, torch.float32, head_dim=16)
WEIGHTS = quantize(torch.randn(2 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)), "Q8_0")
SCALE, BIAS = torch.linspace(0.5, 1.5, WIDTH), torch.linspace(-1, 1, 2 * WIDTH)


def chain(x: Tensor, layers: int = 3) -> Tensor:
    """Norms, products and activations, with a residual that outlives several of them."""
    hidden, residual = OPS.rms_norm(x, SCALE, 1e-6, None), x
    for _ in range(layers):
        branch = OPS.silu_and_mul(block_linear(STREAM, hidden, WEIGHTS, "Q8_0", 2 * WIDTH, BIAS))
        hidden, residual = OPS.fused_add_rms_norm(branch, residual, SCALE, 1e-6, None)
    return hidden


def draw(num_tokens: int, seed: int) -> Tensor:
    return torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_a_program_does_what_its_calls_do(threads: int, num_tokens: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = draw(num_tokens, 0)
        program = STREAM.record(lambda: chain(x), Pool())
        for seed in (1, 2):
            x.copy_(draw(num_tokens, seed))
            program.run()
            assert torch.equal(program.result, chain(x.clone()))
    finally:
        torch.set_num_threads(before)


def test_recording_computes_nothing() -> None:
    x = draw(2, 0)
    pool = Pool()
    program = STREAM.record(lambda: chain(x), pool)
    program.result.fill_(7.0)
    other = STREAM.record(lambda: chain(x), pool)
    assert torch.equal(program.result, torch.full_like(program.result, 7.0))
    other.run()
    program.run()
    assert torch.equal(program.result, other.result)


def test_a_thread_that_records_leaves_others_alone() -> None:
    x = draw(2, 0)
    expected = chain(x.clone())
    found: list[Tensor] = []

    def compute() -> None:
        found.append(chain(x.clone()))
        release_threads()

    def step() -> Tensor:
        other = threading.Thread(target=compute)
        other.start()
        other.join()
        return chain(x)

    STREAM.record(step, Pool())
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("refused", [lambda x: x + 1, lambda x: x.mul_(2), lambda x: torch.empty_like(x)])
def test_what_is_no_kernel_is_refused_and_recording_ends(refused) -> None:  # type: ignore[no-untyped-def]
    x = draw(2, 0)
    expected = chain(x.clone())
    with pytest.raises(NotRecordableError, match="aten"):
        STREAM.record(lambda: refused(chain(x)), Pool())
    assert torch.equal(chain(draw(2, 0)), expected)


def test_views_may_be_taken_while_recording() -> None:
    x = draw(4, 0)

    def halves() -> Tensor:
        first, second = torch.split(OPS.rms_norm(x, SCALE, 1e-6, None), [2, 2])
        return OPS.fused_add_rms_norm(first.view(2, WIDTH), second, SCALE, 1e-6, None)[0]

    program = STREAM.record(halves, Pool())
    program.run()
    assert torch.equal(program.result, halves())


def test_memory_is_reused_as_soon_as_its_tensors_are_gone_and_never_before() -> None:
    pool = Pool()
    first = pool.empty((3, 5))
    view = first[1:2].view(5)
    address = first.data_ptr()
    del first
    assert pool.empty((3, 5)).data_ptr() != address, "a view still needs it"
    del view
    assert pool.empty((4, 4)).data_ptr() == address
    assert pool.empty((1000,)).data_ptr() != address


def test_programs_of_all_sizes_share_memory() -> None:
    pool, x = Pool(), draw(8, 0)
    programs = [STREAM.record(lambda n=n: chain(x[:n], layers=30), pool) for n in (8, 4, 8)]  # type: ignore[misc]
    assert len(pool._blocks) <= 14, "30 layers have 120 results"
    assert programs[0].result.data_ptr() == programs[2].result.data_ptr(), "a result is no one's until its program runs"
    for program, n in zip(programs, (8, 4, 8), strict=True):
        program.run()
        assert torch.equal(program.result, chain(x[:n], layers=30))
