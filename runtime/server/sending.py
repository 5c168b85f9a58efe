"""Send answers as JSON or as server-sent events, and stop when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ramet.errors import RequestCancelled
from ramet.runtime.server.errors import HttpError, error_response
from ramet.runtime.server.link.streams import MANY

T = TypeVar("T")
Json = dict[str, Any]  # Any: JSON
_encoder = msgspec.json.Encoder()

PATIENCE_S = 0.5  # errors that come sooner have an HTTP status of their own
COMMENT_S = 15.0  # proxies close connections on which nothing comes for a minute or less
COMMENT = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"  # the last event of OpenAI's and SGLang's streams


class AnswerStruct(msgspec.Struct, forbid_unknown_fields=True):
    """Base of every answer's struct. The answer's JSON and its schema in the OpenAPI document come from the struct.

    A field that may be absent from an answer has the default UNSET. Every other field is always present.
    """


def json_response(answer: Any, status: int = 200) -> Response:  # Any: a struct, or JSON
    return Response(_encoder.encode(answer), status, media_type="application/json")


def event(data: Any, name: str | None = None, event_id: int | None = None) -> bytes:  # Any: a struct, or JSON
    """One server-sent event."""
    head = b"" if event_id is None else b"id: %d\n" % event_id
    if name is not None:
        head += b"event: " + name.encode() + b"\n"
    return head + b"data: " + _encoder.encode(data) + b"\n\n"


async def named_events(events: AsyncGenerator[Json, None]) -> AsyncGenerator[bytes, None]:
    """Server-sent events of JSON objects, each with its type as its name."""
    async with contextlib.aclosing(events):
        async for written in events:
            yield event(written, written["type"])


class LastEvent(bytes):
    """The last event of a stream. It is sent together with the stream's end, so the client gets both sooner."""

    __slots__ = ()


class EventStream(Response):
    """Sends the events of a generator. The generator is closed as soon as the client leaves.

    The head is sent with the first event, so an earlier error is an HTTP error. A later error is sent as an event. If
    the first event does not come soon, the head goes out with a comment; and whenever nothing came for a while, another
    comment follows, so that no proxy closes the connection.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None], end: bytes = b"") -> None:
        """`close`: aborts the source of the events, because a generator that never ran cannot do it. `end`: bytes sent
        after the last event."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._end = end
        self._is_begun = False
        self._sending = asyncio.Lock()  # a comment never comes into the middle of an event
        self._sent_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client leaves."""
        try:
            with contextlib.suppress(RequestCancelled):
                await until_disconnect(receive, self._send_all(scope, receive, send))
        finally:
            # A client may leave while an event is being sent. The generator is not running then and cannot end itself.
            await self._stop_watching()
            self._close()
            await self._events.aclose()

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._watch(send, PATIENCE_S)
        num_sent = 0
        try:
            async for data in self._events:
                if isinstance(data, LastEvent):
                    await self._stop_watching()
                    await self._send(send, data + self._end, is_last=True)
                    return
                await self._send(send, data)
                num_sent += 1
                if num_sent % MANY == 0:
                    await asyncio.sleep(0)  # others have a turn, even if there is always an event
        except Exception as error:
            response = error_response(error)
            await self._stop_watching()
            if not self._is_begun:
                await response(scope, receive, send)
                return
            await self._send(send, event(HttpError.of(error).body))
        await self._stop_watching()
        await self._send(send, self._end, is_last=True)

    async def _send(self, send: Send, data: bytes, *, is_last: bool = False) -> None:
        async with self._sending:
            if not self._is_begun:
                self._is_begun = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": not is_last})
            self._sent_s = asyncio.get_running_loop().time()

    def _watch(self, send: Send, patience_s: float) -> None:
        """Send a comment when nothing was sent for `patience_s`, and from then on whenever nothing comes."""
        loop = asyncio.get_running_loop()

        def look() -> None:
            if self._sent_s + patience_s > loop.time():
                self._timer = loop.call_at(self._sent_s + patience_s, look)
                return
            self._comment = loop.create_task(self._send(send, COMMENT))
            self._watch(send, COMMENT_S)

        self._timer = loop.call_later(patience_s, look)

    async def _stop_watching(self) -> None:
        """Send no more comments. One that is being sent is completed first."""
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            await asyncio.wait([self._comment])


async def collected(request: Request, items: AsyncGenerator[T, None]) -> list[T]:
    """Collect all items. If the client leaves first, the generator is closed and RequestCancelled is raised."""

    async def collect() -> list[T]:
        async with contextlib.aclosing(items):
            return [item async for item in items]

    return await until_disconnect(request.receive, collect())


async def until_disconnect(receive: Receive, answer: Coroutine[Any, Any, T]) -> T:
    """Wait for `answer`. If the client leaves first, the answer is cancelled and RequestCancelled is raised.

    The answer runs in the caller's task, and one more task waits for the client to leave: tasks are a request's cost.
    """
    me, is_left, is_over = asyncio.current_task(), False, False
    assert me is not None

    def leave(gone: asyncio.Future[None]) -> None:
        nonlocal is_left
        if not is_over and not gone.cancelled():
            is_left = True
            me.cancel()

    gone = asyncio.ensure_future(_gone(receive))
    gone.add_done_callback(leave)
    try:
        return await answer
    except asyncio.CancelledError:
        if not is_left or me.uncancel() > 0:  # another caller has cancelled this task
            raise
        raise RequestCancelled("the client closed the connection") from None
    finally:
        is_over = True
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
