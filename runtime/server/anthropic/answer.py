"""The answer of the Messages API: content blocks, the events of a stream, and the message as a whole.

A stream and a whole answer come from the same writer, so they cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ramet.runtime.server.openai.answers import ClosedByBudget, Count, PromptMiss, TokenUsage
from ramet.runtime.server.sending import AnswerStruct, Json

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(AnswerStruct):
    """The prompt has `input_tokens` and `cache_read_input_tokens` together."""

    input_tokens: Count
    cache_creation_input_tokens: Count
    cache_read_input_tokens: Annotated[int, Meta(ge=0, description="tokens of the prompt that were not computed again")]
    output_tokens: Count
    closed_by_budget: ClosedByBudget = UNSET
    ramet: PromptMiss | UnsetType = UNSET


class MessageAnswer(AnswerStruct, kw_only=True):
    """`content`: blocks of the types `thinking`, `text` and `tool_use`."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Json]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class CountedTokens(AnswerStruct):
    input_tokens: Count


def message_usage(usage: TokenUsage) -> MessageUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return MessageUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
        closed_by_budget=usage.closed_by_budget,
        ramet=usage.prompt_tokens_details.ramet,
    )


class MessageWriter:
    """Writes one message: takes the deltas of a chat answer, and returns events. Owner: the answer's coroutine."""

    def __init__(self, message: MessageAnswer) -> None:
        self.message = message
        self._text = ""  # of the open block
        self._is_open = False

    def begin(self) -> list[Json]:
        """Return the first events."""
        return [{"type": "message_start", "message": msgspec.to_builtins(self.message)}, {"type": "ping"}]

    def push(self, deltas: Sequence[Json]) -> list[Json]:
        """Add deltas of a chat answer."""
        events: list[Json] = []
        for delta in deltas:
            if "reasoning_content" in delta:
                text = delta["reasoning_content"]
                events += self._opened({"type": "thinking", "thinking": "", "signature": ""})
                events.append(self._added({"type": "thinking_delta", "thinking": text}, text))
            elif "content" in delta:
                events += self._opened({"type": "text", "text": ""})
                events.append(self._added({"type": "text_delta", "text": delta["content"]}, delta["content"]))
            else:
                for call in delta["tool_calls"]:
                    events += self._called(call)
        return events

    def finish(self, usage: TokenUsage, stop_reason: StopReason, stop_sequence: str | None) -> list[Json]:
        """End the message."""
        events = self._close()
        message = self.message
        message.usage, message.stop_reason, message.stop_sequence = message_usage(usage), stop_reason, stop_sequence
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        used = msgspec.to_builtins(message.usage)
        return [*events, {"type": "message_delta", "delta": delta, "usage": used}, {"type": "message_stop"}]

    def _called(self, call: Json) -> list[Json]:
        events: list[Json] = []
        function = call.get("function", {})
        if "id" in call:
            events = self._opened({"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}})
        text = function.get("arguments", "")
        if text:
            events.append(self._added({"type": "input_json_delta", "partial_json": text}, text))
        return events

    def _opened(self, block: Json) -> list[Json]:
        """Open a block, unless one of this type is open. Every call has a block of its own."""
        content = self.message.content
        if self._is_open and content[-1]["type"] == block["type"] != "tool_use":
            return []
        events = self._close()
        content.append(block)
        self._is_open, self._text = True, ""
        return [*events, {"type": "content_block_start", "index": len(content) - 1, "content_block": dict(block)}]

    def _added(self, delta: Json, text: str) -> Json:
        self._text += text
        return {"type": "content_block_delta", "index": len(self.message.content) - 1, "delta": delta}

    def _close(self) -> list[Json]:
        """End the open block, if there is one."""
        if not self._is_open:
            return []
        content, text = self.message.content, self._text
        block = content[-1]
        self._is_open = False
        index = len(content) - 1
        events: list[Json] = []
        if block["type"] == "tool_use":
            block["input"] = _object(text)
        else:
            block[block["type"]] = text
        if block["type"] == "thinking":
            block["signature"] = "ramet"
            signed = {"type": "signature_delta", "signature": block["signature"]}
            events.append({"type": "content_block_delta", "index": index, "delta": signed})
        return [*events, {"type": "content_block_stop", "index": index}]


def _object(arguments: str) -> Json:
    """Return the arguments of a call. A call that was cut off has none: the stop reason says so."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
