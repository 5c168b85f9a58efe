"""Log-probabilities against plain torch in double precision."""

from __future__ import annotations

import pytest
import torch

from ramet.kernels.sampling.sample import compute_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 50).to(dtype)
    tokens = torch.tensor([4, 0, 49], dtype=torch.int32)
    chosen, values, ids = compute_logprobs(logits, tokens, 5)
    expected = logits.double() - torch.logsumexp(logits.double(), -1, keepdim=True)
    assert torch.allclose(chosen.double(), expected[torch.arange(3), tokens.long()], atol=1e-5)
    assert torch.allclose(values.double(), expected.gather(1, ids), atol=1e-5)
    assert torch.allclose(values.double(), expected.sort(descending=True).values[:, :5], atol=1e-5)
