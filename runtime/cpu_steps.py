"""Decode steps on a CPU as recorded programs, one a batch size: what CUDA graphs are to a GPU.

Recorded when a batch size first comes up, which costs about as much as the step itself. A decoder whose products are
not all kernels of ours (weights in fp32, batches that a library multiplies) has no program and runs eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ramet.kernels.cpu_program import NotRecordableError, Pool, Program
from ramet.kernels.step_inputs import DecodeInputs
from ramet.runtime.models.context import ForwardContext
from ramet.runtime.models.decoder import Decoder

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class RecordedStep:
    """A step of one batch size. The caller fills `rows` and `inputs`, then asks for `logits`."""

    rows: Tensor  # int32 [B], slots
    inputs: DecodeInputs
    decoder: Decoder
    embeddings: Tensor  # [B, hidden]
    program: Program
    raw_logits: Tensor  # [B, V], before a cap

    def logits(self) -> Tensor:
        """Run the step; returns [B, V], which the next step may write again."""
        self.embeddings.copy_(self.decoder.embedding(self.inputs.token_ids))
        self.program.run()
        return self.decoder.capped(self.raw_logits)


class RecordedSteps:
    """Programs of one decoder. `make_context(rows, inputs)`: what the decoder reads besides the embeddings."""

    def __init__(self, decoder: Decoder, make_context: Callable[[Tensor, DecodeInputs], ForwardContext]) -> None:
        self._decoder = decoder
        self._make_context = make_context
        self._pool = Pool()
        self._steps: dict[int, RecordedStep | None] = {}

    def get(self, batch_size: int) -> RecordedStep | None:
        """The program of this batch size; None where the step has to run eagerly."""
        if batch_size not in self._steps:
            self._steps[batch_size] = self._record(batch_size)
        return self._steps[batch_size]

    def _record(self, batch_size: int) -> RecordedStep | None:
        decoder = self._decoder
        rows, inputs = torch.zeros(batch_size, dtype=torch.int32), DecodeInputs.create(batch_size)
        embeddings = torch.zeros((batch_size, decoder.config.hidden_size), dtype=decoder.dtype)
        context = self._make_context(rows, inputs)
        try:
            program, raw_logits = Program.record(
                lambda: decoder.output(decoder.hidden(embeddings, context)), self._pool
            )
        except NotRecordableError as error:
            logger.debug("decode steps of %d rows run eagerly: they need %s", batch_size, error)
            return None
        return RecordedStep(rows, inputs, decoder, embeddings, program, raw_logits)
