"""Eager edits of logits for the requests that need more than the fused sampler, and log-probabilities.

Penalties (in this order, all in fp32; Keskar et al. 2019 for the first, OpenAI's definition for the others):

    repetition   tokens of prompt or output: logit / r where positive, logit * r where negative
    frequency    logit - f * (count in the output)
    presence     logit - p * (1 if in the output)

These are plain torch functions, for CPU and device tensors alike; they run outside CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_penalties(
    logits: Tensor, output_counts: Tensor, prompt_mask: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Return penalised logits, fp32 [B, V].

    output_counts: int [B, V], how often each token was generated. prompt_mask: bool [B, V], tokens of the prompt.
    repetition (1: off), frequency, presence (0: off): fp32 [B].
    """
    logits = logits.float()
    in_output = output_counts > 0
    rate = torch.where(in_output | prompt_mask, repetition.unsqueeze(1), 1.0)
    logits = torch.where(logits > 0, logits / rate, logits * rate)
    return logits - frequency.unsqueeze(1) * output_counts - presence.unsqueeze(1) * in_output


def apply_logit_bias(logits: Tensor, batch_rows: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
    """Add `bias` [E] to logits [B, V] at (batch_rows [E], tokens [E]), in place; entries that repeat add up."""
    return logits.index_put_((batch_rows.long(), tokens.long()), bias.to(logits.dtype), accumulate=True)


def mask_tokens(logits: Tensor, batch_rows: Tensor, tokens: Tensor) -> Tensor:
    """Set logits [B, V] at (batch_rows [E], tokens [E]) to -inf, in place: stop tokens before `min_tokens`."""
    minus_infinity = torch.tensor(float("-inf"), dtype=logits.dtype, device=logits.device)
    return logits.index_put_((batch_rows.long(), tokens.long()), minus_infinity)


def compute_logprobs(logits: Tensor, tokens: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of the unprocessed distribution: the log-softmax of the model's raw logits [B, V].

    Temperature, penalties and masks do not enter (OpenAI's and vLLM's default). Pass raw logits, without padding.
    tokens: int [B]. Returns the chosen tokens' fp32 [B], the likeliest values fp32 [B, top_n] and ids int64 [B, top_n].
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, tokens.long().unsqueeze(1)).squeeze(1)
    values, ids = logprobs.topk(top_n, dim=-1)
    return chosen, values, ids
