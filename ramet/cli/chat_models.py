"""What `ramet chat` and `ramet bench` talk to: a model in this process, or a server's OpenAI API.

Both report how many tokens were cached. Not here: how answers are shown (`chat`, `bench`).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import httpx
import msgspec

from ramet.errors import ConfigError, EngineStopped, InvalidRequest
from ramet.lang.backends.http_loop import refusal_of
from ramet.lang.backends.sse import DONE, events_of
from ramet.lang.graph.sampling import Sampling

if TYPE_CHECKING:
    from ramet.runtime.engine.engine import Engine

Json = dict[str, Any]  # Any: JSON
Pieces = Generator[tuple[str, str], None, None]  # (reasoning, text) as they come; closing it aborts the request


@dataclass(slots=True)
class Reply:
    """One answer, while it arrives and afterwards. Times are in seconds. A token count is None where
    the server does not report it."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    started_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None  # from the start to the first token
    total_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)  # since the start, one for each increment

    def note(self) -> None:
        """Note the time at which the first token and the latest one arrived."""
        self.total_s = time.monotonic() - self.started_s
        self.arrivals_s.append(self.total_s)
        if self.first_s is None:
            self.first_s = self.total_s


class ChatModel(Protocol):
    """A model to talk to. `chat` and `complete` yield pieces of text and fill in `reply` as the pieces are read."""

    name: str

    def chat(self, messages: Sequence[Json], sampling: Sampling, reply: Reply) -> Pieces: ...

    def complete(self, prompt: str, sampling: Sampling, reply: Reply) -> Pieces: ...

    def close(self) -> None: ...


class LocalModel:
    """A model in this process. It keeps an answer's tokens, so that the next turn computes only the new tokens."""

    def __init__(self, model: str | None, config: Json, on_stage: Callable[[str], None] | None = None) -> None:
        from ramet.runtime.engine.engine import Engine
        from ramet.runtime.server.openai.conversations import Conversations

        self._engine: Engine = Engine(model, on_stage=on_stage, **config)
        self._conversations = Conversations(self._engine.tokenizer)
        self.name = model or self._engine.model.name

    def chat(self, messages: Sequence[Json], sampling: Sampling, reply: Reply) -> Pieces:
        from ramet.runtime.server.openai.reasoning import ReasoningSplitter, position_after

        prompt = self._conversations.prompt(list(messages))
        splitter = ReasoningSplitter(position_after(prompt.end))
        stops = self._engine.chat_template.stop_strings
        ids: list[int] = []
        with contextlib.closing(self._stream(prompt.ids, sampling, reply, ids, stops)) as pieces:
            for piece in pieces:
                yield self._said(reply, *splitter.push(piece))
        yield self._said(reply, *splitter.finish())
        if reply.finish_reason == "stop":
            self._conversations.remember(prompt, {"role": "assistant", "content": reply.text}, ids)

    def complete(self, prompt: str, sampling: Sampling, reply: Reply) -> Pieces:
        ids = self._engine.tokenizer.encode(prompt, add_special=True)
        with contextlib.closing(self._stream(ids, sampling, reply, [], ())) as pieces:
            for piece in pieces:
                yield self._said(reply, "", piece)

    def _said(self, reply: Reply, reasoning: str, text: str) -> tuple[str, str]:
        reply.reasoning += reasoning
        reply.text += text
        return reasoning, text

    def _stream(
        self, prompt_ids: list[int], sampling: Sampling, reply: Reply, ids: list[int], stops: tuple[str, ...]
    ) -> Generator[str, None, None]:
        room = max(1, self._engine.context_length - len(prompt_ids))
        limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        params = msgspec.structs.replace(sampling, max_tokens=limit, stop=stops).params()
        handle = self._engine.submit(prompt_ids, params)
        try:
            for output in handle:
                reply.note()
                ids += output.token_ids
                reply.prompt_tokens = output.usage.prompt_tokens
                reply.cached_tokens = output.usage.cached_tokens
                reply.completion_tokens = output.usage.completion_tokens
                reply.finish_reason = None if output.finish_reason is None else output.finish_reason.value
                yield output.text
        finally:
            if reply.finish_reason is None:
                handle.cancel()

    def close(self) -> None:
        self._engine.shutdown()


