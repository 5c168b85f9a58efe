"""The fields of request bodies for sampling (made from the table of sampling values) and for constraints.

/v1/chat/completions and /v1/completions share `SamplingFields`; /generate uses only the sampling values. Names are
OpenAI's, then those on which SGLang and vLLM agree. A field without effect in Ramet is not declared, so it is refused
by name; `validation.REFUSED` has the reason for the known ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Field, create_model
from pydantic_core import PydanticCustomError

from ramet.errors import InvalidGrammar
from ramet.grammar.text.gbnf import is_gbnf, lark_of_gbnf
from ramet.lang.graph.constraint import Constraint, Tokenization
from ramet.lang.graph.json_form import (
    KNOWN,
    AdditionalProperties,
    JsonForm,
    Order,
    Whitespace,
    json_form,
    whitespace_named,
)
from ramet.lang.graph.sampling import FIELDS, SamplingField
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.validation import (
    NULL,
    Condition,
    FieldRule,
    ModelName,
    OnlyFalse,
    OnlyTrue,
    Strict,
    Token,
    field_at,
)
from ramet.runtime.types import MAX_INT32, SamplingParams

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
NO_HEALING = "token_healing is true, but log-probabilities belong to whole tokens; ask for one of them"

# `ebnf`: GBNF or Lark, recognised by its syntax; the resulting constraint is a `cfg`
Kind = Literal["json_schema", "regex", "cfg", "choice", "ebnf", "structural_tag", "grammar"]
Asked = tuple[str, Kind, object]  # field, kind, source (None: not requested)
_SHARED: Mapping[str, Kind] = {
    "json_schema": "json_schema",
    "regex": "regex",
    "cfg": "cfg",
    "ebnf": "ebnf",
    "structural_tag": "structural_tag",
}
# The kind of the constraint in each field; of a body, only one may be given.
NATIVE_CONSTRAINTS: Mapping[str, Kind] = {**_SHARED, "composed": "grammar"}
CONSTRAINTS: Mapping[str, Kind] = {
    **_SHARED,
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "ebnf",
    "structured_outputs.json": "json_schema",
    "structured_outputs.json_object": "json_schema",
    "structured_outputs.regex": "regex",
    "structured_outputs.choice": "choice",
    "structured_outputs.grammar": "ebnf",
    "structured_outputs.structural_tag": "structural_tag",
}
_OF_JSON = ("json_schema", "structural_tag", "grammar")  # kinds to which a form of JSON means something
_MAX_WAYS = 10
_FORMAT = "response_format.type"  # a chat's response_format; of type text it is no constraint
# The fields that ask for a form of JSON, and what they are if they ask for none.
FORMS: Mapping[str, Condition] = dict.fromkeys(JsonForm.__struct_fields__, NULL)
ALL_FORMS: Mapping[str, Condition] = {
    **FORMS,
    "guided_whitespace_pattern": NULL,
    "structured_outputs.whitespace_pattern": NULL,
    "structured_outputs.disable_any_whitespace": (None, False),
    "structured_outputs.disable_additional_properties": (None, False),
}


def _one_of(absent: Mapping[str, Condition]) -> FieldRule:
    """A body gives one of these fields at most. `absent`: what they are if they are not given."""
    ways = tuple({other: absent[other] for other in absent if other != name} for name in absent)
    text = "{given} each constrain the answer; give only one of them"
    return FieldRule(text, ways, tuple(absent), is_stated=len(ways) < _MAX_WAYS)


def constraint_rules(
    constraints: Mapping[str, Kind], forms: Mapping[str, Condition], *, is_chat: bool = False
) -> tuple[FieldRule, ...]:
    """A body has one constraint at most, and asks for a form of JSON only beside a constraint that may have JSON.

    A chat's calls of tools are JSON, too; they go with a JSON schema and with no other constraint.
    """
    absent: dict[str, Condition] = dict.fromkeys(constraints, NULL)
    of_json: list[Mapping[str, Condition]] = [{name: "given"} for name in constraints if constraints[name] in _OF_JSON]
    rules = []
    if is_chat:
        others: dict[str, Condition] = {name: NULL for name, kind in constraints.items() if kind != "json_schema"}
        others[_FORMAT] = (None, "text", "json_object", "json_schema")
        absent[_FORMAT] = (None, "text")
        of_json += [{_FORMAT: ("json_object", "json_schema", "structural_tag")}, {"tools": "some", **others}]
        text = "{given} constrains the whole answer, so tools cannot be called; use a JSON schema, or tool_choice none"
        rules = [FieldRule(text, (others, {"tools": "none"}, {"tool_choice": ("none",)}), tuple(others))]
    one = _one_of(absent)
    text = "{given} is of JSON, but the request asks for none"
    return one, FieldRule(text, (forms, *of_json), tuple(forms), is_stated=not is_chat), *rules


def _json_type(field: SamplingField) -> Any:  # Any: a type, or Annotated with what pydantic checks of it
    """The type of a value in a body."""
    if field.name == "top_k":
        return Annotated[int, Field(ge=-1, le=MAX_INT32, description="0 or -1: off")]
    if field.name == "max_tokens":
        return Annotated[int, Field(ge=1, le=MAX_INT32, description="null: to the end of the context")]
    if field.name == "seed":
        return Annotated[int, Field(ge=-(2**63), le=2**63 - 1, description="choice i is drawn with seed + i")]
    if field.kind == "int":
        return Annotated[int, Field(ge=int(field.low), le=int(min(field.high, MAX_INT32)))]
    number = Field(gt=field.low, le=field.high) if field.is_open else Field(ge=field.low, le=field.high)
    text = Annotated[str, Field(min_length=1, max_length=10_000)]
    types: dict[str, Any] = {  # Any: types
        "float": Annotated[float, number],
        "bool": bool,
        "texts": text | Annotated[list[text], Field(max_length=MAX_STOPS)],
        "tokens": Annotated[list[Token], Field(max_length=1024)],
        "biases": Annotated[
            dict[TokenKey, Annotated[float, number]],
            Field(max_length=4096, json_schema_extra={"additionalProperties": False}),
        ],
    }
    return types[field.kind]


TokenKey = Annotated[str, Field(pattern="^[0-9]{1,9}$")]


def _values_model(name: str, fields: Mapping[str, SamplingField], *, null_is_default: bool) -> Any:  # Any: see below
    """A body's sampling fields. `null_is_default`: null means the default in every field."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(SamplingParams)}
    declared: dict[str, Any] = {}  # Any: what pydantic takes as the definition of a field
    for spelled, field in fields.items():
        is_plain = field.kind in ("int", "float", "bool")
        takes_null = null_is_default or field.takes_none or not is_plain
        default = defaults[field.name] if is_plain and not null_is_default else None
        declared[spelled] = (_json_type(field) | None if takes_null else _json_type(field), default)
    return create_model(name, __base__=Strict, **declared)


