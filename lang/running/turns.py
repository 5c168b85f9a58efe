"""Calls that take turns on one thread: while one waits for a value, the others go on.

`together` calls a function so. A call that waits has a stack of its own (a greenlet), so it may wait at any depth. Only
one of them runs at a time, so they need no locks, and a call that never waits costs little more than an ordinary one.
`Pause` is how code waits: it lets the other functions go on, or blocks the thread if there are none.
"""

from __future__ import annotations

import heapq
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import copy_context
from typing import Any, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from ramet.errors import InvalidProgram

T = TypeVar("T")


class Pause:
    """One wait of the code that runs here. `wake` may be called on any thread, before or during the wait."""

    __slots__ = ("_event", "_turns")

    def __init__(self) -> None:
        here = getcurrent()
        self._turns = here.turns if isinstance(here, _Stack) else None
        self._event = threading.Event() if self._turns is None else None

    def wake(self) -> None:
        """End the wait."""
        if self._event is not None:
            self._event.set()
        elif self._turns is not None:
            self._turns.wake(self)

    def wait(self, timeout_s: float | None, before: Callable[[], object]) -> bool:
        """Wait for `wake`; return False if the time runs out first.

        `before` is called before the thread blocks. If several functions gave an equal one, it is called once for all
        of them, also for those that have ended since.
        """
        if self._turns is not None:
            return self._turns.pause(self, timeout_s, before)
        assert self._event is not None
        before()
        woken = self._event.wait(timeout_s)
        self._event.clear()
        return woken


class _Stack(greenlet):
    """The stack of a function that waits, and of those that ended before it without a wait. `turns`: its group."""

    def __init__(self, turns: _Turns, run: Callable[[], None]) -> None:
        super().__init__(run)
        self.turns = turns
        self.gr_context = copy_context()


class _Turns:
    """The functions of one call of `together`. The code that calls it runs while all of them wait."""

    def __init__(self) -> None:
        self._caller = Pause()  # the wait of the code that called
        self._paused: dict[Pause, _Stack] = {}
        self._woken: deque[Pause] = deque()  # may also hold pauses that are over; other threads append
        self._limits: list[tuple[float, int, Pause]] = []  # a heap of (time, number, pause)
        self._before: dict[Callable[[], object], Pause] = {}  # with the last pause that gave it
        self._failing: Pause | None = None  # whose `before` runs

    def run(self, body: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> list[T]:
        results: dict[int, T] = {}
        left = enumerate(calls)
        is_taking = is_over = False  # the next arguments are being taken; no call begins any more

        def call() -> None:
            nonlocal is_taking, is_over
            while not is_over:  # up to the first one that waits
                is_taking = True
                taken = next(left, None)
                is_taking = False
                if taken is None:
                    is_over = True
                else:
                    results[taken[0]] = copy_context().run(_called, body, taken[1])

        try:
            while not is_over:
                if is_taking:  # whoever takes them waits for them
                    self._go_on()
                else:
                    _Stack(self, call).switch()
            while self._paused:
                self._go_on()
        except BaseException:
            is_over = True
            for stack in list(self._paused.values()):
                stack.throw(GreenletExit)
            raise
        return [results[index] for index in range(len(results))]

    def wake(self, pause: Pause) -> None:
        self._woken.append(pause)
        self._caller.wake()

    def pause(self, pause: Pause, timeout_s: float | None, before: Callable[[], object]) -> bool:
        """Let the others go on until `pause` is woken, or its time runs out. Runs on the stack that waits."""
        stack = getcurrent()
        assert isinstance(stack, _Stack)
        assert stack.parent is not None
        self._paused[pause] = stack
        self._before[before] = pause
        if timeout_s is not None:
            heapq.heappush(self._limits, (time.monotonic() + timeout_s, id(pause), pause))
        return bool(stack.parent.switch())

    def _go_on(self) -> None:
        """Resume one function. Waits until one can go on."""
        while True:
            while self._woken:
                stack = self._paused.pop(self._woken.popleft(), None)
                if stack is not None:
                    stack.switch(True)
                    return
            while self._limits and self._limits[0][2] not in self._paused:
                heapq.heappop(self._limits)
            left = self._limits[0][0] - time.monotonic() if self._limits else None
            if left is not None and left <= 0:
                self._paused.pop(heapq.heappop(self._limits)[2]).switch(False)
                return
            try:
                self._caller.wait(left, self._send)
            except Exception as error:
                stack = self._paused.pop(self._failing, None) if self._failing is not None else None
                self._failing = None
                if stack is None:
                    raise
                stack.throw(error)
                return

    def _send(self) -> None:
        for before, pause in tuple(self._before.items()):
            self._failing = pause
            before()
        self._failing = None


def together(body: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """Call a function as `map` does, but so that a call which waits for a value lets the others go on.

    Returns the results in order. The calls start in order, and run on this thread one at a time; their arguments may be
    waited for, too. The first exception of one stops the others at the place where they wait, and is raised.

    Raises:
        InvalidProgram: the function is `async`, so that its call alone runs nothing.
    """
    return _Turns().run(body, zip(*arguments, strict=True))


def _called(body: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:  # Any: whatever the function takes, returns
    result = body(*arguments)
    if inspect.iscoroutine(result):
        result.close()
        name = result.__qualname__
        raise InvalidProgram(f"{name} is async, so its branches run by asyncio.gather(...) in an async program")
    return result
