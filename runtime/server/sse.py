"""Server-sent events, and the rule that nobody generates for a client that has left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ramet.errors import RametError
from ramet.runtime.server.disconnect import until_disconnect
from ramet.runtime.server.state import HttpError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_encoder = msgspec.json.Encoder()

DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:  # Any: JSON
    return b"data: " + _encoder.encode(value) + b"\n\n"


def json_response(value: Any, status: int = 200) -> Response:  # Any: JSON
    return Response(_encoder.encode(value), status, media_type="application/json")


class EventStream(StreamingResponse):
    """Sends the events of a generator, which is closed at once when the client leaves."""

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        """`close`: aborts what the events come from; a generator that never ran cannot do that itself."""
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client leaves. One task more than this one: it waits for the client's end.

        (Starlette's own loop makes a task group and two tasks for every stream.)
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
            await self.stream_response(send)
        except asyncio.CancelledError:
            if not is_left or me.uncancel() > 0:  # somebody else ends this task
                raise
        finally:
            is_over = True
            gone.cancel()
            # A client may leave while an event is being sent: then the generator is not running, and nobody ends it.
            self._close()
            await self._events.aclose()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def collected(request: Request, items: AsyncGenerator[T, None]) -> list[T]:
    """All items; where the client leaves first, the generator is closed and RequestCancelled is raised."""

    async def collect() -> list[T]:
        async with contextlib.aclosing(items):
            return [item async for item in items]

    return await until_disconnect(request, collect(), lambda: None)


async def started(request: Request, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Wait for the first item, so that what is wrong with a request is an HTTP error and not an event of a stream.

    Returns a generator of all items; it closes `items`.
    """

    async def first() -> T:
        try:
            return await anext(items)
        except BaseException:
            await items.aclose()
            raise

    item = await until_disconnect(request, first(), lambda: None)

    async def rest() -> AsyncGenerator[T, None]:
        async with contextlib.aclosing(items):
            yield item
            async for later in items:
                yield later

    return rest()


async def guarded(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The events, an error as one more event, and [DONE]."""
    try:
        async with contextlib.aclosing(events):
            async for data in events:
                yield data
    except (HttpError, RametError) as error:
        logger.info("a stream ends with an error: %s", error)
        yield event(HttpError.of(error).body)
    except Exception as error:  # the answer has begun: an event is all that can say so
        logger.exception("a stream failed")
        yield event(HttpError.of(error).body)
    yield DONE
