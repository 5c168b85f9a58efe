"""An engine around a scheduler without a model, for tests and simulations of scheduling.

A token is a pure function of the path before it, and pages hold hashes of paths. Every position that a step reads must
hold the hash of the reader's own path; otherwise an assertion fails. With `overlap`, a step is collected after the next
one is launched, or before that is scheduled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ramet.runtime.cache.page_pool import PagePool
from ramet.runtime.cache.radix_cache import RadixCache
from ramet.runtime.scheduling.config import SchedulerConfig
from ramet.runtime.scheduling.scheduler import Scheduler
from ramet.runtime.types import Batch, FinishReason, Request, RowOutput, SamplingParams, ScheduledSequence, Sequence

VOCAB = 50
STOP = 0


def token_after(path_hash: int) -> int:
    return (path_hash >> 7) % VOCAB


def path_hashes(salt: str, tokens: list[int]) -> list[int]:
    value, hashes = hash(("root", salt)), []
    for token in tokens:
        value = hash((value, token))
        hashes.append(value)
    return hashes


def expected_output(request: Request) -> list[int]:
    """Return the tokens that the simulated model generates for a request."""
    value = path_hashes(request.cache_salt, request.prompt_ids.tolist())[-1]
    output: list[int] = []
    while len(output) < request.max_tokens:
        token = token_after(value)
        output.append(token)
        value = hash((value, token))
        if token in request.stop_ids:
            break
    return output


def sequences_of(batch: Batch) -> list[Sequence]:
    return [item.sequence for item in batch.items]


@dataclass(slots=True)
class Slot:
    """The device's view of a slot: its sequence, its whole path, and its page table row."""

    sequence: Sequence
    path: list[int]
    page_ids: list[int]


