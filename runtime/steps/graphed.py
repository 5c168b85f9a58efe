"""Steps that replay a CUDA graph, sampling included: decode steps, and decode steps with few new prompt tokens.

Graphs are captured at start and owned by `cuda_graph.StepGraphs`. A graph keeps its hidden states; log-probabilities
and scores are computed from them behind it. Not here: long prompts, and steps whose logits the host must edit or mask
before a token is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.slots.tables import SlotTables, prepare_decode, scatter_rows, upload
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.steps.attention_plans import AttentionPlans
from ramet.runtime.steps.cuda_graph import DecodeBuffers, GraphCapture, GraphKey, MixedBuffers, MixedKey, StepGraphs
from ramet.runtime.steps.inputs import ExtendArrays, Step
from ramet.runtime.steps.sampler import Sampled, Sampler
from ramet.runtime.steps.slots import RunningSlots


class GraphedSteps:
    """Captures steps from the embedding to the slots' new states, and replays them."""

    def __init__(
        self,
        decoder: Decoder,
        slots: RunningSlots,
        plans: AttentionPlans,
        sampler: Sampler,
        *,
        max_extend: int,
        capture: GraphCapture | None = None,
    ) -> None:
        """max_extend: maximum tokens of a captured step with prompts; 0 captures decode graphs only."""
        self._decoder = decoder
        self._tables: SlotTables = slots.tables
        self._plans = plans
        self._sampler = sampler
        bodies, device = (self._decode_body, self._mixed_body), decoder.device
        self.graphs = StepGraphs(*bodies, slots.num_slots, slots.dummy, device, max_extend=max_extend, capture=capture)
        # Hidden states of the last graph's tokens, from which log-probabilities and scores are computed outside it.
        shape = self.graphs.max_tokens, decoder.config.hidden_size
        self._hidden = torch.empty(shape, dtype=decoder.dtype, device=device)

    def run(self, step: Step) -> Sampled | None:
        """Replay the graph of a step. Returns None if no graph fits."""
        if step.needs_host:
            return None
        if step.extend is not None:
            return self._replay_mixed(step, step.extend)
        tokens = self.graphs.replay(step.decode_rows, step.new_pages, uses_tree=step.uses_tree)
        return Sampled(_own(tokens), lambda rows: self._decoder.logits(self._hidden.index_select(0, rows)))

    def _replay_mixed(self, step: Step, arrays: ExtendArrays) -> Sampled | None:
        if step.pooled is not None:
            return None
        counts = step.num_decode, len(arrays.token_ids), len(arrays.rows)
        key = self.graphs.mixed_key(*counts, uses_tree=step.uses_tree)
        if key is None:
            return None
        sent = arrays.updates, arrays.sample_index, arrays.score_index, arrays.score_targets
        updates, sampled, scored, targets = upload(sent, self._decoder.device)
        scatter_rows(updates, self._tables.arena)
        tokens = self.graphs.replay_mixed(key, step.decode_rows, step.new_pages, arrays)
        scores = self._sampler.score(self._hidden, scored, targets, step.num_score_tops)

        def logits_of(rows: Tensor) -> Tensor:
            return self._decoder.logits(self._hidden.index_select(0, sampled.index_select(0, rows)))

        return Sampled(_own(tokens), logits_of, scores)

    def _decode_body(self, key: GraphKey, buffers: DecodeBuffers) -> None:
        """A step of decode rows and padding."""
        inputs = buffers.inputs
        prepare_decode(buffers.rows, buffers.new_pages, self._tables, self._plans.page_size, inputs)
        decode = self._plans.decode(buffers.rows, inputs.kv_lens, self._plans.shared(uses_tree=key.uses_tree))
        context = self._plans.context(inputs.positions, inputs.kv_slots, decode)
        logits = self._decoder.logits(self._keep(self._decoder.forward(inputs.token_ids, context)))
        self._sampler.choose(logits, buffers.rows, inputs.kv_lens, None, buffers.tokens)

    def _mixed_body(self, key: MixedKey, buffers: MixedBuffers) -> None:
        """A step of decode rows, new tokens and padding."""
        part = buffers.part
        decode = None
        if key.num_decode:
            rows, inputs = part("rows"), buffers.inputs
            size = self._plans.page_size
            prepare_decode(rows, part("new_pages"), self._tables, size, inputs, fills_padding=False)
            decode = self._plans.decode(rows, inputs.kv_lens, self._plans.shared(uses_tree=key.uses_tree))
        where = part("cu_seqlens"), part("kv_lens"), part("extend_rows")
        extend = self._plans.extend_in_graph(*where, key.num_tokens)
        context = self._plans.context(part("positions"), part("kv_slots"), decode, extend, extend_start=0)
        hidden = self._decoder.forward(part("token_ids"), context)
        logits = self._decoder.logits(self._keep(hidden).index_select(0, part("sample_index")))
        self._sampler.choose(logits, part("sample_rows"), part("sample_positions"), None, buffers.tokens)

    def _keep(self, hidden: Tensor) -> Tensor:
        self._hidden[: hidden.shape[0]].copy_(hidden)
        return hidden


def _own(tokens: Tensor) -> Tensor:
    """Tokens that the next replay does not overwrite; to a GPU's host they are copied before it."""
    return tokens if tokens.device.type == "cuda" else tokens.clone()
