"""An engine that replays what a test says, and a small application around the OpenAI endpoints."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from ramet.runtime.server.anthropic.routes import anthropic_endpoints
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.limits import HttpLimits
from ramet.runtime.server.link.protocol import Output, Submit
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.openai.chat import ChatEndpoint
from ramet.runtime.server.openai.routes import openai_endpoints
from ramet.runtime.server.responses.routes import responses_endpoints
from ramet.runtime.server.routing import make_app
from ramet.runtime.server.served_model import ServedModel
from ramet.runtime.server.tenants import Tenants
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.chat_template import ChatTemplate
from ramet.runtime.text.tokenizer import Tokenizer

Json = dict[str, Any]
Script = Callable[[Submit], list[Output]]


class FakeStream:
    """Gives one increment after the other; remembers whether it was closed before its end."""

    def __init__(self, request_id: str, outputs: list[Output]) -> None:
        self.id = request_id
        self.is_over = False
        self.was_aborted = False
        self._outputs = outputs

    def close(self) -> None:
        self.was_aborted = self.was_aborted or not self.is_over

    async def __aiter__(self) -> AsyncIterator[Output]:
        try:
            for output in self._outputs:
                await asyncio.sleep(0)
                self.is_over = output.finish_reason is not None
                if output.error is not None:
                    raise output.error.to_exception()
                yield output
            if not self.is_over:
                await asyncio.sleep(3600)  # an engine that is still at work
        finally:
            self.close()

    async def collect(self) -> Output:
        outputs = [output async for output in self]
        for output in outputs[1:]:
            outputs[0].absorb(output)
        return outputs[0]


@dataclass
class FakeEngine:
    """`script` says what the engine answers to a request; `submitted` and `streams` are what came of it."""

    script: Script = lambda command: []
    submitted: list[Submit] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    hello: object = field(default_factory=lambda: SimpleNamespace(context_length=4096, adapters=[]))
    cached_tokens: int = 0

    def new_id(self, prefix: str) -> str:
        return f"{prefix}-{len(self.submitted)}"

    def submit(self, command: Submit, *, is_whole: bool = False) -> FakeStream:
        self.submitted.append(command)
        stream = FakeStream(command.id, self.script(command))
        self.streams.append(stream)
        return stream

    def says(self, text: str | bytes, *, cuts: Sequence[int] = (), finish: str = "stop", stop: Any = 257) -> None:
        """Answer every request with these bytes as tokens, in increments that end at `cuts`."""
        self.script = lambda command: outputs_of(command, text, cuts, finish, stop, self.cached_tokens)


def outputs_of(
    command: Submit,
    text: str | bytes,
    cuts: Sequence[int] = (),
    finish: str = "stop",
    stop: Any = 257,  # Any: a token or a string
    cached_tokens: int = 0,
) -> list[Output]:
    """Increments of an answer whose tokens are its bytes, cut as the engine would: text holds whole characters."""
    from ramet.runtime.text.detokenizer import Detokenizer

    data = text.encode() if isinstance(text, str) else text
    detokenizer = Detokenizer([bytes([value]) for value in range(256)])
    borders = sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)})
    outputs = []
    count = int(finish == "stop")
    for start, end in pairwise(borders):
        ids = list(data[start:end])
        count += len(ids)
        outputs.append(Output(command.id, len(command.prompt_ids), cached_tokens, count, detokenizer.push(ids), ids))
    last = Output(command.id, len(command.prompt_ids), cached_tokens, count, detokenizer.flush())
    last.finish_reason, last.stop_match = finish, stop if finish == "stop" else None
    return [*outputs, last]


class Client:
    """Requests to the application over an engine that replays."""

    def __init__(self, template: str | None = None, tokenizer: Tokenizer | None = None, **config: Any) -> None:
        self.engine = FakeEngine()
        self.tokenizer: Any = tokenizer or ByteTokenizer()
        if template is not None:
            self.tokenizer.chat_template = ChatTemplate(template)
        proxy, settings = cast(EngineProxy, self.engine), ServerConfig(**config)
        self.served = ServedModel(settings, proxy, Tenants(settings), self.tokenizer, "fake", time.time())
        chat = ChatEndpoint(self.served)
        endpoints = [
            *openai_endpoints(self.served, chat),
            *responses_endpoints(self.served, chat),
            *anthropic_endpoints(self.served, chat),
        ]
        app = make_app(endpoints, self.served)
        self.app: Any = HttpLimits(app, settings, self.served.tenants)

    def request(self, path: str, body: Any, method: str = "POST") -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                if isinstance(body, bytes):
                    return await client.request(method, path, content=body)
                return await client.request(method, path, json=body)

        return asyncio.run(asyncio.wait_for(send(), 30))

    def chat(self, content: str = "Hi", **fields: Any) -> Json:
        """One chat completion; its answer."""
        body = {"messages": [{"role": "user", "content": content}], **fields}
        response = self.request("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        answer: Json = response.json()
        return answer

    def chunks(self, content: str = "Hi", **fields: Any) -> list[Json]:
        """One streamed chat completion; its chunks, the mark of the end checked."""
        body = {"messages": [{"role": "user", "content": content}], "stream": True, **fields}
        return events_of(self.request("/v1/chat/completions", body))

    def refusal(self, path: str, body: Any, status: int = 400) -> Json:
        """The error that a request gets."""
        response = self.request(path, body)
        assert response.status_code == status, response.text
        error: Json = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def named_events(self, response: httpx.Response) -> list[Json]:
        """The events of a stream whose events are named by their type, without its comments."""
        assert response.status_code == 200, response.text
        found = []
        for block in response.text.split("\n\n"):
            if block and not block.startswith(":"):
                name, data = block.split("\n", 1)
                event = json.loads(data.removeprefix("data: "))
                assert name == f"event: {event['type']}"
                found.append(event)
        return found

    def prompt_text(self, index: int = -1) -> str:
        return str(self.tokenizer.decode(self.engine.submitted[index].prompt_ids))


def events_of(response: httpx.Response) -> list[Json]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def message_of(chunks: Sequence[Json], index: int = 0) -> Json:
    """The message that a stream's deltas of one choice add up to, as the official client does it."""
    message: Json = {"content": "", "reasoning_content": "", "tool_calls": [], "finish_reason": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or []:
                if call["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"name": call["function"]["name"], "arguments": "", "id": call["id"]})
                known = message["tool_calls"][call["index"]]
                known["arguments"] += call.get("function", {}).get("arguments", "")
                known["incomplete"] = known.get("incomplete", False) or call.get("incomplete", False)
            message["finish_reason"] = choice["finish_reason"] or message["finish_reason"]
    return message


@pytest.fixture
def make_client() -> Callable[..., Client]:
    return Client


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def merge_deltas() -> Callable[..., Json]:
    return message_of


@pytest.fixture
def read_events() -> Callable[[httpx.Response], list[Json]]:
    return events_of


@pytest.fixture
def replay() -> Callable[..., list[Output]]:
    return outputs_of
