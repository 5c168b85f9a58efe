"""A limit on the time in which a connection must send its request's head.

uvicorn waits for a head without limit, so sockets that never complete one (half-open, or opened to exhaust file
descriptors) would stay for ever. `limits` bounds bodies; uvicorn's keep-alive timer bounds idle connections.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_TIMEOUT_S = 75.0


class PatientProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # h11's or httptools', whichever is there
    """uvicorn's protocol, extended to close a connection that does not complete a request's head in time."""

    head_timeout_s = HEAD_TIMEOUT_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: uvicorn's own arguments
        super().__init__(*args, **kwargs)
        self._head_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop()  # from here on uvicorn's keep-alive timer runs

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = asyncio.get_running_loop().call_later(self.head_timeout_s, self._give_up)

    def _stop(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
