"""Eager logit edits against plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from ramet.kernels.logits import apply_logit_bias, apply_penalties, compute_logprobs, mask_tokens


def test_penalties_follow_their_formulas() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    counts = torch.tensor([[3, 0, 1, 0], [0, 0, 0, 2]])
    prompt = torch.tensor([[False, True, False, False], [False] * 4])
    result = apply_penalties(
        logits, counts, prompt, torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.0]), torch.tensor([0.25, 1.0])
    )
    expected = [[1.0 - 1.5 - 0.25, -4.0, 0.5 - 0.5 - 0.25, -1.0], [1.0, 1.0, 1.0, 0.0]]
    assert torch.allclose(result, torch.tensor(expected))


def test_bias_adds_up_and_masked_tokens_are_minus_infinity() -> None:
    logits = torch.zeros(2, 4, dtype=torch.bfloat16)
    apply_logit_bias(logits, torch.tensor([0, 0, 1]), torch.tensor([1, 1, 3]), torch.tensor([1.0, 2.0, -5.0]))
    assert logits.tolist() == [[0, 3, 0, 0], [0, 0, 0, -5]]
    mask_tokens(logits, torch.tensor([1]), torch.tensor([0]))
    assert logits[1, 0] == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 50).to(dtype)
    tokens = torch.tensor([4, 0, 49], dtype=torch.int32)
    chosen, values, ids = compute_logprobs(logits, tokens, 5)
    expected = logits.double() - torch.logsumexp(logits.double(), -1, keepdim=True)
    assert torch.allclose(chosen.double(), expected[torch.arange(3), tokens.long()], atol=1e-5)
    assert torch.allclose(values.double(), expected.gather(1, ids), atol=1e-5)
    assert torch.allclose(values.double(), expected.sort(descending=True).values[:, :5], atol=1e-5)
