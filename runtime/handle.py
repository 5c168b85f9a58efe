"""The caller's handle of a request: it yields increments as they arrive, or the whole result at the end."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramet.errors import InvalidRequest
from ramet.runtime.types import FinishReason, RequestOutput, TopTokens, Usage


@dataclass(frozen=True, slots=True)
class RequestResult:
    """A finished request. If requested, `logprobs` and `top_logprobs` are as long as `token_ids`.

    `vector`: fp32 [hidden], of a pooling request. `incomplete`: the reason why a constrained text that `max_tokens` cut
    off is incomplete. `was_closed`: as in RequestOutput.
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
    vector: NDArray[np.float32] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    incomplete: str | None = None
    was_closed: bool = False


class RequestHandle:
    """One request's output: iterate over increments (`for`, `async for`), or wait for all (`result`, `await`).

    collects: False if the request was submitted with `on_output`, which gets them all: reading is an InvalidRequest.
    """

    __slots__ = ("__weakref__", "_cancel", "_collects", "_lock", "_outputs", "_waiters", "request_id")

    def __init__(self, request_id: str, cancel: Callable[[str], None], *, collects: bool = True) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._collects = collects
        self._outputs: list[RequestOutput] = []
        self._lock = threading.Lock()
        self._waiters: list[Callable[[], object]] = []  # called once, when there is a further output

    def push(self, output: RequestOutput) -> None:
        """Add an increment. Called by the engine."""
        with self._lock:
            self._outputs.append(output)
            waiters, self._waiters = self._waiters, []
        for wake in waiters:
            wake()

    def _has_more(self, than: int, wake: Callable[[], object]) -> bool:
        """Return whether there are more outputs. If there are not, `wake` is called once there are."""
        if not self._collects:
            raise InvalidRequest(
                f"the outputs of request {self.request_id} go to its on_output; submit it without one to read them here"
            )
        with self._lock:
            has_more = len(self._outputs) > than
            if not has_more:
                self._waiters.append(wake)
            return has_more

    def cancel(self) -> None:
        """Abort the request. Its pages are free within one step. Does nothing if the request is finished."""
        self._cancel(self.request_id)

    def __iter__(self) -> Iterator[RequestOutput]:
        for index in itertools.count():
            arrived = threading.Event()
            if not self._has_more(index, arrived.set):
                arrived.wait()
            output = self._outputs[index]
            yield _raise_error(output)
            if output.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        for index in itertools.count():
            loop = asyncio.get_running_loop()
            arrived = loop.create_future()
            if not self._has_more(index, partial(_resolve, loop, arrived)):
                await arrived
            output = self._outputs[index]
            yield _raise_error(output)
            if output.finish_reason is not None:
                return

    def result(self, timeout_s: float | None = None) -> RequestResult:
        """Wait for the result. Raises the request's error, RequestCancelled, or TimeoutError (the request goes on)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not (num := len(self._outputs)) or self._outputs[num - 1].finish_reason is None:
            arrived = threading.Event()
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not self._has_more(num, arrived.set) and not arrived.wait(left):
                raise TimeoutError(f"request {self.request_id} did not finish within {timeout_s} s; it goes on")
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
            vector=last.vector,
            timings=dict(last.timings or {}),
            incomplete=last.incomplete,
            was_closed=last.was_closed,
        )


def _resolve(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    """Resolve a future of a loop that runs on another thread."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(None))


def _raise_error(output: RequestOutput) -> RequestOutput:
    if output.error is not None:
        raise output.error
    return output
