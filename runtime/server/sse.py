"""Server-sent events, and the rule that nobody generates for a client that has left."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from ramet.errors import RequestCancelled
from ramet.runtime.server.direct import error_response
from ramet.runtime.server.disconnect import until_disconnect
from ramet.runtime.server.state import HttpError

T = TypeVar("T")
_encoder = msgspec.json.Encoder()

DONE = b"data: [DONE]\n\n"


class LastEvent(bytes):
    """An event that only the end of the stream follows: both leave together, so that the client has them sooner."""

    __slots__ = ()


def event(value: Any) -> bytes:  # Any: JSON
    return b"data: " + _encoder.encode(value) + b"\n\n"


def json_response(value: Any, status: int = 200) -> Response:  # Any: JSON
    return Response(_encoder.encode(value), status, media_type="application/json")


class EventStream(Response):
    """Sends the events of a generator, which is closed at once when the client leaves.

    The head leaves with the first event, so that what is wrong with a request is an HTTP error. From there on an error
    is one more event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None], end: bytes = b"") -> None:
        """`close`: aborts what the events come from; a generator that never ran cannot do that itself. `end`: sent
        after the last event."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._end = end
        self._is_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client leaves."""
        try:
            with contextlib.suppress(RequestCancelled):
                await until_disconnect(receive, self._send_all(scope, receive, send))
        finally:
            # A client may leave while an event is being sent: then the generator is not running, and nobody ends it.
            self._close()
            await self._events.aclose()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for data in self._events:
                if isinstance(data, LastEvent):
                    await self._send(send, data + self._end, is_last=True)
                    return
                await self._send(send, data)
        except Exception as error:
            response = error_response(error)
            if not self._is_begun:
                await response(scope, receive, send)
                return
            await self._send(send, event(HttpError.of(error).body))
        await self._send(send, self._end, is_last=True)

    async def _send(self, send: Send, data: bytes, *, is_last: bool = False) -> None:
        if not self._is_begun:
            self._is_begun = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": data, "more_body": not is_last})


async def collected(request: Request, items: AsyncGenerator[T, None]) -> list[T]:
    """All items; where the client leaves first, the generator is closed and RequestCancelled is raised."""

    async def collect() -> list[T]:
        async with contextlib.aclosing(items):
            return [item async for item in items]

    return await until_disconnect(request.receive, collect())
