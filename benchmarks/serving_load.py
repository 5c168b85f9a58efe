"""Load for a server or an in-process engine: what sends it, what one request's answer is, and when requests are sent.

A target takes a prompt of token ids and gives back a `Sample`. `HttpTarget` speaks /v1/completions, streamed, to any
OpenAI-compatible server; its client is a bare protocol over httptools, because a client that shares two cores with the
server is part of what is measured. `EngineTarget` calls an `Engine` of this process.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import httptools
import msgspec
from workloads import Chain

from ramet.lang.backends.sse import DONE, complete_events
from ramet.runtime.engine.engine import Engine
from ramet.runtime.types import RequestOutput, SamplingParams


@dataclass(slots=True)
class Sample:
    """One answer. `gaps_s`: between increments with text. `output_ids`: empty where a server does not tell them."""

    sent_s: float  # time.perf_counter()
    first_token_s: float | None = None  # since it was sent
    gaps_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    num_output: int = 0
    num_prompt: int = 0
    num_cached: int = 0
    output_ids: list[int] = field(default_factory=list)
    error: str | None = None
    last_s: float = 0.0

    def note_increment(self, now_s: float) -> None:
        if self.first_token_s is None:
            self.first_token_s = now_s - self.sent_s
        else:
            self.gaps_s.append(now_s - self.last_s)
        self.last_s = now_s


class Target(Protocol):
    """Where requests go."""

    async def generate(self, prompt: list[int], out: int, *, wants_ids: bool) -> Sample:
        """Generate exactly `out` tokens greedily. Errors are in the sample."""
        ...


class EngineTarget:
    """The engine in this process. Text is made of its tokens, as a server's engine does."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def generate(self, prompt: list[int], out: int, *, wants_ids: bool) -> Sample:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        sample = Sample(time.perf_counter())

        def on_output(output: RequestOutput) -> None:
            if output.token_ids:
                sample.note_increment(time.perf_counter())
                sample.output_ids.extend(output.token_ids)
            if output.finish_reason is not None:
                sample.total_s = time.perf_counter() - sample.sent_s
                sample.num_output = output.usage.completion_tokens
                sample.num_prompt, sample.num_cached = output.usage.prompt_tokens, output.usage.cached_tokens
                sample.error = None if output.error is None else str(output.error)
                loop.call_soon_threadsafe(done.set_result, None)

        sampling = SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True)
        self._engine.submit(prompt, sampling, on_output=on_output)
        await done
        return sample


class _Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None  # Any: JSON


_decoder = msgspec.json.Decoder(_Event)


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None  # Any: httptools has no types
        self._sample: Sample | None = None
        self._done: asyncio.Future[None] | None = None
        self._rest = b""  # of the body, not read yet
        self._error_body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.is_open = cast(asyncio.Transport, transport), True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._done is not None and not self._done.done():
            assert self._sample is not None
            self._sample.error = "the connection was closed"
            self._done.set_result(None)

    async def send(self, request: bytes, sample: Sample) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._sample, self._rest, self._error_body = sample, b"", b""
        self._done = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        sample.sent_s = time.perf_counter()
        self._transport.write(request)
        await self._done

    def data_received(self, data: bytes) -> None:
        if self._parser is not None:
            self._parser.feed_data(data)

    # -- the parser's callbacks ----------------------------------------------------------------------------------

    def on_body(self, body: bytes) -> None:
        assert self._sample is not None
        if self._parser.get_status_code() != 200:
            self._error_body += body
            return
        now_s, has_text = time.perf_counter(), False
        events, self._rest = complete_events(self._rest + body)
        for event in events:
            if event.data != DONE:
                has_text |= self._take(_decoder.decode(event.data))
        if has_text:
            self._sample.note_increment(now_s)

    def _take(self, event: _Event) -> bool:
        sample = self._sample
        assert sample is not None
        if event.error is not None:
            sample.error = str(event.error)
        if event.usage is not None:
            details = event.usage.prompt_tokens_details
            sample.num_prompt, sample.num_output = event.usage.prompt_tokens, event.usage.completion_tokens
            sample.num_cached = (details.cached_tokens or 0) if details is not None else 0
        has_text = False
        for choice in event.choices:
            has_text |= bool(choice.text) or bool(choice.token_ids)
            sample.output_ids += choice.token_ids or []
        return has_text

    def on_message_complete(self) -> None:
        assert self._sample is not None
        assert self._done is not None
        status = self._parser.get_status_code()
        if status != 200:
            self._sample.error = f"status {status}: {self._error_body.decode(errors='replace')[:200]}"
        self._sample.total_s = time.perf_counter() - self._sample.sent_s
        if not self._done.done():
            self._done.set_result(None)


class HttpTarget:
    """A server. `close` when done; connections are kept and used again, the last one first."""

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._model = model
        key = f"authorization: Bearer {api_key}\r\n" if api_key is not None else ""
        self._head = f"POST /v1/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n{key}"
        self._idle: list[_Connection] = []

    async def generate(self, prompt: list[int], out: int, *, wants_ids: bool) -> Sample:
        body: dict[str, object] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": out,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if wants_ids:
            body["return_token_ids"] = True
        data = msgspec.json.encode(body)
        connection = self._idle.pop() if self._idle else None
        if connection is None or not connection.is_open:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(_Connection, self._host, self._port)
        sample = Sample(time.perf_counter())
        await connection.send(f"{self._head}content-length: {len(data)}\r\n\r\n".encode() + data, sample)
        if connection.is_open:
            self._idle.append(connection)
        return sample

    def close(self) -> None:
        for connection in self._idle:
            if connection._transport is not None:
                connection._transport.close()
        self._idle.clear()


async def run_chain(target: Target, chain: Chain, samples: list[Sample]) -> None:
    """One turn after the other. An error ends the chain.

    A server that does not tell token ids gets the tokens of the turn's own prompt as its answer: the history is as
    long, but its cache holds other tokens from there on.
    """
    history: list[int] = []
    for number, turn in enumerate(chain):
        prompt = history + turn.new
        sample = await target.generate(prompt, turn.out, wants_ids=number + 1 < len(chain))
        samples.append(sample)
        if sample.error is not None:
            return
        history = prompt + (sample.output_ids or turn.new[: turn.out])


async def closed_loop(target: Target, chains: Sequence[Chain], concurrency: int) -> tuple[list[Sample], float]:
    """So many chains in flight until all are done. Returns the samples and the seconds that it took."""
    waiting, samples = list(reversed(chains)), list[Sample]()

    async def worker() -> None:
        while waiting:
            await run_chain(target, waiting.pop(), samples)

    start_s = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(min(concurrency, len(chains)))))
    return samples, time.perf_counter() - start_s


async def open_loop(target: Target, chains: Sequence[Chain], rate: float, seed: int = 0) -> tuple[list[Sample], float]:
    """Chains begin `rate` times a second on average, with exponential gaps, whatever became of those before."""
    rng, samples = random.Random(f"poisson{seed}"), list[Sample]()
    tasks, start_s = [], time.perf_counter()
    due_s = start_s
    for chain in chains:
        due_s += rng.expovariate(rate)
        await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
        tasks.append(asyncio.create_task(run_chain(target, chain, samples)))
    await asyncio.gather(*tasks)
    return samples, time.perf_counter() - start_s
