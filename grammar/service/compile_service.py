"""Compiles grammars outside the step loop: worker threads that take turns, limits on time, states and memory, caches.

Compiling is Python code, so threads that compile share one interpreter with each other and with the engine's steps.
Therefore one job has the turn at a time, and which one is a question of fairness (`fair_queue`): a job is held at its
next look at its time limit (`deadline.check`, about every millisecond) as soon as a shorter one arrives. There, it also
lets the engine's thread have the interpreter. A job that looks too seldom is not waited for: others work beside it.

A job that passes its time or memory limit ends with GrammarTooLarge, which names the part that was being compiled. The
time is its thread's own, so neither other jobs nor a busy machine count. A worker whose job is given up stops at the
next look, is interrupted if it does not, and is replaced if it does not react to that (in a long call into compiled
code). Grammars are kept by (source, options, vocabulary). Those that were asked for once are dropped first, then the
least recently used. Regular grammars are also kept on disk.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import json
import logging
import queue
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from ramet.errors import EngineStopped, GrammarError, GrammarTooLarge, Overloaded, RametError
from ramet.grammar import ir
from ramet.grammar.deadline import OutOfTime, Turn, in_turns, time_limit
from ramet.grammar.json_schema.algebra.expressions import Expressions
from ramet.grammar.json_schema.schema.document import SchemaNode
from ramet.grammar.machine.automaton import Limits
from ramet.grammar.machine.compiled_grammar import CompiledGrammar
from ramet.grammar.machine.vocabulary import Vocabulary
from ramet.grammar.regular.languages import RegularCompiler
from ramet.grammar.service.cost import expected_s
from ramet.grammar.service.disk_cache import DiskCache, default_cache_dir
from ramet.grammar.service.fair_queue import BUDGETS_S, Client, FairQueue, Ticket
from ramet.grammar.service.sources import Parsed, compile_parsed, parse_source
from ramet.grammar.service.warm_up import load_loops
from ramet.grammar.tools.text_with_values import TextWithValues

logger = logging.getLogger(__name__)

_TURN_S = 0.025  # what a job has before it is asked again who is due
_TICK_S = 0.01
_PATIENCE_S = 0.05  # how long a job that was asked to pause, or to stop, is waited for
_INTERRUPT_S = 0.25  # of its own time, between interrupts of a worker that does not stop
_GRACE_S = 2.0
_START_S = 300.0  # a worker that has not loaded the loops after this time does not count any more
_LOOK_S = 0.001  # between the moments at which a job may be held
_NAP_S = 1e-6  # the system makes it about 60 us; a thread that waits for the interpreter gets it meanwhile
_SLACK_S = 0.2  # added to a time limit: the compilation's own comes first, and its message says more
_SHARE = 4  # a job whose turns last longer than this times its processor time does not keep its level, either
_SHARE_OF_ONCE = 1 / 8  # of the cache's bytes, for what was asked for once
_MOST_WALL = 10.0  # times the limit that a job's turns may last by the wall clock, if its thread uses no processor time


Finish = Callable[[CompiledGrammar], object]


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Limits on the cost of compiling, and of the caches.

    max_time_s: of one job, in its thread's own time. max_memory_bytes: growth of the whole process during a job's
    turns; None: not watched. max_waiting: jobs that may wait; one more is refused with Overloaded. max_cache_bytes:
    tables and masks of the grammars in memory. cache_dir: None keeps nothing on disk. min_disk_time_s: only what took
    at least this long is kept on disk.
    """

    limits: Limits = field(default_factory=Limits)
    max_time_s: float = 10.0
    max_memory_bytes: int | None = 4 << 30
    max_waiting: int = 256
    max_grammars: int = 512
    max_cache_bytes: int = 1 << 28
    cache_dir: Path | None = field(default_factory=default_cache_dir)
    min_disk_time_s: float = 0.05


@dataclass(slots=True, eq=False, kw_only=True)
class _Job(Ticket):
    """One source that is being compiled for all who asked for it. Owned by the service, under its lock."""

    key: tuple[str, str]
    kind: str
    source: Any
    options: dict[str, Any]
    vocabulary: Vocabulary
    parsed: Parsed | None
    waiting: list[Future[CompiledGrammar]] = field(default_factory=list)
    is_done: bool = False  # answered: by its worker's result, or because it was given up


