"""The bodies that OpenAI's API defines, and how a body that breaks them becomes an OpenAI-shaped error.

Strict: no conversion between types, and every field that is not declared is refused by name. Not here: sampling and
constraint fields (`sampling_fields`), answers (`chat`, `completions`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from fastapi import Request
from pydantic import Field

from ramet.runtime.server.limits import BodyRefused
from ramet.runtime.server.sampling_fields import MAX_TOP_LOGPROBS, OnlyTrue, SamplingFields, Strict
from ramet.runtime.server.state import HttpError, ServerState
from ramet.runtime.types import MAX_INT32

Json = dict[str, Any]  # Any: JSON

# Why known fields of OpenAI, SGLang and vLLM are refused. What is in neither list is refused as unknown.
REFUSED: Mapping[str, str] = {
    "add_special_tokens": "the chat template, or the tokenizer's own rule, decides it",
    "allowed_token_ids": "use a constraint, or logit_bias",
    "audio": "answers are text",
    "bad_words": "use logit_bias, or a constraint",
    "best_of": "use n",
    "chat_template": "the model's own template is used",
    "custom_labels": "use metadata",
    "custom_logit_processor": "no code is taken from requests",
    "custom_params": "no code is taken from requests",
    "documents": "put them into messages",
    "extra_key": "use cache_salt",
    "function_call": "it is deprecated; use tool_choice",
    "functions": "it is deprecated; use tools",
    "guided_decoding_backend": "there is one grammar engine",
    "guided_whitespace_pattern": "white space is as docs/grammar.md says",
    "image_data": "the model reads text",
    "audio_data": "the model reads text",
    "video_data": "the model reads text",
    "include_stop_str_in_output": "a stop string never belongs to the answer; it is in matched_stop",
    "input_embeds": "use input_ids",
    "input_ids": "use /v1/completions or /generate for token ids",
    "length_penalty": "there is no beam search",
    "logits_processors": "no code is taken from requests",
    "lora_path": "adapters are not supported",
    "max_thinking_tokens": "reasoning has no limit of its own",
    "modify_logits": "no code is taken from requests",
    "prediction": "predicted outputs are not supported",
    "prompt_logprobs": "use /v1/completions with echo and logprobs",
    "request_id": "the answer's id is the request's",
    "return_cached_tokens_details": "cached tokens are always in usage",
    "return_hidden_states": "hidden states are not returned",
    "return_meta_info": "use /generate",
    "return_prompt_token_ids": "return_token_ids gives them, too",
    "rid": "the answer's id is the request's",
    "session_id": "conversations are recognised by their messages",
    "session_params": "conversations are recognised by their messages",
    "spaces_between_special_tokens": "special tokens are never text",
    "stop_regex": "use stop, or a regex constraint",
    "stream_interval": "tokens come as they are made; what a slow reader has not taken is merged",
    "suffix": "the model does not fill in the middle",
    "token_ids_logprob": "use top_logprobs_num",
    "truncate_prompt_tokens": "prompts are never cut",
    "verbosity": "it is not supported",
    "web_search_options": "there is no web search",
}
_PART_TYPES = frozenset({"image_url", "video_url", "audio_url", "input_audio", "input_image", "file", "thinking"})


class TextPart(Strict):
    """A part of a message's content. `cache_control`: accepted for clients that mark caching; prefixes always are."""

    type: Literal["text"]
    text: str
    cache_control: Json | None = None


class FunctionCall(Strict):
    name: str
    arguments: str = Field(description="JSON text")


class ToolCall(Strict):
    """A call in the history. `index` and `incomplete` are what streams and cut calls carry; the prompt has neither."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None
    incomplete: bool | None = None


class Message(Strict):
    """One message. `refusal`, `annotations`, `audio` and `function_call` are there to echo an answer: null or empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
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


class Tool(Strict):
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

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, max_length=1024)
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
    messages: list[Message] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: Json | None = None


