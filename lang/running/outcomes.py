"""The outcomes of a run's nodes, and the threads and event loops that wait for them.

Events come from a backend's threads. Not here: sending nodes to a backend, and reading values (run.py).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ramet.lang.graph import ir
from ramet.lang.running.turns import Pause

Listener = Callable[[ir.NodeEvent], None]
Ready = Callable[[], bool]


class Outcomes:
    """The last event of every node that is done or failed. Owner: the run. Any thread may call.

    `failure`: the error that ended the whole run; it is raised in everyone who waits. `rests`: set while no thread of
    the program works because an event woke it. A thread that is woken clears it, and sets it before it waits again.
    """

    def __init__(self, *, keep_events: bool = False) -> None:
        """`keep_events`: keep all events for listeners that are added later."""
        self.failure: Exception | None = None
        self.rests = threading.Event()
        self.rests.set()
        self._ended: dict[int, ir.NodeEvent] = {}
        self._lock = threading.Lock()
        # Who waits, by node, so that an event wakes only those that it concerns; None: those who wait for several.
        self._waiters: dict[int | None, list[tuple[Ready, Callable[[], object]]]] = {}
        self._listeners: list[Listener] = []
        self._events: list[ir.NodeEvent] | None = [] if keep_events else None
        self._texts: dict[int, str] = {}  # of the followed nodes, so far

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
        with self._lock:
            return dict(self._ended)

    def put(self, event: ir.NodeEvent) -> None:
        """Pass an event of a node to the listeners, and wake those who wait for it. Ignored once the node ended."""
        is_end = event.kind in ("done", "error")
        is_news = is_end
        with self._lock:
            if event.node in self._ended:
                return
            if is_end:
                self._ended[event.node] = event
            elif event.node in self._texts:
                self._texts[event.node] += event.text
                is_news = True
            if self._events is not None:
                self._events.append(event)
        try:
            for listener in self._listeners:
                listener(event)
        finally:  # any error of a listener must reach those who wait for this event
            if is_news:
                self._wake(event.node)

    def follow(self, node: int) -> None:
        """Keep the text of a node as it comes (`text_of`), and wake those who wait for the node at each piece."""
        self._texts[node] = ""

    def is_followed(self, node: int) -> bool:
        return node in self._texts

    def text_of(self, node: int) -> str:
        """Return the text so far of a followed node."""
        return self._texts[node]

    def fail(self, error: Exception) -> None:
        """Fail the whole run."""
        self.failure = error
        self.wake_all()

    def listen(self, listener: Listener) -> None:
        """Call `listener` for every event from now on. If events are kept, call it for the earlier ones first."""
        with self._lock:
            missed = list(self._events or ())
            self._listeners.append(listener)
        for event in missed:
            listener(event)

    def wait(
        self,
        ready: Ready,
        timeout_s: Callable[[], float | None],
        node: int | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> bool:
        """Wait until `ready()`; return False if the time runs out first. Raises the failure of the run.

        `node`: the one whose end makes it ready; None: several. `before` is called before anything blocks (Pause.wait).
        """
        while True:
            pause = Pause()

            def wake(pause: Pause = pause) -> None:
                self.rests.clear()
                pause.wake()

            if self._is_ready(ready, node, wake):
                return True
            if not pause.wait(timeout_s(), before):
                return ready()

    async def until(self, ready: Ready, timeout_s: Callable[[], float | None], node: int | None = None) -> bool:
        """`wait` for an event loop."""
        loop = asyncio.get_running_loop()
        while True:
            future: asyncio.Future[None] = loop.create_future()
            if self._is_ready(ready, node, partial(_settle, loop, future)):
                return True
            try:
                await asyncio.wait_for(future, timeout_s())
            except TimeoutError:
                return False

    def _is_ready(self, ready: Ready, node: int | None, wake: Callable[[], object]) -> bool:
        """Return `ready()`. If it is false, `wake` is called when it may be true."""
        with self._lock:
            if ready():
                return True
            self.check_alive()
            self._waiters.setdefault(node, []).append((ready, wake))
            return False

    def check_alive(self) -> None:
        """Raise the failure of the run, if there is one."""
        if self.failure is not None:
            raise self.failure

    def wake_all(self) -> None:
        """Make everyone who waits check again."""
        with self._lock:
            waiters = [one for some in self._waiters.values() for one in some]
            self._waiters.clear()
        for _, wake in waiters:
            wake()

    def _wake(self, node: int) -> None:
        with self._lock:
            waiters = self._waiters.pop(node, [])
            # Whoever waits for several nodes is woken when it can go on. Else each event would cost a thread switch.
            for waiter in self._waiters.pop(None, ()):
                is_ready, _ = waiter
                if is_ready():
                    waiters.append(waiter)
                else:
                    self._waiters.setdefault(None, []).append(waiter)
        for _, wake in waiters:
            wake()


def _settle(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    def settle() -> None:
        if not future.done():
            future.set_result(None)

    with suppress(RuntimeError):  # the loop is closed, so nobody waits there any more
        loop.call_soon_threadsafe(settle)
