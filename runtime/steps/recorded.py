"""Recorded programs for steps of few tokens on a CPU, one for each size: the counterpart of a GPU's CUDA graphs.

A program is recorded when its size first occurs, which costs about as much as the step itself. New tokens of a prompt
run as decode rows of one sequence: each layer writes the keys of all of them before any row attends, and each row's KV
length limits the keys that it sees. A step whose products do not all run on Ramet's kernels (sizes that a library
multiplies) has no program and runs eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ramet.kernels.ops import NotRecordableError, Record, Recording
from ramet.kernels.slots.tables import DecodeInputs, prepare_decode
from ramet.runtime.models.decoder import Decoder, ForwardContext
from ramet.runtime.steps.attention_plans import AttentionPlans
from ramet.runtime.steps.eager import EagerSteps
from ramet.runtime.steps.inputs import ExtendArrays, Step
from ramet.runtime.steps.sampler import Sampled, Sampler
from ramet.runtime.steps.slots import RunningSlots

logger = logging.getLogger(__name__)

# Limits of a recorded step with new tokens. Attention of prompts transposes the keys once for all rows, a program once
# for each thread: with SmolLM2 (queries of 576 numbers), both take the same time if 32 new tokens see 500 keys each; if
# 16 see 5,000, a program takes a fifth more.
_MAX_TOKENS = 64
_MAX_PRODUCTS = 40_000 * 576  # products of query and key numbers, in a layer


@dataclass(slots=True, eq=False)
class RecordedStep:
    """A recorded step of one size. The caller fills `rows` and `inputs`, then runs it."""

    rows: Tensor  # int32 [B], slots
    inputs: DecodeInputs
    decoder: Decoder
    embeddings: Tensor  # [B, hidden]
    recording: Recording

    def run(self) -> Tensor:
        """Run the step. Returns logits [B, V] before the softcap, or [B, hidden]. The next step may overwrite them."""
        self.embeddings.copy_(self.decoder.embedding(self.inputs.token_ids))
        self.recording.run()
        return self.recording.result

    def hidden(self, rows: Tensor, token_ids: Tensor, positions: Tensor, kv_slots: Tensor) -> Tensor:
        """Run a step that ends in hidden states, on T <= B tokens (arguments int32 [T]). Returns [T, hidden].

        Each sequence's tokens must directly follow its cached ones. The next step may overwrite the result.
        """
        count, inputs = rows.numel(), self.inputs
        parts = (rows, token_ids, positions, kv_slots, positions + 1)
        static = (self.rows, inputs.token_ids, inputs.positions, inputs.kv_slots, inputs.kv_lens)
        for target, part in zip(static, parts, strict=True):
            target[:count] = part
            target[count:] = 0  # padding writes to the dummy page, and sees nothing
        return self.run()[:count]

    def logits(self) -> Tensor:
        """Run a step that ends in logits. Returns [B, V], which the next step may overwrite."""
        return self.decoder.capped(self.run())


class Recordings:
    """Programs of one decoder.

    record: the recorder of the decoder's ops. `make_context(rows, inputs)`: makes the decoder's `ForwardContext`.
    """

    def __init__(
        self, decoder: Decoder, record: Record, make_context: Callable[[Tensor, DecodeInputs], ForwardContext]
    ) -> None:
        self._decoder = decoder
        self._record_kernels = record
        self._make_context = make_context
        self._steps: dict[tuple[int, bool], RecordedStep | None] = {}

    def get(self, batch_size: int, *, has_logits: bool = True) -> RecordedStep | None:
        """Return the program of this size, or None if the step must run eagerly."""
        key = batch_size, has_logits
        if key not in self._steps:
            self._steps[key] = self._record(batch_size, has_logits)
        return self._steps[key]

    def get_extend(self, num_tokens: int, num_keys: int) -> RecordedStep | None:
        """Return a program that ends in hidden states for a step with new tokens, or None if it should run eagerly.

        num_tokens: tokens of all rows. num_keys: the number of keys that a new token sees, summed over the new tokens.
        """
        config = self._decoder.config
        if num_tokens > _MAX_TOKENS or num_keys * config.num_heads * config.head_dim > _MAX_PRODUCTS:
            return None
        # Few sizes, without waste: products also compute groups of four tokens.
        return self.get(num_tokens if num_tokens <= 2 else -(-num_tokens // 4) * 4, has_logits=False)

    def _record(self, batch_size: int, has_logits: bool) -> RecordedStep | None:
        decoder = self._decoder
        rows, inputs = torch.zeros(batch_size, dtype=torch.int32), DecodeInputs.create(batch_size)
        embeddings = torch.zeros((batch_size, decoder.config.hidden_size), dtype=decoder.dtype)
        context = self._make_context(rows, inputs)

        def step() -> Tensor:
            hidden = decoder.hidden(embeddings, context)
            return decoder.output(hidden) if has_logits else hidden

        try:
            recording = self._record_kernels(step)
        except NotRecordableError as error:
            logger.debug("steps of %d tokens run eagerly: they need %s", batch_size, error)
            return None
        return RecordedStep(rows, inputs, decoder, embeddings, recording)


class RecordedSteps:
    """Runs steps of few tokens as programs."""

    def __init__(
        self,
        decoder: Decoder,
        slots: RunningSlots,
        plans: AttentionPlans,
        sampler: Sampler,
        eager: EagerSteps,
        record: Record,
    ) -> None:
        self._tables = slots.tables
        self._plans = plans
        self._sampler = sampler
        self._eager = eager
        self.recordings = Recordings(decoder, record, self._context)

    def run(self, step: Step) -> Sampled | None:
        """Run a step if its size has a program; otherwise return None: it must run eagerly."""
        return self._run_decode(step) if step.extend is None else self._run_extend(step, step.extend)

    def computes_run(self, num_tokens: int, num_rows: int, kv_len: int) -> bool:
        """Return True if computing a row's known tokens in one step is faster (see `ModelRunner`).

        A recorded step is always faster. An eager step costs more than decode steps, and delays all other rows.
        """
        if num_tokens > num_rows // 3 or self.recordings.get(num_rows) is None:
            return True
        num_keys = (num_tokens + 1) * (kv_len + num_tokens)
        return self.recordings.get_extend(num_rows + num_tokens, num_keys) is not None

    def _run_decode(self, step: Step) -> Sampled | None:
        recorded = self.recordings.get(step.num_decode)
        if recorded is None:
            return None
        recorded.rows.copy_(torch.from_numpy(step.decode_rows))
        new_pages = torch.from_numpy(step.new_pages)
        prepare_decode(recorded.rows, new_pages, self._tables, self._plans.page_size, recorded.inputs)
        return self._sampler.sample(step, recorded.logits(), recorded.rows, recorded.inputs.kv_lens)

    def _run_extend(self, step: Step, arrays: ExtendArrays) -> Sampled | None:
        q_lens, prompts = arrays.q_lens, slice(step.num_verified, None)
        num_tokens = step.num_decode + len(arrays.token_ids)
        recorded = self.recordings.get_extend(num_tokens, int(q_lens[prompts] @ arrays.kv_lens[prompts]))
        if recorded is None:
            return None
        sent, _ = self._eager.send(step, arrays)
        rows = torch.from_numpy(np.concatenate([step.decode_rows, np.repeat(arrays.rows, q_lens)]))
        hidden = recorded.hidden(rows, sent.token_ids, sent.positions, sent.kv_slots)
        return self._sampler.sample_extend(step, hidden, sent)

    def _context(self, rows: Tensor, inputs: DecodeInputs) -> ForwardContext:
        return self._plans.context(inputs.positions, inputs.kv_slots, self._plans.decode(rows, inputs.kv_lens))
