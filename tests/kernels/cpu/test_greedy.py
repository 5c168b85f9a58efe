"""The compiled choice of greedy tokens against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from ramet.kernels.cpu.greedy import greedy_tokens, sample
from ramet.kernels.sampling.logit_edits import PARAMETERS, EditTables
from ramet.kernels.sampling.sample import SamplingTables, sample_reference
from ramet.kernels.slots.tables import SlotTables, float_bits

ODD = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, -3e38, 3e38, 1e-45, -1e-45]


def draw_mask(num_rows: int, size: int, share: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    allowed = torch.rand(num_rows, -(-size // 32), 32, generator=generator) < share
    words = (allowed.long() << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize("share", [None, 0.0, 0.002, 0.5, 1.0])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 5), (3, 33), (4, 1024), (5, 1025), (2, 5000)])
@pytest.mark.parametrize("odd", [False, True])
def test_greedy_tokens_equal_the_reference(share: float | None, num_rows: int, size: int, odd: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, size, generator=generator).round(decimals=1)  # rounded: many tie
    if odd:
        positions = torch.randint(size, (num_rows, size // 4 + 1), generator=generator)
        logits.scatter_(1, positions, torch.tensor(ODD).repeat(size)[: positions.numel()].view_as(positions))
    mask = None if share is None else draw_mask(num_rows, size, share)
    rows = torch.arange(num_rows, dtype=torch.int32).flip(0)
    actual, expected = SlotTables.create(num_rows, 3).sampling(), SlotTables.create(num_rows, 3).sampling()
    for vocab_size in (size, max(size - 7, 1)):
        tokens = sample(logits, actual, rows, rows, mask, vocab_size=vocab_size)
        assert torch.equal(tokens, sample_reference(logits, expected, rows, rows, mask, vocab_size=vocab_size))
        assert torch.equal(actual.error, expected.error)


def test_rows_that_draw_are_left_to_the_reference() -> None:
    logits, tables = torch.randn(3, 50), SlotTables.create(3, 1).sampling()
    rows = torch.arange(3, dtype=torch.int32)
    tables.temperature[1] = 0.7
    assert greedy_tokens(logits, tables, rows, None, 50, 1e-5) is None
    tables.top_k[1] = 1
    tokens = greedy_tokens(logits, tables, rows, None, 50, 1e-5)
    assert tokens is not None
    assert tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("large", [0.0, -0.0, math.nan, math.inf])
def test_a_largest_logit_that_is_no_ordinary_number_is_left_to_the_reference(large: float) -> None:
    logits = torch.full((1, 70), -1.0)
    logits[0, 40] = large
    rows = torch.zeros(1, dtype=torch.int32)
    assert greedy_tokens(logits, SlotTables.create(1, 1).sampling(), rows, None, 70, 1e-5) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_masked_and_chosen_by_their_values(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.tensor([[0b1011, 0, -1], [-1, 7, 0], [1 << 30, 0, 0]], dtype=torch.int32)
    tables, rows = SamplingTables.create(3), torch.arange(3, dtype=torch.int32)
    tables.temperature[1] = 0.5
    for chosen in (None, mask):
        expected = sample(logits.float(), tables, rows, rows, chosen)
        assert sample(logits, tables, rows, rows, chosen).tolist() == expected.tolist()
    assert expected[2] == 30


def test_rows_with_edits_are_left_to_the_reference() -> None:
    tables = SlotTables.create(2, 1)
    edits = EditTables.create(1, 70)
    edits.parameters[:, PARAMETERS["repetition"]] = float_bits(1.0)
    edits.bias[1, 33] = 100.0
    tables.column("edit_row")[1] = 1
    rows = torch.arange(2, dtype=torch.int32)
    logits = torch.randn(2, 70)
    tokens = sample(logits, tables.sampling(edits=edits), rows, rows)
    assert tokens.tolist() == [int(logits[0].argmax()), 33]
