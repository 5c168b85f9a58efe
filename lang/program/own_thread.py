"""Runs work on its own thread while an event loop awaits it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextvars import copy_context


async def in_own_thread(work: Callable[[], object]) -> None:
    """Run `work` on a thread of its own. asyncio's pool is a few threads; programs that wait would fill it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    context = copy_context()

    def run() -> None:
        error: BaseException | None = None
        try:
            context.run(work)
        except BaseException as raised:  # raised where the result is awaited
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    def settle(error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    threading.Thread(target=run, name="ramet-program", daemon=True).start()
    await future
