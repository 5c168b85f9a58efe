"""Penalties, biases and minimum lengths by the host: on a CPU, and on a GPU that has no row left for them.

These need the tokens of a sequence on the host, so a step with such rows is not overlapped. The edits are sparse: they
touch the tokens a sequence has seen, never the whole vocabulary. On the device: `logit_edits.py`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from ramet.runtime.types import Sequence


def apply_edits(logits: Tensor, sequences: Seq[Sequence | None]) -> Tensor:
    """Return fp32 logits [R, V] with the edits that `sequences` (one a row, or None) ask for; the input stays as it is.

    Order as in vLLM: logit bias and minimum length, then repetition, frequency and presence penalties.
    Source: repetition penalty, Keskar et al. 2019 (arXiv:1909.05858); frequency and presence, OpenAI's API reference.
    """
    edited = logits.float().clone() if logits.dtype == torch.float32 else logits.float()
    for row, sequence in enumerate(sequences):
        if sequence is None:
            continue
        params = sequence.request.sampling
        line = edited[row]
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=line.device)
            line[ids] += torch.tensor(list(params.logit_bias.values()), device=line.device)
        if len(sequence.output_ids) < params.min_tokens and sequence.request.stop_ids:
            line[torch.tensor(sorted(sequence.request.stop_ids), device=line.device)] = -torch.inf
        if params.repetition_penalty != 1.0:
            seen = torch.from_numpy(np.unique(sequence.tokens(0, sequence.num_tokens)).astype(np.int64)).to(line.device)
            values = line[seen]
            penalty = params.repetition_penalty
            line[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if (params.frequency_penalty or params.presence_penalty) and sequence.output_ids:
            ids_np, counts_np = np.unique(np.asarray(sequence.output_ids, dtype=np.int64), return_counts=True)
            ids = torch.from_numpy(ids_np).to(line.device)
            counts = torch.from_numpy(counts_np.astype(np.float32)).to(line.device)
            line[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return edited
