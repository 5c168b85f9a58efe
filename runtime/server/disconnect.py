"""Waiting for an answer only as long as somebody wants it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from ramet.errors import RequestCancelled

T = TypeVar("T")


async def until_disconnect(request: Request, answer: Coroutine[Any, Any, T], cancel: Callable[[], None]) -> T:
    """Wait for `answer`; when the client leaves first, call `cancel` at once and raise RequestCancelled."""
    task = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RequestCancelled("the client closed the connection")
    finally:
        gone.cancel()
        if not task.done():
            cancel()
            task.cancel()


async def _gone(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return