@dataclass(slots=True, eq=False)
class _Attempt:
    """One worker's work on a job. The worker alone writes `is_paused`, the supervisor the other fields.

    `may_run`: it has the turn. `since_s`: when it got or lost the turn, or was dropped. `is_aged`: its turn is one of
    those that others do not shorten. `active_s`, `grown_bytes`: of its earlier turns. `is_dropped`: its result is not
    wanted.
    """

    job: _Job
    cpu_at_start: float
    may_run: bool = False
    since_s: float = 0.0
    is_aged: bool = False
    is_dropped: bool = False
    charged_s: float = 0.0
    active_s: float = 0.0
    grown_bytes: int = 0
    memory_at_turn: int = 0
    is_paused: bool = True

    def begin_turn(self, now: float, is_aged: bool) -> None:
        self.may_run, self.since_s, self.is_aged = True, now, is_aged
        self.memory_at_turn = _resident_bytes()

    def end_turn(self, now: float) -> None:
        self.active_s, self.grown_bytes = self.turns_s(now), self.grown(_resident_bytes())
        self.may_run, self.since_s, self.memory_at_turn = False, now, _resident_bytes()

    def turns_s(self, now: float) -> float:
        """Return the seconds of its turns so far."""
        return self.active_s + (now - self.since_s if not self.is_paused else 0.0)

    def grown(self, resident_bytes: int) -> int:
        """Return by how much the process grew during its turns, of which one goes on."""
        return self.grown_bytes + max(0, resident_bytes - self.memory_at_turn)


class _Interrupted(BaseException):
    """Raised in a worker whose attempt is not wanted any more."""


