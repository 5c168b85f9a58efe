"""Limits on a request's head: its time, its bytes, its lines, and the requests that one connection sends ahead.

uvicorn has none of them, and a head is read before any key is checked. A head that passes a limit is answered with an
error that names it, and its connection is closed. `limits` bounds bodies; uvicorn's keep-alive timer bounds idle
connections.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ramet.errors import Overloaded
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.tenants import Held

HEAD_TIMEOUT_S = 75.0
MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 128
MAX_AHEAD = 16  # requests that a connection may send before it has its answers
MAX_HEADS_BYTES = 32 << 20  # of all connections together
LINGER_S = 1.0
_ANYBODY = ""  # no key has been checked yet


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol with these limits."""

    head_timeout_s = HEAD_TIMEOUT_S

    def __init__(self, *args: Any, heads: Held | None = None, **kwargs: Any) -> None:  # Any: uvicorn's own arguments
        """`heads`: the bytes of all heads of a server; None for a server with one connection."""
        super().__init__(*args, **kwargs)
        self._heads = heads or bytes_of_heads()
        self._head_timer: TimerHandle | None = None
        self._num_held = 0  # bytes of this connection's head in `_heads`
        self._num_ahead = 0  # bytes of the heads of earlier requests that are not answered yet
        self._num_bytes = 0  # of the head's lines that the parser has given out
        self._num_headers = 0
        self._is_in_head = False
        self._num_silent = 0  # bytes since the parser last gave out something: of one line, however long
        self._refusal: HttpError | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # uvicorn says the same
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return  # dropped; see `send_400_response`
        self._num_silent += len(data)
        super().data_received(data)
        if self._refusal is not None or self.transport.is_closing():
            return
        try:
            self._hold(self._num_ahead + self._num_bytes + self._num_silent)
            self._check_size()
        except (HttpError, Overloaded) as error:
            self._refusal = HttpError.of(error)
            self.send_400_response("")
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._hold(0)
        self._stop()

    # -- what the parser gives out ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_ahead += self._num_bytes
        self._num_bytes = self._num_headers = self._num_silent = 0
        self._is_in_head = True

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_silent = 0
        self._is_in_head = False
        if len(self.pipeline) >= MAX_AHEAD:
            message = f"the connection has sent more than {MAX_AHEAD} requests ahead; wait for their answers"
            raise self._refuse(HttpError(429, message, code="too_many_requests_ahead", retry_after_s=1.0))
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_silent = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_silent = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop()  # from here on uvicorn's keep-alive timer runs
        if not self.pipeline:
            self._num_ahead = 0
            if not self._is_in_head:  # the next request has not begun
                self._num_bytes = 0
            self._hold(self._num_bytes)

    def send_400_response(self, msg: str) -> None:
        """Answer a head that was refused or is not HTTP, and close the connection after a while.

        What still comes is dropped until then: a system that closes a connection with unread bytes takes the answer
        back, too.
        """
        error = self._refusal or HttpError(400, f"this is no HTTP/1.1 request ({msg})", code="invalid_http")
        self._refusal = error
        self._stop()
        if self.cycle is None or self.cycle.response_complete:
            response = error.response()
            head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
            begin = b"HTTP/1.1 %d \r\n%sconnection: close\r\n\r\n" % (error.status, head)
            self.transport.write(begin + bytes(response.body))
            self._head_timer = asyncio.get_running_loop().call_later(LINGER_S, self.transport.close)
        else:
            self.transport.abort()  # within the answer to another request

    def _count(self, num_bytes: int) -> None:
        self._num_silent = 0
        self._num_bytes += num_bytes
        try:
            self._check_size()
        except HttpError as error:
            raise self._refuse(error) from None

    def _check_size(self) -> None:
        """Raise HttpError for a head that is too large. Lines after a chunked body count, too."""
        if self._num_headers > MAX_HEADERS:
            message = f"the request's head has more than {MAX_HEADERS} header lines; send fewer"
            raise HttpError(431, message, code="head_too_large")
        if self._num_bytes + self._num_silent > MAX_HEAD_BYTES:
            message = f"the request's head is larger than {MAX_HEAD_BYTES:,} bytes; send fewer or shorter header lines"
            raise HttpError(431, message, code="head_too_large")

    def _refuse(self, error: HttpError) -> HttpError:
        """Keep an error that the parser will report as its own."""
        self._refusal = error
        return error

    def _hold(self, num_bytes: int) -> None:
        more = num_bytes - self._num_held
        if more > 0:
            self._heads.take(_ANYBODY, more)
        elif more < 0:
            self._heads.give(_ANYBODY, -more)
        self._num_held = num_bytes

    # -- time --------------------------------------------------------------------------------------------------------

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


def bytes_of_heads() -> Held:
    """The bytes of heads that all connections of a server may hold."""
    return Held(MAX_HEADS_BYTES, "bytes of requests' heads", "send smaller heads, or retry later")
