"""The scheduler chooses the tokens of the next step, their pages and their slots. A pure state machine, no torch.

    schedule(drafts) -> Batch      counts its tokens as computed: everything on the device runs in launch order
    note_time(batch, seconds)      learns what steps cost: beside decode rows, prompts are cut to fit `max_step_s`
    finish_step(items, outputs)    reads a step's tokens; may come after the next schedule(), for some rows later still

With overlap, the host may learn that a sequence is finished while the sequence's next step runs. The scheduler releases
the sequence at once and ignores that row later. Its pages may be reused at once, because later steps write them only
after the running step.

Admission reserves pages for the tokens that a sequence may still generate (`reservation_ratio` of its max_tokens). A
request that finds too few pages waits in the queue. With a ratio below 1 a sequence may grow beyond its reservation;
only then can preemption happen. It chooses the newest sequence of the lowest priority, which returns to the queue: its
tokens are kept and its pages stay in the tree. A request is also preempted if slots or pages are taken, its owner has
more than an equal share of them, and another owner waits with less.

A row whose sequence has drafted tokens computes them with its last known token, and yields a token after each. Those
that follow from each other are read; what was computed beyond them is forgotten.

Not here: the order of the queue (`priority`), parked sharers of a prefix (`admission`), stop strings (engine).
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from collections.abc import Sequence as Seq
from operator import itemgetter
from types import MappingProxyType

from ramet.errors import ContextOverflow, InvalidRequest, Overloaded
from ramet.runtime.cache.integrity import require
from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import PrefixMatch, RadixCache
from ramet.runtime.scheduling.admission import AdmissionQueue, Admits, reservation
from ramet.runtime.scheduling.config import SchedulerConfig, SchedulerCounters
from ramet.runtime.scheduling.priority import DECODE_WEIGHT, Flow, Flows, Waiting, equal_parts
from ramet.runtime.scheduling.sequence_pages import SequencePages, known_end, matchable
from ramet.runtime.scheduling.step_costs import StepBudget, StepCosts
from ramet.runtime.types import (
    Batch,
    FinishReason,
    PageCopy,
    Request,
    RowOutput,
    ScheduledSequence,
    Sequence,
    Status,
)

logger = logging.getLogger(__name__)

NO_DRAFTS: Mapping[Sequence, Seq[int]] = MappingProxyType({})
MAX_GAP_S = 0.2  # between two tokens of a task with few rows, beside one with many
_LOOK_EVERY = 4  # steps, at requests that did not fit, where tasks share pages
_LEAST_SHARE = 0.25  # time of prompts in a step, as a part of the time of its decode rows


class Scheduler:
    """Owns the sequences, the slots, and every page that is neither free nor in the tree. Not thread-safe."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PagePool,
        cache: RadixCache,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.pool = pool
        self.cache = cache
        self.counters = SchedulerCounters()
        self._clock = clock
        self._page_size = pool.page_size
        self.pages = SequencePages(pool, cache, reservation_ratio=config.reservation_ratio, share=config.prefix_cache)
        token_s = config.max_step_s / config.first_mixed_tokens
        self._flows = Flows(clock, token_s) if token_s else Flows(clock)
        self._task_of: dict[Sequence, Flow] = {}
        self._waiting = AdmissionQueue(self._flows, pool.page_size)
        self._sequences: dict[str, Sequence] = {}  # waiting and running, by request id
        self._queued_s: dict[Sequence, float] = {}
        self._running: dict[Sequence, None] = {}  # in order of admission
        self._prefilling: dict[Sequence, None] = {}  # running, with known tokens to compute
        self._decoding: dict[Sequence, int] = {}  # running -> the num_computed at which it has all its tokens
        self._free_slots = list(range(config.max_running))
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._num_deadlines = 0
        self.held: set[Sequence] = set()  # see `hold`; others only read it
        self._may_admit = False  # something changed since admission last examined the queue
        self._costs = StepCosts(config.first_mixed_tokens, config.max_step_s or 1.0, config.num_few)
        self._copies: list[PageCopy] = []
        self._finish_interval_s = 0.1  # moving average
        self._last_finish_s = clock()

    # --- requests

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def running(self) -> list[Sequence]:
        """The running sequences, in the order of their admission."""
        return list(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self._running)

    def add(self, request: Request, *, is_ready: bool = True) -> Sequence:
        """Queue a request. If it is not ready, it counts as waiting, but is scheduled only after `make_ready`.

        Raises:
            ContextOverflow: the request can never fit the context or the page pool.
            InvalidRequest: the request's id is in use.
            Overloaded: the queue is full.
        """
        num_max = request.num_prompt + request.max_tokens if request.score_from is None else request.num_prompt
        if num_max > self.config.context_length:
            raise ContextOverflow(
                f"prompt ({request.num_prompt:,} tokens) and output (up to {request.max_tokens:,}) do not fit the "
                f"context of {self.config.context_length:,}; shorten the prompt or lower max_tokens",
                param="max_tokens",
            )
        sequence = Sequence(request)
        num_pages = self.pages.peak(sequence, 1.0)
        if num_pages > self.pool.num_usable:
            raise ContextOverflow(
                f"prompt ({request.num_prompt:,} tokens) and output (up to {request.max_tokens:,}) need {num_pages:,} "
                f"KV pages of {self._page_size} tokens but the pool has {self.pool.num_usable:,}; shorten the prompt, "
                f"lower max_tokens or give the pool more memory",
                param="max_tokens",
            )
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request id {request.request_id!r} is in use", param="request_id")
        if self.num_waiting >= self.config.max_waiting:
            retry_s = min(60.0, max(1.0, 0.1 * self.num_waiting * self._finish_interval_s))
            raise Overloaded(f"{self.num_waiting:,} requests wait already; retry in {retry_s:.0f} s", retry_s)
        self._task_of[sequence] = self._flows.enter(request)
        self._sequences[request.request_id] = sequence
        self._queued_s[sequence] = self._clock()
        if request.deadline_s is not None:
            self._num_deadlines += 1
            heapq.heappush(self._deadlines, (request.deadline_s, self._num_deadlines, sequence))
        if is_ready:
            self._enqueue(sequence)
        return sequence

    def make_ready(self, sequence: Sequence) -> None:
        """Let a live sequence that was not ready be scheduled."""
        assert not sequence.is_finished, f"{sequence.request.request_id} is finished already"
        self._enqueue(sequence)

    def abort(self, request_id: str) -> Sequence | None:
        """Finish a request now. Its pages and slot are free on return. Returns None if no such id is live."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self.finish(sequence, FinishReason.ABORT)
        return sequence

    def hold(self, sequence: Sequence) -> None:
        """From now on, plan a step of this live sequence only once the host knows its last token."""
        assert not sequence.is_finished, f"{sequence.request.request_id} is finished already"
        self.held.add(sequence)

    def unhold(self, sequence: Sequence) -> None:
        """Plan the steps of a sequence as those of others again. Does nothing if it is not held."""
        self.held.discard(sequence)

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        num_output_tokens: int | None = None,
        *,
        error: Exception | None = None,
    ) -> None:
        """End a live sequence now, keeping its first `num_output_tokens` output tokens (None: all).

        Its computed pages go to the cache, except with FinishReason.ERROR: after an error their content is unknown.
        """
        assert not sequence.is_finished, f"{sequence.request.request_id} is finished already"
        if num_output_tokens is not None:
            del sequence.output_ids[num_output_tokens:]
        if sequence.status is Status.RUNNING:
            self._release(sequence, keep=reason is not FinishReason.ERROR)
        else:
            self._waiting.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason, sequence.error = reason, error
        self.held.discard(sequence)
        self._flows.leave(self._task_of.pop(sequence))
        self._finish_interval_s += 0.05 * (self._clock() - self._last_finish_s - self._finish_interval_s)
        self._last_finish_s = self._clock()
        del self._sequences[sequence.request.request_id]
        del self._queued_s[sequence]
        self.counters.num_finished += 1

    def shorten(self, sequence: Sequence, reason: FinishReason, num_output_tokens: int) -> None:
        """Let an ended sequence have ended earlier: keep its first output tokens. Does nothing if it has no more."""
        if num_output_tokens < len(sequence.output_ids):
            del sequence.output_ids[num_output_tokens:]
            sequence.finish_reason = reason

    def expire_deadlines(self) -> list[Sequence]:
        """Abort and return every sequence whose deadline has passed. O(1) if there is none."""
        expired = []
        while self._deadlines and (self._deadlines[0][0] <= self._clock() or self._deadlines[0][2].is_finished):
            sequence = heapq.heappop(self._deadlines)[2]
            if not sequence.is_finished:
                self.finish(sequence, FinishReason.ABORT)
                expired.append(sequence)
        return expired

    def fail_running(self, error: Exception) -> list[Sequence]:
        """End every running sequence with ERROR and empty the cache: the failed step may have corrupted any page."""
        failed = list(self._running)
        for sequence in failed:
            self.finish(sequence, FinishReason.ERROR, error=error)
        self.cache.flush()
        return failed

    # --- a step

    def schedule(self, drafts: Mapping[Sequence, Seq[int]] = NO_DRAFTS) -> Batch | None:
        """Plan the next step. Returns None if every sequence waits for tokens of launched steps.

        drafts: tokens that may follow the known ones of some of the `draftable` sequences; held ones, in overlapped
        steps. Fewer are verified where there is no room for them.
        """
        self._copies = []
        self._grow_decoding()
        has_several = self._flows.num_tasks > 1
        if has_several and self.num_waiting and self.counters.num_steps % _LOOK_EVERY == 0:
            self._may_admit = True  # perhaps another task is due first now, which may get pages of others
        heir = self._share_room() if has_several and self._may_admit else None
        decoding = self._decoding
        if drafts:
            drafts = {sequence: tokens for sequence, tokens in drafts.items() if sequence in decoding}
        extends: list[ScheduledSequence] = []
        room = (self.config.max_num_tokens_per_step - len(decoding)) // 2 if drafts else 0
        if self._prefilling or self._may_admit:
            self._plan_extends(extends, self._budget(min(room, sum(map(len, drafts.values())))), heir)
        self._may_admit |= heir is not None  # perhaps more is given in the next step
        if self.config.max_step_s and has_several:
            has_owners = self._flows.num_owners > 1
            decoding = self._within_shares(extends) if has_owners else self._within_gap(extends)
            drafts = {sequence: tokens for sequence, tokens in drafts.items() if sequence in decoding}
        verified = self._plan_drafts(drafts, room) if drafts else {}
        items: list[ScheduledSequence] = []
        held = self.held
        new, append = tuple.__new__, items.append  # the hot loop: 256 rows in a few tens of microseconds
        for sequence, limit in decoding.items():
            start = sequence.num_computed
            if start < limit and not (held and sequence.num_in_flight and sequence in held):
                if verified and sequence in verified:
                    continue
                sequence.num_computed = start + 1
                sequence.num_in_flight += 1
                append(new(ScheduledSequence, (sequence, start, 1, 1)))
        num_decode = len(items)
        num_tokens = num_decode
        for item in verified.values():
            num_tokens += item.num_tokens
            item.sequence.num_computed = item.start + item.num_tokens
            item.sequence.num_in_flight += 1
        items += verified.values()
        if self.num_waiting:
            self._count_decoded(items)
        num_extend = 0
        for item in extends:
            num_extend += item.num_tokens
            self._launch_extend(item)
        items += extends
        if not items:
            return None
        counters = self.counters
        counters.num_steps += 1
        counters.num_decoded_tokens += num_decode + len(verified)
        counters.num_computed_tokens += num_extend
        return Batch(counters.num_steps, tuple(items), num_decode, num_tokens + num_extend, tuple(self._copies))

    def _count_decoded(self, items: Iterable[ScheduledSequence]) -> None:
        """Count the service of rows that decode. It is the same for each, however many tokens it verifies."""
        task_of = self._task_of
        rows = Counter(task_of[item[0]] for item in items)
        for task, count in rows.items():
            self._flows.add(task, DECODE_WEIGHT * count)

    def decoding(self) -> list[Sequence]:
        """Return the sequences that decode in the next step, if the host need not know more of their tokens."""
        return [s for s, limit in self._decoding.items() if s.num_computed < limit]

    def draftable(self) -> list[Sequence]:
        """Return those of them whose tokens the host all knows."""
        return [s for s in self.decoding() if not s.num_in_flight]

    def note_time(self, batch: Batch, seconds: float) -> None:
        """Learn from a step that took so long: to its end from its launch, or from the end of the step before."""
        self._flows.note_time(batch, seconds)
        if self.config.max_step_s:
            self._costs.note(batch, seconds)

    def finish_step(self, items: Iterable[ScheduledSequence], outputs: list[RowOutput]) -> list[Sequence]:
        """Read the outputs of rows of a step. Returns the sequences that have new tokens or scores.

        items: those of a batch; any of them may be finished by a later call. A held sequence whose row is not finished
        is not scheduled.

        A sampling row may yield several tokens if no later step of its sequence is launched; the next step computes
        their KV. If it yields no token, its last position is computed again.
        """
        changed = []
        for item, output in zip(items, outputs, strict=True):
            sequence = item.sequence
            if sequence.status is Status.FINISHED:
                continue
            if not item.num_samples:
                if sequence.request.score_from is not None:
                    changed.append(sequence)
                    if item.start + item.num_tokens >= known_end(sequence):
                        self.finish(sequence, FinishReason.LENGTH)
                continue
            changed.append(sequence)
            sequence.num_in_flight -= 1
            if item.num_samples > 1:
                self._forget_refused(item, output.token_ids)
            request, output_ids = sequence.request, sequence.output_ids
            stop_ids, max_tokens = request.stop_ids, request.max_tokens
            for token in output.token_ids:
                output_ids.append(token)
                if token in stop_ids and len(output_ids) >= request.sampling.min_tokens:
                    self.finish(sequence, FinishReason.STOP)
                    break
                if len(output_ids) >= max_tokens and not output.is_complete:
                    self.finish(sequence, FinishReason.LENGTH)
                    break
            else:
                if output.is_complete:
                    self.finish(sequence, FinishReason.STOP)
                elif len(output.token_ids) != 1 or sequence.status is not Status.RUNNING:
                    self._resume(sequence, len(output.token_ids))
        return changed

    def _forget_refused(self, item: ScheduledSequence, tokens: tuple[int, ...]) -> None:
        """Forget the draft of a row that is read, and the KV of its drafted tokens that are none of the new ones."""
        sequence = item.sequence
        pairs = enumerate(zip(sequence.draft_ids, tokens, strict=False))
        num_kept = next((i for i, (draft, token) in pairs if draft != token), min(len(sequence.draft_ids), len(tokens)))
        num_kept = min(num_kept, max(len(tokens) - 1, 0))  # the last token is yet to be computed
        sequence.num_drafted += len(sequence.draft_ids)
        sequence.num_accepted += num_kept
        sequence.draft_ids = []
        if sequence.status is Status.RUNNING:
            sequence.num_computed = item.start + 1 + num_kept
        self.counters.num_decoded_tokens += num_kept

    def _resume(self, sequence: Sequence, num_new: int) -> None:
        """Choose a sequence's next state after a preemption, or after a step that did not yield exactly one token."""
        if sequence.status is Status.WAITING:
            if not sequence.num_in_flight:
                self._enqueue(sequence)
            return
        assert not sequence.num_in_flight, "several tokens, or none, while a later step of the sequence is launched"
        sequence.num_computed = min(sequence.num_computed, sequence.num_tokens - 1)
        if sequence.num_tokens - sequence.num_computed > 1 or not num_new:
            del self._decoding[sequence]
            self._prefilling[sequence] = None

    # --- decode and extend rows

    def _budget(self, num_drafted: int) -> StepBudget:
        """Return what may be added to the rows that decode: tokens, and the time that they leave.

        Where they take almost all of it, prompts get a part of the step nevertheless (`_LEAST_SHARE`). A drafted token
        counts as a row.
        """
        num_decode, target_s = len(self._decoding) + num_drafted, self.config.max_step_s
        seconds = math.inf
        if target_s and num_decode:
            decode_s = self._costs.decode_s(num_decode)
            if self._flows.num_owners > 1 and self._decoding:
                target_s, decode_s = self._shared(target_s, decode_s)
            seconds = max(target_s - decode_s, _LEAST_SHARE * decode_s)
        return StepBudget(self._step_tokens() - num_decode, seconds, self._costs, num_decode)

    def _shared(self, target_s: float, decode_s: float) -> tuple[float, float]:
        """Return how long a step with prompts may take, and its rows in it, where several owners share it.

        The step is as long as suits the owner with the fewest rows, see `_within_shares`, unless this owner itself has
        prompts. The rows leave an owner without rows, who has prompts alone, its share of the time.
        """
        num_rows = Counter(sequence.request.owner for sequence in self._decoding)
        asking = {sequence.request.owner for sequence in self._prefilling} | self._waiting.owners
        num_owners = len(asking | num_rows.keys())
        owner, fewest = min(num_rows.items(), key=itemgetter(1))
        if asking - num_rows.keys():
            decode_s = min(decode_s, target_s * (1 - 1 / num_owners))
        if owner not in asking:
            share_s = num_owners * self._costs.decode_s(fewest)
            target_s, decode_s = min(target_s, share_s), min(decode_s, share_s / (1 + _LEAST_SHARE))
        return target_s, decode_s

    def _within_shares(self, extends: Iterable[ScheduledSequence]) -> dict[Sequence, int]:
        """Return the rows that decode in this step, where `n` owners share it.

        A step is at most `n` times as long as it would be with the rows and prompts of one owner alone, for each owner
        that is part of it. So all are at least as fast as alone on a machine that is `n` times as slow, whatever the
        others ask for; and who has few rows costs the others at most a share of the time. Where the rows are too many
        for that, each owner has an equal part of them, and those that skip the step are the first ones of the next.
        """
        ready = self._ready()
        costs = self._costs
        num_rows = Counter(sequence.request.owner for sequence in ready)
        own_s = {owner: costs.decode_s(count) for owner, count in num_rows.items()}
        prompts_s = 0.0
        for item in extends:
            owner, seconds = item.sequence.request.owner, costs.extend_s(item.sequence, item.start, item.num_tokens)
            own_s[owner] = own_s.get(owner, costs.decode_s(0)) + seconds
            prompts_s += seconds
        most = costs.rows_within(self._flows.num_served * min(own_s.values(), default=0.0) - prompts_s)
        if most >= len(ready):
            return ready
        return self._in_turn({sequence: sequence.request.owner for sequence in ready}, most)

    def _within_gap(self, extends: Iterable[ScheduledSequence]) -> dict[Sequence, int]:
        """Return the rows that decode in this step, where the tasks of one owner share it.

        A task with many rows does not make a step longer than `MAX_GAP_S`: beyond, its rows skip steps in turn, as far
        as it has more of them than an equal part. A step that long loses little by it.
        """
        costs, seconds = self._costs, MAX_GAP_S
        if costs.decode_s(len(self._decoding)) < seconds / 2 and not extends:
            return self._decoding
        for item in extends:
            seconds -= costs.extend_s(item.sequence, item.start, item.num_tokens)
        most = costs.rows_within(seconds)
        ready = self._ready()
        return ready if most >= len(ready) else self._in_turn({s: self._task_of[s] for s in ready}, most)

    def _ready(self) -> dict[Sequence, int]:
        """Return the rows that can decode in this step."""
        is_held = {s for s in self.held if s.num_in_flight}
        return {s: n for s, n in self._decoding.items() if s.num_computed < n and s not in is_held}

    def _in_turn(self, flow_of: Mapping[Sequence, Hashable], most: int) -> dict[Sequence, int]:
        """Return an equal part of these rows for each of their flows; the others are the first ones of the next."""
        parts = equal_parts(Counter(flow_of.values()), most)
        chosen: dict[Sequence, int] = {}
        for sequence, flow in flow_of.items():
            if parts[flow]:
                parts[flow] -= 1
                chosen[sequence] = self._decoding.pop(sequence)
        self._decoding |= chosen
        return chosen

    def _step_tokens(self) -> int:
        """Maximum number of tokens in the next step.

        With few decode rows, prompts run in small chunks. Reading the weights dominates such a step, so a few hundred
        more tokens cost little, while a large chunk would delay every row and every new prompt. With many rows, larger
        chunks are better: each step is long anyway, and requests that wait for their prompt cost more.
        """
        config = self.config
        if not self._decoding:
            return config.max_num_tokens_per_step
        num_live = min(len(self._sequences), config.max_running)
        mixed = max(config.min_mixed_tokens, config.mixed_tokens_per_request * num_live)
        return min(mixed, config.max_num_tokens_per_step)

    def _grow_decoding(self) -> None:
        """Give a page to every decode row that starts one. Preempts a sequence if no page is left."""
        size = self._page_size
        at_border = [s for s, limit in self._decoding.items() if not s.num_computed % size and s.num_computed < limit]
        for sequence in at_border:
            if sequence.status is Status.RUNNING and len(sequence.page_ids) * size <= sequence.num_computed:
                self._grow(sequence, 1, planned=())

    def _plan_drafts(self, drafts: Mapping[Sequence, Seq[int]], room: int) -> dict[Sequence, ScheduledSequence]:
        """Plan the rows that verify drafts: up to `room` drafted tokens in all. Nobody is preempted for a draft."""
        size = self._page_size
        rows: dict[Sequence, ScheduledSequence] = {}
        for sequence, tokens in drafts.items():
            limit = self._decoding.get(sequence)
            if limit is None:
                continue  # preempted for a prompt
            assert not sequence.num_in_flight, f"{sequence.request.request_id}: its last token is not known"
            start = sequence.num_computed
            count = min(len(tokens), limit - start - 1, room)
            num_missing = -(-(start + 1 + count) // size) - len(sequence.page_ids)
            if num_missing > 0 and not self.pages.take(sequence, num_missing):
                count = len(sequence.page_ids) * size - start - 1
            if count > 0:
                room -= count
                sequence.draft_ids = [int(token) for token in tokens[:count]]
                rows[sequence] = ScheduledSequence(sequence, start, count + 1, count + 1)
        return rows

    def _plan_extends(self, extends: list[ScheduledSequence], budget: StepBudget, heir: Waiting | None) -> None:
        """Plan chunks of running sequences first, then of newly admitted ones, but those of tasks that are due before.

        Sequences that have generated tokens go before prompts, because their chunks are short. heir: for whom
        `_share_room` has made room.
        """
        planned: set[Sequence] = set()
        if heir is not None and budget.has_room and self._try_admit(heir, [], None):
            self._plan_extend(heir.sequence, budget, planned, extends)
        prefilling = list(self._prefilling)
        if self._flows.num_tasks > 1 and prefilling:
            now_s = self._clock()
            ranks = {sequence: self._flows.rank(self._task_of[sequence], now_s) for sequence in prefilling}
            if self._may_admit:
                self._plan_admissions(extends, budget, planned, before=min(ranks.values()))
            prefilling.sort(key=lambda sequence: (not sequence.output_ids, ranks[sequence]))
        else:
            prefilling.sort(key=lambda sequence: not sequence.output_ids)
        for sequence in prefilling:
            if budget.has_room and sequence in self._prefilling and sequence not in planned:
                self._plan_extend(sequence, budget, planned, extends)
        if self._may_admit:
            self._plan_admissions(extends, budget, planned)

    def _share_room(self) -> Waiting | None:
        """Where slots or pages are taken, free some for an owner that waits and has less than an equal share of them,
        or for one of its tasks that has less than an equal share of the owner's.

        Who has most of them gives what is beyond its own share: its newest request waits again. So nothing is taken
        from somebody who could take it back. Returns for whom a request has to wait again; it still is in the queue.
        """
        size: Callable[[Sequence], int] = self.pages.size
        total, is_full = self.pool.num_usable, not self._free_slots
        if is_full:
            size, total = (lambda _: 1), self.config.max_running
        held = Counter[Flow | None]()
        for waiting in self._waiting.firsts():
            if not is_full and self.pages.fits(waiting.sequence):
                return None
            if not held:
                for running in reversed(self._running):
                    flow, num = self._task_of[running], size(running)
                    held[flow] += num
                    held[flow.parent] += num
            task, wanted = self._task_of[waiting.sequence], size(waiting.sequence)
            victim = self._beyond_share(task.parent, total, held, size, wanted)
            if victim is None:
                victim = self._beyond_share(task, held[task.parent], held, size, wanted)
            if victim is not None:
                self._preempt(victim)
                return waiting
        return None

    def _beyond_share(
        self,
        flow: Flow | None,
        total: int,
        held: Mapping[Flow | None, int],
        size: Callable[[Sequence], int],
        num_wanted: int,
    ) -> Sequence | None:
        """Return whose slot or pages a flow beside `flow` gives, if `flow` has a right to so many more of `total`.

        held: by owner and task, of which `size` says what a running request has.
        """
        assert flow is not None
        assert flow.parent is not None
        share = max(total // flow.parent.num_members, 1)
        if held[flow] + num_wanted > share:
            return None
        beside = (one for one in held if one is not None and one.parent is flow.parent)
        most = max(beside, key=held.__getitem__, default=flow)
        tasks = (one for one in held if one is not None and one.parent is most)
        victim = self._victim((), max(tasks, key=held.__getitem__, default=most))  # of an owner, its largest task
        return None if victim is None or held[most] - size(victim) < share else victim

    def _plan_admissions(
        self,
        extends: list[ScheduledSequence],
        budget: StepBudget,
        planned: set[Sequence],
        *,
        before: tuple[float, float] | None = None,
    ) -> None:
        """Admit waiting requests that fit, in order, and plan their first chunks.

        before: only those of tasks that are due before, see `Flows.rank`.
        """
        blocked: list[Waiting] = []
        admits: Admits | None = None
        num_parked = self.counters.num_parked
        num_refused = 0
        while budget.has_room and self._free_slots and num_refused < self.config.max_examined:
            waiting = self._waiting.pop()
            if waiting is None:
                self._may_admit = False
                break
            if before is not None and self._flows.rank(self._task_of[waiting.sequence], self._clock()) >= before:
                self._waiting.put_back(waiting)
                break
            if self._try_admit(waiting, blocked, admits):
                self._plan_extend(waiting.sequence, budget, planned, extends)
                continue
            num_refused += 1
            if blocked and admits is None:
                admits = self._reserve(blocked[0].sequence)
        for waiting in blocked:
            self._waiting.put_back(waiting)
        if before is not None:
            return
        is_full = not self._free_slots and self._flows.num_tasks == 1  # else slots may have to change their task
        if is_full or (blocked and budget.has_room and num_parked == self.counters.num_parked):
            self._may_admit = False  # examine the queue again only after something has changed

    def _plan_extend(
        self, sequence: Sequence, budget: StepBudget, planned: set[Sequence], extends: list[ScheduledSequence]
    ) -> None:
        """Plan the next chunk of a sequence's known tokens, if any of it fits. Long chunks end at page borders."""
        size, start, end = self._page_size, sequence.num_computed, known_end(sequence)
        stop = min(end, start + budget.tokens_of(sequence, start))
        if stop <= start:
            return
        if stop < end and stop // size * size - start > (stop - start) // 2:
            stop = stop // size * size
        num_missing = -(-stop // size) - len(sequence.page_ids)
        if num_missing > 0 and not self._grow(sequence, num_missing, planned):
            # Reached only if the sequence itself was preempted (it has no pages then), or pages were quarantined.
            stop = len(sequence.page_ids) * size
            if stop <= start:
                return
        planned.add(sequence)
        samples = stop == end and sequence.request.score_from is None
        extends.append(ScheduledSequence(sequence, start, stop - start, int(samples)))
        budget.spend(sequence, start, stop - start)
        self._flows.add(self._task_of[sequence], stop - start)

    def _launch_extend(self, item: ScheduledSequence) -> None:
        """Count a planned chunk as computed and share its pages: later steps may read the KV that this step writes."""
        sequence = item.sequence
        sequence.num_computed = item.start + item.num_tokens
        is_complete = sequence.num_computed == known_end(sequence)
        node = self.pages.share(sequence, is_complete=is_complete)
        if is_complete:
            del self._prefilling[sequence]
            self._waiting.clear_frontier(sequence)
        elif self.config.prefix_cache:
            self._waiting.set_frontier(sequence, node, sequence.num_tokens)
        if self._waiting.wake(sequence, None if is_complete else node.end):
            self._may_admit = True
        if item.num_samples:
            sequence.num_in_flight += 1
            self._decoding[sequence] = sequence.request.num_prompt + sequence.request.max_tokens - 1

    # --- admission

    def _enqueue(self, sequence: Sequence) -> None:
        cached_share = 0.0
        if self.config.prefix_cache:
            num_cached = self.cache.match_length(matchable(sequence), sequence.request.cache_salt)
            cached_share = num_cached / sequence.num_tokens
        self._waiting.add(sequence, self._queued_s[sequence], cached_share)
        self._may_admit = True

    def _try_admit(self, waiting: Waiting, blocked: list[Waiting], admits: Admits | None) -> bool:
        """Admit the first waiting request, park it, or add it to `blocked`. Returns True if it was admitted."""
        sequence = waiting.sequence
        match = self.pages.match(sequence)
        if self._waiting.try_park(waiting, match):
            self.counters.num_parked += 1
            self.cache.unlock(match.node)
            return False
        num_needed = self.pages.peak(sequence) - len(match.page_ids)
        fits = num_needed <= self.pages.num_available
        if fits and admits is not None:
            head = blocked[0]
            fits = head.num_overtaken < self.config.max_overtakes
            fits = fits and admits(self._steps_left(sequence), num_needed)
            head.num_overtaken += fits
            self.counters.num_overtakes += fits
        if not fits:
            waiting.cached_share = match.num_tokens / sequence.num_tokens
            blocked.append(waiting)
            self.cache.unlock(match.node)
            return False
        self._admit(sequence, match)
        return True

    def _reserve(self, head: Sequence) -> Admits:
        """Reserve a start for the first request that does not fit."""
        num_missing = self.pages.peak(head) - self.pages.num_available
        running = [(self._steps_left(s), self.pages.peak(s) - s.num_cached // self._page_size) for s in self._running]
        return reservation(num_missing, running)

    def _steps_left(self, sequence: Sequence) -> int:
        """Maximum number of steps until a sequence ends, if prefills do not wait for others and no row skips one."""
        request = sequence.request
        num_output = request.max_tokens - len(sequence.output_ids) if request.score_from is None else 0
        num_known = known_end(sequence) - sequence.num_computed
        return num_output + math.ceil(num_known / max(1, self._step_tokens() - len(self._running)))

    def _admit(self, sequence: Sequence, match: PrefixMatch) -> None:
        self._waiting.remove(sequence)
        sequence.status = Status.RUNNING
        sequence.slot = heapq.heappop(self._free_slots)
        if sequence.first_scheduled_s is None:
            sequence.first_scheduled_s = self._clock()
        self.pages.attach(sequence, match)
        copy = self.pages.copy_tail(sequence, match, self._copies)
        if copy is not None:
            self._copies.append(copy)
        sequence.num_cached = sequence.num_computed
        self._flows.run(self._task_of[sequence], 1)
        self._running[sequence] = None
        self._prefilling[sequence] = None
        self.counters.num_admitted += 1
        self.counters.num_cached_tokens += sequence.num_cached
        if self.config.prefix_cache:
            self._waiting.set_frontier(sequence, match.node, sequence.num_tokens)

    # --- pages

    def _grow(self, sequence: Sequence, num_pages: int, planned: Iterable[Sequence]) -> bool:
        """Give pages to a running sequence; preempts others if needed. Returns False if it was preempted itself."""
        while not self.pages.take(sequence, num_pages):
            victim = self._victim(planned)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _victim(self, planned: Iterable[Sequence], task: Flow | None = None) -> Sequence | None:
        """Choose the sequence to preempt: the newest of the lowest priority that is not in `planned`.

        `task`: only of this one.
        """
        candidates = [s for s in reversed(self._running) if s.request.score_from is None and s not in planned]
        if task is not None:
            candidates = [s for s in candidates if self._task_of[s] is task]
        return max(candidates, key=lambda s: s.request.priority, default=None)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence, keep=True)
        sequence.status = Status.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.counters.num_preemptions += 1
        if not sequence.num_in_flight:  # otherwise it is queued once its last token is read
            self._enqueue(sequence)

    def _release(self, sequence: Sequence, *, keep: bool) -> None:
        """Take the slot and the pages from a running sequence. With `keep`, its computed pages go to the tree."""
        assert sequence.slot is not None
        self.pages.release(sequence, keep=keep)
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = None
        self._flows.run(self._task_of[sequence], -1)
        del self._running[sequence]
        self._prefilling.pop(sequence, None)
        self._decoding.pop(sequence, None)
        self._waiting.clear_frontier(sequence)
        self._waiting.wake(sequence, None)
        self._may_admit = True

    # --- integrity

    def check_integrity(self) -> None:
        """Check pages, slots and reservations. O(pages).

        Raises:
            CacheIntegrityError: describes the first violation found.
        """
        self.pages.check_integrity(self._running)
        slots = sorted([*self._free_slots, *(s.slot for s in self._running if s.slot is not None)])
        require(slots == list(range(self.config.max_running)), "slots are lost or given out twice")

    def quarantine_leaks(self) -> int:
        """Quarantine pages without an owner, and return their number (0 unless there is a bug). Only while idle."""
        assert not self._running
        return self.pages.quarantine_leaks()
