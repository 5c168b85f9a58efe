"""Runs a program's tools beside the program, on a few threads. Each call has its own time limit.

A call that exceeds its limit is abandoned: its thread can't be stopped, but no longer counts, and its result is
dropped. An abandoned async tool is cancelled.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from typing import Any

from ramet.errors import InvalidProgram, InvalidRequest
from ramet.lang.running.tools import Tool, to_json

MAX_CALLS = 32  # calls of one program at once
OnDone = Callable[[Any, Exception | None], None]  # Any: what the tool returned
Call = tuple[int, int]  # the message, and the index of the call in it


class ToolRunner:
    """The tools of one run of a program, by name, and their calls. Owner: the run.

    `tools`: the tools given to the run; `add` adds those that the program declares.
    """

    def __init__(self, tools: Mapping[str, Callable[..., Any]]) -> None:
        self._tools = dict(tools)
        self._loops: dict[int, asyncio.AbstractEventLoop] = {}  # of messages whose async tools run there
        self._begun: dict[Call, Future[Any]] = {}  # calls for whose results nobody waits yet
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()  # each makes one call, on its own thread
        self._num_running = 0
        self._tasks: set[Future[Any]] = set()

    def add(self, tool: Tool) -> bool:
        """Add a tool. Return False if another tool has its name."""
        return self._tools.setdefault(tool.name, tool) == tool

    def use_loop(self, message: int, loop: asyncio.AbstractEventLoop) -> None:
        """Run the tools that this message calls on `loop` if they are async."""
        self._loops[message] = loop

    def begin(self, call: Call, name: str, arguments: Mapping[str, Any]) -> None:
        """Start a tool whose arguments are closed, while its message is still being written."""
        result: Future[Any] = Future()
        self._begun[call] = result
        self._start_tool(call, name, arguments, partial(_settle, result))

    def drop(self, message: int) -> None:
        """Forget the calls of a message that was never completed. Those that wait for a place never start."""
        for call in [one for one in tuple(self._begun) if one[0] == message]:
            self._begun.pop(call).cancel()

    def call(self, call: Call, name: str, arguments: Mapping[str, Any], done: OnDone) -> None:
        """Call a tool for a ToolCall node, or take the call that has begun. `done` receives JSON, or the error."""
        begun = self._begun.pop(call, None)
        if begun is None:
            self._start_tool(call, name, arguments, done)
            return

        def ended(result: Future[Any]) -> None:
            error = result.exception()
            done(None if error else result.result(), error if isinstance(error, Exception) else None)

        begun.add_done_callback(ended)

    def _start_tool(self, call: Call, name: str, arguments: Mapping[str, Any], done: OnDone) -> None:
        tool = self._tools.get(name)

        def work() -> Any:
            if tool is None:
                raise InvalidProgram(f"the program has no tool {name!r}; it has {', '.join(self._tools) or 'none'}")
            return tool(**(tool.read(arguments) if isinstance(tool, Tool) else arguments))

        def ended(result: Any, error: Exception | None) -> None:
            if error is None:
                try:
                    result = to_json(result, name)
                except InvalidRequest as raised:
                    error = raised
            done(None if error else result, error)

        timeout_s = tool.timeout_s if isinstance(tool, Tool) else None
        loop = self._loops.get(call[0])
        if loop is not None and isinstance(tool, Tool) and tool.is_async:
            self._start_on(loop, name, work, timeout_s, ended)
        else:
            self._start(name, work, timeout_s, ended)

    def _start(self, name: str, work: Callable[[], Any], timeout_s: float | None, done: OnDone) -> None:
        """Call `work` on a thread; a coroutine that it returns runs there, too. `done` receives the result or error."""
        ended: Future[Any] = Future()  # set once: by the call, or by its time limit

        def over(_: Future[Any]) -> None:
            with self._lock:
                self._num_running -= 1
            error = ended.exception()
            done(None if error else ended.result(), error if isinstance(error, Exception) else None)
            self._next()

        def call() -> None:
            timer: threading.Timer | None = None
            if timeout_s is not None:
                timer = threading.Timer(timeout_s, _settle, (ended, None, _too_late(name, timeout_s)))
                timer.daemon = True
                timer.start()
            try:
                result = work()
                if asyncio.iscoroutine(result):
                    result = asyncio.run(_limited(name, result, timeout_s))
            except Exception as error:  # the tool's error is raised where its value is read
                _settle(ended, None, error)
            else:
                _settle(ended, result, None)
            finally:
                if timer is not None:
                    timer.cancel()

        ended.add_done_callback(over)
        # Not a pool: the interpreter joins a pool's threads at exit, and a tool may hang.
        thread = threading.Thread(target=call, name=f"ramet-tool-{name}", daemon=True)
        with self._lock:
            self._waiting.append(thread.start)
        self._next()

    def _start_on(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        work: Callable[[], Coroutine[Any, Any, Any]],
        timeout_s: float | None,
        done: OnDone,
    ) -> None:
        """Await `work()` on an event loop that is free to run it."""

        async def run() -> Any:
            return await _limited(name, work(), timeout_s)

        task = asyncio.run_coroutine_threadsafe(run(), loop)
        with self._lock:
            self._tasks.add(task)

        def finished(ended: Future[Any]) -> None:
            with self._lock:
                self._tasks.discard(ended)
            if not ended.cancelled():
                error = ended.exception()
                done(None if error else ended.result(), error if isinstance(error, Exception) else None)

        task.add_done_callback(finished)

    def cancel(self) -> None:
        """Drop waiting calls, and cancel the running ones that can be cancelled."""
        with self._lock:
            self._waiting.clear()
            tasks = list(self._tasks)
        for task in tasks:
            task.cancel()

    def _next(self) -> None:
        with self._lock:
            if not self._waiting or self._num_running >= MAX_CALLS:
                return
            start = self._waiting.popleft()
            self._num_running += 1
        start()


def _settle(ended: Future[Any], result: Any, error: Exception | None) -> None:
    """Set the outcome of a call, unless it has one."""
    with suppress(InvalidStateError):
        if error is None:
            ended.set_result(result)
        else:
            ended.set_exception(error)


async def _limited(name: str, work: Coroutine[Any, Any, Any], timeout_s: float | None) -> Any:
    try:
        async with asyncio.timeout(timeout_s) as limit:
            return await work
    except TimeoutError as error:
        if limit.expired():
            raise _too_late(name, timeout_s) from error
        raise


def _too_late(name: str, timeout_s: float | None) -> TimeoutError:
    return TimeoutError(f"tool {name!r} did not answer within {timeout_s:g} s" if timeout_s else f"tool {name!r}")
