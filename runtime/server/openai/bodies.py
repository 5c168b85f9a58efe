"""The request bodies of OpenAI's API.

Not here: sampling and constraint fields (`sampling_fields`), answers (`answers`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from ramet.runtime.server.sampling_fields import (
    ALL_FORMS,
    CONSTRAINTS,
    MAX_TOP_LOGPROBS,
    NO_HEALING,
    JsonFormFields,
    SamplingFields,
    constraint_rules,
)
from ramet.runtime.server.sending import Json
from ramet.runtime.server.validation import NULL, FieldRule, Ids, ModelName, OnlyTrue, Prompt, Strict, Token
from ramet.runtime.types import MAX_INT32

RESERVED = ("messages", "tools", "documents", "add_generation_prompt")  # variables that have fields of their own


def _not_reserved(variables: Json) -> Json:
    for name in RESERVED:
        if name in variables:
            raise PydanticCustomError("reserved", f"{name} has a field of its own")
    return variables


ThinkingTokens = Annotated[int, Field(ge=1, le=MAX_INT32, json_schema_extra={"format": "thinking-tokens"})]
TemplateVariables = Annotated[
    Json,
    AfterValidator(_not_reserved),
    Field(json_schema_extra={"propertyNames": {"not": {"enum": list(RESERVED)}}}),
]
ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TextPart(Strict):
    """A part of a message's content. `cache_control` is accepted and ignored: prefixes are always cached."""

    type: Literal["text"]
    text: str
    cache_control: Json | None = None


class PastFunction(Strict):
    name: str
    arguments: str = Field(description="JSON text")


class PastCall(Strict):
    """A call in the history. `index` (from streams) and `incomplete` (from cut-off calls) do not go into the prompt."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: PastFunction
    index: int | None = None
    incomplete: bool | None = None


class ChatMessage(Strict):
    """One message. `refusal`, `annotations`, `audio`, `function_call` do not go into the prompt.

    An assistant's message may have any other fields, so an answer can be sent back as a client keeps it.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[PastCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(default=None, description="vLLM's name of reasoning_content")
    refusal: str | None = None
    annotations: Annotated[list[Json], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    def plain(self) -> Json:
        """The message in the form of chat templates: only set fields, `developer` as `system`, content as text."""
        message: Json = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        given = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning if self.reasoning_content is None else self.reasoning_content,
        }
        message |= {field: value for field, value in given.items() if value is not None}
        if self.tool_calls:
            message["tool_calls"] = [
                call.model_dump(include={"id", "type", "function"}, exclude_none=True) for call in self.tool_calls
            ]
        return message

    @property
    def text(self) -> str:
        """The content as text; empty if the message has none."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class FunctionDefinition(Strict):
    """Arguments match the schema with or without `strict`."""

    name: ToolName
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class ToolDefinition(Strict):
    type: Literal["function"]
    function: FunctionDefinition

    def plain(self) -> Json:
        """The tool in the form of chat templates. The order of its fields is fixed, so the prompt stays the same."""
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


class AllowedFunctions(Strict):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=1024)


class AllowedTools(Strict):
    """The prompt shows all tools, so it stays the same, and only these may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


class PlainFormat(Strict):
    type: Literal["text", "json_object"]


class SchemaFormat(JsonFormFields):
    """`name` and `description` are labels. The schema is enforced with or without `strict`.

    `whitespace`, `order` and `additional_properties` are Ramet's own.
    """

    name: str = Field(max_length=256)
    description: str | None = None
    json_schema: Json | OnlyTrue = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: SchemaFormat


class StructuralTagFormat(Strict):
    """Either `structures` and `triggers` as in SGLang and vLLM, or XGrammar's `format` of triggered tags."""

    rules = (
        FieldRule(
            "a structural tag needs structures and triggers, or a format",
            ({"structures": "given", "triggers": "given"}, {"format": "given"}),
            ("format",),
        ),
    )

    type: Literal["structural_tag"]
    structures: list[Json] | None = None
    triggers: list[str] | None = None
    format: Json | None = None


class Prediction(Strict):
    """The answer that the client expects, in large part: an edited file. It makes the answer faster, and no other."""

    type: Literal["content"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


ResponseFormat = Annotated[PlainFormat | JsonSchemaFormat | StructuralTagFormat, Field(discriminator="type")]


class ChatBody(SamplingFields):
    """`POST /v1/chat/completions`. `max_completion_tokens` is the newer name of `max_tokens`.

    `history`: `append` continues an earlier answer of this server from its generated tokens, even if the chat template
    would now write the answer differently (without its reasoning); `render` renders the whole history again.
    `separate_reasoning`: false leaves `<think>` parts in the content. `reasoning_effort`: passed to templates that read
    it; `none` turns off a template's enable_thinking. It is a hint: a template that reads neither ignores it.
    """

    rules = (
        *SamplingFields.rules[-1:],
        *constraint_rules(CONSTRAINTS, ALL_FORMS, is_chat=True),
        FieldRule(
            "top_logprobs needs logprobs: true",
            ({"top_logprobs": (None, 0)}, {"logprobs": (True,)}),
            ("top_logprobs",),
        ),
        FieldRule(
            "tool_choice asks for a call but there are no tools",
            ({"tool_choice": (None, "none", "auto")}, {"tools": "some"}),
            ("tool_choice",),
        ),
    )

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[ToolDefinition] | None = Field(default=None, max_length=1024)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: ReasoningEffort | None = None
    max_thinking_tokens: ThinkingTokens | None = Field(default=None, description="most tokens of reasoning")
    separate_reasoning: bool | None = None
    stream_reasoning: OnlyTrue | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    history: Literal["append", "render"] | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: Prediction | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(default=None, description="a hint, without effect")


class CompletionBody(SamplingFields):
    """`POST /v1/completions`. The spelling of a special token in a text prompt becomes that token.

    `logprobs`: the number of most likely tokens besides the chosen one; with `echo`, of the prompt's tokens, too.
    `add_special_tokens`: false leaves out the tokens that the tokenizer puts before a text. `token_healing`: the model
    writes the prompt's last token again, as a part of any token that begins with it; null: for texts with a constraint.
    """

    rules = (
        *SamplingFields.rules,
        FieldRule(NO_HEALING, ({"token_healing": (None, False)}, {"logprobs": NULL}), ("token_healing",)),
    )

    # Ids first: where texts are tried before them, each id is an error to collect, which took longer than all the rest.
    prompt: Prompt | Ids | Annotated[list[Prompt], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)] = (
        Field(union_mode="left_to_right")
    )
    max_tokens: int | None = Field(default=None, ge=0, le=MAX_INT32, description="default 16")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: int | None = Field(default=None, ge=1, description="no other value than that of n")
    token_healing: bool | None = None


class TokenizeBody(Strict):
    """`prompt`, or `messages` (and `tools`) rendered by the chat template."""

    rules = (
        FieldRule(
            "give either prompt or messages",
            ({"prompt": "given", "messages": NULL}, {"prompt": NULL, "messages": "given"}),
        ),
        FieldRule(
            "{given} is only allowed with messages",
            ({"messages": "given"}, {"tools": NULL, "chat_template_kwargs": NULL}),
            ("tools", "chat_template_kwargs"),
        ),
    )

    model: ModelName | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    tools: list[ToolDefinition] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateVariables | None = None


class DetokenizeBody(Strict):
    model: ModelName | None = None
    tokens: list[Token]