class RemoteModel:
    """A server with OpenAI's API. Raises ConfigError if no such server answers at `url`."""

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url is {url!r}, but must be an http:// address")
        base = url.rstrip("/")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(
            base_url=base if base.endswith("/v1") else f"{base}/v1",
            headers=headers,
            timeout=httpx.Timeout(600, connect=5),
            limits=httpx.Limits(max_connections=None),
        )
        try:
            answer = self._http.get("/models")
        except httpx.TransportError as error:
            self._http.close()
            raise ConfigError(f"no server answers at {url}: {error}; is `ramet serve` running?") from error
        if answer.status_code != 200:
            self._http.close()
            raise ConfigError(f"{url} answers {answer.status_code}: {_message(answer.content)}")
        self.name = model or str(answer.json()["data"][0]["id"])

    def chat(self, messages: Sequence[Json], sampling: Sampling, reply: Reply) -> Pieces:
        body = {"messages": list(messages), **self._fields(sampling)}
        for chunk in self._chunks("/chat/completions", body, reply):
            for choice in chunk["choices"]:
                reasoning = choice["delta"].get("reasoning_content") or ""
                text = choice["delta"].get("content") or ""
                reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
                if reasoning or text:
                    reply.note()
                    reply.reasoning += reasoning
                    reply.text += text
                    yield reasoning, text

    def complete(self, prompt: str, sampling: Sampling, reply: Reply) -> Pieces:
        for chunk in self._chunks("/completions", {"prompt": prompt, **self._fields(sampling)}, reply):
            for choice in chunk["choices"]:
                reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
                reply.note()
                reply.text += choice["text"]
                yield "", choice["text"]

    def _fields(self, sampling: Sampling) -> Json:
        return {"model": self.name, **sampling.said(), "stream": True, "stream_options": {"include_usage": True}}

    def _chunks(self, path: str, body: Json, reply: Reply) -> Iterator[Json]:
        try:
            with self._http.stream("POST", path, json=body) as answer:
                if answer.status_code != 200:
                    raise InvalidRequest(f"the server answers {answer.status_code}: {_message(answer.read())}")
                for chunk in _chunks_of(answer):
                    usage = chunk.get("usage")
                    if usage:
                        reply.prompt_tokens = usage["prompt_tokens"]
                        reply.completion_tokens = usage["completion_tokens"]
                        reply.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
                    yield chunk
        except httpx.TransportError as error:
            raise EngineStopped(f"the server is gone: {error or type(error).__name__}") from error

    def close(self) -> None:
        self._http.close()


def _chunks_of(answer: httpx.Response) -> Iterator[Json]:
    """The JSON of every event of a stream. Raises EngineStopped for an event that is an error."""
    for event in events_of(answer.iter_bytes()):
        if event.data == DONE:
            continue
        chunk: Json = json.loads(event.data)
        if "error" in chunk:
            raise EngineStopped(str(chunk["error"].get("message", chunk["error"])))
        yield chunk


def _message(content: bytes) -> str:
    """What an error's body says, or its beginning."""
    return refusal_of(content)[0] or content[:200].decode("utf-8", "replace")


def open_model(
    model: str | None,
    url: str | None,
    api_key: str | None,
    config: Json,
    on_stage: Callable[[str], None] | None = None,
) -> ChatModel:
    """Open the server at `url`, or without a `url` a model in this process.

    config: fields of EngineConfig. on_stage: as in `Engine`.
    """
    if url is None:
        return LocalModel(model, config, on_stage)
    if config:
        raise ConfigError(f"--{next(iter(config)).replace('_', '-')} is the server's affair; leave it out with --url")
    return RemoteModel(url, model, api_key)