# What is asked for elsewhere in a body is left out: max_tokens has another default in each of OpenAI's endpoints, and
# log-probabilities have other names everywhere.
OPENAI_VALUES = {field.name: field for field in FIELDS.values() if field.name not in ("max_tokens", "logprobs")}
NATIVE_VALUES = {field.native or field.name: field for field in FIELDS.values() if field.name != "logprobs"}

MESSAGES_VALUES = {name: FIELDS[name] for name in ("temperature", "top_k", "top_p")}

if TYPE_CHECKING:  # a type checker cannot know fields that come from a table; they are read by name
    OpenAiValues = Strict
    NativeValues = Strict
    MessagesValues = Strict
else:
    MessagesValues = _values_model("MessagesValues", MESSAGES_VALUES, null_is_default=True)
    OpenAiValues = _values_model("OpenAiValues", OPENAI_VALUES, null_is_default=True)
    NativeValues = _values_model("NativeValues", NATIVE_VALUES, null_is_default=False)


def given_values(body: Strict, fields: Mapping[str, SamplingField]) -> dict[str, Any]:
    """The values that a body sets, by the names of their SamplingParams fields."""
    given: dict[str, Any] = {}  # Any: each field has its own type
    for spelled, field in fields.items():
        value = getattr(body, spelled)
        if value is not None:
            given[field.name] = _engine_value(field, value)
        elif field.takes_none:
            given[field.name] = None
    return given


