"""Log-probabilities of tokens, on a CPU or a GPU; outside CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_logprobs(logits: Tensor, tokens: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of the unprocessed distribution: the log-softmax of the model's raw logits [B, V].

    Temperature, penalties and masks have no effect (OpenAI's and vLLM's default). Pass raw logits without padding.
    tokens: int [B]. Returns the chosen tokens' values fp32 [B], the top values fp32 [B, top_n], and ids int64
    [B, top_n].
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, tokens.long().unsqueeze(1)).squeeze(1)
    values, ids = logprobs.topk(top_n, dim=-1)
    return chosen, values, ids
