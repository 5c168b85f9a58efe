"""Penalties, biases and minimum lengths on the device: against numbers worked out by hand, and kernel = reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ramet.kernels.sampling.logit_edits import (
    ENDS_TEXT,
    IN_PROMPT,
    PARAMETERS,
    EditTables,
    count_tokens_reference,
    count_tokens_triton,
    edit_logits_reference,
    edit_logits_triton,
)
from ramet.kernels.slots.tables import float_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def set_parameters(
    tables: EditTables, row: int, repetition: float, frequency: float, presence: float, minimum: int
) -> None:
    for name, value in (("repetition", repetition), ("frequency", frequency), ("presence", presence)):
        tables.parameters[row, PARAMETERS[name]] = float_bits(value)
    tables.parameters[row, PARAMETERS["minimum"]] = minimum


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_edits_follow_their_formulas() -> None:
    tables = EditTables.create(2, 6).of_slots(torch.tensor([0, 2, 1], dtype=torch.int32))
    set_parameters(tables, 1, 2.0, 0.5, 0.25, minimum=10)
    tables.words[1] = torch.tensor([3, IN_PROMPT, 1 | IN_PROMPT, 0, ENDS_TEXT, ENDS_TEXT | 2])
    tables.bias[1, 3] = 7.0
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0, 5.0, 4.0]] * 3)
    rows = torch.tensor([0, 2, 2], dtype=torch.int32)
    edit_logits_reference(logits, tables, rows[:2], torch.tensor([9, 9], dtype=torch.int32))
    early = [1.0 - 1.5 - 0.25, -4.0, 0.5 - 0.5 - 0.25, 6.0, -math.inf, -math.inf]
    assert tables.edited[1].tolist() == early
    edit_logits_reference(logits, tables, rows[2:], torch.tensor([10], dtype=torch.int32))
    assert tables.edited[1].tolist() == [*early[:4], 5.0, 2.0 - 1.0 - 0.25]
    assert not tables.edited[[0, 2]].any(), "rows that nobody asked for"


def random_case(dtype: torch.dtype, vocab_size: int) -> tuple[Tensor, EditTables, Tensor, Tensor]:
    """Eight slots and a dummy, in a batch with two dummies; three slots have edits."""
    tables = EditTables.create(4, vocab_size, DEVICE).of_slots(int32(0, 3, 0, 0, 1, 4, 0, 0, 0))
    for row in range(1, 5):
        set_parameters(tables, row, 0.5 + 0.4 * row, 0.3 * row - 0.6, 0.2 * row - 0.5, minimum=20 * row)
    counts = torch.randint(0, 4, tables.words.shape) * (torch.rand(tables.words.shape) < 0.2)
    flags = (torch.rand(tables.words.shape) < 0.2) * IN_PROMPT + (torch.rand(tables.words.shape) < 0.1) * ENDS_TEXT
    tables.words[1:] = (counts + flags)[1:].to(tables.words)
    tables.bias[1:] = (torch.randn(tables.bias.shape) * (torch.rand(tables.bias.shape) < 0.1))[1:].to(tables.bias)
    rows = int32(4, 0, 1, 8, 5, 2, 8)
    logits = torch.randn(len(rows), vocab_size + 7).to(dtype).to(DEVICE)[:, :vocab_size]
    return logits, tables, rows, int32(19, 3, 61, 0, 80, 9, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [40, 8192, 9001])
def test_the_kernel_edits_as_the_reference(dtype: torch.dtype, vocab_size: int) -> None:
    torch.manual_seed(vocab_size)
    logits, tables, rows, positions = random_case(dtype, vocab_size)
    edit_logits_reference(logits, tables, rows, positions)
    expected = tables.edited.clone()
    tables.edited.fill_(99.0)
    edit_logits_triton(logits, tables, rows, positions)
    assert torch.allclose(tables.edited[[1, 3, 4]], expected[[1, 3, 4]], rtol=1e-6, atol=1e-6)
    assert bool((tables.edited[[0, 2]] == 99.0).all()), "rows that nobody asked for"


def test_generated_tokens_are_counted_for_slots_with_edits_alone() -> None:
    _, tables, rows, _ = random_case(torch.float32, 40)
    before, tokens = tables.words.clone(), int32(7, 7, 39, 7, 0, 7, 7)
    count_tokens_reference(tables, rows, tokens)
    expected = tables.words.clone()
    tables.words.copy_(before)
    count_tokens_triton(tables, rows, tokens)
    assert tables.words.equal(expected)
    changed = (expected != before).nonzero().tolist()
    assert changed == [[1, 7], [3, 39], [4, 0]]
    assert bool((expected[1, 7] < 0) == (before[1, 7] < 0)), "flags stay"
