"""A Messages request in the form of a chat completion: blocks become messages and calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from ramet.runtime.server.anthropic.bodies import (
    AssistantMessage,
    Block,
    CountBody,
    MessagesBody,
    OutputSchema,
    OwnTool,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    text_of,
)
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.openai.bodies import (
    ChatBody,
    ChatMessage,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedTool,
    SchemaFormat,
    ToolDefinition,
)
from ramet.runtime.server.sampling_fields import MESSAGES_VALUES
from ramet.runtime.server.sending import Json
from ramet.runtime.server.validation import made, no_tool_to_call


def chat_body(body: CountBody, *, thinks: bool) -> ChatBody:
    """Return the chat completion that answers a request. Raises HttpError for fields that contradict each other.

    `thinks`: the model's chat template marks reasoning. A budget of thinking means nothing to other models.
    """
    tools = [_function(tool) for tool in body.tools or () if isinstance(tool, OwnTool)]
    choice = body.tool_choice
    schema = body.output_format or (None if body.output_config is None else body.output_config.format)
    values: Json = {}
    if isinstance(body, MessagesBody):
        values = {
            "max_tokens": body.max_tokens,
            "stop": body.stop_sequences,
            "stream": body.stream,
            **{name: getattr(body, name) for name in MESSAGES_VALUES},
        }
        budget = None if body.thinking is None else body.thinking.budget_tokens
        if budget is not None and budget >= body.max_tokens:
            raise HttpError(
                400,
                f"thinking.budget_tokens is {budget:,}, but must be below max_tokens ({body.max_tokens:,})",
                param="thinking.budget_tokens",
            )
        if thinks and body.thinking is not None and body.thinking.type == "enabled":
            values["max_thinking_tokens"] = budget
    return made(
        ChatBody,
        model=None if body.model.startswith("claude-") else body.model,
        messages=messages_of(body),
        tools=tools or None,
        tool_choice=_tool_choice(body, [tool.function.name for tool in tools]),
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        response_format=None if schema is None else _response_format(schema),
        reasoning_effort=None if body.output_config is None else body.output_config.effort,
        chat_template_kwargs=_template_variables(body),
        **values,
    )


def messages_of(body: CountBody) -> list[ChatMessage]:
    """Return the conversation as chat messages."""
    system = text_of(body.system, "\n\n")
    messages: list[Json] = [{"role": "system", "content": system}] if system else []
    for message in body.messages:
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        elif isinstance(message, AssistantMessage):
            messages.append(_answer(message.content))
        else:
            messages += _results_and_text(message.role, message.content)
    return [ChatMessage.model_validate(message) for message in messages]


def _answer(blocks: Sequence[Block]) -> Json:
    """Return an earlier answer as one message."""
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    message: Json = {"role": "assistant", "content": "".join(texts)}
    thinking = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    if thinking:
        message["reasoning_content"] = thinking
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)},
        }
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    if calls:
        message["tool_calls"] = calls
    return message


def _results_and_text(role: str, blocks: Sequence[TextBlock | ToolResultBlock]) -> list[Json]:
    """Return the results of tools as messages of their own, and the texts between them."""
    messages: list[Json] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            messages.append({"role": "tool", "content": text_of(block.content), "tool_call_id": block.tool_use_id})
        elif messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{block.text}"
        else:
            messages.append({"role": role, "content": block.text})
    return messages or [{"role": role, "content": ""}]


def _function(tool: OwnTool) -> ToolDefinition:
    schema = {key: value for key, value in tool.input_schema.items() if key != "$schema"}
    function = FunctionDefinition(name=tool.name, description=tool.description, parameters=schema, strict=tool.strict)
    return ToolDefinition(type="function", function=function)


def _tool_choice(body: CountBody, names: Sequence[str]) -> Literal["none", "auto", "required"] | NamedTool | None:
    choice = body.tool_choice
    if choice is None or (choice.type == "auto" and not names):
        return None
    if choice.type == "tool":
        if choice.name is None or choice.name not in names:
            known = ", ".join(names) or "none"
            raise HttpError(
                400, f"tool_choice.name is {choice.name!r}; the tools are {known}", param="tool_choice.name"
            )
        return NamedTool(type="function", function=FunctionName(name=choice.name))
    if choice.type == "any" and not names:
        raise no_tool_to_call(tool.type or "custom" for tool in body.tools or ())
    return "required" if choice.type == "any" else choice.type


def _response_format(asked: OutputSchema) -> JsonSchemaFormat:
    schema = SchemaFormat(name="output", schema=asked.json_schema, strict=True)
    return JsonSchemaFormat(type="json_schema", json_schema=schema)


def _template_variables(body: CountBody) -> Json | None:
    thinking = body.thinking
    if thinking is None or thinking.type == "adaptive":
        return None
    return {"enable_thinking": thinking.type == "enabled"}
