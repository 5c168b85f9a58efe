"""Check request bodies. The error for a wrong body names the wrong field and the reason.

Bodies are strict: values are not converted, and every undeclared field is refused by name. Not here: the bodies
themselves (`bodies` of each API).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError

from ramet.runtime.server.errors import HttpError

# Reasons why known fields of OpenAI, SGLang and vLLM are refused. A field in neither list is refused as unknown.
REFUSED: Mapping[str, str] = {
    "add_special_tokens": "the chat template, or the tokenizer's own rule, decides it",
    "allowed_token_ids": "use a constraint, or logit_bias",
    "audio": "answers are text",
    "audio_data": "the model reads text",
    "bad_words": "use logit_bias, or a constraint",
    "best_of": "use n",
    "bootstrap_host": "prefill and decode are not apart here",
    "bootstrap_port": "prefill and decode are not apart here",
    "bootstrap_room": "prefill and decode are not apart here",
    "chat_template": "the model's own template is used",
    "chat_template_content_format": "contents are texts",
    "custom_labels": "use metadata",
    "custom_logit_processor": "no code is taken from requests",
    "custom_params": "no code is taken from requests",
    "data_parallel_rank": "the server chooses among its engines",
    "detokenize": "answers are text; return_token_ids gives the tokens, too",
    "documents": "put them into messages",
    "early_stopping": "there is no beam search",
    "extra_key": "use cache_salt",
    "function_call": "it is deprecated; use tool_choice",
    "functions": "it is deprecated; use tools",
    "guided_decoding_backend": "there is one grammar engine",
    "image_data": "the model reads text",
    "include_stop_str_in_output": "a stop string never belongs to the answer; it is in matched_stop",
    "input_embeds": "use input_ids",
    "input_ids": "use /v1/completions or /generate for token ids",
    "kv_transfer_params": "prefill and decode are not apart here",
    "length_penalty": "there is no beam search",
    "log_metrics": "every request is counted",
    "logits_processors": "no code is taken from requests",
    "lora_path": "adapters are not supported",
    "lora_request": "the model has no adapters",
    "max_thinking_tokens": "reasoning has a limit of its own in /v1/chat/completions only",
    "mm_processor_kwargs": "the model reads text",
    "modify_logits": "no code is taken from requests",
    "prompt_logprobs": "use /v1/completions with echo and logprobs",
    "request_id": "the answer's id is the request's",
    "return_cached_tokens_details": "cached tokens are always in usage",
    "return_hidden_states": "hidden states are not returned",
    "return_meta_info": "use /generate",
    "return_prompt_token_ids": "return_token_ids gives them, too",
    "return_routed_experts": "hidden states are not returned",
    "return_tokens_as_token_ids": "return_token_ids gives them apart from the text",
    "rid": "the answer's id is the request's",
    "session_id": "conversations are recognised by their messages",
    "session_params": "conversations are recognised by their messages",
    "spaces_between_special_tokens": "special tokens are never text",
    "stream_interval": "tokens come as they are made; what a slow reader has not taken is merged",
    "suffix": "the model does not fill in the middle",
    "token_ids_logprob": "use top_logprobs_num",
    "top_k_return_logprob": "use top_logprobs",
    "truncate_prompt_tokens": "prompts are never cut",
    "verbosity": "it belongs to chats",
    "video_data": "the model reads text",
    "vllm_xargs": "no code is taken from requests",
    "watermark": "answers are not marked",
    "web_search_options": "there is no web search",
}
# What the field's servers do by default, where that is neither null, empty nor false. A client that sends it asks for
# nothing.
DEFAULTS: Mapping[str, object] = {
    "best_of": 1,
    "detokenize": True,
    "length_penalty": 1,
    "log_metrics": True,
    "spaces_between_special_tokens": True,
    "add_special_tokens": True,
    "guided_decoding_backend": "auto",
    "chat_template_content_format": "auto",
    "stream_interval": 1,
}
_CHUNK_BYTES = 1 << 18
_PART_TYPES = frozenset(
    ("image_url", "video_url", "audio_url", "input_audio", "input_image", "input_file", "image", "document")
) | {"file", "thinking"}


def _boolean(value: object) -> object:
    """Refuse values that are not booleans: `Literal[True]` by itself accepts 1 and 1.0, which equal it."""
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


OnlyTrue = Annotated[Literal[True], BeforeValidator(_boolean)]
OnlyFalse = Annotated[Literal[False], BeforeValidator(_boolean)]


def _stop_at_first_wrong_item(schema: Any) -> None:  # Any: a core schema, or a part of one
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _stop_at_first_wrong_item(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _stop_at_first_wrong_item(part)


class Strict(BaseModel):
    """Base of every request model: no conversions between types, no unknown fields.

    A list is read up to its first wrong item: an error for each item of a list of a million took gigabytes.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _stop_at_first_wrong_item(schema)
        return schema


