"""Eager steps: any step can run op by op."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.slots.tables import DecodeInputs, prepare_decode
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.steps.attention_plans import AttentionPlans
from ramet.runtime.steps.inputs import ExtendArrays, ExtendInputs, Step, upload_extend
from ramet.runtime.steps.sampler import Sampled, Sampler
from ramet.runtime.steps.slots import RunningSlots, upload


@dataclass(slots=True)
class SentStep:
    """A step with new tokens, on the device. token_ids, positions, kv_slots: int32 [T], decode rows first."""

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    decode: DecodeMetadata | None
    extend: ExtendInputs


class EagerSteps:
    """Runs a step with the ops of the decoder's device, one after another."""

    def __init__(
        self, decoder: Decoder, slots: RunningSlots, plans: AttentionPlans, sampler: Sampler, page_size: int
    ) -> None:
        self._decoder = decoder
        self._slots = slots
        self._plans = plans
        self._sampler = sampler
        self._page_size = page_size

    def run(self, step: Step) -> Sampled:
        """Launch a step of any kind."""
        decoder, plans = self._decoder, self._plans
        if step.extend is None:
            inputs, decode = self._send_decode(step)
            context = plans.context(inputs.positions, inputs.kv_slots, decode)
            logits = decoder.logits(decoder.forward(inputs.token_ids, context))
            return self._sampler.sample(step, logits, decode.rows, inputs.kv_lens)
        sent = self.send(step, step.extend)
        context = plans.context(sent.positions, sent.kv_slots, sent.decode, plans.extend(sent.extend, step.extend))
        return self._sampler.sample_extend(step, decoder.forward(sent.token_ids, context), sent.extend)

    def send(self, step: Step, arrays: ExtendArrays) -> SentStep:
        """Send a step with new tokens, and write its updates to the slot tables."""
        extend = upload_extend(arrays, self._slots.tables, self._decoder.device)
        if not step.batch.num_decode:
            return SentStep(extend.token_ids, extend.positions, extend.kv_slots, None, extend)
        inputs, decode = self._send_decode(step)
        return SentStep(
            torch.cat((inputs.token_ids, extend.token_ids)),
            torch.cat((inputs.positions, extend.positions)),
            torch.cat((inputs.kv_slots, extend.kv_slots)),
            decode,
            extend,
        )

    def _send_decode(self, step: Step) -> tuple[DecodeInputs, DecodeMetadata]:
        """Send the decode rows. The device reads their tokens and positions from the slot tables."""
        device, tables, batch = self._decoder.device, self._slots.tables, step.batch
        rows, new_pages = upload([step.decode_rows, step.new_pages], device)
        inputs = DecodeInputs.create(batch.num_decode, device)
        columns = tables.last_token, tables.kv_len, tables.page_table
        prepare_decode(rows, new_pages, *columns, self._page_size, inputs)
        kv_lens = [item.start + 1 for item in batch.items[: batch.num_decode]]
        return inputs, self._plans.decode(rows, inputs.kv_lens, self._plans.tree_of(batch), kv_lens)
