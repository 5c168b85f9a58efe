"""The bodies of requests that OpenAI's API defines.

Not here: sampling and constraint fields (`sampling_fields`), answers (`answers`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ramet.runtime.server.responses import Json
from ramet.runtime.server.sampling_fields import MAX_TOP_LOGPROBS, SamplingFields
from ramet.runtime.server.validation import OnlyTrue, Strict
from ramet.runtime.types import MAX_INT32


class TextPart(Strict):
    """A part of a message's content. `cache_control`: accepted for clients that mark caching; prefixes always are."""

    type: Literal["text"]
    text: str
    cache_control: Json | None = None


class PastFunction(Strict):
    name: str
    arguments: str = Field(description="JSON text")


class PastCall(Strict):
    """A call in the history. `index` and `incomplete` are what streams and cut calls carry; the prompt has neither."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: PastFunction
    index: int | None = None
    incomplete: bool | None = None


class ChatMessage(Strict):
    """One message. `refusal`, `annotations`, `audio` and `function_call` are there to echo an answer: null or empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: Annotated[list[Json], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    def plain(self) -> Json:
        """The message as chat templates read it: fields that are set, `developer` as `system`, content as text."""
        message: Json = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        for field in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(self, field)
            if value is not None:
                message[field] = value
        if self.tool_calls:
            message["tool_calls"] = [
                call.model_dump(include={"id", "type", "function"}, exclude_none=True) for call in self.tool_calls
            ]
        return message

    @property
    def text(self) -> str:
        """The content; a message without one is empty."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class FunctionDefinition(Strict):
    """`strict`: where all tools say so, properties come in their schema's order; arguments match it in any case."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class ToolDefinition(Strict):
    type: Literal["function"]
    function: FunctionDefinition

    def plain(self) -> Json:
        """The tool as chat templates read it: always in this order, so that the prompt stays the same."""
        function: Json = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
    """`name` and `description` are labels. The schema is enforced whatever `strict` says.

    `strict`: properties come in the schema's order, and no others than those it names; without it in any order.
    """

    name: str = Field(max_length=256)
    description: str | None = None
    json_schema: Json | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: SchemaFormat


class StructuralTagFormat(Strict):
    """`structures` and `triggers` as in SGLang and vLLM, or XGrammar's `format` of triggered tags."""

    type: Literal["structural_tag"]
    structures: list[Json] | None = None
    triggers: list[str] | None = None
    format: Json | None = None


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat, Field(discriminator="type")
]


class ChatBody(SamplingFields):
    """`POST /v1/chat/completions`. `max_completion_tokens` is the newer name of `max_tokens`.

    `history`: `append` continues an earlier answer of this server from the tokens that were generated, even where the
    chat template would now write it differently (without its reasoning); `render` renders the history anew.
    `separate_reasoning`: false leaves `<think>` parts in the content. `reasoning_effort`: given to templates that read
    it; `none` turns off what a template calls enable_thinking. What a template reads neither way is refused.
    """

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[ToolDefinition] | None = Field(default=None, max_length=1024)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: OnlyTrue | None = None
    chat_template_kwargs: Json | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    history: Literal["append", "render"] | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionBody(SamplingFields):
    """`POST /v1/completions`. Special tokens spelled in a text prompt are those tokens: the caller writes all of it.

    `logprobs`: that many of the likeliest tokens beside the chosen one; with `echo`, 0 only (prompt tokens are scored,
    their alternatives are not).
    """

    # Ids first: where texts are tried before them, each id is an error to collect, which took longer than all the rest.
    prompt: str | list[int] | list[str] | list[list[int]] = Field(union_mode="left_to_right")
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_INT32, description="default 16")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1, description="no other value than that of n")


class TokenizeBody(Strict):
    """`prompt`, or `messages` (and `tools`) rendered by the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    tools: list[ToolDefinition] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: Json | None = None


class DetokenizeBody(Strict):
    model: str | None = None
    tokens: list[int]
