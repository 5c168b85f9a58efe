"""Sampling: the reference against first principles, the Triton kernels against the reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from ramet.kernels.sampling.sample import (
    GrammarTables,
    SamplingTables,
    gumbel_noise_reference,
    sample_reference,
    split_seed,
    unpack_mask,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_tables(num_slots: int, **columns: object) -> SamplingTables:
    tables = SamplingTables.create(num_slots)
    for name, value in columns.items():
        getattr(tables, name)[:num_slots] = torch.as_tensor(value).to(getattr(tables, name).dtype)
    return tables


def pack_mask(allowed: torch.Tensor) -> torch.Tensor:
    num_rows, vocab_size = allowed.shape
    num_words = -(-vocab_size // 32)
    padded = torch.zeros(num_rows, num_words * 32, dtype=torch.int64)
    padded[:, :vocab_size] = allowed
    words = (padded.view(num_rows, num_words, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def expected_keep(x: torch.Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The filters in plain Python, one token at a time."""
    values = x.double().tolist()
    alive = [t for t, v in enumerate(values) if v > -math.inf]
    if 0 < top_k < len(values):
        kth = sorted(values, reverse=True)[top_k - 1]
        alive = [t for t in alive if values[t] >= kth]
    largest = max(values)
    if top_p < 1:
        total = sum(math.exp(values[t] - largest) for t in alive)
        alive = [
            t
            for t in alive
            if sum(math.exp(values[u] - largest) for u in alive if values[u] > values[t]) < top_p * total
        ]
    return {t for t in alive if min_p == 0 or values[t] >= largest + math.log(min_p)}


def test_greedy_takes_the_lowest_index_of_equal_logits() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    token = sample_reference(logits, make_tables(2), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int32))
    assert token.tolist() == [1, 0]
    assert token.dtype == torch.int32


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (7, 0.8, 0.05), (3, 0.2, 0)],
)
def test_sampled_tokens_are_those_the_filters_keep_and_no_others(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(1, 24, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    tables = make_tables(1, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    keep = expected_keep(logits[0] / 0.8, top_k, top_p, min_p)
    num_draws = 3000
    tokens = sample_reference(
        logits.expand(num_draws, -1), tables, torch.zeros(num_draws, dtype=torch.int32), torch.arange(num_draws)
    )
    seen = set(tokens.tolist())
    assert seen <= keep
    probability = torch.softmax(logits[0] / 0.8, -1)
    kept_mass = sum(float(probability[t]) for t in keep)
    likely = {t for t in keep if float(probability[t]) / kept_mass > 0.01}
    assert likely <= seen
    counts = torch.bincount(tokens, minlength=24)
    for token in likely:
        p = float(probability[token]) / kept_mass
        assert abs(int(counts[token]) - p * num_draws) <= 5 * math.sqrt(p * (1 - p) * num_draws)


def test_the_result_depends_on_seed_position_and_logits_alone() -> None:
    logits = torch.randn(6, 100)
    tables = make_tables(8, temperature=1.0, top_p=0.95, seed_low=torch.arange(8), seed_high=7)
    rows, positions = torch.tensor([3, 1, 0, 7, 2, 5]), torch.tensor([9, 9, 100, 5, 4, 77])
    together = sample_reference(logits, tables, rows, positions)
    padded = torch.cat((logits, torch.full((6, 28), 50.0)), 1)
    for row in range(6):
        alone = sample_reference(
            padded[row : row + 1], tables, rows[row : row + 1], positions[row : row + 1], vocab_size=100
        )
        assert alone.item() == together[row].item()


def test_masked_and_padded_tokens_never_win() -> None:
    logits = torch.randn(3, 70)
    allowed = torch.rand(3, 64) < 0.2
    allowed[:, 40] = True
    tables = make_tables(3, temperature=[0.0, 1.0, 2.0], top_p=[1.0, 1.0, 0.5], top_k=[0, 50, 0])
    for position in range(50):
        token = sample_reference(
            logits, tables, torch.arange(3), torch.full((3,), position), mask=pack_mask(allowed), vocab_size=64
        )
        assert allowed[torch.arange(3), token.long()].all()


def test_grammar_rows_and_free_rows_mix() -> None:
    allowed = torch.zeros(2, 40, dtype=torch.bool)
    allowed[0] = True
    allowed[1, 33] = True
    state = torch.tensor([0, 5, 0, 0], dtype=torch.int32)
    mask_index = torch.tensor([0, 0, 0, 0, 0, 1], dtype=torch.int32)
    tables = dataclasses.replace(make_tables(3), grammar=GrammarTables(state, mask_index, pack_mask(allowed)))
    logits = torch.randn(3, 40)
    token = sample_reference(logits, tables, torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int32))
    assert token.tolist() == [int(logits[0].argmax()), 33, int(logits[2].argmax())]


def test_rows_without_a_finite_logit_are_flagged_and_defined() -> None:
    nan, infinity = math.nan, math.inf
    logits = torch.tensor(
        [[nan, nan, nan], [-infinity] * 3, [nan, 1.0, 0.0], [0.0, infinity, infinity], [0.0, 1.0, nan]]
    )
    tables = make_tables(5, temperature=[1.0, 0.0, 0.0, 1.0, 1.0], top_p=[0.9, 1.0, 1.0, 1.0, 0.1])
    token = sample_reference(logits, tables, torch.arange(5), torch.arange(5))
    assert token.tolist()[:3] == [0, 0, 1]
    assert token[3] in (1, 2)
    assert token[4] == 1
    assert tables.error.tolist() == [1, 1, 0, 0, 0, 0]


def test_noise_is_standard_gumbel_and_independent_between_seeds_positions_and_tokens() -> None:
    tokens = torch.arange(200_000)
    noise = gumbel_noise_reference(*split_seed(123), 5, tokens).double()
    assert torch.isfinite(noise).all()
    uniform = torch.exp(-torch.exp(-noise))
    counts = torch.histc(uniform, 100, 0, 1)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_square < 99 + 5 * math.sqrt(2 * 99)
    others = [
        gumbel_noise_reference(*split_seed(123), 6, tokens),
        gumbel_noise_reference(*split_seed(124), 5, tokens),
        gumbel_noise_reference(*split_seed(123 + (1 << 40)), 5, tokens),
        noise.roll(1),
        noise.roll(32),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack((noise, other.double())))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(len(tokens))


def test_split_seed_keeps_64_bits() -> None:
    assert split_seed(5) == (5, 0)
    assert split_seed(-1) == (-1, -1)
    assert split_seed((1 << 63) | 0x80000000) == (-(2**31), -(2**31))


def test_a_mask_unpacks_to_what_was_packed() -> None:
    allowed = torch.rand(4, 77) < 0.5
    assert torch.equal(unpack_mask(pack_mask(allowed), 77), allowed)


def test_output_buffer_is_filled_in_its_own_type() -> None:
    out = torch.full((2,), -1, dtype=torch.int64)
    result = sample_reference(torch.eye(2), make_tables(2), torch.tensor([0, 1]), torch.tensor([0, 0]), out=out)
    assert result is out
    assert out.tolist() == [0, 1]
