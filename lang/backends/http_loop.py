"""The HTTP client that backends share: an event loop on its own thread, retries, server-sent events, and errors.

A request is repeated only if that is safe. A server's errors become the error classes that they have in process. Not
here: the contents of requests (remote.py, openai.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import httpx
import msgspec

from ramet.errors import (
    ConfigError,
    ContextOverflow,
    EngineStopped,
    GrammarError,
    InvalidProgram,
    InvalidRequest,
    Overloaded,
    RametError,
    RemoteError,
    RequestCancelled,
    from_name,
)
from ramet.lang.backends.sse import ServerSentEvent, complete_events
from ramet.lang.graph.options import Deadline

_PAUSES_S = (0.1, 0.3, 1.0, 3.0, 5.0)  # before the n-th retry, if the server names no time
_MAX_PAUSE_S = 60.0  # the longest wait, even if a server asks for more
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})


class HttpLoop:
    """An HTTP client on an event loop with its own thread. Both are created at first use, and again after `close`.

    `connect_s`: the time limit of connecting. `silence_s`: the longest pause within an answer. `max_retries`: the most
    retries of a request that found no server, or a busy one.
    """

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        connect_s: float = 10.0,
        silence_s: float = 60.0,
        max_retries: int = 4,
        verify: bool = True,
        server: str = "`ramet serve`",
    ) -> None:
        """`server`: the name of the server expected at `url`, for messages."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url is {url!r}, but must begin with http:// or https://")
        self.url = url.rstrip("/")
        self.server = server
        self.max_retries = max_retries
        self._settings = {
            "headers": dict(headers),
            "timeout": httpx.Timeout(silence_s, connect=connect_s, pool=None),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30.0),
            "verify": verify,
        }
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Running] = weakref.WeakKeyDictionary()

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine on the loop. Any thread may call. The coroutine must handle its own errors."""
        self._here().spawn(work)

    def call(self, work: Callable[..., object], *args: object) -> None:
        """Schedule a function call on the loop's thread."""
        self._run().loop.call_soon_threadsafe(work, *args)

    def wait(self, work: Coroutine[Any, Any, Any]) -> Any:  # Any: what the coroutine returns
        """Run a coroutine on the loop and wait for its result. Must not be called on the loop's own thread."""
        return asyncio.run_coroutine_threadsafe(work, self._run().loop).result()

    def close(self, patience_s: float = 2.0) -> None:
        """End the thread, after waiting up to `patience_s` for running work."""
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            running.stop(patience_s)

    def _run(self) -> _Running:
        with self._lock:
            if self._running is None:
                self._running = _Running(self.url, self._settings)
                self._by_loop[self._running.loop] = self._running
                weakref.finalize(self, self._running.stop, 1.0)  # at the latest when the process ends
            return self._running

    def _here(self) -> _Running:
        """Return the loop that this code runs on, even if it is closed by now; on other threads, the current one."""
        try:
            found = self._by_loop.get(asyncio.get_running_loop())
        except RuntimeError:
            found = None
        return found or self._run()

    # Requests. On the loop.

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        deadline: Deadline | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:  # Any: JSON
        """One request, repeated where nobody answered or the server is busy. Raises RametError."""

        async def send(client: httpx.AsyncClient) -> Any:
            answer = await client.request(
                method, self.url + path, content=encoded(body), headers={**_JSON, **(headers or {})}
            )
            if answer.status_code >= 400:
                raise error_of(answer.status_code, answer.content, answer.headers, str(answer.url))
            return self._decoded(answer.content, path)

        return await self.repeat(send, deadline or Deadline(None))

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, path: str, body: object = None, *, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[AsyncIterator[ServerSentEvent]]:
        """The events of an answer. Not repeated: only the caller knows where to go on. Raises RametError."""
        client = self._here().client
        content = encoded(body) if method == "POST" else None
        try:
            async with client.stream(
                method, self.url + path, content=content, headers={**_JSON, **(headers or {})}
            ) as answer:
                if answer.status_code >= 400:
                    raise error_of(answer.status_code, await answer.aread(), answer.headers, str(answer.url))
                yield _events(answer.aiter_raw() if "content-encoding" not in answer.headers else answer.aiter_bytes())
        except httpx.TransportError as error:
            raise self.unreachable(error) from error

    async def repeat(
        self, send: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]], deadline: Deadline
    ) -> Any:  # Any: what `send` returns
        """Call `send` until it works, or what it raises can't be helped by waiting."""
        for attempt in range(self.max_retries + 1):
            try:
                async with asyncio.timeout(deadline.left_s()):
                    return await send(self._here().client)
            except TimeoutError as error:
                raise Deadline.error() from error
            except (RametError, httpx.TransportError) as error:
                found = error if isinstance(error, RametError) else self.unreachable(error)
                pause_s = retry_pause(found, attempt)
                if pause_s is None or attempt == self.max_retries or not deadline.allows(pause_s):
                    raise found from (None if found is error else error)
                await asyncio.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def unreachable(self, error: Exception) -> RemoteError:
        """Return the error for a connection that failed or broke."""
        what = str(error) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return RemoteError(f"no server answers at {self.url} ({what}); is {self.server} running there?")
        return RemoteError(f"the connection to {self.url} broke: {what}")

    def _decoded(self, content: bytes, path: str) -> Any:  # Any: JSON
        try:
            return json.loads(content)
        except ValueError as error:
            raise RemoteError(f"{self.url}{path} answered no JSON: {content[:100]!r}") from error


