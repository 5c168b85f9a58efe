"""The engine loop: `schedule -> launch -> collect`, and two orders of these three calls.

`step_sync` collects a step before the next is scheduled. `step_overlap` schedules and launches step t + 1 while step t
runs on the device, and only then reads step t; sequences that the host must look at between two steps are then in every
second one. Both give the same tokens. Not here: threads, text, callers (engine.py).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from ramet.errors import GrammarTooLarge
from ramet.kernels.grammar.arena import FREE_STATE
from ramet.runtime.constraints.incomplete import state_after, why_incomplete
from ramet.runtime.scheduling.scheduler import Scheduler
from ramet.runtime.steps.launched_step import HostMasks, LaunchedStep
from ramet.runtime.steps.model_runner import ModelRunner
from ramet.runtime.types import Batch, FinishReason, Grammar, Request, RowOutput, Sequence

logger = logging.getLogger(__name__)

_MOST_HELD = 0.25  # of the running sequences


@dataclass(slots=True)  # one a token: see RowOutput
class SequenceUpdate:
    """What a step changed for one sequence: its new tokens, and whether it is finished (`sequence.finish_reason`)."""

    sequence: Sequence
    output: RowOutput


class EngineCore:
    """One thread's engine: add and abort requests between steps, and call `step` while there is work."""

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner, *, overlap: bool, vocab_words: int, context_length: int
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.overlap = overlap
        self.appends_forced = True  # tokens that a grammar leaves no choice about are computed together, not decoded
        self.num_steps = 0
        # Why sequences with FinishReason.ERROR failed; whoever reports it takes it out.
        self.errors: dict[Sequence, Exception] = {}
        self.incomplete: dict[Sequence, str] = {}  # why constrained texts that max_tokens cut are not whole; likewise
        self.context_length = context_length
        self._vocab_words = vocab_words
        self._in_flight: LaunchedStep | None = None
        # Sequences whose sampling needs their tokens on the host first. Few of them take every second step, and the
        # others overlap; with many, steps do not overlap.
        self._on_host: set[Sequence] = set()
        scheduler.held = self._on_host
        self._with_logprobs: set[Sequence] = set()
        self._grammar_states: dict[Sequence, int | None] = {}  # of those whose masks the host computes
        self._unfinishable: set[Sequence] = set()  # of these, those that max_tokens must cut
        self._device_bases: dict[Sequence, int] = {}  # the arena's number of their grammar's state 0

    def add(self, request: Request) -> Sequence:
        """Queue a request. Raises what Scheduler.add raises: the request alone fails."""
        sequence = self.scheduler.add(request)
        grammar = request.grammar
        base = None if grammar is None else self._acquire_on_device(grammar)
        if base is not None:
            self._device_bases[sequence] = base
        elif grammar is not None:
            self._grammar_states[sequence] = 0
        if request.sampling.logprobs is not None:
            self._with_logprobs.add(sequence)
        return sequence

    def abort(self, request_id: str) -> bool:
        """Finish a request now, by its exact id; its pages are free when this returns. False where there is none."""
        return self.scheduler.abort(request_id)

    def finish(self, sequence: Sequence, reason: FinishReason, num_output_tokens: int | None = None) -> None:
        """End a sequence for a reason that only text shows (a stop string), keeping its first output tokens."""
        if not sequence.is_finished:
            self.scheduler.finish(sequence, reason, num_output_tokens)
        self._forget(sequence)

    @property
    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_work

    @property
    def is_stepping(self) -> bool:
        """True while a launched step has not been collected."""
        return self._in_flight is not None

    def check_integrity(self) -> None:
        """Compare page accounting with the tree. Raises CacheIntegrityError."""
        self.scheduler.check_integrity()

    def stats(self) -> dict[str, float]:
        """Counters and gauges of the scheduler, and the number of steps."""
        scheduler = self.scheduler
        counters = {name: float(getattr(scheduler.counters, name)) for name in scheduler.counters.__slots__}
        return {
            **counters,
            "num_running": float(scheduler.num_running),
            "num_waiting": float(scheduler.num_waiting),
            "num_free_pages": float(scheduler.pool.num_free),
            "num_evictable_pages": float(scheduler.cache.num_evictable_pages),
            "num_pages": float(scheduler.pool.num_usable),
        }

    def step(self) -> list[SequenceUpdate]:
        """Run one step in whichever order fits, and return what changed.

        A step that raises ends the sequences that run (FinishReason.ERROR); the engine and what waits go on. Where the
        device is lost, so that no step would succeed any more, what it says is raised.
        """
        updates = [SequenceUpdate(s, RowOutput()) for s in self.scheduler.expire_deadlines()]
        try:
            if self.overlap and len(self._on_host) <= _MOST_HELD * self.scheduler.num_running:
                updates.extend(self.step_overlap())
            else:
                updates.extend(self.drain())
                updates.extend(self.step_sync())
        except Exception as error:
            self._in_flight = None
            self.runner.check_device()
            logger.exception("a step failed; what ran in it ends, the engine goes on")
            failed = self.scheduler.fail_running()
            self.errors.update(dict.fromkeys(failed, error))
            updates.extend(SequenceUpdate(s, RowOutput()) for s in failed)
        for sequence in [s for s in self.errors if not s.is_finished]:
            self.scheduler.finish(sequence, FinishReason.ERROR)
            updates.append(SequenceUpdate(sequence, RowOutput()))
        for update in updates:
            if update.sequence.is_finished:
                self._forget(update.sequence)
        return updates

    def step_sync(self) -> list[SequenceUpdate]:
        batch = self.scheduler.schedule()
        return [] if batch is None else self.collect(self.launch(batch))

    def step_overlap(self) -> list[SequenceUpdate]:
        batch = self.scheduler.schedule()
        launched = None if batch is None else self.launch(batch)
        updates = self.drain()
        self._in_flight = launched
        return updates

    def drain(self) -> list[SequenceUpdate]:
        """Collect the step in flight, if there is one."""
        launched, self._in_flight = self._in_flight, None
        return [] if launched is None else self.collect(launched)

    def launch(self, batch: Batch) -> LaunchedStep:
        self.num_steps += 1
        for item in batch.items[batch.num_decode :]:
            if item.samples and item.sequence in self._grammar_states:
                self._on_host.add(item.sequence)
            if item.sequence.request.sampling.edits_logits:
                self._acquire_edits(item.sequence)
        return self.runner.launch(
            batch,
            masks=self._host_masks(batch),
            grammar_states=self._joining_states(batch),
            has_host_edits=bool(self._on_host),
            has_logprobs=bool(self._with_logprobs),
        )

    def collect(self, launched: LaunchedStep) -> list[SequenceUpdate]:
        """Wait for a launched step, advance its sequences, and return those that are not finished already."""
        outputs = launched.read()
        live = [not item.sequence.is_finished for item in launched.batch.items]
        if self._grammar_states:
            outputs = self._advance_grammars(launched, outputs)
        self.scheduler.finish_step(launched.batch, outputs)
        updates = []
        for item, output, was_live in zip(launched.batch.items, outputs, live, strict=True):
            if was_live and (output.token_ids or output.prompt_logprobs is not None or item.sequence.is_finished):
                updates.append(SequenceUpdate(item.sequence, output))
        return updates

    def _acquire_edits(self, sequence: Sequence) -> None:
        """Let the device edit a sequence's logits, where it has a row left; else its tokens must be on the host.

        So they must where the host masks it, because then the host may replace a token.
        """
        edits = self.runner.edits
        if edits is None or sequence in self._grammar_states or not edits.acquire(sequence):
            self._on_host.add(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._on_host.discard(sequence)
        self._with_logprobs.discard(sequence)
        if self.runner.edits is not None:
            self.runner.edits.release(sequence)
        if sequence.finish_reason is FinishReason.LENGTH:
            self._note_incomplete(sequence)
        self._grammar_states.pop(sequence, None)
        self._unfinishable.discard(sequence)
        if self._device_bases.pop(sequence, None) is not None:
            assert self.runner.arena is not None
            assert sequence.request.grammar is not None
            self.runner.arena.release(sequence.request.grammar)

    def _note_incomplete(self, sequence: Sequence) -> None:
        grammar = sequence.request.grammar
        if grammar is None:
            return
        if sequence in self._grammar_states:
            state = self._grammar_states[sequence]
        else:
            state = state_after(grammar, sequence.output_ids)
        why = why_incomplete(sequence, grammar, state)
        if why is not None:
            self.incomplete[sequence] = why

    def _acquire_on_device(self, grammar: Grammar) -> int | None:
        """The arena's number of the grammar's state 0; None where it is open, or there is no arena or no room in it."""
        arena = self.runner.arena
        grammars = self.runner.device_grammars
        tables = None if arena is None or grammars is None else grammars.prepare(grammar)
        if arena is None or tables is None:
            return None
        self.runner.use_device()
        try:
            return arena.acquire(grammar, tables)
        except GrammarTooLarge as error:
            logger.info("the host computes the masks of a grammar: %s", error)
            return None

    def _joining_states(self, batch: Batch) -> list[int] | None:
        """The arena's state of each extend row: where its tokens so far have led. None where all are unconstrained."""
        arena = self.runner.arena
        if arena is None or not (self._device_bases or self._grammar_states):
            return None
        states = []
        for item in batch.items[batch.num_decode :]:
            base, grammar = self._device_bases.get(item.sequence), item.sequence.request.grammar
            if base is not None and grammar is not None:
                state = state_after(grammar, item.sequence.output_ids)  # after a preemption there are some
                # No state: past an end token, where the request ignores it.
                states.append(arena.final_state if state is None else base + state)
            elif item.sequence in self._grammar_states:
                assert item.sequence.slot is not None
                states.append(arena.host_state(item.sequence.slot))
            else:
                states.append(FREE_STATE)
        return states

    def _host_masks(self, batch: Batch) -> HostMasks | None:
        """Masks of the items that sample, or None where none of them is constrained by the host."""
        if not self._grammar_states:
            return None
        sampled = [item.sequence for item in batch.items if item.samples]
        rows = [row for row, sequence in enumerate(sampled) if sequence in self._grammar_states]
        if not rows:
            return None
        words = np.full((len(sampled), self._vocab_words), -1, dtype=np.int32)
        for row in rows:
            sequence = sampled[row]
            grammar, state = sequence.request.grammar, self._grammar_states[sequence]
            if grammar is not None and state is not None:
                try:
                    grammar.fill_mask(state, words[row])
                except Exception as error:  # a grammar's failure ends its own request only
                    words[row] = -1
                    self.errors[sequence] = error
        return HostMasks(rows, words)

    def _advance_grammars(self, launched: LaunchedStep, outputs: list[RowOutput]) -> list[RowOutput]:
        """Advance the automata of constrained rows; where a token leaves no room to finish, force one that does."""
        result = list(outputs)
        forced: list[tuple[int, int]] = []
        num_sampled = 0
        for i, (item, output) in enumerate(zip(launched.batch.items, outputs, strict=True)):
            sequence, row = item.sequence, num_sampled
            num_sampled += item.samples
            grammar, state = sequence.request.grammar, self._grammar_states.get(sequence)
            if grammar is None or state is None or not output.token_ids or sequence.is_finished:
                continue
            (token,) = output.token_ids
            if token in sequence.request.stop_ids and grammar.is_accepting(state):
                continue
            try:
                chosen, after = self._advance(sequence, grammar, state, token)
            except Exception as error:  # a grammar's failure ends its own request only
                self.errors[sequence] = error
                continue
            if chosen != token:
                logprobs = None if output.logprobs is None else (launched.logprob(row, chosen),)
                result[i] = replace(output, token_ids=(chosen,), logprobs=logprobs)
                assert sequence.slot is not None
                forced.append((sequence.slot, chosen))
            try:
                run, after = self._forced_run(sequence, grammar, chosen, after, len(outputs))
            except Exception as error:  # as above
                self.errors[sequence] = error
                continue
            if run:
                result[i] = RowOutput((chosen, *run))
            self._grammar_states[sequence] = after
        if forced:
            self.runner.override_tokens(forced)
        return result

    def _forced_run(
        self, sequence: Sequence, grammar: Grammar, token: int, state: int | None, num_rows: int
    ) -> tuple[list[int], int | None]:
        """The tokens that must follow `token`, and the state behind them.

        Only where one token alone is allowed, so decoding would give the same ones; the next step computes them as it
        computes a prompt. What is looked at token by token (penalties, log-probabilities, stop strings) is decoded, and
        so are runs that are too short to gain anything in a step of `num_rows`.
        """
        request = sequence.request
        left = request.max_tokens - len(sequence.output_ids) - 1
        params = request.sampling
        is_watched = params.edits_logits or params.logprobs is not None or params.stop or token in request.stop_ids
        if state is None or not self.appends_forced or is_watched:
            return [], state
        run = grammar.forced_tokens(state)[:left]
        end = next((i for i, forced in enumerate(run, 1) if forced in request.stop_ids), len(run))
        kv_len = request.num_prompt + len(sequence.output_ids) + 1
        if end == 0 or not self.runner.computes_run(end, num_rows, kv_len):
            return [], state
        for forced in run[:end]:
            assert state is not None
            state = grammar.advance(state, forced)
        return run[:end], state

    def _advance(self, sequence: Sequence, grammar: Grammar, state: int, token: int) -> tuple[int, int | None]:
        """The token to keep and the state after it: `token`, unless it leaves too little room to finish.

        A text that cannot be finished within its budget never can again (a token shortens the way by one at most), so
        it is left alone from then on and ends with FinishReason.LENGTH.
        """
        after = grammar.advance(state, token)
        if sequence in self._unfinishable:
            return token, after
        left = sequence.request.max_tokens - len(sequence.output_ids) - 1
        if after is not None and self._fits(grammar, after, left):
            return token, after
        completion = grammar.shortest_completion(state)
        if completion and len(completion) <= left + 1:
            return completion[0], grammar.advance(state, completion[0])
        if not completion and sequence.request.stop_ids and grammar.is_accepting(state):
            return min(sequence.request.stop_ids), after  # it may end here, and after any other token it could not
        self._unfinishable.add(sequence)
        return token, after

    def _fits(self, grammar: Grammar, state: int, num_tokens: int) -> bool:
        """True where the text can be finished from `state` in so many tokens."""
        return grammar.completion_bound(state) <= num_tokens or len(grammar.shortest_completion(state)) <= num_tokens
