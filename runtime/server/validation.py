"""Check request bodies. The error for a wrong body names the wrong field and the reason.

Bodies are strict: values are not converted, and every undeclared field is refused by name. What a body must fulfil is
stated in the OpenAPI document, as far as JSON schema can say it. Not here: the bodies themselves (`bodies` of each
API).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from ramet.runtime.server.errors import HttpError
from ramet.runtime.types import MAX_INT32

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
    "echo": "an answer is new text alone",
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
    "lora_path": "name the adapter as the model",
    "lora_request": "name the adapter as the model",
    "max_thinking_tokens": "reasoning has a limit of its own in /v1/chat/completions only",
    "mm_processor_kwargs": "the model reads text",
    "modalities": "the model reads and writes text",
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
_MAX_MENDS = 32  # each reads the body again
_PART_TYPES = frozenset(
    ("image_url", "video_url", "audio_url", "input_audio", "input_image", "input_file", "image", "document")
) | {"file", "thinking"}


def _boolean(value: object) -> object:
    """Refuse values that are not booleans: `Literal[True]` by itself accepts 1 and 1.0, which equal it."""
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


# A server's document adds what only the server knows of these values (see `body_schema`).
ModelName = Annotated[str, Field(json_schema_extra={"format": "model-name"})]
Token = Annotated[int, Field(ge=0, le=MAX_INT32, json_schema_extra={"format": "token-id"})]
Ids = Annotated[list[Token], Field(min_length=1)]
Prompt = Annotated[str, Field(json_schema_extra={"format": "prompt"})]
OnlyTrue = Annotated[Literal[True], BeforeValidator(_boolean)]
OnlyFalse = Annotated[Literal[False], BeforeValidator(_boolean)]


# What a field must be: not null; neither null nor empty; null or empty; one of these values. A missing field is null.
Condition = Literal["given", "some", "none"] | tuple[str | int | None, ...]
NULL: Condition = (None,)
_CONDITIONS: Mapping[str, dict[str, Any]] = {  # Any: JSON
    "given": {"not": {"type": "null"}},
    "some": {"not": {"type": "null"}, "minItems": 1, "minLength": 1, "minProperties": 1},
    "none": {"type": ["null", "array", "string", "object"], "maxItems": 0, "maxLength": 0, "maxProperties": 0},
}


@dataclass(frozen=True, slots=True, eq=False)
class FieldRule:
    """What the fields of a body must be to each other. A body that breaks it is refused, and the document states it.

    A body keeps the rule if it meets all conditions of one of `ways`, by field; `a.b`: the field b of the object in a.
    `problem`: the error's text. `names`: the fields that it may name, by default all of the rule; `{given}` stands for
    those of them that are in the way. `is_stated` false: the document does not state it, because the ways of all rules
    of a body together are cases to whoever reads the document, and tools that make test cases of it take about 30.
    """

    problem: str
    ways: tuple[Mapping[str, Condition], ...]
    names: tuple[str, ...] = ()
    is_stated: bool = True

    def broken_by(self, body: BaseModel) -> list[str] | None:
        """Return the fields that the error names; None if the body keeps the rule."""
        if _is_kept_by_default(self, type(body)) and _fields(self).isdisjoint(body.model_fields_set):
            return None  # most bodies have none of most rules' fields
        if any(all(_meets(field_at(body, path), wanted) for path, wanted in way.items()) for way in self.ways):
            return None
        names = self.names or tuple(dict.fromkeys(path for way in self.ways for path in way))
        in_the_way = [n for n in names if any(n in way and not _meets(field_at(body, n), way[n]) for way in self.ways)]
        return in_the_way or [names[0]]

    def schema(self, model: type[BaseModel]) -> dict[str, Any]:  # Any: JSON
        """Return the rule as a JSON schema."""
        return {"anyOf": [_schema_of_way(model, way) for way in self.ways]}


@cache
def _fields(rule: FieldRule) -> frozenset[str]:
    return frozenset(path.partition(".")[0] for way in rule.ways for path in way)


@cache
def _is_kept_by_default(rule: FieldRule, model: type[BaseModel]) -> bool:
    """True if a body without any field of the rule keeps it."""
    return any(all(_meets(_default(model, path), wanted) for path, wanted in way.items()) for way in rule.ways)


def _default(model: type[BaseModel], path: str) -> object:
    """What a field is if the body does not have it. Objects in fields have no defaults."""
    if "." in path:
        return None
    return model.model_fields[_attributes(model).get(path, path)].get_default(call_default_factory=True)


@cache
def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """The attribute of each field that has another name in JSON."""
    return {field.alias: name for name, field in model.model_fields.items() if field.alias is not None}


def field_at(body: Any, path: str) -> Any:  # Any: a model, or a field's value
    """The value of a field, or of a field of the object in it (`a.b`). None if there is none."""
    for name in path.split("."):
        body = getattr(body, _attributes(type(body)).get(name, name), None) if isinstance(body, BaseModel) else None
    return body


def _meets(value: object, wanted: Condition) -> bool:
    if isinstance(wanted, tuple):
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in wanted)
    if wanted == "given":
        return value is not None
    return (value is None or value in ("", [], {})) == (wanted == "none")


def _schema_of_way(model: type[BaseModel], way: Mapping[str, Condition]) -> dict[str, Any]:  # Any: JSON
    properties: dict[str, Any] = {}
    required = []
    for path, wanted in way.items():
        first, _, inner = path.partition(".")
        condition = {"enum": list(wanted)} if isinstance(wanted, tuple) else _CONDITIONS[wanted]
        if inner:
            part = properties.setdefault(first, {"properties": {}})
            part["properties"][inner] = condition
            if not _meets(None, wanted):
                part |= {"type": "object", "required": [inner]}
        else:
            properties[first] = condition
        if not _meets(_default(model, path), wanted):
            required.append(first)
    return {"properties": properties, **({"required": required} if required else {})}


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
    rules: ClassVar[tuple[FieldRule, ...]] = ()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _stop_at_first_wrong_item(schema)
        return core_schema.no_info_after_validator_function(_keeping_rules, schema) if cls.rules else schema

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)  # Any above: JSON
        if cls.rules:
            handler.resolve_ref_schema(found)["allOf"] = [rule.schema(cls) for rule in cls.rules if rule.is_stated]
        return found


def _keeping_rules(body: Strict) -> Strict:
    """Check the rules of a body. Raises PydanticCustomError for the first that is broken."""
    for rule in body.rules:
        names = rule.broken_by(body)
        if names is not None:
            raise PydanticCustomError("rule", "a rule is broken", {"problem": rule.problem, "names": names})
    return body


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
    for _ in range(_MAX_MENDS):
        try:
            return model.model_validate_json(data)
        except pydantic.ValidationError as error:
            kind = error.errors(include_url=False, include_context=False, include_input=False)[0]["type"]
            body = None if kind == "json_invalid" else _decoded(data)
            if body is None or not _mend(error, body):
                raise error_of(error, body) from None
        data = pydantic_core.to_json(body)
    raise HttpError(400, f"the body has integers with a fraction in more than {_MAX_MENDS} places; write 16, not 16.0")


def no_tool_to_call(kinds: Iterable[str]) -> HttpError:
    """The error of a `tool_choice` that asks for a call where no tool has a function. kinds: of the tools given."""
    offered = ", ".join(dict.fromkeys(kinds))
    left_out = f"tools of type {offered} are not run here" if offered else "there are no tools"
    message = f"tool_choice asks for a call, but there is no tool that can be called here: {left_out}; give a function"
    return HttpError(400, message, param="tool_choice")


def made(kind: type[Body], /, **values: Any) -> Body:  # Any: checked
    """Make a body of another one's values. Raises HttpError for a value that it does not take."""
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        raise error_of(error, values) from None


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
        if problem["type"] == "int_type":  # of a list, pydantic has read no more than up to here
            while len(path) > 1 and isinstance(path[-1], int):
                path.pop()
        parent, name = body, path[-1]
        for part in path[:-1]:
            parent = parent[part]
        if not _has(parent, name):
            continue
        value = parent[name]
        if problem["type"] == "int_type":
            parent[name] = _whole(value)
            is_changed = is_changed or repr(parent[name]) != repr(value)
        elif isinstance(parent, dict) and _asks_nothing(str(name), value, path, body):
            del parent[name]
            is_changed = True
    return is_changed


