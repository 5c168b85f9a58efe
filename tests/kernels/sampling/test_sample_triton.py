"""The sampling kernels against the reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from ramet.kernels.sampling.logit_edits import ENDS_TEXT, PARAMETERS, EditTables
from ramet.kernels.sampling.sample import GrammarTables, SamplingTables, sample_reference
from ramet.kernels.sampling.sample_triton import sample_triton
from ramet.kernels.slots.tables import float_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# numpy warns where the device saturates, wraps or takes -inf - -inf in a branch that `where` discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_words(num_rows: int, vocab_size: int, density: float) -> Tensor:
    bits = (torch.rand(num_rows, -(-vocab_size // 32), 32) < density).long()
    words = (bits << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def make_case(dtype: torch.dtype, vocab_size: int, num_columns: int) -> tuple[Tensor, SamplingTables, Tensor, Tensor]:
    """Ten slots that cover every filter, alone and together, and a dummy; one batch row each."""
    temperature = [0.0, 1.0, 0.7, 1.3, 1.0, 0.2, 1.0, 0.9, 1.0, 5.0]
    top_k = [0, 0, 5, 0, 0, 40, 200, 1, 3, 0]
    top_p = [1.0, 1.0, 1.0, 0.8, 1.0, 0.9, 1.0, 1.0, 0.3, 0.5]
    min_p = [0.0, 0.0, 0.0, 0.0, 0.1, 0.05, 0.0, 0.0, 0.0, 0.02]
    tables = SamplingTables.create(10, DEVICE)
    for column, values in (
        (tables.temperature, temperature),
        (tables.top_k, top_k),
        (tables.top_p, top_p),
        (tables.min_p, min_p),
        (tables.seed_low, [torch.randint(-(2**31), 2**31, ()).item() for _ in range(10)]),
        (tables.seed_high, [torch.randint(-(2**31), 2**31, ()).item() for _ in range(10)]),
    ):
        column[:10] = torch.tensor(values).to(column)
    rows = torch.cat((torch.randperm(10), torch.tensor([10]))).to(torch.int32)
    logits = (torch.randn(11, num_columns) * 2).to(dtype)
    logits[:, vocab_size:] = 99.0
    return logits.to(DEVICE), tables, rows.to(DEVICE), torch.randint(0, 9999, (11,), dtype=torch.int32, device=DEVICE)


def random_edits(vocab_size: int) -> EditTables:
    """Edits of six of ten slots that change which tokens are best, without repetition penalties.

    A division may round differently in the last bit, and so could a tie.
    """
    slot_row = torch.tensor([1, 0, 2, 3, 0, 4, 0, 5, 6, 0, 0], dtype=torch.int32)
    tables = EditTables.create(6, vocab_size, DEVICE).of_slots(slot_row.to(DEVICE))
    tables.bias[1:] = torch.randint(-6, 7, (6, vocab_size)).to(tables.bias)
    tables.words[1:] = ((torch.rand(6, vocab_size) < 0.2) * ENDS_TEXT).to(tables.words)
    tables.parameters[:, PARAMETERS["repetition"]] = float_bits(1.0)
    tables.parameters[1:4, PARAMETERS["minimum"]] = 10_000
    return tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "num_columns"), [(1000, 1000), (2500, 2560), (40, 64)])
@pytest.mark.parametrize("masking", ["none", "mask", "grammar", "both", "edits", "grammar edits"])
def test_kernels_choose_the_reference_tokens(
    dtype: torch.dtype, vocab_size: int, num_columns: int, masking: str
) -> None:
    torch.manual_seed(vocab_size + len(masking) + dtype.itemsize)
    logits, tables, rows, positions = make_case(dtype, vocab_size, num_columns)
    mask = random_words(11, num_columns, 0.3).to(DEVICE) if masking in ("mask", "both") else None
    if "edits" in masking:
        tables = dataclasses.replace(tables, edits=random_edits(num_columns))
    if "grammar" in masking or masking == "both":
        state = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 0], dtype=torch.int32, device=DEVICE)
        index = torch.tensor([0, 2, 1, 2], dtype=torch.int32, device=DEVICE)
        grammar = GrammarTables(state, index, random_words(3, num_columns, 0.2).to(DEVICE))
        tables = dataclasses.replace(tables, grammar=grammar)
    expected = sample_reference(logits, tables, rows, positions, mask, vocab_size=vocab_size)
    expected_error = tables.error.tolist()
    tables.error.zero_()
    actual = sample_triton(logits, tables, rows, positions, mask, vocab_size=vocab_size)
    assert actual.tolist() == expected.tolist()
    assert tables.error.tolist() == expected_error


def test_kernels_are_defined_on_rows_without_finite_logits_and_on_infinities() -> None:
    nan, infinity = math.nan, math.inf
    logits = torch.tensor([[nan] * 3, [-infinity] * 3, [nan, 1.0, 0.0], [0.0, infinity, infinity], [0.0, 1.0, nan]])
    tables = SamplingTables.create(5, DEVICE)
    tables.temperature[:] = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    tables.top_p[:] = torch.tensor([0.9, 1.0, 1.0, 1.0, 0.1, 1.0])
    rows = torch.arange(5, dtype=torch.int32, device=DEVICE)
    token = sample_triton(logits.to(DEVICE), tables, rows, rows).tolist()
    assert token[:3] == [0, 0, 1]
    assert token[3] in (1, 2)
    assert token[4] == 1
    assert tables.error.tolist() == [1, 1, 0, 0, 0, 0]


def test_ties_at_the_borders_of_the_filters_are_kept() -> None:
    logits = torch.zeros(1, 96, device=DEVICE)
    logits[0, :40] = -1.0
    logits[0, 7] = 1.0
    tables = SamplingTables.create(1, DEVICE)
    tables.temperature[0] = 1.0
    tables.top_k[0] = 3
    seen = set()
    for position in range(40):
        args = logits, tables, torch.zeros(1, dtype=torch.int32, device=DEVICE)
        step = torch.tensor([position], dtype=torch.int32, device=DEVICE)
        token = sample_triton(*args, step).item()
        assert token == sample_reference(*args, step).item()
        assert token == 7 or token >= 40
        seen.add(token)
    assert len(seen) > 20
