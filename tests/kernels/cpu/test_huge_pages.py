"""Weights that lie one after another."""

from __future__ import annotations

import torch

from ramet.kernels.cpu.huge_pages import HugePages


def test_tensors_are_copied_side_by_side_at_cache_lines() -> None:
    memory = HugePages()
    sources = [torch.arange(size).to(torch.uint8).view(-1, 5) for size in (100, 15, 0, 1000)]
    moved = [memory.move(source) for source in sources]
    for source, copy in zip(sources, moved, strict=True):
        assert torch.equal(source, copy)
        assert copy.data_ptr() % 64 == 0
    assert moved[1].data_ptr() - moved[0].data_ptr() == 128
    assert moved[3].untyped_storage().data_ptr() != sources[3].untyped_storage().data_ptr()


def test_what_does_not_fit_into_a_chunk_gets_another_one() -> None:
    memory = HugePages()
    small = memory.move(torch.full((64,), 1, dtype=torch.uint8))
    large = memory.move(torch.full((33 << 20,), 2, dtype=torch.uint8))
    after = memory.move(torch.full((64,), 3, dtype=torch.uint8))
    assert [int(tensor.min()) for tensor in (small, large, after)] == [1, 2, 3]
    assert [int(tensor.max()) for tensor in (small, large, after)] == [1, 2, 3]
