"""The answer of the Responses API: output items, the events of a stream, and the response as a whole.

A stream and a whole answer come from the same writer, so they cannot differ.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET

from ramet.runtime.server.openai.answers import (
    ChatLogprob,
    ClosedByBudget,
    CompletionTokensDetails,
    Count,
    PromptTokensDetails,
    TokenUsage,
)
from ramet.runtime.server.responses.bodies import ResponsesBody
from ramet.runtime.server.responses.translation import INPUT, Functions, sealed
from ramet.runtime.server.sending import AnswerStruct, Json

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ENDED = frozenset({"completed", "incomplete", "failed", "cancelled"})


class ResponseUsage(AnswerStruct):
    input_tokens: Count
    input_tokens_details: PromptTokensDetails
    output_tokens: Count
    output_tokens_details: CompletionTokensDetails
    total_tokens: Count
    closed_by_budget: ClosedByBudget = UNSET


class ResponseError(AnswerStruct):
    code: str
    message: str


class IncompleteDetails(AnswerStruct):
    reason: Literal["max_output_tokens", "content_filter"]


class ResponseObject(AnswerStruct, kw_only=True):
    """A response. `output`: items of the types `reasoning`, `message`, `function_call` and `custom_tool_call`.

    `incomplete_details`: set if the answer was cut off. The other fields return what was asked.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[Json]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: Json
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: Json
    tool_choice: str | Json
    tools: list[Json]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]


def response_usage(usage: TokenUsage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=usage.prompt_tokens_details,
        output_tokens=usage.completion_tokens,
        output_tokens_details=usage.completion_tokens_details,
        total_tokens=usage.total_tokens,
        closed_by_budget=usage.closed_by_budget,
    )