class Echoed(Strict):
    """Base of what clients send back from earlier answers: fields that do not matter here are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


Body = TypeVar("Body", bound=Strict)


def parsed(model: type[Body], data: bytes, max_values: int) -> Body:
    """Parse a body. Raises HttpError naming the wrong field, and for one with more than `max_values` values.

    A field that is known and not supported may be there if its value asks for nothing: null, an empty value, false, or
    the default of the servers that have it. Clients that send back an answer may add fields to it. An integer may be
    written as 16.0.
    """
    _check_values(data, max_values)
    try:
        return model.model_validate_json(data)
    except pydantic.ValidationError as error:
        if error.errors(include_url=False, include_context=False, include_input=False)[0]["type"] == "json_invalid":
            raise error_of(error, data) from None
        body = _decoded(data)
        if not _mend(error, body):
            raise error_of(error, data) from None
    data = pydantic_core.to_json(body)
    try:
        return model.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise error_of(error, data) from None


def _check_values(data: bytes, limit: int) -> None:
    """Raise HttpError for JSON with more than `limit` values, where a list or an object counts ten.

    As values of Python a list takes a hundred times its two bytes, so the size of a body does not bound its memory.
    """
    if _weight(data) <= limit:  # also counts what stands in strings
        return
    weight, is_inside, backslash = 0, False, b""
    for start in range(0, len(data), _CHUNK_BYTES):
        chunk = backslash + data[start : start + _CHUNK_BYTES]
        backslash = b"\\" * ((len(chunk) - len(chunk.rstrip(b"\\"))) % 2)  # what it escapes is in the next chunk
        chunk = chunk[: len(chunk) - len(backslash)]
        parts = chunk.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        weight += sum(map(_weight, parts[is_inside::2]))
        is_inside ^= len(parts) % 2 == 0
    if weight > limit:
        message = f"the body has about {weight:,} values, lists and objects counted ten times; the limit is {limit:,}"
        raise HttpError(413, f"{message}: send fewer, or raise --max-json-values", code="too_many_values")


def _weight(text: bytes) -> int:
    return text.count(b",") + 10 * (text.count(b"[") + text.count(b"{"))


def _mend(error: pydantic.ValidationError, body: Any) -> bool:  # Any: JSON
    """Remove the undeclared fields that ask for nothing, and write integers without a fraction.

    JSON does not tell 16.0 from 16. Returns whether the body has changed.
    """
    is_changed = False
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        if problem["type"] not in ("extra_forbidden", "int_type"):
            continue
        path = _real_path(problem["loc"], body, is_missing=False)
        if not path:
            continue
        parent, name = body, path[-1]
        for part in path[:-1]:
            parent = parent[part]
        if not _has(parent, name):
            continue
        value = parent[name]
        if problem["type"] == "int_type":
            if isinstance(parent, list):  # pydantic has read it up to here
                parent[:] = map(_whole, parent)
            else:
                parent[name] = _whole(value)
            is_changed = is_changed or parent[name] is not value
        elif isinstance(parent, dict) and _asks_nothing(str(name), value, path, body):
            del parent[name]
            is_changed = True
    return is_changed


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _asks_nothing(name: str, value: object, path: Sequence[int | str], body: Any) -> bool:  # Any: JSON
    if len(path) > 2 and path[0] == "messages" and body["messages"][path[1]].get("role") == "assistant":
        return True
    if name not in REFUSED:
        return False
    is_default = name in DEFAULTS and value == DEFAULTS[name] and isinstance(value, bool) == (DEFAULTS[name] is True)
    return value is None or value is False or value in ("", [], {}) or is_default


def error_of(error: pydantic.ValidationError, data: bytes) -> HttpError:
    """The HTTP form of a validation error: its most specific complaint."""
    problems = error.errors(include_url=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        if "recursion limit" in problems[0]["msg"]:
            message = "the body's lists and objects are nested more than about 200 deep; send a flatter one"
            return HttpError(400, message, code="invalid_json")
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
    """The body as a value. It is valid JSON, because pydantic has read it."""
    value: object = pydantic.TypeAdapter(Any).validate_json(data)
    return value


def _real_path(loc: Sequence[int | str], body: object, *, is_missing: bool) -> list[int | str]:
    """The part of pydantic's path that exists in the body, without the names of union members and the like."""
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


def body_schema(model: type[Strict]) -> dict[str, Any]:  # Any: JSON
    """The JSON schema of a body, without references."""
    schema = model.model_json_schema(mode="validation")
    definitions = schema.pop("$defs", {})
    inlined: dict[str, Any] = _inlined(schema, definitions)
    return inlined


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
