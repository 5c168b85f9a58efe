"""One step on the device: inputs, decoder, sampling, and the copy of what was sampled back to the host.

`launch` never waits for the device (where the device is a GPU); `LaunchedStep.read` does, one step later. A step that
only decodes, or has few new tokens besides, replays a CUDA graph; others run eagerly. Owner of the slot tables.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ramet.kernels.attention_decode import DecodeMetadata
from ramet.kernels.attention_extend import ExtendMetadata
from ramet.kernels.attention_plan import FIXED_SPLITS, PROGRAMS_PER_SM, AttentionTiles, choose_num_splits
from ramet.kernels.attention_tree import TreePlan
from ramet.kernels.copy_pages import copy_pages
from ramet.kernels.grammar_arena import FREE_STATE, GrammarArena
from ramet.kernels.grammar_mask import advance_states
from ramet.kernels.logits import compute_logprobs
from ramet.kernels.sampling import sample
from ramet.kernels.step_inputs import COLUMNS, DecodeInputs, commit_decode, prepare_decode, scatter_rows
from ramet.runtime.cuda_graph import Capture, DecodeBuffers, GraphKey, MixedBuffers, MixedKey, StepGraphs
from ramet.runtime.grammar_device import DeviceGrammars
from ramet.runtime.inputs import (
    ExtendArrays,
    ExtendInputs,
    decode_rows_of,
    gather_extend,
    new_pages_of,
    scored_range,
    upload_extend,
)
from ramet.runtime.kv_cache import KVCache
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.context import ForwardContext
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.sampler import apply_edits
from ramet.runtime.slots import RunningSlots, upload
from ramet.runtime.tree_planner import TreePlanner
from ramet.runtime.types import Batch, RowOutput

if TYPE_CHECKING:
    from ramet.runtime.cpu_steps import RecordedSteps

_SCORE_ROWS = 512  # logits rows of one part of a scoring chunk: bounds the [rows, V] fp32 workspace
_ANY_LENGTH = 1 << 20  # as the longest of a launch: attention takes the tile of long prompts


@dataclass(slots=True)
class LaunchedStep:
    """A step whose results are on their way to the host. `read` waits for them."""

    batch: Batch
    tokens: Tensor  # int32 [R], host
    logprobs: Tensor | None  # fp32 [R], host
    top_logprobs: tuple[Tensor, Tensor] | None  # ids [R, n], values [R, n], host
    scores: Tensor | None  # fp32 [Q], host
    logits: Tensor | None  # [R, V] on the device, where the host may replace a token whose log-probability is wanted
    event: torch.cuda.Event | None

    def read(self) -> list[RowOutput]:
        """Wait for the step and return one output an item, in the batch's order."""
        if self.event is not None:
            self.event.synchronize()
        tokens = self.tokens.tolist()
        items = self.batch.items
        if self.logprobs is not None or self.scores is not None:
            return self._read_rows(tokens)
        if len(tokens) == len(items):
            return [RowOutput((token,)) for token in tokens]
        sampled = iter(tokens)
        return [RowOutput((next(sampled),)) if item.samples else RowOutput() for item in items]

    def logprob(self, row: int, token: int) -> float:
        """The log-probability of another token than the one that was sampled in a row of those that sample."""
        assert self.logits is not None
        tokens = torch.tensor([token], device=self.logits.device)
        return float(compute_logprobs(self.logits[row : row + 1], tokens, 0)[0])

    def _read_rows(self, tokens: list[int]) -> list[RowOutput]:
        logprobs = None if self.logprobs is None else self.logprobs.tolist()
        scores = None if self.scores is None else self.scores.numpy()
        outputs, row, scored = [], 0, 0
        for item in self.batch.items:
            first, last = scored_range(item)
            part = None
            if last > first and scores is not None:
                part = scores[scored : scored + last - first].copy()
                scored += last - first
            if not item.samples:
                outputs.append(RowOutput(prompt_logprobs=part))
                continue
            wanted = item.sequence.request.sampling.logprobs
            if logprobs is None or wanted is None:
                outputs.append(RowOutput((tokens[row],), prompt_logprobs=part))
            else:
                outputs.append(RowOutput((tokens[row],), (logprobs[row],), (self._top(row, wanted),), part))
            row += 1
        return outputs

    def _top(self, row: int, count: int) -> tuple[tuple[int, float], ...]:
        if self.top_logprobs is None:
            return ()
        ids, values = self.top_logprobs
        return tuple(zip(ids[row, :count].tolist(), values[row, :count].tolist(), strict=True))


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
        device_grammars: DeviceGrammars | None = None,
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
        self.device_grammars = device_grammars
        self.tree = tree
        self.is_deterministic = is_deterministic
        self.tiles = tiles
        self.sampling = (
            slots.tables.sampling() if arena is None else slots.tables.sampling(arena.mask_index, arena.mask_rows)
        )
        self.device = device
        self.max_kv_len = max_kv_len
        self.page_size = kv_cache.page_size
        self.graphs: StepGraphs | None = None
        self._recorded: RecordedSteps | None = None
        if device.type == "cpu":
            from ramet.runtime.cpu_steps import RecordedSteps  # needs numba: not for a GPU

            self._recorded = RecordedSteps(decoder, self._recorded_context)
        num_counters = slots.num_slots * self.model.num_kv_heads
        self._merge_counters = torch.zeros(num_counters, dtype=torch.int32, device=device) if is_cuda else None
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 1

    @torch.inference_mode()
    def launch(
        self,
        batch: Batch,
        *,
        masks: NDArray[np.int32] | None = None,
        on_host: bool = False,
        grammar_states: Seq[int] | None = None,
    ) -> LaunchedStep:
        """Start one step.

        masks: int32 [R, W], one row for each item that samples; None: the host masks nothing.
        on_host: the tokens so far are known to the host, so penalties, biases and log-probabilities can be done.
        grammar_states: the arena's state of each extend row, for those that join; None: all are unconstrained.
        """
        self.use_device()
        self._copy_pages(batch)
        scores = None
        samples_in_graph = masks is None and not on_host
        if batch.num_decode < len(batch.items):
            states = grammar_states or [FREE_STATE] * (len(batch.items) - batch.num_decode)
            arrays = gather_extend(batch, self.slots, states, self.page_size)
            tokens_in_graph = self._replay_mixed(batch, arrays) if samples_in_graph else None
            if tokens_in_graph is not None:
                return self._to_host(batch, tokens_in_graph, None, None)
            hidden, slots, positions, scores = self._run_extend(batch, arrays)
            if slots.numel() == 0:
                return self._to_host(batch, slots, None, scores)
            logits = self.decoder.logits(hidden)
        elif self.graphs is None:
            logits, slots, positions = self._run_decode(batch)
        else:
            rows, new_pages = decode_rows_of(batch.items), new_pages_of(batch.items, self.page_size)
            uses_tree = self._tree_plan(batch) is not None
            buffers = self.graphs.replay(rows, new_pages, samples=samples_in_graph, uses_tree=uses_tree)
            count = len(rows)
            if samples_in_graph:
                return self._to_host(batch, buffers.tokens[:count], None, None)
            assert buffers.logits is not None
            logits, slots, positions = buffers.logits[:count], buffers.rows[:count], buffers.inputs.kv_lens[:count]
        tokens, logprobs = self._sample(batch, logits, slots, positions, masks, on_host)
        return self._to_host(batch, tokens, logprobs, scores, None if masks is None else logits)

    def use_device(self) -> None:
        """Make the device this thread's current one: Triton launches there."""
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)

    def make_graphs(self, max_extend: int = 0, capture: Capture | None = None) -> StepGraphs:
        """The graphs of decode steps and of steps with at most `max_extend` new tokens; none is captured yet."""
        return StepGraphs(
            self._decode_body,
            self._mixed_body,
            self.slots.num_slots,
            self.slots.dummy,
            self.device,
            max_extend=max_extend,
            capture=capture,
        )

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
        logits = self.decoder.logits(hidden.index_select(0, part("sample_index")))
        slots = part("sample_rows")
        sample(logits, self.sampling, slots, part("sample_positions"), None, buffers.tokens)
        self._commit(slots, buffers.tokens, part("sample_positions"))

    def _decode_body(self, key: GraphKey, buffers: DecodeBuffers) -> None:
        tables, inputs = self.tables, buffers.inputs
        prepare_decode(
            buffers.rows, buffers.new_pages, tables.last_token, tables.kv_len, tables.page_table, self.page_size, inputs
        )
        decode = self._graph_metadata(inputs, buffers.rows, uses_tree=key.uses_tree)
        context = self._context(inputs.positions, inputs.kv_slots, key.bucket, decode)
        logits = self.decoder.logits(self.decoder.forward(inputs.token_ids, context))
        if not key.samples:
            buffers.logits = logits
            return
        sample(logits, self.sampling, buffers.rows, inputs.kv_lens, None, buffers.tokens)
        self._commit(buffers.rows, buffers.tokens, inputs.kv_lens)

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
        commit_decode(slots, tokens, self.tables.last_token, self.tables.kv_len)

    def _tree_plan(self, batch: Batch) -> TreePlan | None:
        return None if self.tree is None else self.tree.update(batch.items[: batch.num_decode])

    def _sample(
        self,
        batch: Batch,
        raw: Tensor,
        slots: Tensor,
        positions: Tensor,
        masks: NDArray[np.int32] | None,
        on_host: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """Tokens int32 [R] and, where some row asks for them, log-probabilities (chosen, top values, top ids)."""
        sequences = [item.sequence for item in batch.items if item.samples]
        edited = on_host and any(s.request.sampling.needs_logit_edits for s in sequences)
        logits = apply_edits(raw, sequences) if edited else raw
        mask = None if masks is None else upload([masks], self.device)[0]
        tokens = torch.empty(slots.numel(), dtype=torch.int32, device=self.device)
        sample(logits, self.sampling, slots, positions, mask, tokens)
        self._commit(slots, tokens, positions)
        wanted = [s.request.sampling.logprobs for s in sequences if s.request.sampling.logprobs is not None]
        return tokens, compute_logprobs(raw, tokens, max(wanted)) if edited and wanted else None

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
        logprobs: tuple[Tensor, Tensor, Tensor] | None,
        scores: Tensor | None,
        logits: Tensor | None = None,
    ) -> LaunchedStep:
        is_cuda = self.device.type == "cuda"

        def host(tensor: Tensor) -> Tensor:
            if not is_cuda:
                return tensor if self.graphs is None else tensor.clone()  # the next replay writes it again
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return target.copy_(tensor, non_blocking=True)

        step = LaunchedStep(
            batch=batch,
            tokens=host(tokens),
            logprobs=None if logprobs is None else host(logprobs[0]),
            top_logprobs=None if logprobs is None else (host(logprobs[2]), host(logprobs[1])),
            scores=None if scores is None else host(scores),
            logits=None if logprobs is None else logits,
            event=None,
        )
        if is_cuda:
            step.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            step.event.record()
        return step


def _padded(batch: int) -> int:
    """The smallest power of two from `batch` on."""
    return 1 << (batch - 1).bit_length()