def _engine_value(field: SamplingField, value: Any) -> Any:  # Any: as above
    if field.name == "top_k":
        return max(value, 0)
    if field.kind == "texts":
        return (value,) if isinstance(value, str) else tuple(value)
    if field.kind == "tokens":
        return tuple(value)
    return {int(token): bias for token, bias in value.items()} if field.kind == "biases" else value


class StreamOptions(Strict):
    """`include_usage`: the last chunk has the usage. `continuous_usage_stats`: every chunk has the usage so far."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: OnlyFalse | None = None


class JsonFormFields(Strict):
    """How JSON is written where a schema leaves it open (see JsonForm). null: as the server is configured."""

    whitespace: Whitespace | None = Field(default=None, description="model: a space after each comma and colon")
    order: Order | None = Field(default=None, description="of properties: as the schema declares them, or any")
    additional_properties: AdditionalProperties | None = Field(
        default=None, description="schema: the letter of a schema that says nothing of them, so any others"
    )


def _whitespace_pattern(value: object) -> object:
    """Turn another server's pattern of white space into Ramet's name for it."""
    if not isinstance(value, str):
        return value
    found = whitespace_named(value)
    if found is None:
        known = ", ".join(KNOWN["whitespace"])
        raise PydanticCustomError("whitespace", f"Input should be one of {known}, or a pattern such as [ ]? or \\s*")
    return found


Choices = Annotated[list[str], Field(min_length=1)]
GrammarSource = Annotated[str, Field(min_length=1)]
JsonSchema = Annotated[str, Field(min_length=1)] | dict[str, Any] | OnlyTrue  # Any: JSON; no value matches `false`
WhitespacePattern = Annotated[Whitespace, BeforeValidator(_whitespace_pattern)]


class StructuredOutputs(Strict):
    """vLLM's form of a constraint: an object of its own. The last three fields say how JSON is written."""

    rules = (_one_of(dict.fromkeys(("json", "json_object", "regex", "choice", "grammar", "structural_tag"), NULL)),)

    json_schema: JsonSchema | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: GrammarSource | None = None
    json_object: OnlyTrue | None = None
    structural_tag: str | dict[str, Any] | None = None
    whitespace_pattern: WhitespacePattern | None = Field(default=None, description="a value of `whitespace`, or \\s*")
    disable_any_whitespace: bool | None = Field(default=None, description="true: whitespace compact")
    disable_additional_properties: bool | None = Field(default=None, description="true: closed, the default")

    def form(self) -> list[tuple[str, str, str | None]]:
        """(field, its name in JsonForm, value) of the fields that say how JSON is written."""
        compact = "compact" if self.disable_any_whitespace else None
        closed = "closed" if self.disable_additional_properties else None
        return [
            ("structured_outputs.whitespace_pattern", "whitespace", self.whitespace_pattern),
            ("structured_outputs.disable_any_whitespace", "whitespace", compact),
            ("structured_outputs.disable_additional_properties", "additional_properties", closed),
        ]


class SamplingFields(JsonFormFields, OpenAiValues):
    """Sampling, constraints, and labels of a request. `null` means the default in every field.

    Defaults are OpenAI's (temperature 1, top_p 1), not those of the model's generation_config.json.
    `user`, `safety_identifier` and `prompt_cache_key` are accepted as labels: they change neither prompt nor answer
    (prefixes are cached for every key; `cache_salt` separates them). The answer returns `metadata`.
    """

    rules = (
        *constraint_rules(CONSTRAINTS, ALL_FORMS),
        FieldRule(
            "stream_options is only allowed with stream: true",
            ({"stream_options.include_usage": (None, False)}, {"stream": (True,)}),
            ("stream_options",),
        ),
    )

    model: ModelName | None = Field(
        default=None, description="the served model's name; null or `default` stands for it"
    )
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    regex: str | None = None
    cfg: GrammarSource | None = Field(default=None, description="a grammar in Lark's syntax")
    ebnf: GrammarSource | None = Field(
        default=None, description="a grammar in GBNF with a rule `root`, or in Lark's syntax"
    )
    structural_tag: str | dict[str, Any] | None = Field(default=None, description="free text with constrained parts")
    json_schema: JsonSchema | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarSource | None = Field(default=None, description="as ebnf")
    guided_whitespace_pattern: WhitespacePattern | None = Field(default=None, description="as whitespace_pattern")
    structured_outputs: StructuredOutputs | None = None
    tokenization: Tokenization | None = Field(default=None, description="of text that a constraint forces: canonical")

    priority: int | None = Field(default=None, ge=-100, le=2**31 - 1, description="lower values run first")
    cache_salt: str | None = Field(default=None, max_length=200)
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=512)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    store: OnlyFalse | None = Field(default=None, description="completions are not stored")
    service_tier: Literal["auto", "default"] | None = None

    # Fields that some clients always send. Only values that equal Ramet's behaviour are accepted.
    skip_special_tokens: OnlyTrue | None = Field(default=None, description="special tokens are never text")
    no_stop_trim: OnlyFalse | None = Field(default=None, description="a stop string never belongs to the answer")
    include_stop_str_in_output: OnlyFalse | None = None
    use_beam_search: OnlyFalse | None = None
    return_hidden_states: OnlyFalse | None = None


