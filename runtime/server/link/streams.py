"""The streams through which readers take what the engine process says of one request or program.

Backpressure: increments that a reader has not taken yet are merged into one, so a slow reader holds its output once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeAlias, TypeVar

from ramet.runtime.server.link.protocol import Output, ProgramEvent
from ramet.runtime.server.link.tracing import CURRENT

MANY = 64  # reports, or events of an answer, after which others have a turn

ReportT = TypeVar("ReportT", Output, ProgramEvent)


class ReportStream(Generic[ReportT]):
    """The increments of one request, or the events of one program. Iterate over them.

    Leaving the iteration early, or `close`, aborts the request or program.
    """

    def __init__(
        self,
        request_id: str,
        abort: Callable[[str], None],
        *,
        is_whole: bool = False,
        passes: Callable[[ReportT], bool] | None = None,
    ) -> None:
        """is_whole: the reader wants only the complete output, and is woken only once.

        passes: sees each report first, and tells whether the reader gets it.
        """
        self.id = request_id
        self.trace = CURRENT.get()  # of the HTTP request that made this one
        self._abort = abort
        self._is_whole = is_whole
        self._passes: Callable[[ReportT], bool] | None = passes
        self._pending: deque[ReportT] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_over = False
        self._num_taken = 0

    def push(self, report: ReportT) -> None:
        """Add an increment or event."""
        if self._passes is not None and not self._passes(report):
            return
        if not self._pending or not self._pending[-1].absorb(report):
            self._pending.append(report)
        if self._waiter is not None and not self._waiter.done() and self._is_due:
            self._waiter.set_result(None)

    @property
    def is_untouched(self) -> bool:
        """True while the reader has got nothing and still waits."""
        return self._num_taken == 0 and not self._is_over

    def forget(self) -> None:
        """Drop what the reader has not got: the request begins anew."""
        assert self._num_taken == 0, "the reader has a part of it"
        self._pending.clear()

    @property
    def _is_due(self) -> bool:
        return bool(self._pending) and (not self._is_whole or self._pending[-1].is_last)

    def close(self) -> None:
        """Abort the request or program, unless its last report has been taken."""
        if not self._is_over:
            self._is_over = True
            self._abort(self.id)

    async def __aiter__(self) -> AsyncIterator[ReportT]:
        try:
            while not self._is_over:
                if not self._is_due:
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
                    self._waiter = None
                report = self._pending.popleft()
                self._num_taken += 1
                if self._num_taken % MANY == 0:
                    await asyncio.sleep(0)  # others have a turn, even if there is always a report
                self._is_over = report.is_last
                if report.error is not None:
                    raise report.error.to_exception()
                yield report
        finally:
            self.close()

    async def collect(self) -> ReportT:
        """Wait for the end and return a request's whole output as one increment. Raises the request's error."""
        whole: ReportT | None = None
        async for output in self:
            if whole is None:
                whole = output
            else:
                whole.absorb(output)
        assert whole is not None
        return whole


AnyStream: TypeAlias = ReportStream[Any]  # Any: of either kind of report
