"""The request body of the Responses API.

Items are what a conversation consists of: messages, reasoning, calls of tools and their results. Clients send back the
items of earlier answers, so unknown fields of an item are ignored. Unknown fields of the body are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ramet.runtime.server.openai.bodies import PlainFormat, ReasoningEffort, TemplateVariables, ToolName
from ramet.runtime.server.sampling_fields import MAX_TOP_LOGPROBS, OpenAiValues
from ramet.runtime.server.sending import Json
from ramet.runtime.server.validation import Echoed, FieldRule, ModelName, OnlyFalse, OnlyTrue, Strict
from ramet.runtime.types import MAX_INT32


class TextContent(Echoed):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


class RefusalContent(Echoed):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Content = Annotated[TextContent | RefusalContent, Field(discriminator="type")]


class MessageItem(Echoed):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Content]


class CallItem(Echoed):
    """A call of a function. `namespace`: of the function, if it was offered in one."""

    type: Literal["function_call"]
    call_id: str
    name: ToolName
    arguments: str
    namespace: ToolName | None = None


class CustomCallItem(Echoed):
    """A call of a custom tool, whose input is a text."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: ToolName
    input: str
    namespace: ToolName | None = None


class ResultItem(Echoed):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: str | list[Content]


class ReasoningItem(Echoed):
    """Reasoning of an earlier answer. `encrypted_content`: as this server gave it."""

    type: Literal["reasoning"]
    summary: list[TextContent] = Field(default_factory=list)
    content: list[TextContent] | None = None
    encrypted_content: str | None = None


class ReferenceItem(Echoed):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"]
    id: str


_ITEMS = (MessageItem, CallItem, CustomCallItem, ResultItem, ReasoningItem, ReferenceItem)


def _item_kind(value: Any) -> str:  # Any: JSON, or an item
    """Return the name of an item's type. A message may leave it out."""
    kind = value.get("type") if isinstance(value, dict) else value.type if isinstance(value, _ITEMS) else None
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ResultItem, Tag("custom_tool_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ReferenceItem, Tag("item_reference")],
    Discriminator(_item_kind),
]


class FunctionTool(Strict):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    defer_loading: OnlyFalse | None = None


class CustomFormat(Strict):
    """The language of a custom tool's input: any text, or a regular expression."""

    rules = (
        FieldRule(
            "the input of a custom tool can be any text, or match a grammar with the syntax 'regex' and a definition",
            ({"type": ("text",)}, {"syntax": ("regex",), "definition": "given"}),
            ("syntax",),
        ),
    )

    type: Literal["text", "grammar"]
    syntax: Literal["regex", "lark"] | None = None
    definition: str | None = None


class CustomTool(Strict):
    """A tool whose input is a text."""

    type: Literal["custom"]
    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None
    defer_loading: OnlyFalse | None = None


class NamespaceTool(Strict):
    """Tools under one name. The model sees each of them as `namespace.name`."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    tools: list[FunctionTool | CustomTool] = Field(max_length=1024)


class ProviderTool(Echoed):
    """A tool that the provider of a model would run. Here nobody runs it, so it is not offered to the model.

    Its own fields are ignored.
    """

    type: Literal[
        "web_search",
        "web_search_2025_08_26",
        "web_search_preview",
        "web_search_preview_2025_03_11",
        "image_generation",
        "tool_search",
    ]


Tool = Annotated[FunctionTool | CustomTool | NamespaceTool | ProviderTool, Field(discriminator="type")]


class ChosenTool(Echoed):
    """A tool by its name, in `tool_choice`."""

    type: Literal["function", "custom"]
    name: ToolName
    namespace: ToolName | None = None


class ChosenTools(Strict):
    """`tool_choice`: the prompt shows all tools, and only these may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenTool] = Field(min_length=1, max_length=1024)


class TextSchema(Strict):
    type: Literal["json_schema"]
    name: str = Field(max_length=256)
    description: str | None = None
    json_schema: Json | OnlyTrue = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Strict):
    """`verbosity` is a hint, which has no effect here."""

    format: Annotated[PlainFormat | TextSchema, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Strict):
    """`effort`: passed to templates that know it. `summary`: the reasoning is also given as its own summary."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: str | None = None


class ResponseStreamOptions(Strict):
    include_obfuscation: OnlyFalse | None = None


Include = Literal[
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesBody(OpenAiValues):
    """`POST /v1/responses`. Besides OpenAI's fields it takes the sampling values of chat completions.

    `background`: the answer is written while nobody waits, and is fetched by its id. `store`: false keeps nothing;
    stored responses are kept in memory, a bounded number of them. `truncation`: `auto` leaves out the oldest items of a
    conversation that is too long for the context. `prompt_cache_key`, `safety_identifier`, `user`, `client_metadata`
    are labels: they change neither prompt nor answer. Tools that a provider would run (`web_search`) are not offered to
    the model.
    """

    rules = (
        FieldRule(
            "background needs store: the answer is fetched by its id",
            ({"background": (None, False)}, {"store": (None, True)}),
            ("background",),
        ),
        FieldRule(
            "input is empty; give at least one message",
            ({"input": "some"}, {"instructions": "some"}, {"previous_response_id": "given"}),
            ("input",),
        ),
    )

    model: ModelName | None = Field(
        default=None, description="the served model's name; null or `default` stands for it"
    )
    input: str | list[Item] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = Field(default=None, max_length=200)
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    max_tool_calls: int | None = Field(default=None, ge=1, description="counts calls of a provider's tools: none here")
    tools: list[Tool] | None = Field(default=None, max_length=1024)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | ChosenTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[Include] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    background: bool | None = None
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    priority: int | None = Field(default=None, ge=-100, le=MAX_INT32, description="lower values run first")
    cache_salt: str | None = Field(default=None, max_length=200)
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=512)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    prompt_cache_retention: str | None = Field(default=None, max_length=64)
    client_metadata: Json | None = None
    chat_template_kwargs: TemplateVariables | None = None
    conversation: None = Field(default=None, description="conversations are continued by previous_response_id")
    prompt: None = Field(default=None, description="there are no stored prompts")
