"""One step on the device: inputs, decoder, sampling, and the copy of what was sampled back to the host.

`launch` never waits for the device (where the device is a GPU); `LaunchedStep.read` does, one step later. A step that
only decodes, or has few new tokens besides, replays a CUDA graph; others run eagerly. Owner of the slot tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.extend import ExtendMetadata
from ramet.kernels.attention.plan import FIXED_SPLITS, PROGRAMS_PER_SM, AttentionTiles, choose_num_splits
from ramet.kernels.attention.tree import TreePlan
from ramet.kernels.grammar.arena import FREE_STATE, GrammarArena
from ramet.kernels.grammar.mask import advance_states
from ramet.kernels.sampling.logit_edits import count_tokens
from ramet.kernels.sampling.logprobs import compute_logprobs
from ramet.kernels.slots.copy_pages import copy_pages
from ramet.kernels.slots.tables import COLUMNS, DecodeInputs, commit_decode, prepare_decode, scatter_rows
from ramet.runtime.constraints.states import HostMasks
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.context import ForwardContext
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.steps.cuda_graph import Capture, DecodeBuffers, GraphKey, MixedBuffers, MixedKey, StepGraphs
from ramet.runtime.steps.inputs import (
    ExtendArrays,
    ExtendInputs,
    decode_rows_of,
    gather_extend,
    new_pages_of,
    upload_extend,
)
from ramet.runtime.steps.kv_cache import KVCache
from ramet.runtime.steps.launched_step import LaunchedStep, StepLogprobs
from ramet.runtime.steps.logit_edits import LogitEdits, apply_edits
from ramet.runtime.steps.recorded import RecordedSteps
from ramet.runtime.steps.slots import RunningSlots, upload
from ramet.runtime.steps.tree_planner import TreePlanner
from ramet.runtime.types import Batch, Sequence

_SCORE_ROWS = 512  # logits rows of one part of a scoring chunk: bounds the [rows, V] fp32 workspace
_ANY_LENGTH = 1 << 20  # as the longest of a launch: attention takes the tile of long prompts


class ModelRunner:
    """Runs batches of a scheduler on one device."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        slots: RunningSlots,
        *,
        device: torch.device,
        max_kv_len: int,
        arena: GrammarArena | None = None,
        edits: LogitEdits | None = None,
        tree: TreePlanner | None = None,
        is_deterministic: bool = False,
        tiles: AttentionTiles | None = None,
    ) -> None:
        """is_deterministic: a row's bits must not depend on the other rows; `decoder` has batch-invariant products.

        tiles: of attention, measured on this card.
        """
        assert tree is None or not is_deterministic, "what a group shares changes the order of summation"
        is_cuda = device.type == "cuda"
        self.decoder = decoder
        self.model: ModelConfig = decoder.config
        self.kv_cache = kv_cache
        self.slots = slots
        self.tables = slots.tables
        self.arena = arena
        self.edits = edits
        self.tree = tree
        self.is_deterministic = is_deterministic
        self.tiles = tiles
        self.sampling = slots.tables.sampling(
            None if arena is None else arena.mask_index,
            None if arena is None else arena.mask_rows,
            None if edits is None else edits.tables,
        )
        self.device = device
        self.max_kv_len = max_kv_len
        self.page_size = kv_cache.page_size
        self.graphs: StepGraphs | None = None
        self._hidden: Tensor | None = None  # [max_samples, hidden]: the last graph's, of the rows that it sampled
        make_record = decoder.ops.make_record
        self._recorded = None if make_record is None else RecordedSteps(decoder, make_record(), self._recorded_context)
        num_counters = slots.num_slots * self.model.num_kv_heads
        self._merge_counters = torch.zeros(num_counters, dtype=torch.int32, device=device) if is_cuda else None
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 1

    @torch.inference_mode()
    def launch(
        self,
        batch: Batch,
        *,
        masks: HostMasks | None = None,
        grammar_states: Seq[int] | None = None,
        has_host_edits: bool = False,
        has_logprobs: bool = False,
    ) -> LaunchedStep:
        """Start one step.

        masks: of rows whose grammars the host masks; None: there are none. With an arena these rows' slots must be in
        the states that select what the host writes. grammar_states: the arena's state of each extend row, for those
        that join; None: all are unconstrained. has_host_edits, has_logprobs: some sequences' logits are edited by the
        host, which must know their tokens so far; some want log-probabilities. Without them nobody looks.
        """
        self.use_device()
        self._copy_pages(batch)
        scores = None
        if masks is not None and self.arena is not None:
            self._send_masks(self.arena, batch, masks)
            masks = None
        edited = has_host_edits and any(item.samples and self.is_edited_by_host(item.sequence) for item in batch.items)
        in_graph = self.graphs is not None and masks is None and not edited
        if batch.num_decode < len(batch.items):
            arrays = self._gather_extend(batch, grammar_states)
            tokens = self._replay_mixed(batch, arrays) if in_graph else None
            if tokens is not None:
                return self._to_host(batch, tokens, self._logprobs_of_graph(batch, tokens) if has_logprobs else None)
            hidden, slots, positions, scores = self._run_extend(batch, arrays)
            if slots.numel() == 0:
                return self._to_host(batch, slots, scores=scores)
            logits = self.decoder.logits(hidden)
        elif in_graph and self.graphs is not None:
            rows, new_pages = decode_rows_of(batch.items), new_pages_of(batch.items, self.page_size)
            tokens = self.graphs.replay(rows, new_pages, uses_tree=self._tree_plan(batch) is not None)
            return self._to_host(batch, tokens, self._logprobs_of_graph(batch, tokens) if has_logprobs else None)
        else:
            logits, slots, positions = self._run_decode(batch)
        tokens = self._sample(batch, logits, slots, positions, masks, has_edits=edited)
        return self._to_host(batch, tokens, self._logprobs(batch, logits, tokens) if has_logprobs else None, scores)

    def is_edited_by_host(self, sequence: Sequence) -> bool:
        """Whether a sequence's logits are edited, and it has no row of the device's edit tables."""
        if not sequence.request.sampling.edits_logits:
            return False
        return self.edits is None or self.edits.row_of(sequence) == 0

    def use_device(self) -> None:
        """Make the device this thread's current one: Triton launches there."""
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)

    def check_device(self) -> None:
        """Wait for the device; raises where it is lost: after an illegal access CUDA refuses everything, for good."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def make_graphs(self, max_extend: int = 0, capture: Capture | None = None) -> StepGraphs:
        """The graphs of decode steps and of steps with at most `max_extend` new tokens; none is captured yet."""
        graphs = StepGraphs(
            self._decode_body,
            self._mixed_body,
            self.slots.num_slots,
            self.slots.dummy,
            self.device,
            max_extend=max_extend,
            capture=capture,
        )
        shape = graphs.max_samples, self.model.hidden_size
        self._hidden = torch.empty(shape, dtype=self.decoder.dtype, device=self.device)
        return graphs

    @torch.inference_mode()
    def capture_graphs(self, max_extend: int = 0, capture: Capture | None = None) -> None:
        """Capture all graphs, and use them from now on; the slot tables must be idle.

        Also compiles the kernels that no graph has.
        """
        self.graphs = self.make_graphs(max_extend, capture)
        self.graphs.capture(self.graphs.keys(with_tree=self.tree is not None))
        none = torch.zeros(1, dtype=torch.int32, device=self.device)
        copy_pages(self.kv_cache.storage, none, none, none)
        if self.arena is not None:
            self.arena.warm_up()
            return
        for rows in (1, self.slots.num_slots):  # masks of the host come to the sampler
            slots = torch.full((rows,), self.slots.dummy, dtype=torch.int32, device=self.device)
            logits = torch.zeros((rows, self.model.vocab_size), dtype=self.decoder.dtype, device=self.device)
            mask = torch.full((rows, -(-self.model.vocab_size // 32)), -1, dtype=torch.int32, device=self.device)
            self.decoder.ops.sample(logits, self.sampling, slots, torch.zeros_like(slots), mask, None)

    def _replay_mixed(self, batch: Batch, arrays: ExtendArrays) -> Tensor | None:
        """Run a step with extend rows as a graph, sampling included; None where there is none for its size."""
        if self.graphs is None or len(arrays.score_index):
            return None
        uses_tree = batch.num_decode > 1 and self._tree_plan(batch) is not None
        key = self.graphs.mixed_key(batch.num_decode, len(arrays.token_ids), len(arrays.rows), uses_tree=uses_tree)
        if key is None:
            return None
        (updates,) = upload([arrays.updates], self.device)
        scatter_rows(updates, self.tables.arena)
        items = batch.items[: batch.num_decode]
        return self.graphs.replay_mixed(key, decode_rows_of(items), new_pages_of(items, self.page_size), arrays)

    def _mixed_body(self, key: MixedKey, buffers: MixedBuffers) -> None:
        """A step of decode rows, new tokens and padding, from the embedding to the slots' new states."""
        tables, part = self.tables, buffers.part
        decode = None
        if key.num_decode:
            rows, inputs = part("rows"), buffers.inputs
            columns = tables.last_token, tables.kv_len, tables.page_table
            prepare_decode(rows, part("new_pages"), *columns, self.page_size, inputs, fills_padding=False)
            decode = self._graph_metadata(inputs, rows, uses_tree=key.uses_tree)
        extend = ExtendMetadata(
            cu_seqlens_q=part("cu_seqlens"),
            kv_lens=part("kv_lens"),
            rows=part("extend_rows"),
            page_table=tables.page_table,
            max_seqlen_q=_ANY_LENGTH if self.is_deterministic else key.num_tokens,
            max_kv_len=self.max_kv_len,
            tiles=self.tiles,
        )
        context = self._context(part("positions"), part("kv_slots"), key.num_decode, decode, extend, extend_start=0)
        hidden = self.decoder.forward(part("token_ids"), context)
        logits = self.decoder.logits(self._keep(hidden.index_select(0, part("sample_index"))))
        slots = part("sample_rows")
        self.decoder.ops.sample(logits, self.sampling, slots, part("sample_positions"), None, buffers.tokens)
        self._commit(slots, buffers.tokens, part("sample_positions"))

    def _decode_body(self, key: GraphKey, buffers: DecodeBuffers) -> None:
        tables, inputs = self.tables, buffers.inputs
        prepare_decode(
            buffers.rows, buffers.new_pages, tables.last_token, tables.kv_len, tables.page_table, self.page_size, inputs
        )
        decode = self._graph_metadata(inputs, buffers.rows, uses_tree=key.uses_tree)
        context = self._context(inputs.positions, inputs.kv_slots, key.bucket, decode)
        logits = self.decoder.logits(self._keep(self.decoder.forward(inputs.token_ids, context)))
        self.decoder.ops.sample(logits, self.sampling, buffers.rows, inputs.kv_lens, None, buffers.tokens)
        self._commit(buffers.rows, buffers.tokens, inputs.kv_lens)

    def _keep(self, hidden: Tensor) -> Tensor:
        """Copy what a graph's logits come from to where it stays until the next graph, for log-probabilities."""
        assert self._hidden is not None
        self._hidden[: hidden.shape[0]].copy_(hidden)
        return hidden

    def _graph_metadata(self, inputs: DecodeInputs, rows: Tensor, *, uses_tree: bool) -> DecodeMetadata:
        tree = self.tree.plan if uses_tree and self.tree is not None else None
        num_splits = self._num_splits(rows.numel())
        return DecodeMetadata(
            inputs.kv_lens, rows, self.tables.page_table, num_splits, tree, None, self._merge_counters, self.tiles
        )

    def _num_splits(self, batch: int) -> int:
        """Parts of a row's keys. By the padded batch, so that a row is split alike in graphs and eager steps."""
        if self.is_deterministic:
            return FIXED_SPLITS
        programs = PROGRAMS_PER_SM
        if self.tiles is not None and self.tiles.fit(self.model.head_dim, self.decoder.dtype):
            programs = self.tiles.decode_programs or programs
        return choose_num_splits(_padded(batch), self.model.num_kv_heads, self.max_kv_len, self.num_sms, programs)

    def _commit(self, slots: Tensor, tokens: Tensor, positions: Tensor) -> None:
        """Advance the slots' automata, which may replace a token to close a text; store and count the tokens."""
        if self.arena is not None:
            budgets = self.tables.budgets(positions)
            advance_states(slots, tokens, self.tables.grammar_state, self.arena.automata, self.arena.tokens, budgets)
        if self.sampling.edits is not None:
            count_tokens(self.sampling.edits, slots, tokens)
        commit_decode(slots, tokens, self.tables.last_token, self.tables.kv_len)

    def _gather_extend(self, batch: Batch, grammar_states: Seq[int] | None) -> ExtendArrays:
        """The extend rows; edit tables of those that join are filled."""
        items = batch.items[batch.num_decode :]
        edit_rows = [0] * len(items)
        if self.edits is not None:
            edit_rows = [self.edits.row_of(item.sequence) for item in items]
            for item, row in zip(items, edit_rows, strict=True):
                if row and self.slots.joins(item):
                    self.edits.fill(item.sequence)
        states = grammar_states or [FREE_STATE] * len(items)
        return gather_extend(batch, self.slots, states, edit_rows, self.page_size)

    def _send_masks(self, arena: GrammarArena, batch: Batch, masks: HostMasks) -> None:
        """Put the host's masks where the sampler finds them by these rows' states."""
        slots = [item.sequence.slot for item in batch.items if item.samples]
        chosen = np.asarray([slots[row] for row in masks.rows], dtype=np.int32)
        index, words = upload([chosen, masks.words[masks.rows]], self.device)
        arena.set_host_masks(index, words)

    def _logprobs_of_graph(self, batch: Batch, tokens: Tensor) -> StepLogprobs | None:
        """As `_logprobs`, after a graph, from the hidden states that it kept."""
        return self._logprobs(batch, self._hidden, tokens, self.decoder.logits)

    def _logprobs(
        self, batch: Batch, source: Tensor | None, tokens: Tensor, logits_of: Callable[[Tensor], Tensor] | None = None
    ) -> StepLogprobs | None:
        """Log-probabilities of the rows that ask for them. source: logits [R, V], or what `logits_of` makes them of."""
        sampled = [item.sequence.request.sampling.logprobs for item in batch.items if item.samples]
        rows = [row for row, wanted in enumerate(sampled) if wanted is not None]
        if not rows or source is None:
            return None
        (index,) = upload([np.asarray(rows, dtype=np.int32)], self.device)
        logits = source.index_select(0, index)
        if logits_of is not None:
            logits = logits_of(logits)
        most = max(wanted or 0 for wanted in sampled)
        chosen, values, ids = compute_logprobs(logits, tokens.index_select(0, index), most)
        return StepLogprobs(rows, chosen, ids, values, logits)

    def _tree_plan(self, batch: Batch) -> TreePlan | None:
        return None if self.tree is None else self.tree.update(batch.items[: batch.num_decode])

    def _sample(
        self,
        batch: Batch,
        raw: Tensor,
        slots: Tensor,
        positions: Tensor,
        masks: HostMasks | None,
        *,
        has_edits: bool,
    ) -> Tensor:
        """Tokens int32 [R]. has_edits: some rows' logits are edited here."""
        logits = raw
        if has_edits:
            sequences = [item.sequence for item in batch.items if item.samples]
            logits = apply_edits(raw, [s if self.is_edited_by_host(s) else None for s in sequences])
        mask = None if masks is None else upload([masks.words], self.device)[0]
        tokens = torch.empty(slots.numel(), dtype=torch.int32, device=self.device)
        self.decoder.ops.sample(logits, self.sampling, slots, positions, mask, tokens)
        self._commit(slots, tokens, positions)
        return tokens

    def _copy_pages(self, batch: Batch) -> None:
        if not batch.page_copies:
            return
        copies = np.asarray([(c.source, c.target, c.num_tokens) for c in batch.page_copies], dtype=np.int32)
        source, target, num_tokens = upload([copies[:, 0], copies[:, 1], copies[:, 2]], self.device)
        copy_pages(self.kv_cache.storage, source, target, num_tokens)

    def _run_decode(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, V], slots [B] and positions of the new tokens [B]."""
        rows, new_pages = upload([decode_rows_of(batch.items), new_pages_of(batch.items, self.page_size)], self.device)
        recorded = None if self._recorded is None else self._recorded.get(batch.num_decode)
        if recorded is not None:
            self._prepare_decode(recorded.rows.copy_(rows), new_pages, recorded.inputs)
            return recorded.logits(), recorded.rows, recorded.inputs.kv_lens
        inputs = self._prepare_decode(rows, new_pages, DecodeInputs.create(rows.numel(), self.device))
        decode = self._decode_metadata(rows, inputs.kv_lens, batch)
        context = self._context(inputs.positions, inputs.kv_slots, batch.num_decode, decode)
        return self.decoder.logits(self.decoder.forward(inputs.token_ids, context)), rows, inputs.kv_lens

    def _recorded_context(self, rows: Tensor, inputs: DecodeInputs) -> ForwardContext:
        decode = DecodeMetadata(inputs.kv_lens, rows, self.tables.page_table)
        return self._context(inputs.positions, inputs.kv_slots, rows.numel(), decode)

    def _run_extend(self, batch: Batch, arrays: ExtendArrays) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As `_run_decode` for the rows that sample, and the log-probabilities that were asked for."""
        extend = upload_extend(arrays, self.slots, self.device)
        extend.metadata.tiles = self.tiles
        if self.is_deterministic:
            extend.metadata.max_seqlen_q = _ANY_LENGTH
        token_ids, positions, kv_slots = extend.token_ids, extend.positions, extend.kv_slots
        decode, decode_rows = None, extend.token_ids[:0]
        if batch.num_decode:
            decode_items = batch.items[: batch.num_decode]
            decode_rows, new_pages = upload(
                [decode_rows_of(decode_items), new_pages_of(decode_items, self.page_size)], self.device
            )
            inputs = self._prepare_decode(decode_rows, new_pages, DecodeInputs.create(batch.num_decode, self.device))
            token_ids = torch.cat((inputs.token_ids, token_ids))
            positions = torch.cat((inputs.positions, positions))
            kv_slots = torch.cat((inputs.kv_slots, kv_slots))
            decode = self._decode_metadata(decode_rows, inputs.kv_lens, batch)
        q_lens = np.diff(arrays.cu_seqlens)
        recorded = None
        if self._recorded is not None:
            recorded = self._recorded.get_extend(token_ids.numel(), int(q_lens @ arrays.kv_lens))
        if recorded is not None:
            rows = torch.cat((decode_rows, torch.from_numpy(np.repeat(arrays.rows, q_lens))))
            hidden = recorded.hidden(rows, token_ids, positions, kv_slots)
        else:
            context = self._context(positions, kv_slots, batch.num_decode, decode, extend.metadata)
            hidden = self.decoder.forward(token_ids, context)
        scores = self._score(hidden, extend)
        return hidden.index_select(0, extend.sample_index), extend.sample_rows, extend.sample_positions, scores

    def _prepare_decode(self, rows: Tensor, new_pages: Tensor, inputs: DecodeInputs) -> DecodeInputs:
        tables = self.tables
        prepare_decode(rows, new_pages, tables.last_token, tables.kv_len, tables.page_table, self.page_size, inputs)
        return inputs

    def computes_run(self, num_tokens: int, num_rows: int, kv_len: int) -> bool:
        """Whether a row's known tokens should be computed in one step, instead of as many decode steps.

        num_rows: of the step. kv_len: of the row, with the token before them, whose KV is missing, too. A step that
        is recorded always gains. One that runs eagerly costs more than decode steps, and delays all other rows.
        """
        recorded = self._recorded
        if recorded is None or num_tokens > num_rows // 3 or recorded.get(num_rows) is None:
            return True
        return recorded.get_extend(num_rows + num_tokens, (num_tokens + 1) * (kv_len + num_tokens)) is not None

    def override_tokens(self, tokens: Seq[tuple[int, int]]) -> None:
        """Replace the last token of slots, (slot, token) each, before their next step is launched."""
        column = COLUMNS["last_token"]
        (updates,) = upload(
            [np.asarray([(slot, column, token) for slot, token in tokens], dtype=np.int32)], self.device
        )
        scatter_rows(updates, self.tables.arena)

    def _context(
        self,
        positions: Tensor,
        kv_slots: Tensor,
        num_decode: int,
        decode: DecodeMetadata | None,
        extend: ExtendMetadata | None = None,
        extend_start: int | None = None,
    ) -> ForwardContext:
        start = num_decode if extend_start is None else extend_start
        return ForwardContext(positions, kv_slots, num_decode, decode, extend, self.kv_cache.layers, start)

    def _decode_metadata(self, rows: Tensor, kv_lens: Tensor, batch: Batch) -> DecodeMetadata:
        lens = [item.start + 1 for item in batch.items[: batch.num_decode]]
        return DecodeMetadata(
            kv_lens,
            rows,
            self.tables.page_table,
            self._num_splits(len(lens)),
            self._tree_plan(batch),
            lens,
            self._merge_counters,
            self.tiles,
        )

    def _score(self, hidden: Tensor, extend: ExtendInputs) -> Tensor | None:
        if extend.score_index is None or extend.score_targets is None:
            return None
        parts = []
        for low in range(0, extend.score_index.numel(), _SCORE_ROWS):
            index = extend.score_index[low : low + _SCORE_ROWS]
            logits = self.decoder.logits(hidden.index_select(0, index))
            parts.append(compute_logprobs(logits, extend.score_targets[low : low + _SCORE_ROWS], 0)[0])
        return torch.cat(parts)

    def _to_host(
        self,
        batch: Batch,
        tokens: Tensor,
        logprobs: StepLogprobs | None = None,
        scores: Tensor | None = None,
    ) -> LaunchedStep:
        is_cuda = self.device.type == "cuda"

        def host(tensor: Tensor) -> Tensor:
            if not is_cuda:
                return tensor if self.graphs is None else tensor.clone()  # the next replay writes it again
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return target.copy_(tensor, non_blocking=True)

        if logprobs is not None:
            parts = [host(part) for part in (logprobs.chosen, logprobs.top_ids, logprobs.top_values)]
            logprobs = dataclasses.replace(logprobs, chosen=parts[0], top_ids=parts[1], top_values=parts[2])
        step = LaunchedStep(batch, host(tokens), logprobs, None if scores is None else host(scores), event=None)
        if is_cuda:
            step.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            step.event.record()
        return step


def _padded(batch: int) -> int:
    """The smallest power of two from `batch` on."""
    return 1 << (batch - 1).bit_length()
