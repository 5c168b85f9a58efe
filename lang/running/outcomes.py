"""The outcomes of a run's nodes, and the threads and event loops that wait for them.

Events come from a backend's threads. Not here: sending nodes to a backend, and reading values (run.py).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from ramet.lang.graph import ir

Listener = Callable[[ir.NodeEvent], None]
Ready = Callable[[], bool]


class Outcomes:
    """The last event of every node that is done or failed. Owner: the run. Any thread may call.

    `failure`: the error that ended the whole run; it is raised in everyone who waits.
    """

    def __init__(self, *, keep_events: bool = False) -> None:
        """`keep_events`: keep all events for listeners that are added later."""
        self.failure: Exception | None = None
        self._ended: dict[int, ir.NodeEvent] = {}
        self._changed = threading.Condition()
        self._blocked: list[Ready] = []  # the conditions of the threads in `wait`
        # Who awaits, by node, so that an event wakes only those that it concerns; None: those who await several nodes.
        self._waiters: dict[int | None, list[tuple[Ready, asyncio.AbstractEventLoop, asyncio.Future[None]]]] = {}
        self._listeners: list[Listener] = []
        self._events: list[ir.NodeEvent] | None = [] if keep_events else None

    def __len__(self) -> int:
        return len(self._ended)

    def __contains__(self, node: int) -> bool:
        return node in self._ended

    def __getitem__(self, node: int) -> ir.NodeEvent:
        return self._ended[node]

    def get(self, node: int) -> ir.NodeEvent | None:
        """Return the last event of a node, or None while it is neither done nor failed."""
        return self._ended.get(node)

    def copy(self) -> dict[int, ir.NodeEvent]:
        """Return all last events by node, in the order of their arrival."""
        with self._changed:
            return dict(self._ended)

    def put(self, event: ir.NodeEvent) -> None:
        """Pass an event of a node to the listeners, and wake those who wait for it. Ignored once the node ended."""
        is_end = event.kind in ("done", "error")
        with self._changed:
            if event.node in self._ended:
                return
            if is_end:
                self._ended[event.node] = event
            if self._events is not None:
                self._events.append(event)
        try:
            for listener in self._listeners:
                listener(event)
        finally:  # any error of a listener must reach those who wait for this event
            if is_end:
                self._wake(event.node)

    def fail(self, error: Exception) -> None:
        """Fail the whole run."""
        self.failure = error
        self.wake_all()

    def listen(self, listener: Listener) -> None:
        """Call `listener` for every event from now on. If events are kept, call it for the earlier ones first."""
        with self._changed:
            missed = list(self._events or ())
            self._listeners.append(listener)
        for event in missed:
            listener(event)

    def wait(self, ready: Ready, timeout_s: Callable[[], float | None]) -> bool:
        """Block until `ready()`; return False if the time runs out first. Raises the failure of the run."""
        with self._changed:
            self._blocked.append(ready)
            try:
                while not ready():
                    self.check_alive()
                    if not self._changed.wait(timeout_s()) and not ready():
                        return False
                return True
            finally:
                self._blocked.remove(ready)

    async def until(self, ready: Ready, timeout_s: Callable[[], float | None], node: int | None = None) -> bool:
        """`wait` for an event loop. `node`: the one that it takes; None: several."""
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if ready():
                    return True
                self.check_alive()
                future: asyncio.Future[None] = loop.create_future()
                self._waiters.setdefault(node, []).append((ready, loop, future))
            try:
                await asyncio.wait_for(future, timeout_s())
            except TimeoutError:
                return False

    def check_alive(self) -> None:
        """Raise the failure of the run, if there is one."""
        if self.failure is not None:
            raise self.failure

    def wake_all(self) -> None:
        """Make everyone who waits check again."""
        with self._changed:
            waiters = [one for some in self._waiters.values() for one in some]
            self._waiters.clear()
            self._changed.notify_all()
        _resolve(waiters)

    def _wake(self, node: int) -> None:
        with self._changed:
            waiters = self._waiters.pop(node, [])
            for waiter in self._waiters.pop(None, ()):
                is_ready, *_ = waiter
                if is_ready():
                    waiters.append(waiter)
                else:
                    self._waiters.setdefault(None, []).append(waiter)
            # A thread is woken only when it can go on. Else each of thousands of events would cost a thread switch.
            if any(ready() for ready in self._blocked):
                self._changed.notify_all()
        _resolve(waiters)


def _resolve(waiters: list[tuple[Ready, asyncio.AbstractEventLoop, asyncio.Future[None]]]) -> None:
    def settle(future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)

    for _, loop, future in waiters:
        with suppress(RuntimeError):  # the loop is closed, so nobody waits there any more
            loop.call_soon_threadsafe(settle, future)
