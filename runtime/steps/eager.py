"""Eager steps: any step can run op by op."""

from __future__ import annotations

import numpy as np
import torch

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.slots.tables import DecodeInputs, prepare_decode, upload
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.steps.attention_plans import AttentionPlans
from ramet.runtime.steps.inputs import ExtendArrays, ExtendInputs, Step, upload_extend
from ramet.runtime.steps.sampler import Sampled, Sampler
from ramet.runtime.steps.slots import RunningSlots


class EagerSteps:
    """Runs a step with the ops of the decoder's device, one after another."""

    def __init__(self, decoder: Decoder, slots: RunningSlots, plans: AttentionPlans, sampler: Sampler) -> None:
        self._decoder = decoder
        self._tables = slots.tables
        self._plans = plans
        self._sampler = sampler

    def run(self, step: Step) -> Sampled:
        """Launch a step of any kind."""
        decoder, plans = self._decoder, self._plans
        if step.extend is None:
            inputs, plan = self._send_decode(step)
            context = plans.context(inputs.positions, inputs.kv_slots, plan)
            logits = decoder.logits(decoder.forward(inputs.token_ids, context))
            return self._sampler.sample(step, logits, plan.rows, inputs.kv_lens)
        sent, decode = self.send(step, step.extend)
        num_verified, extend = step.num_verified, None
        if num_verified:
            decode = self._with_drafts(step, step.extend, sent)
        if num_verified < len(step.extend.rows):
            extend = plans.extend(sent, step.extend, num_verified)
        context = plans.context(sent.positions, sent.kv_slots, decode, extend)
        return self._sampler.sample_extend(step, decoder.forward(sent.token_ids, context), sent)

    def send(self, step: Step, arrays: ExtendArrays) -> tuple[ExtendInputs, DecodeMetadata | None]:
        """Send a step with new tokens, and write its updates to the slot tables.

        Returns the inputs with the decode rows' tokens in front, and the attention plan of the decode rows.
        """
        sent = upload_extend(arrays, self._tables, self._decoder.device)
        if not step.num_decode:
            return sent, None
        inputs, decode = self._send_decode(step)
        sent.token_ids = torch.cat((inputs.token_ids, sent.token_ids))
        sent.positions = torch.cat((inputs.positions, sent.positions))
        sent.kv_slots = torch.cat((inputs.kv_slots, sent.kv_slots))
        return sent, decode

    def _with_drafts(self, step: Step, arrays: ExtendArrays, sent: ExtendInputs) -> DecodeMetadata:
        """The attention plan of the decode rows and of rows that verify drafts: their tokens attend as decode rows do.

        On some CPUs, attention of prompts has another precision.
        """
        num_tokens = int(arrays.cu_seqlens[step.num_verified])
        verified = np.repeat(arrays.rows[: step.num_verified], arrays.q_lens[: step.num_verified])
        (rows,) = upload([np.concatenate([step.decode_rows, verified])], self._decoder.device)
        kv_lens = sent.positions[: len(rows)] + 1
        on_host = [*step.kv_lens.tolist(), *(arrays.positions[:num_tokens] + 1).tolist()]
        return self._plans.decode(rows, kv_lens, None, on_host)

    def _send_decode(self, step: Step) -> tuple[DecodeInputs, DecodeMetadata]:
        """Send the decode rows. The device reads their tokens and positions from the slot tables."""
        device, plans = self._decoder.device, self._plans
        rows, new_pages = upload([step.decode_rows, step.new_pages], device)
        inputs = DecodeInputs.create(step.num_decode, device)
        prepare_decode(rows, new_pages, self._tables, plans.page_size, inputs)
        tree = plans.shared(uses_tree=step.uses_tree)
        return inputs, plans.decode(rows, inputs.kv_lens, tree, step.kv_lens.tolist())