def _whole(value: object) -> object:
    """The value with integers written as integers, also in lists."""
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _asks_nothing(name: str, value: object, path: Sequence[int | str], body: Any) -> bool:  # Any: JSON
    if len(path) > 2 and path[0] == "messages" and body["messages"][path[1]].get("role") == "assistant":
        return True
    if name not in REFUSED:
        return False
    is_default = name in DEFAULTS and value == DEFAULTS[name] and isinstance(value, bool) == (DEFAULTS[name] is True)
    return value is None or value is False or value in ("", [], {}) or is_default


def error_of(error: pydantic.ValidationError, body: object) -> HttpError:
    """The HTTP form of a validation error: its most specific complaint. `body`: what is wrong; None for no JSON."""
    problems = error.errors(include_url=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        if "recursion limit" in problems[0]["msg"]:
            message = "the body's lists and objects are nested more than about 200 deep; send a flatter one"
            return HttpError(400, message, code="invalid_json")
        return HttpError(400, f"the body is not JSON: {problems[0]['msg']}", code="invalid_json")
    found = []
    for problem in problems:
        path = _real_path(problem["loc"], body, is_missing=problem["type"] == "missing")
        is_type = bool(path) and path[-1] == "type"
        found.append((len(path), is_type, path, problem))
    _, is_type, path, problem = max(found, key=lambda item: item[:2])
    name = _spelled(path)
    kind, given = problem["type"], problem.get("input")
    if kind == "rule":
        broken = next(one["ctx"] for one in error.errors(include_url=False) if one["type"] == "rule")
        names = [f"{name}.{each}" if name else each for each in broken["names"]]
        return HttpError(400, broken["problem"].replace("{given}", " and ".join(names)), param=names[-1])
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


def body_schema(model: type[Strict], formats: Mapping[str, Any] | None = None) -> dict[str, Any]:  # Any: JSON
    """The JSON schema of a body, without references. `formats`: what this server adds to the values of each format."""
    schema = model.model_json_schema(mode="validation")
    definitions = schema.pop("$defs", {})
    inlined: dict[str, Any] = _inlined(schema, definitions, formats or {})
    return inlined


def _inlined(value: Any, definitions: Mapping[str, Any], formats: Mapping[str, Any]) -> Any:  # Any: JSON
    if isinstance(value, dict):
        reference = value.get("$ref")
        if isinstance(reference, str):
            return _inlined(definitions[reference.rsplit("/", 1)[-1]], definitions, formats)
        kept = {
            key: _inlined(item, definitions, formats)
            for key, item in value.items()
            if not (key == "discriminator" and "mapping" in item)
        }
        added = formats.get(kept["format"]) if isinstance(kept.get("format"), str) else None
        return {**kept, **(added or {})}
    if isinstance(value, list):
        return [_inlined(item, definitions, formats) for item in value]
    return value