def new_response(body: ResponsesBody, response_id: str, model: str, status: Status) -> ResponseObject:
    """Return the response to a request, before it has any output."""
    reasoning, text = body.reasoning, body.text
    shown = None if text is None or text.format is None else text.format.model_dump(by_alias=True, exclude_none=True)
    choice = body.tool_choice or "auto"
    values: dict[str, float | None] = {name: getattr(body, name) for name in ("temperature", "top_p")}
    return ResponseObject(
        id=response_id,
        created_at=int(time.time()),
        status=status,
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={
            "effort": None if reasoning is None else reasoning.effort,
            "summary": None if reasoning is None else reasoning.summary or reasoning.generate_summary,
        },
        safety_identifier=body.safety_identifier,
        store=body.store is not False,
        temperature=1.0 if values["temperature"] is None else values["temperature"],
        text={
            "format": shown or {"type": "text"},
            "verbosity": "medium" if text is None or text.verbosity is None else text.verbosity,
        },
        tool_choice=choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
        tools=[_shown_tool(tool.model_dump(by_alias=True)) for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if values["top_p"] is None else values["top_p"],
        truncation=body.truncation or "disabled",
        user=body.user,
        metadata=body.metadata or {},
    )


def _shown_tool(tool: Json) -> Json:
    """Return a tool as OpenAI's clients read it: a function's fields are there even if they are null."""
    needed = {"name", "parameters", "strict"} if tool["type"] == "function" else set()
    return {key: value for key, value in tool.items() if value is not None or key in needed}


class ResponseWriter:
    """Writes one response: takes the deltas of a chat answer, and returns events. Owner: the answer's coroutine.

    `response` is the response so far. Every event has the next sequence number.
    """

    def __init__(self, body: ResponsesBody, response: ResponseObject, functions: Functions) -> None:
        self.response = response
        self._functions = functions
        reasoning = body.reasoning
        summary = None if reasoning is None else reasoning.summary or reasoning.generate_summary
        self._is_summarised = summary not in (None, "none")
        self._is_sealed = "reasoning.encrypted_content" in (body.include or ())
        self._has_logprobs = "message.output_text.logprobs" in (body.include or ()) or body.top_logprobs is not None
        self._number = 0
        self._item: Json | None = None  # the one that is being written, the last of the output
        self._logprobs: list[Json] = []  # of its text so far
        self._text = ""  # of the open item: reasoning, text, arguments

    # -- events

    def begin(self) -> list[Json]:
        """Return the first events."""
        self.response.status = "in_progress"
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def push(self, deltas: Sequence[Json], logprobs: Sequence[ChatLogprob] = ()) -> list[Json]:
        """Add deltas of a chat answer. `logprobs`: of the tokens that they complete."""
        events: list[Json] = []
        for delta in deltas:
            if "reasoning_content" in delta:
                events += self._reasoning(delta["reasoning_content"])
            elif "content" in delta:
                events += self._said(delta["content"], logprobs)
                logprobs = ()
            else:
                for call in delta["tool_calls"]:
                    events += self._called(call)
        return events

    def finish(self, usage: TokenUsage, *, is_cut: bool) -> list[Json]:
        """End the response. `is_cut`: a limit on tokens ended it."""
        response = self.response
        events = self._close("incomplete" if is_cut else "completed")
        response.usage = response_usage(usage)
        response.status = "incomplete" if is_cut else "completed"
        if is_cut:
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        else:
            response.completed_at = int(time.time())
        return [*events, self._whole(f"response.{response.status}")]

    def fail(self, code: str, message: str) -> list[Json]:
        """End the response with an error."""
        self._close("incomplete")
        self.response.status = "failed"
        self.response.error = ResponseError(code, message)
        return [self._whole("response.failed")]

    def cancel(self) -> None:
        """End the response because its client wants no more of it."""
        self._close("incomplete")
        self.response.status = "cancelled"

    def _event(self, kind: str, **fields: object) -> Json:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _whole(self, kind: str) -> Json:
        # Encoded now: the response changes while the event waits to be sent.
        return self._event(kind, response=msgspec.to_builtins(self.response))

    def _of_item(self, kind: str, **fields: object) -> Json:
        assert self._item is not None
        place = len(self.response.output) - 1
        return self._event(kind, item_id=self._item["id"], output_index=place, **fields)

    # -- items

    def _open(self, item: Json) -> list[Json]:
        events = self._close("completed")
        self._item = item
        self._text = ""
        self._logprobs = []
        self.response.output.append(item)
        place = len(self.response.output) - 1
        return [*events, self._event("response.output_item.added", output_index=place, item=_copied(item))]

    def _reasoning(self, text: str) -> list[Json]:
        events: list[Json] = []
        if self._item is None or self._item["type"] != "reasoning":
            events = self._open({"id": _new_id("rs"), "type": "reasoning", "summary": [], "status": "in_progress"})
            if self._is_summarised:
                part = {"type": "summary_text", "text": ""}
                events.append(self._of_item("response.reasoning_summary_part.added", summary_index=0, part=part))
            else:
                part = {"type": "reasoning_text", "text": ""}
                events.append(self._of_item("response.content_part.added", content_index=0, part=part))
        self._text += text
        if self._is_summarised:
            return [*events, self._of_item("response.reasoning_summary_text.delta", summary_index=0, delta=text)]
        return [*events, self._of_item("response.reasoning_text.delta", content_index=0, delta=text)]

    def _said(self, text: str, logprobs: Sequence[ChatLogprob]) -> list[Json]:
        events: list[Json] = []
        if self._item is None or self._item["type"] != "message":
            item = {
                "id": _new_id("msg"),
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
            events = self._open(item)
            part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
            events.append(self._of_item("response.content_part.added", content_index=0, part=part))
        self._text += text
        new: list[Json] = [msgspec.to_builtins(entry) for entry in logprobs] if self._has_logprobs else []
        self._logprobs += new
        return [*events, self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=new)]

    def _called(self, call: Json) -> list[Json]:
        events: list[Json] = []
        function = call.get("function", {})
        if "id" in call:
            offered = self._functions.get(function["name"])
            is_custom = offered is not None and offered.is_custom
            item: Json = {
                "id": _new_id("ctc" if is_custom else "fc"),
                "type": "custom_tool_call" if is_custom else "function_call",
                "status": "in_progress",
                "call_id": call["id"],
                "name": function["name"] if offered is None else offered.name,
                "input" if is_custom else "arguments": "",
            }
            if offered is not None and offered.namespace is not None:
                item["namespace"] = offered.namespace
            events = self._open(item)
        text = function.get("arguments", "")
        self._text += text
        assert self._item is not None
        if text and self._item["type"] == "function_call":
            events.append(self._of_item("response.function_call_arguments.delta", delta=text))
        if call.get("incomplete"):
            self._item["status"] = "incomplete"
        return events

    def _close(self, status: str) -> list[Json]:
        """End the open item, if there is one."""
        item, text = self._item, self._text
        if item is None:
            return []
        if item["status"] != "incomplete":
            item["status"] = status
        if item["type"] == "reasoning":
            events = self._close_reasoning(item, text)
        elif item["type"] == "message":
            part = {"type": "output_text", "annotations": [], "logprobs": self._logprobs, "text": text}
            item["content"] = [part]
            events = [
                self._of_item("response.output_text.done", content_index=0, text=text, logprobs=self._logprobs),
                self._of_item("response.content_part.done", content_index=0, part=part),
            ]
        elif item["type"] == "function_call":
            item["arguments"] = text
            events = [self._of_item("response.function_call_arguments.done", arguments=text, name=item["name"])]
        else:
            item["input"] = _input_of(text) if item["status"] == "completed" else ""
            events = [
                self._of_item("response.custom_tool_call_input.delta", delta=item["input"]),
                self._of_item("response.custom_tool_call_input.done", input=item["input"]),
            ]
        place = len(self.response.output) - 1
        events.append(self._event("response.output_item.done", output_index=place, item=_copied(item)))
        self._item = None
        return events

    def _close_reasoning(self, item: Json, text: str) -> list[Json]:
        item["content"] = [{"type": "reasoning_text", "text": text}]
        if self._is_sealed:
            item["encrypted_content"] = sealed(text)
        if not self._is_summarised:
            return [
                self._of_item("response.reasoning_text.done", content_index=0, text=text),
                self._of_item("response.content_part.done", content_index=0, part=item["content"][0]),
            ]
        item["summary"] = [{"type": "summary_text", "text": text}]
        return [
            self._of_item("response.reasoning_summary_text.done", summary_index=0, text=text),
            self._of_item("response.reasoning_summary_part.done", summary_index=0, part=item["summary"][0]),
        ]


def _copied(item: Json) -> Json:
    return {key: list(value) if isinstance(value, list) else value for key, value in item.items()}


def _input_of(arguments: str) -> str:
    """Return a custom tool's input from the arguments of its function."""
    text: str = json.loads(arguments)[INPUT]
    return text


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
