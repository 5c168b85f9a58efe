"""The caller's handle of a request: it yields increments as they arrive, or the whole result at the end."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from ramet.runtime.types import FinishReason, RequestOutput, TopTokens, Usage


@dataclass(frozen=True, slots=True)
class RequestResult:
    """A finished request. If requested, `logprobs` and `top_logprobs` are as long as `token_ids`.

    `incomplete`: the reason why a constrained text that `max_tokens` cut off is incomplete. `was_closed`: as in
    RequestOutput.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_match: str | int | None
    usage: Usage
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopTokens, ...] | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_tops: tuple[TopTokens, ...] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    incomplete: str | None = None
    was_closed: bool = False


class RequestHandle:
    """One request's output: iterate over increments (`for`, `async for`), or wait for all (`result`, `await`)."""

    def __init__(self, request_id: str, cancel: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._outputs: list[RequestOutput] = []
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def push(self, output: RequestOutput) -> None:
        """Add an increment. Called by the engine."""
        with self._changed:
            self._outputs.append(output)
            waiters, self._waiters = self._waiters, []
            self._changed.notify_all()
        for loop, future in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_resolve, future)

    def cancel(self) -> None:
        """Abort the request. Its pages are free within one step. Does nothing if the request is finished."""
        self._cancel(self.request_id)

    def __iter__(self) -> Iterator[RequestOutput]:
        for index in itertools.count():
            with self._changed:
                while len(self._outputs) <= index:
                    self._changed.wait()
                output = self._outputs[index]
            yield _raise_error(output)
            if output.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        for index in itertools.count():
            while True:
                with self._changed:
                    if len(self._outputs) > index:
                        output = self._outputs[index]
                        break
                    loop = asyncio.get_running_loop()
                    future = loop.create_future()
                    self._waiters.append((loop, future))
                await future
            yield _raise_error(output)
            if output.finish_reason is not None:
                return

    def result(self, timeout_s: float | None = None) -> RequestResult:
        """Wait for the result. Raises the request's error, RequestCancelled, or TimeoutError (the request goes on)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._outputs or self._outputs[-1].finish_reason is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"request {self.request_id} did not finish within {timeout_s} s; it goes on")
                self._changed.wait(left)
        return self._collect()

    def __await__(self) -> Generator[Any, None, RequestResult]:  # Any: what asyncio yields to its loop
        async def wait() -> RequestResult:
            async for _ in self:
                pass
            return self._collect()

        return wait().__await__()

    def _collect(self) -> RequestResult:
        outputs = self._outputs
        last = _raise_error(outputs[-1])
        assert last.finish_reason is not None
        logprobs = [p for o in outputs if o.logprobs is not None for p in o.logprobs]
        tops = [t for o in outputs if o.top_logprobs is not None for t in o.top_logprobs]
        scores = [float(p) for o in outputs if o.prompt_logprobs is not None for p in o.prompt_logprobs]
        prompt_tops = [t for o in outputs if o.prompt_tops is not None for t in o.prompt_tops]
        return RequestResult(
            text="".join(o.text for o in outputs),
            token_ids=tuple(t for o in outputs for t in o.token_ids),
            finish_reason=last.finish_reason,
            stop_match=last.stop_match,
            usage=last.usage,
            logprobs=tuple(logprobs) if logprobs else None,
            top_logprobs=tuple(tops) if tops else None,
            prompt_logprobs=tuple(scores) if scores else None,
            prompt_tops=tuple(prompt_tops) if prompt_tops else None,
            timings=dict(last.timings or {}),
            incomplete=last.incomplete,
            was_closed=last.was_closed,
        )


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _raise_error(output: RequestOutput) -> RequestOutput:
    if output.error is not None:
        raise output.error
    return output