class CompileService:
    """Compiles constraints on its own threads. Thread-safe. `close` it, or use it in a `with` statement.

    A supervisor assigns jobs to workers, gives them their turns, and watches the limits. Each level of the queue has at
    most one job in hand. Workers take no lock of the service: an interrupt may come between any two bytecodes, and must
    not find a worker that holds a lock.
    """

    def __init__(self, config: ServiceConfig | None = None, finish: Finish | None = None) -> None:
        """finish: what else is done with each grammar before it is given out, in its job's turns and half of its time.

        If that takes longer, the grammar is given out as it is.
        """
        self.config = config or ServiceConfig()
        self._finish_grammar = finish
        self.disk = None if self.config.cache_dir is None else DiskCache(self.config.cache_dir)
        self._lock = threading.Lock()
        self._news: queue.SimpleQueue[_News | None] = queue.SimpleQueue()  # None: check again
        self._jobs: dict[tuple[str, str], _Job] = {}
        self._queue: FairQueue[_Job] = FairQueue(self.config.max_waiting)
        self._in_hand: dict[int, _Worker] = {}
        self._cache: OrderedDict[tuple[str, str], CompiledGrammar | GrammarError] = OrderedDict()
        self._asked_again: set[tuple[str, str]] = set()  # those in the cache that were taken from it
        self._parsed: OrderedDict[str, Parsed] = OrderedDict()
        self._workers: list[_Worker] = []
        self._supervisor: threading.Thread | None = None
        self._is_closed = False
        self._is_abandoned = False

    def submit(
        self, kind: str, source: Any, vocabulary: Vocabulary, *, client: Client = (), **options: Any
    ) -> Future[CompiledGrammar]:
        """Return the future of a grammar at once. Kinds, sources and options are those of `compile_constraint`.

        `client`: who asks; what is asked for several is done once. The future raises GrammarError and its subclasses,
        and Overloaded if too many jobs wait. If it is cancelled and nobody else waits for the job, the job is given up.
        """
        text = source_text(kind, source)
        key = (_digest(kind, text, options), vocabulary.key)
        future: Future[CompiledGrammar] = Future()
        with self._lock:
            if self._is_closed:
                raise EngineStopped("the compile service is closed")
            answer: CompiledGrammar | RametError | None = self._cache.get(key)
            job = self._jobs.get(key)
            if answer is not None:
                self._cache.move_to_end(key)
                self._asked_again.add(key)
            elif job is None and self._queue.room(client) < 1:
                answer = self._refusal()
            elif job is None:
                job = self._jobs[key] = _Job(
                    clients=[client],
                    expected_s=expected_s(kind, text),
                    key=key,
                    kind=kind,
                    source=source,
                    options=options,
                    vocabulary=vocabulary,
                    parsed=self._parsed.get(key[0]),
                    waiting=[future],
                )
                self._queue.push(job)
                self._start_supervisor()
                self._news.put(None)
            else:
                job.waiting.append(future)
                self._queue.join(job, client)
        if job is None or answer is not None:
            assert answer is not None
            _answer(future, answer)
            return future
        wanted = job
        future.add_done_callback(lambda done: self._forget(wanted, done))
        return future

    def compile(
        self, kind: str, source: Any, vocabulary: Vocabulary, *, client: Client = (), **options: Any
    ) -> CompiledGrammar:
        """Do as `submit`, and wait for the result."""
        return self.submit(kind, source, vocabulary, client=client, **options).result()

    def close(self) -> None:
        """Give up all jobs (their futures raise EngineStopped) and end the threads. Waits 2 s for them at most."""
        self._end()
        end_s = time.monotonic() + _GRACE_S
        with self._lock:
            threads = [self._supervisor, *(worker.thread for worker in self._workers)]
        for thread in threads:
            if thread is not None:
                thread.join(max(0.0, end_s - time.monotonic()))

    def abandon(self) -> None:
        """Do as `close`, but wait for nothing and take no lock. For finalizers, which interrupt any thread anywhere."""
        self._is_abandoned = True
        self._news.put(None)

    def _end(self) -> None:
        with self._lock:
            self._is_closed = True
            error = EngineStopped("the compile service was closed")
            answers = [a for job in list(self._jobs.values()) for a in self._give_up(job, error)]
            for worker in self._workers:
                worker.stop()
        atexit.unregister(self.close)
        _answer_all(answers)
        self._news.put(None)

    def _start_supervisor(self) -> None:
        if self._supervisor is None:
            atexit.register(self.close)  # a thread killed in compiled code aborts the process
            self._supervisor = threading.Thread(target=self._supervise, name="ramet-compile", daemon=True)
            self._supervisor.start()

    def _refusal(self) -> Overloaded:
        retry_s = min(60.0, max(1.0, 0.1 * len(self._queue)))
        return Overloaded(
            f"{len(self._queue):,} constraints wait to be compiled, and the limit is {self.config.max_waiting:,} "
            f"for all, less for one client; retry in {retry_s:.0f} s",
            retry_s,
        )

    def __enter__(self) -> CompileService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- jobs

    def _forget(self, job: _Job, future: Future[CompiledGrammar]) -> None:
        if not future.cancelled():
            return
        with self._lock:
            is_waiting = future in job.waiting
            if is_waiting:
                job.waiting.remove(future)
            if not job.waiting and not job.is_done:
                self._give_up(job, _Interrupted())
        if is_waiting:
            future.set_running_or_notify_cancel()  # else `concurrent.futures.wait` would wait for it for ever

    def _give_up(self, job: _Job, error: BaseException) -> list[_Answer]:
        """Answer those who wait with an error, and drop the job wherever it is."""
        self._queue.remove(job)
        worker = self._in_hand.get(job.level)
        if worker is not None and worker.attempt is not None and worker.attempt.job is job:
            self._drop(worker)
        return self._finish(job, error)

    def _finish(self, job: _Job, result: CompiledGrammar | BaseException) -> list[_Answer]:
        """Mark a job as done. The caller gives the answers after it has released the lock."""
        job.is_done = True
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
        waiting, job.waiting = job.waiting, []
        return [(future, result) for future in waiting]

    def _supervise(self) -> None:
        """Give turns, take results, watch the limits. Sleeps while nothing happens."""
        closed_s: float | None = None
        while True:
            if self._is_abandoned:
                self._end()
            now = time.monotonic()
            with self._lock:
                answers = self._look_after_workers(now)
                if self._is_closed:
                    closed_s = now if closed_s is None else closed_s
                    if not self._workers or now >= closed_s + _GRACE_S:
                        return
                else:
                    self._raise_levels(now)
                    self._give_turns(now)
                is_idle = not self._jobs and all(w.is_idle for w in self._workers) and not self._is_closed
            _answer_all(answers)
            try:
                news = self._news.get(timeout=None if is_idle else _TICK_S)
            except queue.Empty:
                news = None
            if news is not None:
                with self._lock:
                    answers = self._take(*news)
                _answer_all(answers)

    # --- turns

    def _raise_levels(self, now: float) -> None:
        """Raise what has used its level's time. It keeps its work if the next level is free, and else begins anew.

        The levels' times grow by a factor of four, so what is lost is at most a third more than what the job takes.
        """
        for level, worker in sorted(self._in_hand.items(), reverse=True):
            attempt = worker.attempt
            if attempt is None or worker.is_idle:
                del self._in_hand[level]
            elif max(worker.used_s(now), attempt.turns_s(now) / _SHARE) >= BUDGETS_S[level]:
                job = attempt.job
                if level + 1 not in self._in_hand and self._queue.first(level + 1) is None:
                    self._in_hand[level + 1] = self._in_hand.pop(level)
                    job.level = level + 1
                    continue
                self._drop(worker)
                job.level = level + 1
                if not job.is_done:
                    self._queue.push(job)

    def _give_turns(self, now: float) -> None:
        """Let one job work: that of the lowest level, unless another has waited too long."""
        active = [w for w in self._workers if w.is_active]
        ready = {
            level
            for level in range(len(BUDGETS_S))
            if (self._in_hand[level].is_held if level in self._in_hand else self._queue.first(level) is not None)
        }
        for worker in active:
            attempt = worker.attempt
            if attempt is None or not ready or not attempt.may_run:
                continue
            is_behind = min(ready) < attempt.job.level and not attempt.is_aged
            if is_behind or now >= attempt.since_s + _TURN_S:
                attempt.end_turn(now)
        if not ready or any(w.attempt.may_run or now < w.attempt.since_s + _PATIENCE_S for w in active if w.attempt):
            return
        idle = [w for w in self._workers if w.is_idle]
        if not idle:  # a new worker gets its first job once it is warm: the job's time begins then
            if all(w.is_warm for w in self._workers):
                self._workers.append(_Worker(self.config, self.disk, self._news, self._finish_grammar))
            ready &= self._in_hand.keys()
            if not ready:
                return
        level, is_aged = self._queue.next_level(ready)
        if level not in self._in_hand:
            job = self._queue.first(level)
            assert job is not None
            self._queue.remove(job)
            self._in_hand[level] = idle[0]
            idle[0].assign(job)
        self._in_hand[level].resume(now, is_aged=is_aged)

    def _drop(self, worker: _Worker) -> None:
        """Tell a worker that its attempt is not wanted any more."""
        attempt = worker.attempt
        assert attempt is not None
        if self._in_hand.get(attempt.job.level) is worker:
            del self._in_hand[attempt.job.level]
        worker.drop(time.monotonic())

    def _take(self, attempt: _Attempt, parsed: Parsed | None, result: CompiledGrammar | BaseException) -> list[_Answer]:
        """Take the result of an attempt from a worker."""
        job = attempt.job
        if parsed is not None and not isinstance(parsed, ir.Table):  # it is as large as its grammar, and on disk
            self._parsed[job.key[0]] = parsed
            while len(self._parsed) > self.config.max_grammars:
                self._parsed.popitem(last=False)
        if attempt.is_dropped or job.is_done:
            return []
        if isinstance(result, CompiledGrammar | GrammarError) and not isinstance(result, OutOfTime):
            self._keep(job.key, result)
        return self._finish(job, result)

    def _keep(self, key: tuple[str, str], result: CompiledGrammar | GrammarError) -> None:
        """Keep a result, and make room for it.

        Those that were asked for once make room first, and take a small part of it: who always asks for something new
        does not push out what others use.
        """
        if isinstance(result, GrammarError):
            result.with_traceback(None)
        self._cache[key] = result
        sizes = {kept: _bytes_of(grammar) for kept, grammar in self._cache.items()}
        once = [kept for kept in sizes if kept not in self._asked_again]
        most, total, of_once = self.config.max_cache_bytes, sum(sizes.values()), sum(sizes[kept] for kept in once)
        while len(once) > 1 and (
            len(sizes) > self.config.max_grammars or total > most or of_once > most * _SHARE_OF_ONCE
        ):
            of_once -= sizes[once[0]]
            total -= self._drop_kept(once.pop(0), sizes)
        while len(sizes) > 1 and (len(sizes) > self.config.max_grammars or total > most):
            total -= self._drop_kept(next(iter(sizes)), sizes)

    def _drop_kept(self, key: tuple[str, str], sizes: dict[tuple[str, str], int]) -> int:
        """Forget a kept result. Returns its size."""
        del self._cache[key]
        self._asked_again.discard(key)
        return sizes.pop(key)

    # --- limits

    def _look_after_workers(self, now: float) -> list[_Answer]:
        """End the jobs that have passed a limit, interrupt the workers that do not stop, and let go of lost ones."""
        answers: list[_Answer] = []
        for worker in list(self._workers):
            attempt = worker.attempt
            if not worker.thread.is_alive() or worker.is_lost(now):
                self._workers.remove(worker)
                if attempt is not None and not worker.is_idle and not attempt.is_dropped:
                    self._drop(worker)
                    answers += self._finish(attempt.job, EngineStopped("the thread that compiled the constraint ended"))
            elif not worker.is_warm:
                if now >= worker.started_s + _START_S and not any(w.is_warm for w in self._workers):
                    error = EngineStopped(f"the grammars' loops could not be loaded within {_START_S:.0f} s")
                    answers += [a for job in list(self._jobs.values()) for a in self._give_up(job, error)]
            elif attempt is not None and not worker.is_idle:
                used = worker.used_s(now)
                self._queue.charge(attempt.job, max(0.0, used - attempt.charged_s), now)
                attempt.charged_s = used
                if attempt.is_dropped:
                    worker.insist(now)
                elif worker.is_active and not attempt.job.is_done:
                    answers += self._check_limits(worker, attempt, now)
        return answers

    def _check_limits(self, worker: _Worker, attempt: _Attempt, now: float) -> list[_Answer]:
        job, limit = attempt.job, self.config.max_memory_bytes
        seconds = self.config.max_time_s + _SLACK_S
        if worker.used_s(now) >= seconds or attempt.turns_s(now) >= _MOST_WALL * seconds:
            what = f"took longer than {self.config.max_time_s:g} s"
        elif limit is not None and attempt.grown(_resident_bytes()) > limit:
            what = f"took more than {limit:,} bytes of memory"
        else:
            return []
        where = _whereabouts(sys._current_frames().get(worker.thread.ident or 0))
        message = f"compiling the {job.kind} constraint {_short(job.source)} {what}{where}"
        return self._give_up(job, GrammarTooLarge(f"{message}; simplify it or raise the limit"))


