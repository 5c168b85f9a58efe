"""The fields of request bodies for sampling (made from the table of sampling values) and for constraints.

/v1/chat/completions and /v1/completions share `SamplingFields`; /generate uses only the sampling values. Names are
OpenAI's, then those on which SGLang and vLLM agree. A field without effect in Ramet is not declared, so it is refused
by name; `validation.REFUSED` has the reason for the known ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Field, create_model
from pydantic_core import PydanticCustomError

from ramet.errors import InvalidGrammar
from ramet.grammar.text.gbnf import is_gbnf, lark_of_gbnf
from ramet.lang.graph.constraint import Constraint, Tokenization
from ramet.lang.graph.json_form import (
    AS_CONFIGURED,
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
from ramet.runtime.server.validation import OnlyFalse, OnlyTrue, Strict
from ramet.runtime.types import MAX_INT32, SamplingParams

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

# `ebnf`: GBNF or Lark, recognised by its syntax; the resulting constraint is a `cfg`
Kind = Literal["json_schema", "regex", "cfg", "choice", "ebnf", "structural_tag", "grammar"]
Asked = tuple[str, Kind, object]  # field, kind, source (None: not requested)


def _json_type(field: SamplingField) -> Any:  # Any: a type, or Annotated with what pydantic checks of it
    """The type of a value in a body. SamplingParams checks the ranges of floats, and its errors name them."""
    if field.name == "top_k":
        return Annotated[int, Field(ge=-1, le=MAX_INT32, description="0 or -1: off")]
    if field.name == "max_tokens":
        return Annotated[int, Field(ge=1, le=MAX_INT32, description="null: to the end of the context")]
    if field.name == "seed":
        return Annotated[int, Field(ge=-(2**63), le=2**63 - 1, description="choice i is drawn with seed + i")]
    if field.kind == "int":
        return Annotated[int, Field(ge=int(field.low), le=int(min(field.high, MAX_INT32)))]
    types = {
        "float": float,
        "bool": bool,
        "texts": Annotated[str, Field(max_length=10_000)] | Annotated[list[str], Field(max_length=10_000)],
        "tokens": Annotated[list[int], Field(max_length=1024)],
        "biases": Annotated[dict[str, float], Field(max_length=4096)],
    }
    return types[field.kind]


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

if TYPE_CHECKING:  # a type checker cannot know fields that come from a table; they are read by `given_values` alone
    OpenAiValues = Strict
    NativeValues = Strict
else:
    OpenAiValues = _values_model("OpenAiValues", OPENAI_VALUES, null_is_default=True)
    NativeValues = _values_model("NativeValues", NATIVE_VALUES, null_is_default=False)


def given_values(body: Strict, fields: Mapping[str, SamplingField], where: str = "") -> dict[str, Any]:
    """The values that a body sets, by the names of their SamplingParams fields. `where`: the path to the body's fields.

    Raises: HttpError for a value that SamplingParams cannot represent.
    """
    given: dict[str, Any] = {}  # Any: each field has its own type
    for spelled, field in fields.items():
        value = getattr(body, spelled)
        if value is not None:
            given[field.name] = _engine_value(field, value, where + spelled)
        elif field.takes_none:
            given[field.name] = None
    return given


def _engine_value(field: SamplingField, value: Any, name: str) -> Any:  # Any: as above
    if field.name == "top_k":
        return max(value, 0)
    if field.kind == "texts":
        texts = (value,) if isinstance(value, str) else tuple(value)
        if len(texts) > MAX_STOPS:
            raise HttpError(400, f"{field.name} has {len(texts)} texts; the limit is {MAX_STOPS}", param=name)
        return texts
    if field.kind == "tokens":
        return tuple(value)
    return _logit_bias(value, name) if field.kind == "biases" else value


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


WhitespacePattern = Annotated[Whitespace, BeforeValidator(_whitespace_pattern)]


class StructuredOutputs(Strict):
    """vLLM's form of a constraint: an object of its own. The last three fields say how JSON is written."""

    json_schema: str | dict[str, Any] | bool | None = Field(default=None, alias="json")  # Any: JSON
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
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

    def asked(self) -> list[Asked]:
        any_object = None if self.json_object is None else {"type": "object"}
        return [
            ("structured_outputs.json", "json_schema", self.json_schema),
            ("structured_outputs.json_object", "json_schema", any_object),
            ("structured_outputs.regex", "regex", self.regex),
            ("structured_outputs.choice", "choice", self.choice),
            ("structured_outputs.grammar", "ebnf", self.grammar),
            ("structured_outputs.structural_tag", "structural_tag", self.structural_tag),
        ]


