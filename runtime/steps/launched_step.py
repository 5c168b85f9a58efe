"""A launched step, and the copy of its results to the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ramet.kernels.sampling.sample import compute_logprobs
from ramet.kernels.slots.tables import upload
from ramet.runtime.steps.inputs import Step, pooled_range, scored_range
from ramet.runtime.steps.sampler import Sampled, Scores
from ramet.runtime.types import Batch, RowOutput, ScheduledSequence, TopTokens


@dataclass(slots=True)
class StepLogprobs:
    """Log-probabilities of the k rows that request them. `rows`: their indices among the sampled positions."""

    rows: list[int]
    chosen: Tensor  # fp32 [k]
    top_ids: Tensor  # [k, n]
    top_values: Tensor  # [k, n]
    logits: Tensor  # [k, V], the model's own

    @classmethod
    def of(cls, step: Step, sampled: Sampled) -> StepLogprobs | None:
        """Compute them for the rows that request them; None if no row does."""
        if not len(step.logprob_rows):
            return None
        (index,) = upload([step.logprob_rows], sampled.tokens.device)
        logits = sampled.logits_of(index)
        chosen, values, ids = compute_logprobs(logits, sampled.tokens.index_select(0, index), step.num_tops)
        return cls(step.logprob_rows.tolist(), chosen, ids, values, logits)


@dataclass(slots=True)
class LaunchedStep:
    """A step whose results are being copied to the host. `read` waits for them."""

    batch: Batch
    tokens: Tensor  # int32 [R], host
    logprobs: StepLogprobs | None  # on the host, but for its logits
    scores: Scores | None  # on the host
    pooled: Tensor | None  # on the host
    event: torch.cuda.Event | None

    @classmethod
    def start(cls, batch: Batch, sampled: Sampled, logprobs: StepLogprobs | None) -> LaunchedStep:
        """Start the copy of a step's results to the host, without waiting."""
        if logprobs is not None:
            parts = [_to_host(part) for part in (logprobs.chosen, logprobs.top_ids, logprobs.top_values)]
            logprobs = replace(logprobs, chosen=parts[0], top_ids=parts[1], top_values=parts[2])
        tokens, scores = sampled.tokens, sampled.scores
        if scores is not None:
            scores = Scores(*(_to_host(part) for part in (scores.values, scores.top_ids, scores.top_values)))
        pooled = None if sampled.pooled is None else _to_host(sampled.pooled)
        on_host = _to_host(tokens), logprobs, scores, pooled
        event = torch.cuda.Event() if tokens.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()
        return cls(batch, *on_host, event)

    @property
    def verifies(self) -> bool:
        """True if some rows verify drafts."""
        return any(item.num_samples > 1 for item in self.batch.items[self.batch.num_decode :])

    def read(self) -> list[RowOutput]:
        """Wait for the step, and return one output for each item of the batch."""
        if self.event is not None:
            self.event.synchronize()
        tokens = self.tokens.tolist()
        items = self.batch.items
        if self.logprobs is not None or self.scores is not None or self.pooled is not None:
            return self._read_rows(tokens)
        if len(items) == self.batch.num_decode:
            return [RowOutput((token,)) for token in tokens]
        sampled = iter(tokens)
        return [RowOutput(accepted(item, tuple(islice(sampled, item.num_samples)))) for item in items]

    def logprob(self, row: int, token: int) -> float:
        """The log-probability of a token that was not sampled, read from the device: it waits for what is launched.

        `row`: an index among the sampled positions.
        """
        assert self.logprobs is not None
        index = self.logprobs.rows.index(row)
        logits = self.logprobs.logits[index : index + 1]
        (chosen,) = upload([np.asarray([token], dtype=np.int32)], logits.device)
        return float(compute_logprobs(logits, chosen, 0)[0].tolist()[0])

    def _read_rows(self, tokens: list[int]) -> list[RowOutput]:
        logprobs = {} if self.logprobs is None else self._logprobs_by_row(self.logprobs)
        scores = self.scores
        outputs, row, scored = [], 0, 0
        pooled = iter(() if self.pooled is None else self.pooled.numpy())
        for item in self.batch.items:
            first, last = scored_range(item)
            wanted = item.sequence.request.sampling.logprobs
            part, tops = None, None
            if last > first and scores is not None:
                rows = slice(scored, scored + last - first)
                part = scores.values[rows].numpy().copy()
                tops = tuple(_tops(scores.top_ids[rows, :wanted], scores.top_values[rows, :wanted])) if wanted else None
                scored += last - first
            if item.sequence.request.pooling is not None:
                first, last = pooled_range(item)
                outputs.append(RowOutput(pooled=next(pooled) if last > first else None))
                continue
            taken = accepted(item, tuple(tokens[row : row + item.num_samples]))
            if wanted is None or not taken:
                outputs.append(RowOutput(taken, prompt_logprobs=part, prompt_tops=tops))
            else:
                chosen, top = zip(*(logprobs[row + i] for i in range(len(taken))), strict=True)
                outputs.append(RowOutput(taken, chosen, tuple(likeliest[:wanted] for likeliest in top), part))
            row += item.num_samples
        return outputs

    def _logprobs_by_row(self, found: StepLogprobs) -> dict[int, tuple[float, TopTokens]]:
        tops = _tops(found.top_ids, found.top_values)
        return dict(zip(found.rows, zip(found.chosen.tolist(), tops, strict=True), strict=True))


def accepted(item: ScheduledSequence, sampled: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sampled tokens of a row that follow from each other: all up to the first that is not the drafted one.

    A token that ends the text is the last one. A token depends on nothing but the text before it, its position and the
    request, so these are the tokens that single steps would yield.
    """
    drafts, ends = item.sequence.draft_ids, item.sequence.request.stop_ids
    for count, token in enumerate(sampled[:-1], 1):
        if token != drafts[count - 1] or token in ends:
            return sampled[:count]
    return sampled


def _tops(ids: Tensor, values: Tensor) -> list[TopTokens]:
    """The likeliest tokens of each row of [k, n] tensors on the host."""
    return [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def _to_host(tensor: Tensor) -> Tensor:
    """Return the tensor on the host. The copy from a GPU may still be running."""
    if tensor.device.type != "cuda":
        return tensor
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return target.copy_(tensor, non_blocking=True)
