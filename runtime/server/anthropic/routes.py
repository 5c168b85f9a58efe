"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from ramet.runtime.server.anthropic.answer import (
    CountedTokens,
    MessageAnswer,
    MessageUsage,
    MessageWriter,
    StopReason,
    message_usage,
)
from ramet.runtime.server.anthropic.bodies import CountBody, MessagesBody
from ramet.runtime.server.anthropic.translation import chat_body
from ramet.runtime.server.openai.bodies import ChatBody
from ramet.runtime.server.openai.chat import ChatAnswer, ChatEndpoint
from ramet.runtime.server.routing import Endpoint
from ramet.runtime.server.sending import EventStream, Json, collected, named_events
from ramet.runtime.server.served_model import ServedModel

_TAG = "Anthropic"


class MessagesEndpoints:
    """Answers the Messages API for one server."""

    def __init__(self, served: ServedModel, chat: ChatEndpoint) -> None:
        self._served = served
        self._chat = chat

    async def create(self, request: Request, body: MessagesBody) -> Response | MessageAnswer:
        """Answer a conversation; with `stream` as server-sent events."""
        self._check_model(body.model)
        answer = await self._chat.begin(request, self._chat_body(body), "msg", clamps=True)
        message = MessageAnswer(id=answer.id, model=answer.model, content=[], usage=MessageUsage(0, 0, 0, 0))
        writer = MessageWriter(message)
        events = self._events(answer, writer, body)
        if body.stream:
            return EventStream(named_events(events), answer.close)
        await collected(request, events)
        return message

    async def count(self, request: Request, body: CountBody) -> CountedTokens:
        """Return the number of tokens of the prompt that a request would have."""
        self._check_model(body.model)
        return CountedTokens(input_tokens=await self._chat.count_prompt(request, self._chat_body(body)))

    def _chat_body(self, body: CountBody) -> ChatBody:
        return chat_body(body, thinks=self._chat.thinks)

    def _check_model(self, name: str) -> None:
        if not name.startswith("claude-"):
            self._served.adapter_of(name)

    async def _events(
        self, answer: ChatAnswer, writer: MessageWriter, body: MessagesBody
    ) -> AsyncGenerator[Json, None]:
        """Yield the events of an answer while it is written. The first one waits for the prompt's token counts."""
        progress = answer.progress[0]
        is_begun = False
        async with contextlib.aclosing(answer.outputs()) as outputs:
            async for index, output in outputs:
                deltas = answer.take(index, output)
                if not is_begun:
                    is_begun = True
                    writer.message.usage = message_usage(answer.usage())
                    for first in writer.begin():
                        yield first
                for written in writer.push(deltas):
                    yield written
        await answer.remember([0])
        matched = None if progress.last is None else progress.last.stop_match
        sequence = matched if isinstance(matched, str) and matched in (body.stop_sequences or ()) else None
        for last in writer.finish(answer.usage(), _stop_reason(progress.finish_reason, sequence), sequence):
            yield last


def _stop_reason(finish_reason: str, sequence: str | None) -> StopReason:
    if sequence is not None:
        return "stop_sequence"
    reasons: dict[str, StopReason] = {"length": "max_tokens", "tool_calls": "tool_use"}
    return reasons.get(finish_reason, "end_turn")


def anthropic_endpoints(served: ServedModel, chat: ChatEndpoint) -> list[Endpoint]:
    """The endpoints under /v1/messages."""
    messages = MessagesEndpoints(served, chat)
    return [
        Endpoint(
            "POST",
            "/v1/messages",
            messages.create,
            body=MessagesBody,
            answer=MessageAnswer,
            errors=(404, 429, 503),
            has_stream=True,
            tag=_TAG,
        ),
        Endpoint(
            "POST",
            "/v1/messages/count_tokens",
            messages.count,
            body=CountBody,
            answer=CountedTokens,
            errors=(404, 429, 503),
            tag=_TAG,
        ),
    ]
