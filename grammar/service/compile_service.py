"""Compiles grammars outside the step loop: worker threads, limits on time, states and memory, and caches.

A job that passes its time or memory limit ends with GrammarTooLarge, which names the part that was being compiled. Its
worker is interrupted and takes the next job. A worker that does not react to the interrupt (in a long call into
compiled code) is replaced. Grammars are kept by (source, options, vocabulary), and the least recently used are dropped
first. Regular grammars are also kept on disk.
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
from collections import OrderedDict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from ramet.errors import EngineStopped, GrammarError, GrammarTooLarge
from ramet.grammar import ir
from ramet.grammar.deadline import OutOfTime, time_limit
from ramet.grammar.json_schema.algebra.expressions import Expressions
from ramet.grammar.json_schema.schema.document import SchemaNode
from ramet.grammar.machine.automaton import Limits
from ramet.grammar.machine.compiled_grammar import CompiledGrammar
from ramet.grammar.machine.vocabulary import Vocabulary
from ramet.grammar.regular.byte_language import ByteAutomaton
from ramet.grammar.regular.languages import RegularCompiler
from ramet.grammar.service.disk_cache import DiskCache, default_cache_dir
from ramet.grammar.service.sources import Parsed, compile_parsed, parse_source
from ramet.grammar.service.warm_up import load_loops
from ramet.grammar.tools.text_with_values import TextWithValues

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.05
_GRACE_S = 2.0
_SLACK_S = 0.2  # added to a deadline: the compilation's own time limit comes first, and its message says more


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Limits on the cost of compiling, and of the caches.

    max_time_s: of one job, from its start. max_memory_bytes: growth of the whole process while a job runs; None: not
    watched. max_cache_bytes: tables and masks of the grammars in memory. cache_dir: None keeps nothing on disk.
    min_disk_time_s: only what took at least this long is kept on disk.
    """

    num_workers: int = 1
    limits: Limits = field(default_factory=Limits)
    max_time_s: float = 10.0
    max_memory_bytes: int | None = 4 << 30
    max_grammars: int = 512
    max_cache_bytes: int = 1 << 30
    cache_dir: Path | None = field(default_factory=default_cache_dir)
    min_disk_time_s: float = 0.05


@dataclass(slots=True, eq=False)
class _Job:
    """One source that is being compiled for all who asked for it. Owned by the service, under its lock."""

    key: tuple[str, str]
    kind: str
    source: Any
    options: dict[str, Any]
    vocabulary: Vocabulary
    parsed: Parsed | None
    waiting: list[Future[CompiledGrammar]]
    is_done: bool = False  # answered: by its worker's result, or because it was given up
    is_given_up: bool = False
    deadline: float = 0.0
    memory_at_start: int = 0


class _Interrupted(BaseException):
    """Thrown into a worker whose job has already been answered."""


