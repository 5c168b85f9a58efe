"""The request bodies of the Messages API.

Clients send back the blocks of earlier answers, so unknown fields of a block are ignored. Unknown fields of the body
are refused by name. `cache_control` is accepted everywhere and has no effect: prefixes are always cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ramet.runtime.server.openai.bodies import ToolName
from ramet.runtime.server.sampling_fields import MAX_STOPS, MessagesValues
from ramet.runtime.server.sending import Json
from ramet.runtime.server.validation import Echoed, FieldRule, OnlyTrue, Strict
from ramet.runtime.types import MAX_INT32


class TextBlock(Echoed):
    type: Literal["text"]
    text: str


class ThinkingBlock(Echoed):
    """Thinking of an earlier answer. `signature` is ours or another server's: it is not looked at.

    Redacted thinking, which only its own server can read, is left out.
    """

    type: Literal["thinking", "redacted_thinking"]
    thinking: str = ""


class ToolUseBlock(Echoed):
    type: Literal["tool_use"]
    id: str
    name: str
    input: Json


class ToolResultBlock(Echoed):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: str | list[Block]


class Message(Strict):
    role: Literal["user", "system"]
    content: str | list[Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]]


class OwnTool(Echoed):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: Json
    strict: bool | None = None


class ServerTool(Echoed):
    """A tool that the provider of a model would run. Here nobody runs it, so it is not offered to the model."""

    type: str = Field(pattern=r"^(web_search|web_fetch|tool_search_tool)_\w+$")
    name: str


def _tool_kind(value: Any) -> str:  # Any: JSON, or a tool
    kind = value.get("type") if isinstance(value, dict) else None
    return "offered" if isinstance(value, ServerTool) or kind not in (None, "custom") else "own"


Tool = Annotated[Annotated[OwnTool, Tag("own")] | Annotated[ServerTool, Tag("offered")], Discriminator(_tool_kind)]


class ToolChoice(Strict):
    """`auto`, `any` (some tool is called), `tool` (this one), `none`."""

    rules = (
        FieldRule(
            "a tool_choice of type 'tool' names one", ({"type": ("auto", "any", "none")}, {"name": "given"}), ("name",)
        ),
    )

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Strict):
    """`enabled` and `disabled` are passed to templates that can turn thinking on and off; `adaptive` leaves it to them.

    `budget_tokens` must be below `max_tokens`. Thinking past it is ended in the words of the chat template.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    display: Literal["summarized", "omitted"] | None = None


class OutputSchema(Strict):
    type: Literal["json_schema"]
    json_schema: Json | OnlyTrue = Field(alias="schema")


class OutputConfig(Strict):
    """`effort`: passed to templates that know it."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputSchema | None = None
    task_budget: Json | None = None


class CountBody(Strict):
    """`POST /v1/messages/count_tokens`."""

    rules = (
        FieldRule(
            "tool_choice asks for a call but there are no tools",
            ({"tool_choice.type": (None, "auto", "none")}, {"tools": "some"}),
            ("tool_choice",),
        ),
    )

    model: Annotated[str, Field(json_schema_extra={"format": "claude-name"})]
    messages: list[Annotated[AssistantMessage | Message, Field(discriminator="role")]] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = Field(default=None, max_length=1024)
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputSchema | None = None
    cache_control: Json | None = None
    context_management: Json | None = None
    mcp_servers: Annotated[list[Json], Field(max_length=0)] | None = None
    speed: Literal["standard"] | None = None


class MessagesBody(CountBody, MessagesValues):
    """`POST /v1/messages`. If `max_tokens` does not fit into the context, the rest of the context is the limit.

    `model`: the served model's name, `default`, or any name that begins with `claude-`, because some clients know no
    others. `context_management`: nothing is ever cleared from a conversation, so its edits have no effect.
    """

    max_tokens: int = Field(ge=1, le=MAX_INT32)
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=10_000)]] | None = Field(
        default=None, max_length=MAX_STOPS
    )
    stream: bool | None = None
    metadata: Json | None = Field(default=None, description="a label, without effect")
    service_tier: Literal["auto", "standard_only"] | None = None
    container: None = None
    inference_geo: str | None = None


def text_of(content: str | Sequence[TextBlock] | None, between: str = "") -> str:
    """Return content as one text."""
    if content is None or isinstance(content, str):
        return content or ""
    return between.join(block.text for block in content)
