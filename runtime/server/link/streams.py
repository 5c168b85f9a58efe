"""The streams through which readers take the output of one request or program from the engine process.

Backpressure: increments that a reader has not taken yet are merged into one, so a slow reader holds its output once.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

import msgspec

from ramet.lang.graph.ir import NodeEvent
from ramet.runtime.server.link.protocol import Output, ProgramEnd, ProgramEvent
from ramet.runtime.server.link.tracing import CURRENT


class OutputStream:
    """One request's increments. Iterate over them. Leaving the iteration early, or `close`, aborts the request.

    `is_whole`: the reader wants only the complete output, and is woken only once.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None], *, is_whole: bool = False) -> None:
        self.id = request_id
        self._abort = abort
        self._is_whole = is_whole
        self._pending: Output | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_over = False
        self._heard_s: float | None = None  # time.monotonic() of the last increment
        self._is_touched = False
        self.trace = CURRENT.get()  # of the HTTP request that made this one

    def push(self, output: Output) -> float | None:
        """Add an increment. Returns the seconds since the previous one, None for the first."""
        now_s = time.monotonic()
        gap_s = None if self._heard_s is None else now_s - self._heard_s
        self._heard_s = now_s
        if output.finish_reason is not None and self.trace is not None:
            self.trace.add_output(output)
        if self._pending is None:
            self._pending = output
        else:
            self._pending.absorb(output)
        if self._waiter is not None and not self._waiter.done() and self._is_due(self._pending):
            self._waiter.set_result(None)
        return gap_s

    @property
    def is_untouched(self) -> bool:
        """True while the reader has got nothing and still waits."""
        return not self._is_touched and not self._is_over

    def forget(self) -> None:
        """Drop what the reader has not got: the request begins anew."""
        assert not self._is_touched, "the reader has a part of it"
        self._pending = self._heard_s = None

    def _is_due(self, pending: Output) -> bool:
        return not self._is_whole or pending.finish_reason is not None

    def close(self) -> None:
        """Abort the request, unless its last increment has been taken."""
        if not self._is_over:
            self._is_over = True
            self._abort(self.id)

    async def __aiter__(self) -> AsyncIterator[Output]:
        try:
            while not self._is_over:
                if self._pending is None or not self._is_due(self._pending):
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
                    self._waiter = None
                output, self._pending = self._pending, None
                assert output is not None
                self._is_touched = True
                self._is_over = output.finish_reason is not None
                if output.error is not None:
                    raise output.error.to_exception()
                yield output
        finally:
            self.close()

    async def collect(self) -> Output:
        """Wait for the end and return the whole output as one increment. Raises the request's error."""
        whole: Output | None = None
        async for output in self:
            if whole is None:
                whole = output
            else:
                whole.absorb(output)
        assert whole is not None
        return whole


class ProgramStream:
    """A running program's events, in order. Leaving the iteration early, or `close`, cancels the program."""

    def __init__(self, program_id: str, abort: Callable[[str], None]) -> None:
        self.id = program_id
        self._abort = abort
        self._events: deque[NodeEvent] = deque()
        self._changed = asyncio.Event()
        self._end: ProgramEnd | None = None
        self._is_closed = False
        self.trace = CURRENT.get()  # of the HTTP request that made this one
        self._start_s = time.monotonic()

    def push(self, report: ProgramEvent | ProgramEnd) -> None:
        if isinstance(report, ProgramEnd):
            self._end = report
            if self.trace is not None:
                error = "" if report.error is None else report.error.kind
                self.trace.add(
                    "program", self._start_s, time.monotonic(), {"ramet.program": self.id, "error.type": error}
                )
        else:
            last = self._events[-1] if self._events else None
            event = report.event
            if last is not None and last.kind == event.kind == "text" and last.node == event.node:
                self._events[-1] = msgspec.structs.replace(event, text=last.text + event.text)
            else:
                self._events.append(event)
        self._changed.set()

    @property
    def is_over(self) -> bool:
        return self._end is not None or self._is_closed

    def close(self) -> None:
        if not self.is_over:
            self._is_closed = True
            self._abort(self.id)

    async def __aiter__(self) -> AsyncIterator[NodeEvent]:
        try:
            while True:
                while self._events:
                    yield self._events.popleft()
                if self._end is not None:
                    if self._end.error is not None:
                        raise self._end.error.to_exception()
                    return
                await self._changed.wait()
                self._changed.clear()
        finally:
            self.close()