class CompileService:
    """Compiles constraints on its own threads. Thread-safe. `close` it, or use it in a `with` statement.

    A supervisor assigns jobs to workers and watches the limits. Workers take no lock of the service: an interrupt may
    come between any two bytecodes, and must not find a worker that holds a lock.
    """

    def __init__(self, config: ServiceConfig | None = None) -> None:
        self.config = config or ServiceConfig()
        self.disk = None if self.config.cache_dir is None else DiskCache(self.config.cache_dir)
        self._lock = threading.Lock()
        self._news: queue.SimpleQueue[_News | None] = queue.SimpleQueue()  # None: check again
        self._jobs: dict[tuple[str, str], _Job] = {}
        self._pending: deque[_Job] = deque()
        self._cache: OrderedDict[tuple[str, str], CompiledGrammar | GrammarError] = OrderedDict()
        self._parsed: OrderedDict[str, Parsed] = OrderedDict()
        self._workers: list[_Worker] = []
        self._supervisor: threading.Thread | None = None
        self._is_closed = False
        self._is_abandoned = False

    def submit(self, kind: str, source: Any, vocabulary: Vocabulary, **options: Any) -> Future[CompiledGrammar]:
        """Return the future of a grammar at once. Kinds, sources and options are those of `compile_constraint`.

        The future raises GrammarError and its subclasses. If it is cancelled and nobody else waits for the job, the job
        is given up.
        """
        key = (source_key(kind, source, options), vocabulary.key)
        future: Future[CompiledGrammar] = Future()
        with self._lock:
            if self._is_closed:
                raise EngineStopped("the compile service is closed")
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
                _answer(future, found)
                return future
            job = self._jobs.get(key)
            if job is None:
                job = _Job(key, kind, source, options, vocabulary, self._parsed.get(key[0]), [])
                self._jobs[key] = job
                self._pending.append(job)
                if self._supervisor is None:
                    atexit.register(self.close)  # a thread killed in compiled code aborts the process
                    self._supervisor = threading.Thread(target=self._supervise, name="ramet-compile", daemon=True)
                    self._supervisor.start()
                self._news.put(None)
            job.waiting.append(future)
        future.add_done_callback(lambda done: self._forget(job, done))
        return future

    def compile(self, kind: str, source: Any, vocabulary: Vocabulary, **options: Any) -> CompiledGrammar:
        """Do as `submit`, and wait for the result."""
        return self.submit(kind, source, vocabulary, **options).result()

    def close(self) -> None:
        """Give up all jobs (their futures raise EngineStopped) and end the threads."""
        self._end()
        for thread in (*(w.thread for w in self._workers), self._supervisor):
            if thread is not None:
                thread.join(_GRACE_S)

    def abandon(self) -> None:
        """Do as `close`, but wait for nothing and take no lock. For finalizers, which interrupt any thread anywhere."""
        self._is_abandoned = True
        self._news.put(None)

    def _end(self) -> None:
        with self._lock:
            self._is_closed = True
            jobs = list(self._jobs.values())
            answers = [a for job in jobs for a in self._give_up(job, EngineStopped("the compile service was closed"))]
            for worker in self._workers:
                worker.stop()
        atexit.unregister(self.close)
        _answer_all(answers)
        self._news.put(None)

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
        """Do as `_finish`, and take the job from the queue, or interrupt the worker that is busy with it."""
        job.is_given_up = True
        if job in self._pending:
            self._pending.remove(job)
        for worker in self._workers:
            if worker.assigned is job:
                worker.interrupt()
        return self._finish(job, error)

    def _finish(self, job: _Job, result: CompiledGrammar | BaseException) -> list[_Answer]:
        """Mark a job as done. The caller gives the answers after it has released the lock."""
        job.is_done = True
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
        waiting, job.waiting = job.waiting, []
        return [(future, result) for future in waiting]

    def _supervise(self) -> None:
        """Assign jobs, take results, watch the limits. Sleeps while nothing happens."""
        while True:
            if self._is_abandoned:
                self._end()
            with self._lock:
                if self._is_closed:
                    return
                self._hand_out()
                pause = self._pause()
            try:
                news = self._news.get(timeout=pause)
            except queue.Empty:
                news = None
            with self._lock:
                answers = [] if news is None else self._take(*news)
                answers += self._check_limits()
            _answer_all(answers)

    def _hand_out(self) -> None:
        for worker in [w for w in self._workers if w.is_lost(time.monotonic())]:
            self._workers.remove(worker)
            if worker.assigned is not None and not worker.assigned.is_done:
                self._pending.appendleft(worker.assigned)
        idle = [w for w in self._workers if w.is_idle]
        while self._pending and idle:
            job = self._pending.popleft()
            job.deadline = time.monotonic() + self.config.max_time_s + _SLACK_S
            job.memory_at_start = _resident_bytes()
            idle.pop(0).assign(job)
        # a new worker gets its first job once it is warm: the job's time begins then
        num_starting = sum(not w.is_warm for w in self._workers)
        num_more = min(len(self._pending) - num_starting, self.config.num_workers - len(self._workers))
        self._workers += [_Worker(self.config, self.disk, self._news) for _ in range(num_more)]

    def _pause(self) -> float | None:
        """Return the seconds until the next check if no news arrives; None: only news matter."""
        busy = [w.assigned for w in self._workers if not w.is_idle and w.assigned is not None]
        if not busy:
            return _INTERVAL_S if self._pending else None
        pause = min(job.deadline for job in busy) - time.monotonic()
        if self.config.max_memory_bytes is not None or self._pending or any(job.is_done for job in busy):
            pause = min(pause, _INTERVAL_S)
        return max(pause, _INTERVAL_S / 10)

    def _take(self, job: _Job, parsed: Parsed | None, result: CompiledGrammar | BaseException) -> list[_Answer]:
        """Take the result of a job from a worker."""
        if parsed is not None:
            self._parsed[job.key[0]] = parsed
            while len(self._parsed) > self.config.max_grammars:
                self._parsed.popitem(last=False)
        if job.is_done:
            return []
        if isinstance(result, CompiledGrammar | GrammarError) and not isinstance(result, OutOfTime):
            self._keep(job.key, result)
        return self._finish(job, result)

    def _keep(self, key: tuple[str, str], result: CompiledGrammar | GrammarError) -> None:
        if isinstance(result, GrammarError):
            result.with_traceback(None)
        self._cache[key] = result
        total = sum(_bytes_of(g) for g in self._cache.values())
        while len(self._cache) > 1 and (
            len(self._cache) > self.config.max_grammars or total > self.config.max_cache_bytes
        ):
            _, oldest = self._cache.popitem(last=False)
            total -= _bytes_of(oldest)

    def _check_limits(self) -> list[_Answer]:
        """End the jobs that have passed a limit."""
        out: list[_Answer] = []
        limit = self.config.max_memory_bytes
        now = time.monotonic()
        memory = 0 if limit is None else _resident_bytes()
        for worker in self._workers:
            job = worker.assigned
            if job is None or worker.is_idle:
                continue
            if job.is_done:
                if job.is_given_up and now >= worker.interrupted_at + _INTERVAL_S:
                    worker.interrupt()  # the last interrupt was lost in a callback that swallows exceptions
                continue
            if now >= job.deadline:
                what = f"took longer than {self.config.max_time_s:g} s"
            elif limit is not None and memory - job.memory_at_start > limit:
                what = f"took more than {limit:,} bytes of memory"
            else:
                continue
            where = _whereabouts(sys._current_frames().get(worker.thread.ident or 0))
            message = f"compiling the {job.kind} constraint {_short(job.source)} {what}{where}"
            out += self._give_up(job, GrammarTooLarge(f"{message}; simplify it or raise the limit"))
            job.deadline = now
        return out


