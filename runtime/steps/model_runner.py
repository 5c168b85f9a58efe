"""Run one step on the device: send its inputs, choose how to run it, and copy the sampled tokens back to the host.

On a GPU, `launch` never waits for the device; `LaunchedStep.read` does, one step later. There are three ways to run a
step. Each is a strategy, whose `run(step)` returns None if it cannot run the step:

    GraphedSteps    a GPU: replays a CUDA graph          RecordedSteps    a CPU: runs a recorded program
    EagerSteps      any device, any step: op by op

Owner of the slot tables.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ramet.errors import EngineStopped
from ramet.kernels.attention.plan import AttentionTiles
from ramet.kernels.grammar.arena import FREE_STATE, GrammarArena
from ramet.kernels.slots.tables import COLUMNS, scatter_rows, upload
from ramet.kernels.triton_support import compiling, use_device
from ramet.runtime.constraints.states import HostMasks
from ramet.runtime.models.adapters import Adapters
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.steps.attention_plans import AttentionPlans
from ramet.runtime.steps.cuda_graph import MIXED_TOKENS, GraphCapture, run_once
from ramet.runtime.steps.eager import EagerSteps
from ramet.runtime.steps.graphed import GraphedSteps
from ramet.runtime.steps.inputs import (
    Edited,
    ExtendArrays,
    LastToken,
    Step,
    gather_adapters,
    gather_decode,
    gather_extend,
    gather_logprobs,
    gather_pooled,
    most_tops,
)
from ramet.runtime.steps.kv_cache import KVCache
from ramet.runtime.steps.launched_step import LaunchedStep, StepLogprobs
from ramet.runtime.steps.logit_edits import LogitEdits
from ramet.runtime.steps.recorded import RecordedSteps
from ramet.runtime.steps.sampler import Sampled, Sampler
from ramet.runtime.steps.slots import RunningSlots
from ramet.runtime.steps.tree_planner import TreePlanner
from ramet.runtime.types import Batch, ScheduledSequence

logger = logging.getLogger(__name__)

# One way to run steps, sampling included. Returns None and does nothing if it cannot run this one.
Strategy = Callable[[Step], Sampled | None]


class Peers(Protocol):
    """The other ranks of a model that is divided among processes, as the first rank sees them."""

    def send_step(self, step: Step, tree: TreePlanner | None) -> None:
        """Let the other ranks run this step too. tree: the planner whose plan the step may use."""

    def send_last(self, rows: Seq[LastToken]) -> None:
        """Let the other ranks call `store_last`."""

    def fail(self, error: Exception) -> None:
        """Note that this rank failed within a step, so that the ranks are no longer at the same place."""

    def check(self) -> None:
        """Raise EngineStopped if a rank has ended or failed."""


class ModelRunner:
    """Runs batches of a scheduler on one device, or on one rank of several."""

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
        num_sms: int | None = None,
        share: Callable[[Tensor], None] | None = None,
        peers: Peers | None = None,
        adapters: Adapters | None = None,
        verifies: bool = False,
    ) -> None:
        """is_deterministic: a row's bits must not depend on the other rows; `decoder` has batch-invariant products.

        tiles: attention tiles measured on this GPU. num_sms: number of processors among which attention is split; None
        for the GPU's own. With several ranks, `share` overwrites a tensor with the first rank's, in graphs, too. Only
        the first rank has `peers`, the others, and `arena` and `edits`. adapters: steps with some are never graphs.
        verifies: some graphs verify drafts.
        """
        if device.type == "cuda" and num_sms is None:
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.slots = slots
        self.arena = arena
        self.edits = edits
        self.tree = tree
        self.peers = peers
        self.adapters = adapters
        self.device = device
        self.max_kv_len = max_kv_len
        self._verifies = verifies
        self._plans = AttentionPlans(
            decoder.config,
            kv_cache,
            slots,
            max_kv_len=max_kv_len,
            num_sms=num_sms,
            tree=tree,
            is_deterministic=is_deterministic,
            tiles=tiles,
        )
        self._sampler = Sampler(decoder, slots.tables, arena, edits, share)
        parts = decoder, slots, self._plans, self._sampler
        eager = EagerSteps(*parts)
        make_record = decoder.ops.make_record
        self.recorded = None if make_record is None else RecordedSteps(*parts, eager, make_record())
        self.graphed: GraphedSteps | None = None
        self._strategies: list[Strategy] = [eager.run] if self.recorded is None else [self.recorded.run, eager.run]
        self._uses_tree = False  # the last launched step
        self._adapted: list[Strategy] = []  # for steps in which some tokens have adapters
        if adapters is not None:
            parts = adapters.decoder, slots, self._plans, self._sampler
            adapted = EagerSteps(*parts)
            recorded = [] if make_record is None else [RecordedSteps(*parts, adapted, make_record()).run]
            self._adapted = [*recorded, adapted.run]

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

        masks: the masks of rows that the host masks; None if there are none. With an arena, these rows' slots must be
        in the states that select the host's masks. grammar_states: the arena's state of each extend row, used by rows
        that join; None if all are unconstrained. has_host_edits: the host may have to edit logits of some sequences,
        whose tokens so far it must know. has_logprobs: some sequences request log-probabilities. If a flag is False,
        no row is examined for it.
        """
        self.use_device()
        step = self._gather(batch, masks, grammar_states, has_host_edits=has_host_edits, has_logprobs=has_logprobs)
        self._uses_tree = step.uses_tree
        if self.peers is None:
            return LaunchedStep.start(batch, *self.run(step))
        self.peers.send_step(step, self.tree)
        try:
            return LaunchedStep.start(batch, *self.run(step))
        except Exception as error:
            self.peers.fail(error)
            raise

    @torch.inference_mode()
    def run(self, step: Step) -> tuple[Sampled, StepLogprobs | None]:
        """Run a step on this rank; with several ranks, all run the same steps in the same order."""
        self._copy_pages(step.page_copies)
        if step.adapters is not None:
            assert self.adapters is not None
            self.adapters.choose(step.adapters)
        for strategy in self._strategies if step.adapters is None else self._adapted:
            sampled = strategy(step)
            if sampled is not None:
                return sampled, StepLogprobs.of(step, sampled)
        raise AssertionError("any step can run eagerly")

    def _gather(
        self,
        batch: Batch,
        masks: HostMasks | None,
        grammar_states: Seq[int] | None,
        *,
        has_host_edits: bool,
        has_logprobs: bool,
    ) -> Step:
        """Gather the host's view of a step."""
        words: NDArray[np.int32] | None = None
        verified = [item for item in batch.items[batch.num_decode :] if item.num_samples > 1]
        if masks is not None and self.arena is not None and not verified:
            self._send_masks(self.arena, batch, masks)
        elif masks is not None:
            num_sampled = sum(item.num_samples for item in batch.items)
            words = np.full((num_sampled, masks.words.shape[1]), -1, dtype=np.int32)
            words[masks.rows] = masks.words
        edited: list[Edited | None] | None = None
        if has_host_edits:
            edited = [row for item in batch.items for row in self._edited_by_host(item)]
            edited = edited if any(row is not None for row in edited) else None
        extend = self._gather_extend(batch, grammar_states) if batch.num_decode < len(batch.items) else None
        decode_items = batch.items[: batch.num_decode]
        decode_rows, new_pages, kv_lens = gather_decode(decode_items, self.kv_cache.page_size)
        copies = [(copy.source, copy.target, copy.num_tokens) for copy in batch.page_copies]
        logprob_rows, num_tops = gather_logprobs(batch.items if has_logprobs else ())
        return Step(
            decode_rows,
            new_pages,
            kv_lens,
            np.asarray(copies, dtype=np.int32).reshape(-1, 3),
            extend,
            self.tree is not None and bool(decode_items) and self.tree.update(decode_items) is not None,
            logprob_rows,
            num_tops,
            num_score_tops=0 if extend is None else most_tops(batch.items[batch.num_decode :]),
            needs_host=words is not None or edited is not None,
            pooled=None if extend is None else gather_pooled(batch),
            adapters=gather_adapters(batch.items) if self.adapters is not None and self.adapters.is_used else None,
            num_verified=len(verified),
            masks=words,
            edited=edited,
        )

    def _gather_extend(self, batch: Batch, grammar_states: Seq[int] | None) -> ExtendArrays:
        """Gather the extend rows, and fill the edit-table rows of sequences that join."""
        items = batch.items[batch.num_decode :]
        edit_rows = [0] * len(items)
        if self.edits is not None:
            edit_rows = [self.edits.row_of(item.sequence) for item in items]
            for item, row in zip(items, edit_rows, strict=True):
                if row and self.slots.joins(item):
                    self.edits.fill(item.sequence)
        states = grammar_states or [FREE_STATE] * len(items)
        updates = self.slots.extend_updates(items, states, edit_rows)
        return gather_extend(batch, updates, self.kv_cache.page_size)

    def _edited_by_host(self, item: ScheduledSequence) -> list[Edited | None]:
        """What the host edits at each sampled position: nothing, unless the sequence's logits are edited and it has no
        row of the device's edit tables.
        """
        sequence, end = item.sequence, item.start + item.num_tokens
        if not sequence.request.sampling.edits_logits or (self.edits is not None and self.edits.row_of(sequence)):
            return [None] * item.num_samples
        return [(sequence, position) for position in range(end - item.num_samples + 1, end + 1)]

    def _send_masks(self, arena: GrammarArena, batch: Batch, masks: HostMasks) -> None:
        """Write the host's masks to the arena, at the places that these rows' states select."""
        slots = [item.sequence.slot for item in batch.items for _ in range(item.num_samples)]
        chosen = np.asarray([slots[row] for row in masks.rows], dtype=np.int32)
        index, words = upload([chosen, masks.words], self.device)
        arena.set_host_masks(index, words)

    def _copy_pages(self, copies: NDArray[np.int32]) -> None:
        if not len(copies):
            return
        source, target, num_tokens = upload([copies[:, 0], copies[:, 1], copies[:, 2]], self.device)
        self.kv_cache.copy_pages(source, target, num_tokens)

    def use_device(self) -> None:
        """Make the device current in this thread."""
        use_device(self.device)

    def check_device(self) -> None:
        """Wait for the device. Raises EngineStopped if it is lost: after an illegal access every later CUDA call fails.

        Also raises it if another rank is lost, or if this one failed within a step that the others ran.
        """
        if self.peers is not None:
            self.peers.check()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            raise EngineStopped(
                f"nothing runs on {self.device} in this process any more ({str(error).splitlines()[0]}): start a new "
                "process, as a server does by itself; with CUDA_LAUNCH_BLOCKING=1 its log names the kernel that failed"
            ) from error

    def make_graphs(
        self, max_extend: int = 0, capture: GraphCapture | None = None, decoder: Decoder | None = None
    ) -> GraphedSteps:
        """Make the graphs of decode steps, of steps with at most `max_extend` tokens, and of those that verify drafts.

        None is captured yet.

        decoder: the one that the graphs run; None for the runner's own.
        """
        parts = decoder or self.decoder, self.slots, self._plans, self._sampler
        return GraphedSteps(*parts, max_extend=max_extend, verifies=self._verifies, capture=capture)

    @torch.inference_mode()
    def compile_kernels(self) -> None:
        """Compile the kernels of all steps, many at once, on threads. The slot tables must be idle.

        A layer of each kind runs in steps of all sizes. They launch the library's products alone, on meaningless data.
        """
        start_s, config = time.monotonic(), self.decoder.config
        properties = [p for p in (config.sliding_layers, config.unrotated_layers, config.dense_layers) if p]
        kinds = list(zip(*properties, strict=True)) or [()]
        num_layers = 1 + max(kinds.index(kind) for kind in set(kinds))
        decoders = [self.decoder]
        if self.adapters is not None:
            self.adapters.choose(np.zeros(MIXED_TOKENS[-1], dtype=np.int32))
            decoders.append(self.adapters.decoder)
        with compiling(os.cpu_count() or 1):
            for decoder in decoders:
                few_layers = dataclasses.replace(decoder, layers=decoder.layers[:num_layers])
                graphs = self.make_graphs(MIXED_TOKENS[-1], run_once, few_layers).graphs
                graphs.capture(graphs.keys(with_tree=self.tree is not None))
            self._warm_up()
        logger.info("compiled kernels in %.1f s", time.monotonic() - start_s)

    @torch.inference_mode()
    def capture_graphs(self, max_extend: int = 0, capture: GraphCapture | None = None) -> None:
        """Capture all graphs and use them from now on. The slot tables must be idle."""
        self.graphed, start_s = self.make_graphs(max_extend, capture), time.monotonic()
        keys = self.graphed.graphs.keys(with_tree=self.tree is not None)
        self.graphed.graphs.capture(keys)
        logger.info("captured %d graphs in %.1f s", len(keys), time.monotonic() - start_s)
        self._strategies.insert(0, self.graphed.run)
        self._warm_up()

    def _warm_up(self) -> None:
        """Launch the kernels that no graph contains."""
        scatter_rows(torch.full((1, 3), -1, dtype=torch.int32, device=self.device), self.slots.tables.arena)
        none = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.kv_cache.copy_pages(none, none, none)
        if self.arena is not None:
            self.arena.warm_up()
        for num_rows in (1, min(self.slots.num_slots, 32)):  # few rows and many are scanned in other chunks
            self._sampler.warm_up(num_rows, self.slots.dummy)

    def computes_run(self, num_tokens: int, num_rows: int, kv_len: int) -> bool:
        """Return True if a row's known tokens should be computed in one step instead of one decode step per token.

        num_rows: rows of the step. kv_len: the row's KV length, with the token before the known ones, whose KV is
        also still missing. On a GPU they should, but not beside rows that share a long prefix: decode rows read it
        together, a row with known tokens reads all of it.
        """
        if self.recorded is None:
            return not self._uses_tree
        return self.recorded.computes_run(num_tokens, num_rows, kv_len)

    def override_last(self, rows: Seq[LastToken]) -> None:
        """Replace the last token of slots, and its position, before their next step is launched."""
        if self.peers is not None:
            self.peers.send_last(rows)
        self.store_last(rows)

    def store_last(self, rows: Seq[LastToken]) -> None:
        """`override_last` on this rank alone."""
        token, kv_len = COLUMNS["last_token"], COLUMNS["kv_len"]
        triples = [triple for row in rows for triple in ((row[0], token, row[1]), (row[0], kv_len, row[2]))]
        (updates,) = upload([np.asarray(triples, dtype=np.int32)], self.device)
        scatter_rows(updates, self.slots.tables.arena)
