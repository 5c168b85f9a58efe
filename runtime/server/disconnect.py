"""Waiting for an answer only as long as somebody wants it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from ramet.errors import RequestCancelled

T = TypeVar("T")


async def until_disconnect(receive: Receive, answer: Coroutine[Any, Any, T]) -> T:
    """Wait for `answer`; when the client leaves first, it is cancelled and RequestCancelled raised.

    The answer runs in the caller's own task, and one more waits for the client's end: tasks are what a request costs.
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
        if not is_left or me.uncancel() > 0:  # somebody else ends this task
            raise
        raise RequestCancelled("the client closed the connection") from None
    finally:
        is_over = True
        gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