_Answer = tuple[Future[CompiledGrammar], CompiledGrammar | BaseException]
_News = tuple[_Job, Parsed | None, CompiledGrammar | BaseException]


class _Worker:
    """One thread. The supervisor alone writes `assigned`, the thread alone writes `finished`: an interrupt loses
    neither.
    """

    def __init__(self, config: ServiceConfig, disk: DiskCache | None, news: queue.SimpleQueue[_News | None]) -> None:
        self.limits = replace(config.limits, max_time_s=min(config.limits.max_time_s, config.max_time_s))
        self.min_disk_time_s = config.min_disk_time_s
        self.disk = disk
        self.news = news
        self.assigned: _Job | None = None
        self.finished: _Job | None = None
        self.num_interrupts = 0
        self.interrupted_at = 0.0
        self.is_warm = False
        self._is_stopped = False
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._main, name="ramet-compile-worker", daemon=True)
        self.thread.start()

    @property
    def is_idle(self) -> bool:
        return self.is_warm and self.assigned is self.finished

    def is_lost(self, now: float) -> bool:
        """Tell whether the thread has ended, or was interrupted and did not react (it ends by itself later)."""
        job = self.assigned
        if not self.thread.is_alive():
            return True
        if self.is_idle or job is None or not job.is_done or now < job.deadline + _GRACE_S:
            return False
        logger.warning("a compile worker does not answer and is replaced")
        self.stop()
        return True

    def assign(self, job: _Job) -> None:
        self.assigned = job
        self._wake.put(None)

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
        self.interrupted_at = time.monotonic()
        ident = ctypes.c_ulong(self.thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Interrupted))

    def _main(self) -> None:
        try:
            load_loops()
        except Exception:  # the worker may still do its jobs
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
                job = self.assigned
                if job is None or job is self.finished:
                    self._wake.get()
                elif job.is_done:
                    self._report(job, None, _Interrupted())
                else:
                    self._work(job)
            except _Interrupted:
                continue

    def _work(self, job: _Job) -> None:
        parsed: Parsed | None = None
        num_interrupts = self.num_interrupts
        try:
            with time_limit(self.limits.max_time_s):
                parsed = job.parsed or self._parse(job)
                compiled = compile_parsed(parsed, job.vocabulary, limits=self.limits)
                compiled.mask(0)  # so that the first step waits for neither of them
                compiled.completion_bound(0)
            result: CompiledGrammar | BaseException = compiled
        except Exception as error:  # any error must reach those who wait
            result = error
        # compiled code may lose an interrupt or turn it into another error: drop the result of an interrupted job
        if num_interrupts == self.num_interrupts:
            self._report(job, parsed, result)
            if isinstance(parsed, TextWithValues) and isinstance(result, CompiledGrammar):
                _make_masks(result, parsed.often)

    def _report(self, job: _Job, parsed: Parsed | None, result: CompiledGrammar | BaseException) -> None:
        self.news.put((job, parsed, result))
        self.finished = job
        self.news.put(None)  # only now is the worker idle

    def _parse(self, job: _Job) -> Parsed:
        on_disk = self.disk if job.kind not in ("json_schema", "tools") else None
        found = None if on_disk is None else on_disk.get(job.key[0])
        if found is not None:
            return found
        begin = time.monotonic()
        parsed = parse_source(job.kind, job.source, limits=self.limits, **job.options)
        is_worth_it = time.monotonic() - begin >= self.min_disk_time_s
        if on_disk is not None and is_worth_it and isinstance(parsed, ByteAutomaton):
            on_disk.put(job.key[0], parsed)
        return parsed


def source_key(kind: str, source: Any, options: dict[str, Any]) -> str:
    """Return a digest that is equal for equal sources with equal options. White space in JSON does not count."""
    if kind in ("json_schema", "choice", "tools"):
        if isinstance(source, str):
            # invalid JSON stays text; compiling reports the error
            with contextlib.suppress(ValueError, RecursionError):
                source = json.loads(source)
        try:
            source = json.dumps(source, separators=(",", ":"), ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            source = f"object {id(source)}"  # not JSON: equal only to itself
    content = json.dumps([kind, str(source), sorted(options.items())], default=repr)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _make_masks(grammar: CompiledGrammar, text: bytes) -> None:
    """Make the masks along a text ahead. Most of the work is done without the interpreter's lock."""
    state: int | None = 0
    for byte in text:
        assert state is not None
        state = grammar.advance_bytes(state, bytes((byte,)))
        if state is None:
            return
        grammar.mask(state)


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
