"""The engine loop: `schedule -> launch -> collect`, and three orders of these three calls.

    step_sync        schedule t        launch t        collect t
    step_overlap     schedule t + 1    launch t + 1    collect t         the device has work at every moment
    step_informed    collect t         schedule t + 1  launch t + 1      while the text of step t is delivered, it has

All give the same tokens. With overlap, if the host must see a sequence's token before its next step, the sequence
takes part only in every second step; if it must for all of them, every second step would be empty, so step t is
collected first. A draft continues tokens that the host knows: where drafts pay, step t is collected first, too. Not
here: grammars (constraints/states.py), threads, text and callers (engine.py).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict

import torch
from torch import Tensor

from ramet.errors import InvalidRequest, OutOfMemory
from ramet.runtime.cache.probe import pages_of
from ramet.runtime.cache.radix_cache import PrefixMatch
from ramet.runtime.constraints.states import GrammarStates
from ramet.runtime.engine.step_watch import StepWatch
from ramet.runtime.scheduling.scheduler import NO_DRAFTS, Scheduler
from ramet.runtime.speculation.speculation import Speculation
from ramet.runtime.steps.launched_step import LaunchedStep
from ramet.runtime.steps.model_runner import ModelRunner
from ramet.runtime.types import Batch, FinishReason, Request, RowOutput, ScheduledSequence, Sequence, TokenIds

logger = logging.getLogger(__name__)

# How long a step waits for grammars, twice at most: beside rows that need none, and without such rows
_BESIDE_S, _ALONE_S = 0.001, 0.02


Update = tuple[Sequence, RowOutput]  # what a step did for a sequence, which may be finished now


class EngineCore:
    """The engine of one thread: add and abort requests between steps, and call `step` while there is work."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        grammars: GrammarStates,
        *,
        overlap: bool,
        context_length: int,
        speculation: Speculation | None = None,
    ) -> None:
        """speculation: None verifies no drafts."""
        self.speculation = speculation
        self.scheduler = scheduler
        self.runner = runner
        self.grammars = grammars
        self.overlap = overlap
        self.context_length = context_length
        self._in_flight: LaunchedStep | None = None
        self.watch = StepWatch()
        self._planned_s = 0.0  # when the last step was planned
        self._launched_s: deque[float] = deque()  # of the steps that are not collected
        self._collected_s = 0.0
        self._worked_s = 0.0  # this thread's time then: that of a step that others interrupt
        self._num_held = 0  # of `hold_pages`
        self._has_failed = False  # a step, while pages were held
        self._with_logprobs: set[Sequence] = set()  # steps look for such rows only if there are any

    # --- requests

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises the errors of `Scheduler.add`; only this request fails."""
        adapters = self.runner.adapters
        if request.adapter is not None and adapters is not None:
            adapters.check(request.adapter)
        sequence = self.scheduler.add(request, is_ready=request.grammar is None)
        if adapters is not None:
            adapters.acquire(sequence)
        if request.grammar is not None:
            self.runner.use_device()
            self.grammars.add(sequence)
        if request.sampling.logprobs is not None:
            self._with_logprobs.add(sequence)
        return sequence

    def abort(self, request_id: str) -> bool:
        """Finish the request with this exact id. Its pages are free on return. Returns False if there is none."""
        sequence = self.scheduler.abort(request_id)
        if sequence is not None:
            self._release(sequence)
        return sequence is not None

    def finish(self, sequence: Sequence, reason: FinishReason, num_output_tokens: int | None = None) -> None:
        """End a sequence for a reason found in its text (a stop string), keeping its first output tokens.

        It may have ended with a later token of the same step.
        """
        if not sequence.is_finished:
            self.scheduler.finish(sequence, reason, num_output_tokens)
        elif num_output_tokens is not None:
            self.scheduler.shorten(sequence, reason, num_output_tokens)
        self._release(sequence)

    @property
    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_work or self.grammars.has_work

    @property
    def is_stepping(self) -> bool:
        """True while a launched step has not been collected."""
        return self._in_flight is not None

    # --- steps

    def step(self) -> list[Update]:
        """Run one step, synchronous or overlapped, and return its updates.

        If a step raises, the running sequences end with FinishReason.ERROR; the engine and the waiting requests go on.
        If the device is lost, so no step can succeed any more, the error is raised.
        """
        updates: list[Update] = [(s, RowOutput()) for s in self.scheduler.expire_deadlines()]
        try:
            self._begin_works()
            self._planned_s, self._worked_s = time.monotonic(), time.thread_time()
            if not self.overlap:
                updates += self.step_sync()
            elif self._needs_results():
                self.step_informed(updates)
            else:
                updates += self.step_overlap()
            updates += self._finish_works()
            self.watch.lap("grammars")
        except Exception as error:
            updates += self._fail_running(error)
        updates += self._fail_grammars()
        self._release_finished(updates)
        return updates

    def step_sync(self) -> list[Update]:
        launched = self._start(self._draft())
        return [] if launched is None else self.collect(launched)

    def step_overlap(self) -> list[Update]:
        launched, updates = self._start(), self.drain()
        self._in_flight = launched
        return updates

    def step_informed(self, updates: list[Update]) -> None:
        """Append the updates of the step in flight, then launch the next one, which may raise."""
        updates += self.drain()
        self._release_finished(updates)  # the next step may need what they had, such as rows for edits
        self._in_flight = self._start(self._draft())

    def _needs_results(self) -> bool:
        """Whether the step in flight is collected before the next one is scheduled."""
        held, in_flight, speculation = self.scheduler.held, self._in_flight, self.speculation
        if held and all(running in held for running in self.scheduler.running()):  # some held ones may wait again
            return True
        if speculation is None or in_flight is None or in_flight.verifies:  # a row with drafts yields any number
            return speculation is not None
        return speculation.pays(self.scheduler.decoding())

    def _draft(self) -> dict[Sequence, list[int]]:
        """Draft tokens that pay. No step is in flight."""
        if self.speculation is None:
            return {}
        drafts = self.speculation.propose(self.scheduler.draftable())
        for sequence, tokens in drafts.items():
            if sequence.request.grammar is not None:
                del tokens[self.grammars.look_ahead(sequence, tokens) :]
        return {sequence: tokens for sequence, tokens in drafts.items() if tokens}

    def _start(self, drafts: Mapping[Sequence, Seq[int]] = NO_DRAFTS) -> LaunchedStep | None:
        """Schedule and launch the next step, if there is one."""
        batch = self.scheduler.schedule(drafts)
        self.watch.lap("schedule")
        return None if batch is None else self.launch(batch)

    def drain(self) -> list[Update]:
        """Collect the step in flight, if there is one."""
        launched, self._in_flight = self._in_flight, None
        return [] if launched is None else self.collect(launched)

    def launch(self, batch: Batch) -> LaunchedStep:
        """Start a step on the device, with the host's masks, grammar states and edits."""
        is_alone = self.overlap and self._in_flight is None  # nothing ran while it was planned
        self._launched_s.append(self._planned_s if is_alone else time.monotonic())
        extends = batch.items[batch.num_decode :]
        for item in extends:
            if self._needs_host(item):
                self.scheduler.hold(item.sequence)
        launched = self.runner.launch(
            batch,
            masks=self.grammars.masks(batch),
            grammar_states=self.grammars.arena_states(extends),
            has_host_edits=bool(self.scheduler.held),
            has_logprobs=bool(self._with_logprobs),
        )
        self.watch.lap("launch")
        return launched

    def collect(self, launched: LaunchedStep) -> list[Update]:
        """Wait for a launched step, advance its sequences, and return updates of those that were not yet finished.

        Rows whose grammars are not done with their tokens are left to a later step.
        """
        outputs = launched.read()
        self.watch.lap("device")
        items, outputs = self.grammars.take(launched.batch.items, outputs, launched.logprob)
        self._hold_rows()
        updates = self._finish_rows(items, outputs)
        self.watch.lap("finish")
        now = time.monotonic()
        seconds = now - max(self._launched_s.popleft(), self._collected_s)
        batch = launched.batch
        num_decode, num_rows = batch.num_decode, len(batch.items)
        self.watch.note_step((now, seconds, num_decode, num_rows - num_decode, batch.num_tokens - num_decode))
        self.scheduler.note_time(batch, seconds)
        if self.speculation is not None:
            self.speculation.note_step(batch, seconds if self.overlap else time.thread_time() - self._worked_s)
        self._collected_s = now
        return updates

    def _begin_works(self) -> None:
        """Let the grammars of new requests begin, so that these requests can be part of this step."""
        if self.grammars.has_work:
            self.grammars.work(_BESIDE_S, new_only=True)
            for sequence in self.grammars.take_joined():
                self.scheduler.make_ready(sequence)
        self.watch.lap("grammars")

    def _finish_works(self) -> list[Update]:
        """Let the grammars go on, and finish the rows of this step or of earlier ones that waited for them."""
        if not self.grammars.has_work:
            return []
        has_others = self._in_flight is not None or self.scheduler.num_running > self.grammars.num_waiting
        self.grammars.work(_BESIDE_S if has_others else _ALONE_S)
        for sequence in self.grammars.take_joined():
            self.scheduler.make_ready(sequence)
        rows = self.grammars.take_rows()
        self._hold_rows()
        return self._finish_rows(rows.items, rows.outputs, rows.replaced)

    def _hold_rows(self) -> None:
        """Hold the rows whose tokens the grammars must see before their next step, and no longer those of before."""
        for sequence in self.grammars.take_held():
            self.scheduler.hold(sequence)
        for sequence in self.grammars.take_freed():
            if not sequence.request.sampling.edits_logits:
                self.scheduler.unhold(sequence)

    def _finish_rows(
        self, items: list[ScheduledSequence], outputs: list[RowOutput], replaced: Seq[Sequence] = ()
    ) -> list[Update]:
        """Finish rows of a step. replaced: the sequences among them whose last token is not the sampled one."""
        was_live = [not item.sequence.is_finished for item in items]
        self.scheduler.finish_step(items, outputs)
        verified = [item.sequence for item in items if item.num_samples > 1]
        self._tell_device(dict.fromkeys([*replaced, *verified]))
        updates: list[Update] = []
        for item, output, live in zip(items, outputs, was_live, strict=True):
            sequence = item.sequence
            if live and (
                output.token_ids
                or output.prompt_logprobs is not None
                or output.pooled is not None
                or sequence.is_finished
            ):
                if sequence.is_finished and sequence.request.grammar is not None:
                    output.incomplete = self.grammars.why_incomplete(sequence)
                    is_whole = sequence.finish_reason is FinishReason.STOP
                    output.was_closed = is_whole and self.grammars.was_closed(sequence)
                updates.append((sequence, output))
        return updates

    def _tell_device(self, sequences: Iterable[Sequence]) -> None:
        """Let the slots of sequences that go on decoding have their last known token. Those with more tokens to compute
        send all of them.
        """
        rows = [
            (s.slot, s.output_ids[-1], s.num_computed)
            for s in sequences
            if s.slot is not None and s.num_computed == s.num_tokens - 1
        ]
        if rows:
            self.runner.override_last(rows)

    def _needs_host(self, item: ScheduledSequence) -> bool:
        """Return True if the host must know a sequence's tokens before each of its steps from now on.

        It must if it masks the sequence, or if it edits the logits because no row of the device's edit tables was left
        when the sequence joined.
        If it masks a sequence it also edits the sequence's logits: the host may replace a token that the device would
        already have counted.
        """
        sequence, edits = item.sequence, self.runner.edits
        is_masked = self.grammars.is_on_host(sequence)
        if sequence.request.sampling.edits_logits:
            if not self.runner.slots.joins(item):
                return False
            return is_masked or edits is None or not edits.acquire(sequence)
        return is_masked and item.num_samples > 0

    def _fail_running(self, error: Exception) -> list[Update]:
        """End the sequences that were running when a step raised. Raises if the device is lost."""
        self._in_flight = None
        self._launched_s.clear()
        self.runner.check_device()
        self._has_failed = self._num_held > 0
        if isinstance(error, torch.OutOfMemoryError):
            told = OutOfMemory(
                f"a step did not fit in the memory of {self.runner.device}; lower --mem-fraction-static, "
                f"--chunked-prefill-size or --max-running-requests: {error}"
            )
            told.__cause__, error = error, told
        logger.error("a step failed; what ran in it ends, the engine goes on", exc_info=error)
        return [(s, RowOutput()) for s in self.scheduler.fail_running(error)]

    def _fail_grammars(self) -> list[Update]:
        """End the sequences whose grammars raised in this step."""
        updates: list[Update] = []
        for sequence, error in self.grammars.take_failures().items():
            if not sequence.is_finished:
                self.scheduler.finish(sequence, FinishReason.ERROR, error=error)
                updates.append((sequence, RowOutput()))
        return updates

    def _release_finished(self, updates: list[Update]) -> None:
        for sequence, _ in updates:
            if sequence.is_finished:
                self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Release the resources of a sequence that has ended. Calling it again does nothing."""
        self._with_logprobs.discard(sequence)
        self.grammars.release(sequence)
        if self.speculation is not None:
            self.speculation.release(sequence)
        if self.runner.edits is not None:
            self.runner.edits.release(sequence)
        if self.runner.adapters is not None:
            self.runner.adapters.release(sequence)

    # --- pages of other engines

    def hold_pages(self, tokens: TokenIds, cache_salt: str, num_pages: int) -> PrefixMatch | None:
        """Keep the first pages of a prefix that are cached, so many at most, until `let_go`. None: memory is short."""
        self._check_whole()
        held = self.scheduler.pages.hold(tokens[: num_pages * self.scheduler.pool.page_size], cache_salt)
        self._num_held += held is not None
        return held

    def let_go(self, held: PrefixMatch) -> None:
        """Take back a `hold_pages`."""
        self.scheduler.cache.unlock(held.node)
        self._num_held -= 1
        if self._has_failed and not self._num_held:
            self._has_failed = False
            self.scheduler.cache.flush()  # what a failed step left there, see `Scheduler.fail_running`

    def write_pages(self, tokens: TokenIds, cache_salt: str, first: int, pages: Tensor) -> int:
        """Take in pages of a prefix, from page `first` on: uint8 `[n * page_bytes]` on the model's device.

        Returns how many pages of the prefix are cached now. It is fewer than those given if the pages before them are
        missing, or if the pool has no room.
        """
        self._check_whole()
        size, page_bytes = self.scheduler.pool.page_size, self.runner.kv_cache.page_bytes
        last = first + pages.numel() // page_bytes
        cached = len(pages_of(self.scheduler.cache, tokens, cache_salt))
        if first <= cached < last:
            page_ids = self.scheduler.pages.adopt(tokens[: last * size], cache_salt)
            if page_ids:
                self.runner.kv_cache.write(page_ids, pages[(cached - first) * page_bytes :])
                return last
        return cached

    def _check_whole(self) -> None:
        if self.runner.peers is not None:
            raise InvalidRequest(
                "the pages of an engine with --tp > 1 are divided among its ranks, so they cannot move"
            )

    # --- diagnosis

    def stats(self) -> dict[str, float]:
        """Counters and gauges of the scheduler, and the longest parts of steps."""
        scheduler = self.scheduler
        counters = asdict(scheduler.counters)
        return {
            **{name: float(value) for name, value in counters.items()},
            **({} if self.speculation is None else self.speculation.stats()),
            "num_running": float(scheduler.num_running),
            "max_running": float(scheduler.config.max_running),
            "num_waiting": float(scheduler.num_waiting),
            "num_waiting_for_grammar": float(self.grammars.num_waiting),
            **self.watch.stats(),
            "num_free_pages": float(scheduler.pool.num_free),
            "num_evictable_pages": float(scheduler.cache.num_evictable_pages),
            "num_pages": float(scheduler.pool.num_usable),
            "num_evicted_pages": float(scheduler.cache.num_evicted_pages),
        }
