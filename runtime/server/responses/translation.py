"""A Responses request in the form of a chat completion: items become messages, tools become functions."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.openai.bodies import (
    AllowedFunctions,
    AllowedTools,
    ChatBody,
    ChatMessage,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedTool,
    ResponseFormat,
    SchemaFormat,
    ToolDefinition,
)
from ramet.runtime.server.responses.bodies import (
    CallItem,
    ChosenTool,
    ChosenTools,
    Content,
    CustomCallItem,
    CustomTool,
    FunctionTool,
    Item,
    MessageItem,
    NamespaceTool,
    ReasoningItem,
    ReferenceItem,
    ResponsesBody,
    TextSchema,
)
from ramet.runtime.server.sampling_fields import OPENAI_VALUES
from ramet.runtime.server.sending import Json
from ramet.runtime.server.validation import made, no_tool_to_call

INPUT = "input"  # the only argument of the function that stands for a custom tool
_SEALED = "ramet1."  # begins reasoning that a client carries for us


@dataclass(frozen=True, slots=True)
class OfferedTool:
    """A tool as its client knows it, and the function that the model is offered for it."""

    name: str
    namespace: str | None
    is_custom: bool
    function: FunctionDefinition


Functions = dict[str, OfferedTool]  # by the function's name, which names its namespace, too


def function_name(name: str, namespace: str | None) -> str:
    """Return the name under which the model sees a tool."""
    return name if namespace is None else f"{namespace}.{name}"


def functions_of(body: ResponsesBody) -> Functions:
    """Return the tools that the model is offered. Raises HttpError for a tool that is offered twice."""
    functions: Functions = {}
    for index, tool in enumerate(body.tools or ()):
        if isinstance(tool, NamespaceTool):
            for inner in tool.tools:
                _offer(functions, inner, tool.name, f"tools[{index}]")
        elif isinstance(tool, FunctionTool | CustomTool):
            _offer(functions, tool, None, f"tools[{index}]")
    return functions


def _offer(functions: Functions, tool: FunctionTool | CustomTool, namespace: str | None, where: str) -> None:
    name = function_name(tool.name, namespace)
    if name in functions:
        raise HttpError(400, f"{where} has the name {name!r}, which another tool has; names must differ", param=where)
    is_custom = isinstance(tool, CustomTool)
    parameters = _input_schema(tool) if isinstance(tool, CustomTool) else tool.parameters
    strict = True if isinstance(tool, CustomTool) else tool.strict
    definition = made(FunctionDefinition, name=name, description=tool.description, parameters=parameters, strict=strict)
    functions[name] = OfferedTool(tool.name, namespace, is_custom, definition)


def _input_schema(tool: CustomTool) -> Json:
    text: Json = {"type": "string"}
    if tool.format is not None and tool.format.type == "grammar":
        text["pattern"] = f"^(?:{tool.format.definition})$"
    return {"type": "object", "properties": {INPUT: text}, "required": [INPUT], "additionalProperties": False}


def chat_body(body: ResponsesBody, items: Sequence[Item], functions: Functions) -> ChatBody:
    """Return the chat completion that answers a request. `items`: the whole conversation, without references."""
    wants_logprobs = "message.output_text.logprobs" in (body.include or ()) or body.top_logprobs is not None
    return made(
        ChatBody,
        model=body.model,
        messages=messages_of(body.instructions, items),
        max_tokens=body.max_output_tokens,
        logprobs=True if wants_logprobs else None,
        top_logprobs=body.top_logprobs,
        tools=[ToolDefinition(type="function", function=tool.function) for tool in functions.values()] or None,
        tool_choice=_tool_choice(body, functions),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_response_format(body),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        chat_template_kwargs=body.chat_template_kwargs,
        priority=body.priority,
        cache_salt=body.cache_salt,
        stream=body.stream,
        **{name: getattr(body, name) for name in OPENAI_VALUES},
    )


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[ChatMessage]:
    """Return the conversation as messages. Leading instructions are one message, as most chat templates want it.

    An answer's reasoning, text and calls are one message. Raises HttpError for a conversation without content.
    """
    messages: list[Json] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    reasoning = ""
    for index, item in enumerate(items):
        assert not isinstance(item, ReferenceItem)
        if isinstance(item, ReasoningItem):
            reasoning += _reasoning_text(item, f"input[{index}]")
            continue
        last = messages[-1] if messages else None
        if isinstance(item, MessageItem):
            text = _text(item.content)
            role = "system" if item.role == "developer" else item.role
            if role == "system" and last is not None and all(m["role"] == "system" for m in messages):
                last["content"] += f"\n\n{text}"
                continue
            messages.append({"role": role, "content": text})
        elif isinstance(item, CallItem | CustomCallItem):
            if last is None or last["role"] != "assistant" or reasoning:
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(_past_call(item))
        else:
            messages.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
        if reasoning and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = reasoning
        reasoning = ""
    if not messages:
        raise HttpError(400, "input is empty; give at least one message", param="input")
    return [ChatMessage.model_validate(message) for message in messages]


def _past_call(item: CallItem | CustomCallItem) -> Json:
    arguments = item.arguments if isinstance(item, CallItem) else json.dumps({INPUT: item.input}, ensure_ascii=False)
    name = function_name(item.name, item.namespace)
    return {"id": item.call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _text(content: str | Sequence[Content]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _reasoning_text(item: ReasoningItem, where: str) -> str:
    if item.content:
        return _text(item.content)
    return unsealed(item.encrypted_content, where) if item.encrypted_content else ""


def sealed(reasoning: str) -> str:
    """Return reasoning as the opaque text that a client keeps for a server that stores nothing."""
    return _SEALED + base64.urlsafe_b64encode(reasoning.encode()).decode()


def unsealed(text: str, where: str) -> str:
    """Return the reasoning in a text of `sealed`. Raises HttpError if it is another server's."""
    try:
        if not text.startswith(_SEALED):
            raise ValueError
        return base64.b64decode(text[len(_SEALED) :], altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error):
        name = f"{where}.encrypted_content"
        raise HttpError(400, f"{name} was not made by this server; leave the item out", param=name) from None


def _tool_choice(
    body: ResponsesBody, functions: Functions
) -> Literal["none", "auto", "required"] | NamedTool | AllowedTools | None:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        if not functions and choice == "required":
            raise no_tool_to_call(tool.type for tool in body.tools or ())
        # Only tools that nobody runs here were offered, so the model may call none of them.
        return None if not functions and choice == "auto" else choice
    if isinstance(choice, ChosenTools):
        tools = [_named(tool, functions) for tool in choice.tools]
        return AllowedTools(type="allowed_tools", allowed_tools=AllowedFunctions(mode=choice.mode, tools=tools))
    return _named(choice, functions)


def _named(tool: ChosenTool, functions: Functions) -> NamedTool:
    name = function_name(tool.name, tool.namespace)
    if name not in functions:
        names = ", ".join(functions) or "none"
        raise HttpError(400, f"tool_choice names {name!r}; the tools are {names}", param="tool_choice")
    return NamedTool(type="function", function=FunctionName(name=name))


def _response_format(body: ResponsesBody) -> ResponseFormat | None:
    asked = None if body.text is None else body.text.format
    if isinstance(asked, TextSchema):
        schema = SchemaFormat(
            name=asked.name, description=asked.description, schema=asked.json_schema, strict=asked.strict
        )
        return JsonSchemaFormat(type="json_schema", json_schema=schema)
    return asked