_Answer = tuple[Future[CompiledGrammar], CompiledGrammar | BaseException]
_News = tuple[_Attempt, Parsed | None, CompiledGrammar | BaseException]


class _Worker:
    """One thread. The supervisor alone writes `attempt`, the thread alone writes `finished`: an interrupt loses
    neither.
    """

    def __init__(
        self,
        config: ServiceConfig,
        disk: DiskCache | None,
        news: queue.SimpleQueue[_News | None],
        finish: Finish | None,
    ) -> None:
        self.finish = finish
        self.limits = replace(config.limits, max_time_s=min(config.limits.max_time_s, config.max_time_s))
        self.min_disk_time_s = config.min_disk_time_s
        self.disk = disk
        self.news = news
        self.attempt: _Attempt | None = None
        self.finished: _Attempt | None = None
        self.num_interrupts = 0
        self._insisted = (0.0, 0.0)  # when it was last told to drop its attempt, and its processor time then
        self.started_s = time.monotonic()
        self.is_warm = False
        self._is_stopped = False
        self._clock: int | None = None  # of the thread's processor time
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._main, name="ramet-compile-worker", daemon=True)
        self.thread.start()

    # --- the supervisor's side

    @property
    def is_idle(self) -> bool:
        return self.is_warm and self.attempt is self.finished

    @property
    def is_held(self) -> bool:
        """True if it has an attempt that waits for a turn."""
        attempt = self.attempt
        return attempt is not None and not self.is_idle and attempt.is_paused and not attempt.may_run

    @property
    def is_active(self) -> bool:
        """True if it works, though it may have been asked to pause or to stop."""
        attempt = self.attempt
        return attempt is not None and not self.is_idle and (attempt.may_run or not attempt.is_paused)

    def used_s(self, now: float) -> float:
        """Return the processor time of the attempt; the time of its turns where the system does not tell it."""
        attempt = self.attempt
        if attempt is None:
            return 0.0
        return attempt.turns_s(now) if self._clock is None else self._cpu_s() - attempt.cpu_at_start

    def _cpu_s(self) -> float:
        with contextlib.suppress(OSError):  # the thread has ended
            return 0.0 if self._clock is None else time.clock_gettime(self._clock)
        return 0.0

    def is_lost(self, now: float) -> bool:
        """Tell whether the worker was to drop its attempt and did not react (it ends by itself later)."""
        attempt = self.attempt
        if self.is_idle or attempt is None or not attempt.is_dropped or now < attempt.since_s + _GRACE_S:
            return False
        logger.warning("a compile worker does not answer and is replaced")
        self.stop()
        return True

    def assign(self, job: _Job) -> None:
        self.attempt = _Attempt(job, self._cpu_s())

    def resume(self, now: float, *, is_aged: bool) -> None:
        """Give the turn to the worker's attempt."""
        attempt = self.attempt
        assert attempt is not None
        attempt.begin_turn(now, is_aged)
        self._wake.put(None)

    def drop(self, now: float) -> None:
        """Tell the worker to stop its attempt."""
        attempt = self.attempt
        assert attempt is not None
        attempt.is_dropped, attempt.may_run, attempt.since_s = True, False, now
        self._insisted = (now, self._cpu_s())
        self._wake.put(None)

    def insist(self, now: float) -> None:
        """Interrupt a worker that works on, or sleeps, and does not drop its attempt. Again, if that was lost."""
        last_s, last_cpu_s = self._insisted
        if self._cpu_s() - last_cpu_s >= _INTERRUPT_S or now >= last_s + _SHARE * _INTERRUPT_S:
            self._insisted = (now, self._cpu_s())
            self.interrupt()

    def stop(self) -> None:
        self._is_stopped = True
        self._wake.put(None)

    def interrupt(self) -> None:
        """Throw _Interrupted into the thread. It takes effect between two bytecodes of the thread.

        A thread that is not warm has no job yet, and is left alone.
        """
        if not self.is_warm:
            return
        self.num_interrupts += 1
        ident = ctypes.c_ulong(self.thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Interrupted))

    # --- the thread's side

    def _main(self) -> None:
        if sys.platform == "linux":
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            load_loops()
        except BaseException:  # whatever it is, the worker may still do its jobs
            logger.exception("the grammars' loops could not be loaded ahead")
        while not self._is_stopped:
            try:
                self._loop()
            except _Interrupted:  # thrown while the previous one was handled
                continue

    def _loop(self) -> None:
        """Do the assigned jobs. An interrupt may come at any time. An unfinished job is begun again if it is still
        wanted.
        """
        self.is_warm = True
        self.news.put(None)
        while not self._is_stopped:
            try:
                attempt = self.attempt
                if attempt is None or attempt is self.finished:
                    self._wake.get()
                elif attempt.is_dropped or attempt.job.is_done:
                    self._end(attempt)
                elif attempt.may_run:
                    self._work(attempt)
                else:
                    self._hold(attempt)
            except _Interrupted:
                continue

    def _work(self, attempt: _Attempt) -> None:
        job = attempt.job
        parsed: Parsed | None = None
        num_interrupts = self.num_interrupts
        attempt.is_paused = False
        try:
            with in_turns(self._turn), time_limit(self.limits.max_time_s):
                parsed = job.parsed or self._parse(job)
                compiled = compile_parsed(parsed, job.vocabulary, limits=self.limits)
                compiled.mask(0)  # so that the first step waits for neither of them
                compiled.completion_bound(0)
                if self.finish is not None:
                    with contextlib.suppress(OutOfTime), time_limit(self.limits.max_time_s / 2):
                        self.finish(compiled)
            result: CompiledGrammar | BaseException = compiled
        except _Interrupted:
            raise
        except BaseException as error:  # any error must reach those who wait, and none may end the thread
            result = error
        # compiled code may lose an interrupt or turn it into another error: drop the result of an interrupted attempt
        if num_interrupts != self.num_interrupts:
            return
        self.news.put((attempt, parsed, result))
        if isinstance(parsed, TextWithValues) and isinstance(result, CompiledGrammar):
            _make_masks(result, parsed.often, self._turn)
        self._end(attempt)

    def _end(self, attempt: _Attempt) -> None:
        attempt.is_paused = True
        self.finished = attempt
        self.news.put(None)  # only now is the worker idle

    def _turn(self) -> float:
        """Let others have the interpreter: for a moment, or as long as the attempt does not have the turn.

        Returns the time (time.monotonic) of the next such moment. Raises: _Interrupted if the attempt is not wanted
        any more.
        """
        attempt = self.attempt
        assert attempt is not None
        if attempt.may_run:
            time.sleep(_NAP_S)
        else:
            self._hold(attempt)
            attempt.is_paused = False
        if attempt.is_dropped or self._is_stopped:
            raise _Interrupted
        return time.monotonic() + _LOOK_S

    def _hold(self, attempt: _Attempt) -> None:
        """Wait until the attempt gets a turn, or is dropped."""
        attempt.is_paused = True
        self.news.put(None)
        while not (attempt.may_run or attempt.is_dropped or self._is_stopped):
            self._wake.get()

    def _parse(self, job: _Job) -> Parsed:
        on_disk = self.disk if job.kind not in ("json_schema", "tools") else None
        found = None if on_disk is None else on_disk.get(job.key[0])
        if found is not None:
            return found
        begin = time.thread_time()
        parsed = parse_source(job.kind, job.source, limits=self.limits, **job.options)
        is_worth_it = time.thread_time() - begin >= self.min_disk_time_s
        if on_disk is not None and is_worth_it and isinstance(parsed, ir.Table):
            on_disk.put(job.key[0], parsed)
        return parsed