class DetokenizeBody(Strict):
    model: str | None = None
    tokens: list[int]


Body = TypeVar("Body", bound=Strict)


async def parse_body(state: ServerState, request: Request, model: type[Body]) -> Body:
    """Read and check a body; large ones off the event loop. Raises HttpError naming the field."""
    try:
        data = await request.body()
    except BodyRefused as error:  # its sender puts the right status in place of this one
        raise HttpError(413, str(error)) from None
    try:
        if len(data) > 1 << 16:
            return await state.off_loop(model.model_validate_json, data)
        return model.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise error_of(error, data) from None


def check_model(state: ServerState, name: str | None) -> None:
    """Raises HttpError (404) for the name of another model."""
    if name not in (None, "default", state.model_name):
        raise HttpError(
            404,
            f"the model {name!r} does not exist here; this server serves {state.model_name!r}",
            param="model",
            code="model_not_found",
        )


def error_of(error: pydantic.ValidationError, data: bytes) -> HttpError:
    """The HTTP form of what is wrong with a body: its most specific complaint."""
    problems = error.errors(include_url=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        return HttpError(400, f"the body is not JSON: {problems[0]['msg']}", code="invalid_json")
    body = _decoded(data)
    found = []
    for problem in problems:
        path = _real_path(problem["loc"], body, is_missing=problem["type"] == "missing")
        is_type = bool(path) and path[-1] == "type"
        found.append((len(path), is_type, path, problem))
    _, is_type, path, problem = max(found, key=lambda item: item[:2])
    name = _spelled(path)
    kind, given = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        reason = REFUSED.get(str(path[-1]))
        if reason is not None:
            return HttpError(400, f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")
        return HttpError(400, f"{name} is not a field of this request", param=name, code="unknown_parameter")
    if kind == "missing":
        return HttpError(400, f"{name} is missing", param=name, code="missing_required_parameter")
    if is_type and isinstance(given, str) and given in _PART_TYPES:
        parent = _spelled(path[:-1])
        return HttpError(
            400,
            f"{parent} is a part of type {given!r}; this model reads text",
            param=parent,
            code="unsupported_content",
        )
    if not path:
        return HttpError(400, "the body must be a JSON object", code="invalid_type")
    texts = {p["msg"] for d, _, where, p in found if where == path}
    message = f"{name}: {' or: '.join(sorted(texts))}; it is {_shown(given)}"
    return HttpError(400, message, param=name, code="invalid_value")


def _decoded(data: bytes) -> object:
    """The body as a value. It is JSON already, for pydantic read it."""
    value: object = pydantic.TypeAdapter(Any).validate_json(data)
    return value


def _real_path(loc: Sequence[int | str], body: object, *, is_missing: bool) -> list[int | str]:
    """The part of pydantic's path that is in the body; its names of union members and the like are not."""
    path: list[int | str] = []
    value = body
    for index, part in enumerate(loc):
        if _has(value, part):
            value = value[part]  # type: ignore[index]
        elif not (is_missing and index == len(loc) - 1):
            continue
        path.append(part)
    return path


def _has(value: object, part: int | str) -> bool:
    if isinstance(value, list):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _spelled(path: Sequence[int | str]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def openapi_body(model: type[Strict]) -> Json:
    """`openapi_extra` of a route that reads its body itself: the model's JSON schema without references."""
    schema = model.model_json_schema(mode="validation")
    definitions = schema.pop("$defs", {})
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _inlined(schema, definitions)}},
        }
    }


def _inlined(value: Any, definitions: Mapping[str, Any]) -> Any:  # Any: JSON
    if isinstance(value, dict):
        reference = value.get("$ref")
        if isinstance(reference, str):
            return _inlined(definitions[reference.rsplit("/", 1)[-1]], definitions)
        return {
            key: _inlined(item, definitions)
            for key, item in value.items()
            if not (key == "discriminator" and "mapping" in item)
        }
    if isinstance(value, list):
        return [_inlined(item, definitions) for item in value]
    return value