def sampling_params(body: SamplingFields, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """The sampling parameters of a body. Choice i changes only `seed`.

    Raises: InvalidRequest naming the field whose value is out of range; HttpError.
    """
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given_values(body, OPENAI_VALUES))


def seed_of_choice(seed: int | None, index: int) -> int | None:
    """`seed + index`, wrapped to 64 bits; None stays None."""
    return None if seed is None else (seed + index + 2**63) % 2**64 - 2**63


def asked_constraint(body: Strict, constraints: Mapping[str, Kind]) -> Asked | None:
    """The constraint that a body asks for in one of these fields."""
    for name, kind in constraints.items():
        source = field_at(body, name)
        if source is not None:
            return name, kind, {"type": "object"} if name == "structured_outputs.json_object" else source
    return None


def json_form_of(body: JsonFormFields, inner: JsonFormFields | None = None, where: str = "") -> JsonForm:
    """The form of JSON that a body asks for. `inner`: the one of its response_format. `where`: the path to its fields.

    Raises: HttpError if two fields of the body disagree.
    """
    names = JsonForm.__struct_fields__
    asked = [(where + name, name, getattr(body, name)) for name in names]
    if inner is not None:
        asked += [(f"response_format.json_schema.{name}", name, getattr(inner, name)) for name in names]
    if isinstance(body, SamplingFields):
        asked.append(("guided_whitespace_pattern", "whitespace", body.guided_whitespace_pattern))
        if body.structured_outputs is not None:
            asked += body.structured_outputs.form()
    found: dict[str, tuple[str, str]] = {}
    for field, name, value in asked:
        if value is None:
            continue
        earlier, known = found.setdefault(name, (field, value))
        if known != value:
            raise HttpError(400, f"{earlier} is {known!r}, but {field} is {value!r}; give one of them", param=earlier)
    return json_form(**{name: value for name, (_, value) in found.items()})


def constraint_of(
    asked: Asked | None, limit_bytes: int, tokenization: Tokenization | None, form: JsonForm
) -> tuple[str, Constraint] | None:
    """What is asked for, as (field, constraint).

    Raises: HttpError if the source is too large, or a GBNF source has a mistake.
    """
    if asked is None:
        return None
    name, kind, source = asked
    text = source if isinstance(source, str) else compact_json(source)
    check_size(text, name, limit_bytes)
    if kind != "ebnf":
        return name, Constraint(kind, text, tokenization or "canonical", form)
    try:
        source = lark_of_gbnf(text) if is_gbnf(text) else text
        return name, Constraint("cfg", source, tokenization=tokenization or "canonical")
    except InvalidGrammar as error:
        raise HttpError(400, f"{name}: {error}", param=name, code="invalid_grammar") from None


def check_size(source: str, name: str, limit_bytes: int) -> None:
    """Raise HttpError if a constraint's source is larger than the server allows."""
    size = len(source.encode("utf-8", "surrogatepass"))
    if size > limit_bytes:
        raise HttpError(
            400,
            f"the source of {name} has {size:,} bytes; the limit is {limit_bytes:,} (--max-schema-bytes)",
            param=name,
            code="constraint_too_large",
        )


def compact_json(value: object) -> str:
    """JSON without spaces. Keys keep their order, because properties are generated in this order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
