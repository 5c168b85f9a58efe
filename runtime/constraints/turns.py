"""GrammarWork that may take long, done on other threads in turns with the engine's steps.

The engine's thread gives a turn, waits at most until its end, and goes on. At the end of its turn, a thread stops at
its next check of the deadline (grammar/deadline.py). There it keeps all that it has worked out, until its next turn. So
the time of a step is bounded, although nobody knows beforehand how long a work takes. If the threads ran beside the
steps instead, each operation of a step that releases the interpreter's lock would wait to get it back.

New works come first, each with a turn of its own. The unfinished ones share what is left of the time, and those that
had the least time come first. So a work that takes long delays no short one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from ramet.grammar.deadline import OutOfTime, in_turns, time_limit

_FIRST_TURN_S = 0.001
_LEAST_S = 0.0005  # of unfinished works, in each round
_LIMIT_S = 5.0  # of one work, of its thread's own time
_MAX_THREADS = 64


@dataclass(slots=True, eq=False)
class GrammarWork:
    """A piece of work. Works of one owner are done one after the other. finish: for the engine's thread, once the work
    is done; it gets the work, so that the two do not refer to each other. Then all that a work holds is freed at its
    end, and not by the garbage collector at any time on any thread. error: set if `do` raised.
    """

    owner: Hashable
    do: Callable[[], None]
    finish: Callable[[GrammarWork], None] = lambda _: None
    is_cancelled: bool = False
    error: Exception | None = None

    def cancel(self) -> None:
        """End the work early: at its next turn, it raises OutOfTime."""
        self.is_cancelled = True


class Turns:
    """The works of one engine. All methods are for the engine's thread."""

    def __init__(self) -> None:
        self._new: deque[GrammarWork] = deque()
        self._unfinished: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._done: deque[GrammarWork] = deque()  # filled by the workers
        self._busy: Counter[Hashable] = Counter()  # owners of works that a worker has

    @property
    def has_work(self) -> bool:
        return bool(self._new or self._unfinished or self._done)

    def is_busy(self, owner: Hashable) -> bool:
        """True if a work of this owner is not done."""
        return self._busy[owner] > 0 or any(work.owner == owner for work in self._new)

    def add(self, work: GrammarWork) -> None:
        """Begin a work in the next round."""
        self._new.append(work)

    def give(self, seconds: float, *, to_unfinished: bool = True) -> list[GrammarWork]:
        """Let works go on for about `seconds`, and return those that are done.

        to_unfinished: also those that have had a turn. They get a little time even if there is none left.
        """
        done: list[GrammarWork] = []
        if not self.has_work:
            return done
        end = time.monotonic() + seconds
        self._begin(end, done)
        if to_unfinished and self._unfinished:
            self._go_on(max(end, time.monotonic() + _LEAST_S))
        self._collect(done)
        return done

    def close(self) -> None:
        """End all threads. Unfinished works are dropped."""
        for worker in (*self._idle, *self._unfinished):
            worker.close()
        self._new.clear()
        self._idle, self._unfinished = [], []

    def _begin(self, end: float, done: list[GrammarWork]) -> None:
        """Give each new work its first turn, until `end`."""
        while self._new and time.monotonic() < end:
            works = self._startable()
            if not works:
                return
            worker = self._idle.pop() if self._idle else _Worker(self._done)
            self._busy.update(work.owner for work in works)
            worker.begin(works, end)
            for work in reversed(worker.take_back()):
                self._new.appendleft(work)
                self._release(work)
            (self._idle if worker.is_idle else self._unfinished).append(worker)
            self._collect(done)

    def _startable(self) -> list[GrammarWork]:
        """Take the new works that need not wait for another work of their owner, or for a thread."""
        if not self._idle and len(self._unfinished) >= _MAX_THREADS:
            return []
        works = [work for work in self._new if not self._busy[work.owner]]
        if len(works) == len(self._new):
            self._new.clear()
        else:
            chosen = set(works)
            self._new = deque(work for work in self._new if work not in chosen)
        return works

    def _go_on(self, end: float) -> None:
        """Give turns to unfinished works until `end`."""
        for worker in sorted(self._unfinished, key=_Worker.rank):
            if time.monotonic() >= end:
                return
            worker.go_on(end)
            if worker.is_idle:
                self._unfinished.remove(worker)
                self._idle.append(worker)

    def _collect(self, done: list[GrammarWork]) -> None:
        while self._done:
            work = self._done.popleft()
            self._release(work)
            done.append(work)

    def _release(self, work: GrammarWork) -> None:
        self._busy[work.owner] -= 1
        if not self._busy[work.owner]:
            del self._busy[work.owner]