@dataclass
class SimulatedEngine:
    """Drives a scheduler. `burst`: number of tokens that a sampling row yields if no later step of it is launched.

    draft: returns tokens that may follow a sequence's known ones. collects_first: with `overlap`, whether a step is
    collected before the next one is scheduled, as one with drafts always is.

    step_s: the seconds that a step takes, which the scheduler is told; None: it is told nothing. `times`: all of them.
    """

    scheduler: Scheduler
    overlap: bool = False
    burst: int = 1
    draft: Callable[[Sequence], list[int]] = lambda sequence: []
    collects_first: Callable[[], bool] = lambda: False
    step_s: Callable[[Batch], float] | None = None
    times: list[tuple[Batch, float]] = field(default_factory=list)
    content: dict[tuple[int, int], int] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)
    scores: dict[Sequence, list[int]] = field(default_factory=dict)
    finished: list[Sequence] = field(default_factory=list)
    launched: tuple[Batch, list[RowOutput]] | None = None
    num_computed_tokens: int = 0

    @property
    def page_size(self) -> int:
        return self.scheduler.pool.page_size

    def step(self) -> bool:
        """Schedule, launch and collect once. Returns False if there was nothing to do."""
        scheduler, running = self.scheduler, self.launched
        if running is not None and (self.collects_first() or any(s.draft_ids for s in sequences_of(running[0]))):
            self.drain()
        is_free = self.launched is None
        drafted = [s for s in scheduler.draftable() if is_free or s in scheduler.held]
        batch = scheduler.schedule({sequence: self.draft(sequence) for sequence in drafted})
        self.scheduler.check_integrity()
        launched = None if batch is None else (batch, self.launch(batch))
        if self.overlap:
            self.launched, launched = launched, self.launched
        if launched is not None:
            self.collect(*launched)
        return batch is not None or launched is not None or running is not None

    def drain(self) -> None:
        if self.launched is not None:
            self.collect(*self.launched)
            self.launched = None

    def run(self, max_steps: int = 10_000) -> int:
        for num_steps in range(max_steps):
            if not self.scheduler.has_work and self.launched is None:
                return num_steps
            assert self.step(), "work is left, and nothing runs"
        raise AssertionError("the scheduler does not come to an end")

    def collect(self, batch: Batch, outputs: list[RowOutput]) -> None:
        if self.step_s is not None:
            self.times.append((batch, self.step_s(batch)))
            self.scheduler.note_time(*self.times[-1])
        changed = self.scheduler.finish_step(batch.items, outputs)
        self.scheduler.check_integrity()
        self.finished += [sequence for sequence in changed if sequence.is_finished]

    def launch(self, batch: Batch) -> list[RowOutput]:
        size = self.page_size
        assert batch.num_tokens == sum(item.num_tokens for item in batch.items)
        assert batch.num_tokens <= self.scheduler.config.max_num_tokens_per_step
        assert all(item.num_tokens == item.num_samples == 1 for item in batch.items[: batch.num_decode])
        assert len({item.sequence for item in batch.items}) == len(batch.items)
        assert all(item.num_tokens >= 1 for item in batch.items)
        for item in batch.items:
            assert item.sequence not in self.scheduler.held or item.sequence.num_in_flight <= 1, (
                "held, and two in flight"
            )
        targets = [copy.target for copy in batch.page_copies]
        assert len(set(targets)) == len(targets)
        assert not set(targets) & {copy.source for copy in batch.page_copies}, "copies of a step run at once"
        for copy in batch.page_copies:
            for offset in range(copy.num_tokens):
                self.content[copy.target, offset] = self.content[copy.source, offset]
        decodes = [index < batch.num_decode for index in range(len(batch.items))]
        paths = [self.path_of(*row) for row in zip(batch.items, decodes, strict=True)]
        hashes = [path_hashes(i.sequence.request.cache_salt, p) for i, p in zip(batch.items, paths, strict=True)]
        for item, values in zip(batch.items, hashes, strict=True):
            self.check_read(item.sequence, values[: item.start])
        for item, values in zip(batch.items, hashes, strict=True):
            for position in range(item.start, item.start + item.num_tokens):
                page = item.sequence.page_ids[position // size]
                assert page > 0
                self.content[page, position % size] = values[position]
        for item, values in zip(batch.items, hashes, strict=True):
            self.check_read(item.sequence, values)
        self.num_computed_tokens += batch.num_tokens
        return [self.sample(*row) for row in zip(batch.items, paths, hashes, strict=True)]

    def check_read(self, sequence: Sequence, values: list[int]) -> None:
        size, page_ids = self.page_size, sequence.page_ids
        for position, value in enumerate(values):
            where = page_ids[position // size], position % size
            assert self.content.get(where) == value, f"{sequence.request.request_id} reads foreign KV at {position}"

    def path_of(self, item: ScheduledSequence, is_decode: bool) -> list[int]:
        """The tokens [0, start + num_tokens) of a row. Possibly only the device knows the last one."""
        sequence, stop = item.sequence, item.start + item.num_tokens
        assert sequence.slot is not None
        slot = self.slots.get(sequence.slot)
        if is_decode:
            assert slot is not None
            assert slot.sequence is sequence
        else:
            if slot is None or slot.sequence is not sequence or item.start == sequence.num_cached:
                slot = self.slots[sequence.slot] = Slot(sequence, [], [])
            slot.path = sequence.tokens(0, stop).tolist()
        assert sequence.page_ids[: len(slot.page_ids)] == slot.page_ids, "pages of a running sequence changed"
        slot.page_ids = list(sequence.page_ids)
        assert len(slot.path) == stop
        return list(slot.path)

    def sample(self, item: ScheduledSequence, path: list[int], values: list[int]) -> RowOutput:
        request = item.sequence.request
        if request.score_from is not None:
            assert not item.num_samples
            first, last = max(item.start + 1, request.score_from), item.start + item.num_tokens + 1
            scored = list(range(first, min(last, request.num_prompt)))
            self.scores.setdefault(item.sequence, []).extend(scored)
            return RowOutput(prompt_logprobs=np.zeros(len(scored), dtype=np.float32))
        if not item.num_samples:
            return RowOutput()
        drafts = item.sequence.draft_ids if item.num_samples > 1 else []
        assert len(drafts) == max(item.num_samples - 1, 0)
        known = len(path) - len(drafts)
        tokens = [token_after(value) for value in values[known - 1 :]]
        num_right = next((i for i, draft in enumerate(drafts) if draft != tokens[i] or draft in request.stop_ids), None)
        num_right = len(drafts) if num_right is None else num_right
        tokens, value = tokens[:num_right], values[known - 1 + num_right]
        is_alone = not self.overlap or item.sequence in self.scheduler.held
        for _ in range(self.burst if is_alone else 1):
            tokens.append(token_after(value))
            value = hash((value, tokens[-1]))
        assert item.sequence.slot is not None
        self.slots[item.sequence.slot].path[known:] = tokens
        return RowOutput(tuple(tokens))


def make_simulation(
    *,
    num_pages: int = 64,
    page_size: int = 4,
    overlap: bool = False,
    clock: list[float] | None = None,
    **config: object,
) -> SimulatedEngine:
    """Make an engine with small limits. `clock[0]` is the time in seconds."""
    time = clock if clock is not None else [0.0]
    values = {"context_length": 4096, "max_running": 8, "max_num_tokens_per_step": 16, **config}
    pool = PagePool(num_pages, page_size)
    scheduler = Scheduler(SchedulerConfig(**values), pool, RadixCache(pool), lambda: time[0])  # type: ignore[arg-type]
    return SimulatedEngine(scheduler, overlap)


def make_request(
    request_id: str,
    prompt: list[int] | range,
    max_tokens: int = 4,
    *,
    stop_ids: tuple[int, ...] = (),
    cache_salt: str = "",
    program_id: str | None = None,
    owner: str = "",
    task: str = "",
    priority: int = 0,
    deadline_s: float | None = None,
    score_from: int | None = None,
) -> Request:
    return Request(
        request_id,
        np.asarray(list(prompt), dtype=np.int32),
        SamplingParams(),
        max_tokens,
        stop_ids=frozenset(stop_ids),
        cache_salt=cache_salt,
        program_id=program_id,
        owner=owner,
        task=task,
        priority=priority,
        deadline_s=deadline_s,
        score_from=score_from,
    )


def assert_idle_and_whole(engine: SimulatedEngine) -> None:
    """Assert that nothing runs or waits, and that every page is free or cached."""
    scheduler = engine.scheduler
    scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.pool.num_free + scheduler.cache.num_cached_pages == scheduler.pool.num_total
    assert scheduler.cache.num_evictable_pages == scheduler.cache.num_cached_pages
    assert scheduler.pool.num_quarantined == 0
    assert scheduler.quarantine_leaks() == 0


def assert_output_is_right(sequence: Sequence) -> None:
    """Assert that a finished sequence has the model's output, or the beginning of it if it was cut off."""
    expected = expected_output(sequence.request)
    if sequence.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
        assert sequence.output_ids == expected[: len(sequence.output_ids)]
    elif sequence.request.score_from is None:
        assert sequence.output_ids == expected
