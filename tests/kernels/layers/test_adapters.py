"""Adapters of a layer: the reference by plain products, the kernels by the reference."""

from __future__ import annotations

import pytest
import torch

from ramet.kernels.cpu.pointwise import add_adapters
from ramet.kernels.cpu.program import KernelStream
from ramet.kernels.layers.adapters import (
    AdapterTable,
    add_adapters_reference,
    add_adapters_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def table_of(sizes: list[int], width: int, rank: int, ranks: list[list[int]]) -> AdapterTable:
    """Random adapters, filled up with zeros beyond their ranks."""
    generator = torch.Generator().manual_seed(len(sizes))
    count, num_outputs = len(ranks), sum(sizes)
    bounds = tuple(sum(sizes[:part]) for part in range(len(sizes) + 1))
    a = torch.randn(count, len(sizes), rank, width, generator=generator) / width**0.5
    b = torch.randn(count, num_outputs, rank, generator=generator)
    for adapter, own in enumerate(ranks):
        for part, kept in enumerate(own):
            a[adapter, part, kept:] = 0
            b[adapter, bounds[part] : bounds[part + 1], kept:] = 0
    return AdapterTable(a.to(DEVICE), b.to(DEVICE), bounds, torch.tensor(ranks, dtype=torch.int32))


def tokens_of(chosen: list[int]) -> torch.Tensor:
    return torch.tensor(chosen, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("chosen", [[0, 0], [1], [2, 0, 1, 2, 2, 0, 3]])
@pytest.mark.parametrize(("sizes", "rank"), [([24], 4), ([40, 8, 8], 20), ([72, 72], 16)])
def test_each_token_gets_the_products_of_its_own_adapter(chosen: list[int], sizes: list[int], rank: int) -> None:
    count = len(sizes)
    table = table_of(sizes, 48, rank, [[0] * count, [rank] * count, [1] * count, [0, 3, 2][:count]])
    x = torch.randn(len(chosen), 48, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    before = torch.randn(len(chosen), sum(sizes) + 5, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    expected = before[:, : sum(sizes)].clone()
    for token, adapter in enumerate(chosen):
        for part in range(len(sizes)):
            rows = slice(table.bounds[part], table.bounds[part + 1])
            expected[token, rows] += table.b[adapter, rows] @ (table.a[adapter, part] @ x[token]) if adapter else 0
    for add in (add_adapters_reference, add_adapters_triton):
        out = before.clone()[:, : sum(sizes)]  # a row stride
        assert add(out, x, table, tokens_of(chosen)) is out
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if DEVICE == "cpu":
        found = add_adapters(KernelStream(), before[:, : sum(sizes)].clone(), x, table, tokens_of(chosen))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_added_in_fp32_and_rounded_once() -> None:
    table = table_of([40, 8], 600, 4, [[0, 0], [4, 4]])
    x = torch.randn(3, 600).to(DEVICE, torch.bfloat16)
    out = torch.randn(3, 48).to(DEVICE, torch.bfloat16)
    expected = add_adapters_reference(out.float(), x, table, tokens_of([1, 0, 1]))
    found = add_adapters_triton(out.clone(), x, table, tokens_of([1, 0, 1]))
    # Triton's interpreter cuts off where a card rounds.
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2**-8)


def test_no_tokens_are_no_work() -> None:
    out, x = torch.empty(0, 24, device=DEVICE), torch.empty(0, 48, device=DEVICE)
    assert add_adapters_triton(out, x, table_of([24], 48, 4, [[0]]), tokens_of([])) is out