_JSON = {"Content-Type": "application/json"}


class _Running:
    """A thread with its loop and its client."""

    def __init__(self, url: str, settings: Mapping[str, Any]) -> None:  # Any: settings of every type
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[object]] = set()
        is_ready = threading.Event()

        async def prepare() -> None:
            self.client = httpx.AsyncClient(**settings)
            is_ready.set()

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(prepare())
            self.loop.run_forever()

        self._thread = threading.Thread(target=run, name=f"ramet-http {url}", daemon=True)
        self._thread.start()
        is_ready.wait()

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        def start() -> None:
            task = self.loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self.loop.call_soon_threadsafe(start)

    def stop(self, patience_s: float) -> None:
        if self.loop.is_closed() or threading.current_thread() is self._thread:
            return

        async def end() -> None:
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=patience_s)
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.client.aclose()

        asyncio.run_coroutine_threadsafe(end(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def encoded(body: object) -> bytes | None:
    return None if body is None else msgspec.json.encode(body)


def retry_pause(error: RametError, attempt: int) -> float | None:
    """Return the seconds to wait before the next attempt; None if waiting doesn't help."""
    if isinstance(error, Overloaded):
        return min(_MAX_PAUSE_S, error.retry_after_s)
    pause_s = _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)] * random.uniform(0.8, 1.2)
    if isinstance(error, RemoteError):
        return pause_s if error.status is None or error.status in _RETRIED else None
    return max(pause_s, 1.0) if isinstance(error, EngineStopped) else None


def error_of(status: int, content: bytes, headers: Mapping[str, str], url: str) -> RametError:
    """Return the in-process error of a server's refusal. Ramet's header names its class, else status and code do."""
    message, param, code = refusal_of(content)
    message = message or f"the server answered {status}: {content[:200].decode(errors='replace')!r}"
    retry_after_s = _seconds(headers.get("retry-after"))
    name = headers.get("x-ramet-error")
    if name not in (None, "RametError"):  # which says no more than the status
        return from_name(name, message, param=param, retry_after_s=retry_after_s)
    if status == 429:
        return Overloaded(message, retry_after_s or 1.0)
    if status in (401, 403):
        return RemoteError(f"the server refuses the key ({status}): {message}; pass api_key=", status)
    if status == 499:
        return RequestCancelled(message)
    kinds: Mapping[str | None, type[RametError]] = {
        "context_length_exceeded": ContextOverflow,
        "invalid_grammar": GrammarError,
        "invalid_program": InvalidProgram,
        "engine_unavailable": EngineStopped,
    }
    if code in kinds:
        return kinds[code](message)
    if status in (400, 409, 413, 422):
        return InvalidRequest(message, param)
    return RemoteError(f"{message} (status {status} of {url})", status)


def refusal_of(content: bytes) -> tuple[str, str | None, str | None]:
    """Return (message, param, code) of a body in OpenAI's error format; empty values for another format."""
    try:
        error = json.loads(content)["error"]
        if isinstance(error, str):
            return error, None, None
        return str(error["message"]), error.get("param"), error.get("code")
    except (ValueError, LookupError, TypeError, AttributeError):
        return "", None, None


def _seconds(text: str | None) -> float | None:
    """Return a Retry-After in seconds. A date is not supported and gives None."""
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[ServerSentEvent]:
    rest = b""
    async for piece in pieces:
        events, rest = complete_events(rest + piece)
        for event in events:
            yield event
