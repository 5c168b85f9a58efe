"""Steps of few tokens on a CPU as recorded programs, one a size: what CUDA graphs are to a GPU.

Recorded when a size first comes up, which costs about as much as the step itself. New tokens of a prompt count as
decode rows of one sequence: in each layer the keys of all are written before the first attends, and the KV length of
each says which of them it sees. A decoder whose products are not all kernels of ours (weights in fp32, batches that a
library multiplies) has no program and runs eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ramet.kernels.ops import NotRecordableError, Record, Recording
from ramet.kernels.slots.tables import DecodeInputs
from ramet.runtime.models.context import ForwardContext
from ramet.runtime.models.decoder import Decoder

logger = logging.getLogger(__name__)

# Limits of a recorded step with new tokens. A row reads its keys by itself, while attention of prompts reads them once
# for 8 rows: with SmolLM2 (queries of 576 numbers), both take the same time where new tokens see 8,000 keys together.
_MAX_TOKENS = 32
_MAX_PRODUCTS = 6000 * 576  # of numbers of queries and keys, in a layer


@dataclass(slots=True, eq=False)
class RecordedStep:
    """A step of one size. The caller fills `rows` and `inputs`, then runs it."""

    rows: Tensor  # int32 [B], slots
    inputs: DecodeInputs
    decoder: Decoder
    embeddings: Tensor  # [B, hidden]
    recording: Recording

    def run(self) -> Tensor:
        """Run the step; returns [B, V] before a cap, or [B, hidden], which the next step may write again."""
        self.embeddings.copy_(self.decoder.embedding(self.inputs.token_ids))
        self.recording.run()
        return self.recording.result

    def hidden(self, rows: Tensor, token_ids: Tensor, positions: Tensor, kv_slots: Tensor) -> Tensor:
        """Run a step that ends in hidden states on T <= B tokens, int32 [T] each; returns [T, hidden], as above.

        A sequence's tokens are those that follow its cache.
        """
        count, inputs = rows.numel(), self.inputs
        parts = (rows, token_ids, positions, kv_slots, positions + 1)
        static = (self.rows, inputs.token_ids, inputs.positions, inputs.kv_slots, inputs.kv_lens)
        for target, part in zip(static, parts, strict=True):
            target[:count] = part
            target[count:] = 0  # padding writes to the dummy page, and sees nothing
        return self.run()[:count]

    def logits(self) -> Tensor:
        """Run a step that ends in logits; returns [B, V], which the next step may write again."""
        return self.decoder.capped(self.run())


class RecordedSteps:
    """Programs of one decoder.

    record: of the decoder's ops. `make_context(rows, inputs)`: what the decoder reads besides the embeddings.
    """

    def __init__(
        self, decoder: Decoder, record: Record, make_context: Callable[[Tensor, DecodeInputs], ForwardContext]
    ) -> None:
        self._decoder = decoder
        self._record_kernels = record
        self._make_context = make_context
        self._steps: dict[tuple[int, bool], RecordedStep | None] = {}

    def get(self, batch_size: int, *, has_logits: bool = True) -> RecordedStep | None:
        """The program of this size; None where the step has to run eagerly."""
        key = batch_size, has_logits
        if key not in self._steps:
            self._steps[key] = self._record(batch_size, has_logits)
        return self._steps[key]

    def get_extend(self, num_tokens: int, num_keys: int) -> RecordedStep | None:
        """A program for a step with new tokens, up to hidden states; None where it should run eagerly.

        num_tokens: of all rows. num_keys: that new tokens see, summed over the tokens.
        """
        config = self._decoder.config
        if num_tokens > _MAX_TOKENS or num_keys * config.num_heads * config.head_dim > _MAX_PRODUCTS:
            return None
        # Few sizes, and none wasted: products compute fours of tokens, too.
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
