"""Steps that replay a CUDA graph, sampling included: decode steps, those with few new prompt tokens, and those that
verify drafts, without prompts.

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
from ramet.runtime.steps.cuda_graph import GraphBuffers, GraphCapture, GraphKey, StepGraphs
from ramet.runtime.steps.inputs import Step
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
        verifies: bool = False,
        capture: GraphCapture | None = None,
    ) -> None:
        """max_extend: maximum tokens of a captured step with prompts; 0 captures none. verifies: drafts, in some."""
        self._decoder = decoder
        self._tables: SlotTables = slots.tables
        self._plans = plans
        self._sampler = sampler
        sizes, device = (slots.num_slots, slots.dummy), decoder.device
        self.graphs = StepGraphs(self._body, *sizes, device, max_extend=max_extend, verifies=verifies, capture=capture)
        # Hidden states of the last graph's tokens, from which log-probabilities and scores are computed outside it.
        shape = self.graphs.max_tokens, decoder.config.hidden_size
        self._hidden = torch.empty(shape, dtype=decoder.dtype, device=device)

    def run(self, step: Step) -> Sampled | None:
        """Replay the graph of a step. Returns None if no graph fits."""
        if step.needs_host or step.pooled is not None:
            return None
        arrays, count = step.extend, step.num_decode
        new = (0, 0) if arrays is None else (len(arrays.token_ids), len(arrays.rows))
        if arrays is None or not step.num_verified:
            key = self.graphs.key(count, *new, uses_tree=step.uses_tree)
        elif step.num_verified == len(arrays.rows):
            key = self.graphs.verifying_key(count + len(arrays.token_ids), int(arrays.q_lens.max()) - 1)
        else:
            key = None
        if key is None:
            return None
        if arrays is None:
            tokens = self.graphs.replay(key, step.decode_rows, step.new_pages, None)
            return Sampled(_own(tokens), lambda rows: self._decoder.logits(self._hidden.index_select(0, rows)))
        sent = arrays.updates, arrays.sample_index, arrays.score_index, arrays.score_targets
        updates, sampled, scored, targets = upload(sent, self._decoder.device)
        scatter_rows(updates, self._tables.arena)
        tokens = self.graphs.replay(key, step.decode_rows, step.new_pages, arrays)
        scores = self._sampler.score(self._hidden, scored, targets, step.num_score_tops)

        def logits_of(rows: Tensor) -> Tensor:
            return self._decoder.logits(self._hidden.index_select(0, sampled.index_select(0, rows)))

        return Sampled(_own(tokens), logits_of, scores)

    def _body(self, key: GraphKey, buffers: GraphBuffers) -> None:
        """A step of decode rows, new tokens and padding."""
        if key.num_drafted:
            self._verify(buffers)
            return
        part, inputs, plans = buffers.part, buffers.inputs, self._plans
        decode = extend = None
        if key.num_decode:
            rows, is_alone = part("rows"), not key.num_tokens
            prepare_decode(rows, part("new_pages"), self._tables, plans.page_size, inputs, fills_padding=is_alone)
            decode = plans.decode(rows, inputs.kv_lens, plans.shared(uses_tree=key.uses_tree))
        if key.num_tokens:
            where = part("cu_seqlens"), part("kv_lens"), part("extend_rows")
            extend = plans.extend_in_graph(*where, key.num_tokens)
        start = None if extend is None else 0
        context = plans.context(inputs.positions, inputs.kv_slots, decode, extend, extend_start=start)
        hidden = self._decoder.forward(inputs.token_ids, context)
        self._hidden[: hidden.shape[0]].copy_(hidden)
        if extend is None:
            self._sampler.choose(self._decoder.logits(hidden), part("rows"), inputs.kv_lens, None, buffers.tokens)
            return
        logits = self._decoder.logits(hidden.index_select(0, part("sample_index")))
        self._sampler.choose(logits, part("sample_rows"), part("sample_positions"), None, buffers.tokens)

    def _verify(self, buffers: GraphBuffers) -> None:
        """A step of decode rows, of rows that verify drafts, and padding. All tokens attend as decode rows do."""
        part, inputs, plans = buffers.part, buffers.inputs, self._plans
        rows, new_pages = part("rows"), part("new_pages")
        prepare_decode(rows, new_pages, self._tables, plans.page_size, inputs, fills_padding=False)
        kv_lens = inputs.positions + 1
        decode = plans.decode(part("token_rows"), kv_lens)
        hidden = self._decoder.forward(inputs.token_ids, plans.context(inputs.positions, inputs.kv_slots, decode))
        self._hidden[: hidden.shape[0]].copy_(hidden)
        self._sampler.choose_in_turns(self._decoder.logits(hidden), buffers.turns(), kv_lens, None, buffers.tokens)


def _own(tokens: Tensor) -> Tensor:
    """Tokens that the next replay does not overwrite; to a GPU's host they are copied before it."""
    return tokens if tokens.device.type == "cuda" else tokens.clone()
