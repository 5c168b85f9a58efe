"""Sampling under masks with ends: the text ends as often as the model wants a token that cannot continue it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ramet.grammar import Vocabulary
from ramet.grammar.service.sources import compile_constraint
from ramet.kernels.sampling.sample import SamplingTables, sample_reference
from ramet.runtime.constraints.host_automaton import HostAutomaton
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.types import Request, SamplingParams, Sequence

TOKENIZER = ByteTokenizer()
ENDS = sorted(TOKENIZER.eos_ids)
NUM_DRAWS = 1500
# Pattern, text so far, and the bytes that continue it.
PLACES = [
    ("[0-9]{1,3}", "4", set(b"0123456789")),
    ("[a-z]+(, [a-z]+)*", "red", {*range(ord("a"), ord("z") + 1), ord(",")}),
    ("New( York)?", "New", {ord(" ")}),
]


def automaton(pattern: str, text: str) -> HostAutomaton:
    words = Vocabulary(TOKENIZER.token_bytes, TOKENIZER.eos_ids, TOKENIZER.special_ids, TOKENIZER.vocab_size)
    grammar = compile_constraint("regex", pattern, words)
    request = Request("r", np.zeros(3, dtype=np.int32), SamplingParams(), 50, stop_ids=TOKENIZER.eos_ids)
    walked = HostAutomaton(Sequence(request), grammar)
    walked.begin(words.num_words)
    for token in text.encode():
        walked.sequence.output_ids.extend(walked.follow([token], lambda num_forced: False))
    return walked


def taken(walked: HostAutomaton, logits: NDArray[np.float64], temperature: float, num_draws: int) -> list[int | None]:
    """The tokens that are taken for `num_draws` seeds."""
    assert walked.mask is not None
    tables = SamplingTables.create(num_draws)
    tables.temperature[:] = temperature
    tables.seed_low[:num_draws] = torch.arange(num_draws, dtype=torch.int32)
    rows = torch.arange(num_draws, dtype=torch.int32)
    mask = torch.from_numpy(walked.mask.copy()).repeat(num_draws, 1)
    repeated = torch.from_numpy(logits).float().repeat(num_draws, 1)
    drawn = sample_reference(repeated, tables, rows, rows * 0 + 7, mask).tolist()
    state, num_output = walked.state, walked.num_output
    found = []
    for token in drawn:
        found.append(walked.take(token))
        walked.state, walked.num_output = state, num_output
    return found


def shares(logits: NDArray[np.float64], temperature: float, continuing: set[int]) -> dict[int, float]:
    """By the definition: the end has the mass of all tokens that have bytes and do not continue the text."""
    mass = np.exp(logits / temperature)
    found = {token: mass[token] for token in continuing}
    found[ENDS[0]] = mass[[t for t in range(256) if t not in continuing]].sum() + mass[ENDS].sum()
    total = sum(found.values())
    return {token: share / total for token, share in found.items()}


@pytest.mark.parametrize(("pattern", "text", "continuing"), PLACES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_drawn_text_ends_as_often_as_the_model_means_it(
    pattern: str, text: str, continuing: set[int], temperature: float
) -> None:
    walked = automaton(pattern, text)
    logits = np.random.default_rng(3).normal(size=TOKENIZER.vocab_size)
    logits[sorted(continuing)] += 3.0  # so that both happen
    found = taken(walked, logits, temperature, NUM_DRAWS)
    found = [ENDS[0] if token in ENDS else token for token in found]
    for token, share in shares(logits, temperature, continuing).items():
        count = found.count(token)
        assert abs(count - NUM_DRAWS * share) <= 1 + 5 * np.sqrt(NUM_DRAWS * share * (1 - share)), (token, share)


@pytest.mark.parametrize(("pattern", "text", "continuing"), PLACES)
def test_a_greedy_text_ends_where_the_first_choice_does_not_continue_it(
    pattern: str, text: str, continuing: set[int]
) -> None:
    walked = automaton(pattern, text)
    rng, ends = np.random.default_rng(5), 0
    for _ in range(60):
        logits = rng.normal(size=TOKENIZER.vocab_size)
        logits[sorted(continuing)] += 4 / np.sqrt(len(continuing))  # so that both happen
        of_text = [*range(256), *ENDS]
        best = of_text[int(np.argmax(logits[of_text]))]
        (token,) = taken(walked, logits, 0.0, 1)
        assert token == best if best in continuing else token in ENDS
        ends += token in ENDS
    assert 5 < ends < 55