def source_text(kind: str, source: Any) -> str:
    """Return the text of a source. It is equal for equal sources: white space in JSON does not count."""
    if kind in ("json_schema", "choice", "tools"):
        if isinstance(source, str):
            # invalid JSON stays text; compiling reports the error
            with contextlib.suppress(ValueError, RecursionError):
                source = json.loads(source)
        try:
            source = json.dumps(source, separators=(",", ":"), ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            source = f"object {id(source)}"  # not JSON: equal only to itself
    return str(source)


def source_key(kind: str, source: Any, options: dict[str, Any]) -> str:
    """Return a digest that is equal for equal sources with equal options."""
    return _digest(kind, source_text(kind, source), options)


def _digest(kind: str, text: str, options: dict[str, Any]) -> str:
    content = json.dumps([kind, text, sorted(options.items())], default=repr)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _make_masks(grammar: CompiledGrammar, text: bytes, turn: Turn) -> None:
    """Make the masks along a text ahead. Most of the work is done without the interpreter's lock.

    Its turn ends between masks alone: others may wait for the grammar's own lock.
    """
    state: int | None = 0
    for byte in text:
        assert state is not None
        state = grammar.advance_bytes(state, bytes((byte,)))
        if state is None:
            return
        grammar.mask(state)
        turn()


def _answer_all(answers: list[_Answer]) -> None:
    """Set the futures. Call it without the lock: callbacks of futures may submit again."""
    for future, result in answers:
        _answer(future, result)


def _answer(future: Future[CompiledGrammar], result: CompiledGrammar | BaseException) -> None:
    """Set a future, which its owner may cancel at the same time."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)


def _whereabouts(frame: FrameType | None) -> str:
    """Return the part that a worker is compiling: a schema's pointer, or a terminal's name."""
    while frame is not None:
        for owner in (frame.f_locals.get("node"), frame.f_locals.get("self")):
            match owner:
                case SchemaNode(pointer=place) | Expressions(pointer=place):
                    return f", at {place or '/'}"
                case ir.Terminal(name=name) | RegularCompiler(name=name) if name:
                    return f", at {name}"
        frame = frame.f_back
    return ""


def _bytes_of(grammar: CompiledGrammar | GrammarError) -> int:
    return 0 if isinstance(grammar, GrammarError) else grammar.num_bytes


def _resident_bytes() -> int:
    """Return the resident memory of the process; 0 if the system does not tell."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096
    except OSError:
        return 0


def _short(source: Any) -> str:
    text = source if isinstance(source, str) else repr(source)
    return repr(text if len(text) <= 60 else text[:57] + "...")