class SamplingFields(JsonFormFields, OpenAiValues):
    """Sampling, constraints, and labels of a request. `null` means the default in every field.

    Defaults are OpenAI's (temperature 1, top_p 1), not those of the model's generation_config.json.
    `user`, `safety_identifier` and `prompt_cache_key` are accepted as labels: they change neither prompt nor answer
    (prefixes are cached for every key; `cache_salt` separates them). The answer returns `metadata`.
    """

    model: str | None = Field(default=None, description="the served model's name; null or `default` stands for it")
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    regex: str | None = None
    cfg: str | None = Field(default=None, description="a grammar in Lark's syntax")
    ebnf: str | None = Field(default=None, description="a grammar in GBNF with a rule `root`, or in Lark's syntax")
    structural_tag: str | dict[str, Any] | None = Field(default=None, description="free text with constrained parts")
    json_schema: str | dict[str, Any] | bool | None = None  # Any: JSON
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = Field(default=None, description="as ebnf")
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

    Raises: InvalidSampling naming the field whose value is out of range; HttpError.
    """
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given_values(body, OPENAI_VALUES))


def seed_of_choice(seed: int | None, index: int) -> int | None:
    """`seed + index`, wrapped to 64 bits; None stays None."""
    return None if seed is None else (seed + index + 2**63) % 2**64 - 2**63


def _logit_bias(given: Mapping[str, float], name: str) -> dict[int, float]:
    """The biases by token id. Raises HttpError for the field `name`."""
    bias = {}
    for token, value in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise HttpError(400, f"{name} has the key {token!r}; keys are token ids", param=name)
        bias[int(token)] = value
    return bias


def asks_constraint(body: SamplingFields) -> bool:
    """Return True if one of the constraint fields is set."""
    return any(source is not None for _, _, source in _asked(body))


def constraint_of(
    body: SamplingFields,
    schema: object,
    limit_bytes: int,
    *,
    tag: object = None,
    form: JsonFormFields | None = None,
    has_calls: bool = False,
) -> tuple[str, Constraint] | None:
    """Return (field, constraint) of a body's only constraint. `schema`: the schema in response_format, or None.

    `tag`: the structural tag in response_format, or None. `form`: of JSON, in response_format. `has_calls`: the answer
    may have JSON without a schema.
    Raises: HttpError if several fields set a constraint, the source is too large, a GBNF source has a mistake, or a
    form of JSON is asked for but no JSON.
    """
    formats: list[Asked] = [("response_format", "json_schema", schema), ("response_format", "structural_tag", tag)]
    asked = formats + _asked(body)
    if has_calls and all(source is None for _, _, source in asked):
        return None
    return one_constraint(asked, limit_bytes, body.tokenization or "canonical", json_form_of(body, form))


AskedForm = tuple[JsonForm, str]  # a form of JSON, and the field that asks for it; "" if none does


def json_form_of(body: JsonFormFields, inner: JsonFormFields | None = None, where: str = "") -> AskedForm:
    """The form of JSON that a body asks for. `inner`: the one of its response_format. `where`: the path to its fields.

    Raises: HttpError if two fields of the body disagree.
    """
    asked = _form_fields(body, where)
    if inner is not None:
        asked += _form_fields(inner, "response_format.json_schema.")
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
    form = json_form(**{name: value for name, (_, value) in found.items()})
    return form, next((field for field, _ in found.values()), "")


def _form_fields(fields: JsonFormFields, where: str) -> list[tuple[str, str, str | None]]:
    """(field, its name in JsonForm, value) of each field."""
    return [(where + name, name, getattr(fields, name)) for name in JsonForm.__struct_fields__]


def _asked(body: SamplingFields) -> list[Asked]:
    asked: list[Asked] = [
        ("json_schema", "json_schema", body.json_schema),
        ("regex", "regex", body.regex),
        ("cfg", "cfg", body.cfg),
        ("ebnf", "ebnf", body.ebnf),
        ("structural_tag", "structural_tag", body.structural_tag),
        ("guided_json", "json_schema", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "choice", body.guided_choice),
        ("guided_grammar", "ebnf", body.guided_grammar),
    ]
    return asked if body.structured_outputs is None else asked + body.structured_outputs.asked()


def one_constraint(
    asked: Sequence[Asked], limit_bytes: int, tokenization: Tokenization, asked_form: AskedForm
) -> tuple[str, Constraint] | None:
    """The only one of (field, kind, source) that has a source, as a constraint.

    `tokenization`: as in Constraint. Raises: HttpError as `constraint_of`.
    """
    form, field = asked_form
    given = [(name, kind, source) for name, kind, source in asked if source is not None]
    if form != AS_CONFIGURED and (not given or given[0][1] not in ("json_schema", "structural_tag", "grammar")):
        raise HttpError(400, f"{field} is of JSON, but the request asks for none", param=field)
    if not given:
        return None
    if len(given) > 1:
        names = " and ".join(name for name, _, _ in given)
        raise HttpError(400, f"{names} each constrain the answer; give only one of them", param=given[1][0])
    name, kind, source = given[0]
    text = source if isinstance(source, str) else compact_json(source)
    check_size(text, name, limit_bytes)
    if kind != "ebnf":
        return name, Constraint(kind, text, tokenization, form)
    try:
        source = lark_of_gbnf(text) if is_gbnf(text) else text
        return name, Constraint("cfg", source, tokenization=tokenization)
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