class _Worker:
    """A thread that works only in its turns. Its methods, but for those of the thread itself, are for the engine's
    thread.
    """

    def __init__(self, done: deque[GrammarWork]) -> None:
        self._done = done
        self._works: deque[GrammarWork] = deque()
        self._current: GrammarWork | None = None
        self._used_s = 0.0  # by the current work
        self._round_ends = self._turn_ends = 0.0
        self._is_running = False  # it was given a turn, and has not come back yet
        self._is_closed = False
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        threading.Thread(target=self._run, name="ramet-grammar", daemon=True).start()

    @property
    def is_idle(self) -> bool:
        """True if the thread waits for new works."""
        return not self._is_running and self._current is None

    def rank(self) -> tuple[bool, float]:
        """Return a smaller value for a worker that should go on earlier."""
        work = self._current
        return work is not None and not work.is_cancelled, self._used_s

    def begin(self, works: list[GrammarWork], end: float) -> None:
        """Do these works until `end`. The worker is idle."""
        self._works.extend(works)
        self._used_s = 0.0
        self._turn(end)

    def take_back(self) -> list[GrammarWork]:
        """Return the works that are not begun."""
        works: list[GrammarWork] = []
        try:
            while True:
                works.append(self._works.popleft())  # the thread may take some meanwhile
        except IndexError:
            return works

    def go_on(self, end: float) -> None:
        """Go on with the unfinished work until `end`."""
        if self._is_running and self._back.acquire(blocking=False):
            self._is_running = False
        if not self.is_idle:
            self._turn_ends = end
            self._turn(end)

    def close(self) -> None:
        """Let the thread end."""
        self._is_closed = True
        with contextlib.suppress(RuntimeError):  # a turn was given that the thread has not begun yet
            self._go.release()

    def _turn(self, end: float) -> None:
        begin = time.monotonic()
        self._round_ends = end
        if not self._is_running:
            self._is_running = True
            self._go.release()
        self._is_running = not self._back.acquire(timeout=max(end - begin, 0.0))
        self._used_s += time.monotonic() - begin

    # --- the thread

    def _run(self) -> None:
        with in_turns(self._wait):
            self._go.acquire()
            while not self._is_closed:
                self._do_works()
                if self._is_closed:
                    return
                self._back.release()
                self._go.acquire()

    def _do_works(self) -> None:
        while time.monotonic() < self._round_ends:
            try:
                work = self._current = self._works.popleft()
            except IndexError:
                return
            self._turn_ends = min(self._round_ends, time.monotonic() + _FIRST_TURN_S)
            try:
                with time_limit(_LIMIT_S, "the grammar's work for one token"):
                    work.do()
            except Exception as error:  # it ends only the request that the work is for
                work.error = error
            self._current = None
            self._done.append(work)

    def _wait(self) -> float:
        """Return when this turn ends. If it has ended, wait for the next one."""
        while not self._is_closed and not (self._current is not None and self._current.is_cancelled):
            if time.monotonic() < self._turn_ends:
                return self._turn_ends
            self._back.release()
            self._go.acquire()
        raise OutOfTime("the request was ended while its grammar worked")
