"""Rows of the device's edit tables: what is written for a sequence gives the host's edits, and rows come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ramet.kernels.sampling.logit_edits import EditTables, edit_logits_reference
from ramet.runtime.steps.logit_edits import LogitEdits, apply_edits
from ramet.runtime.types import Request, SamplingParams, Sequence

VOCAB = 50


def make_sequence(output: list[int], **sampling: object) -> Sequence:
    prompt = np.asarray([3, 4, 4, 9], dtype=np.int32)
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    request = Request("r", prompt, params, 20, stop_ids=frozenset([0, 7]))
    return Sequence(request, output_ids=list(output), slot=1)


@pytest.mark.parametrize("output", [[], [5], [5, 4, 5, 7, 49]])
@pytest.mark.parametrize(
    "sampling",
    [
        {"frequency_penalty": 0.7},
        {"presence_penalty": -1.5, "frequency_penalty": -0.25},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "presence_penalty": 0.5, "logit_bias": {5: 3.5, 49: -100.0}},
        {"min_tokens": 3},
        {"min_tokens": 5, "logit_bias": {0: 100.0}, "repetition_penalty": 2.0},
    ],
)
def test_a_filled_row_edits_as_the_host_does(output: list[int], sampling: dict[str, object]) -> None:
    edits = LogitEdits(EditTables.create(2, VOCAB))
    sequence = make_sequence(output, **sampling)
    tables = edits.tables.of_slots(torch.tensor([0, 2], dtype=torch.int32))
    for stale in (tables.words, tables.bias, tables.parameters):
        stale.fill_(3)  # of its owner before
    assert edits.acquire(make_sequence([]))
    assert edits.acquire(sequence)
    assert edits.row_of(sequence) == 2
    edits.fill(sequence)
    torch.manual_seed(len(output))
    logits = torch.randn(1, VOCAB)
    position = torch.tensor([sequence.num_tokens], dtype=torch.int32)
    edit_logits_reference(logits, tables, torch.tensor([1], dtype=torch.int32), position)
    assert torch.allclose(
        tables.edited[2], apply_edits(logits, [(sequence, sequence.num_tokens)])[0], rtol=1e-6, atol=1e-6
    )


def test_rows_are_given_once_and_come_back() -> None:
    edits = LogitEdits(EditTables.create(2, VOCAB))
    first, second, third = (make_sequence([], min_tokens=1) for _ in range(3))
    assert edits.row_of(first) == 0
    assert edits.acquire(first)
    assert edits.acquire(first), "it has one"
    assert edits.num_free == 1
    assert edits.acquire(second)
    assert not edits.acquire(third)
    assert edits.row_of(third) == 0
    edits.release(third)
    assert edits.num_free == 0
    row = edits.row_of(first)
    edits.release(first)
    edits.release(first)
    assert edits.num_free == 1
    assert edits.acquire(third)
    assert edits.row_of(third) == row
