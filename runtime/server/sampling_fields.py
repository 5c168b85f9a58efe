"""The fields that /v1/chat/completions and /v1/completions share: how tokens are chosen, and what a text must match.

Names are OpenAI's, then SGLang's and vLLM's where those two agree with themselves. A field with no effect here is not
declared, so that it is refused by name; `validation.REFUSED` says why for the known ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ramet.errors import InvalidGrammar
from ramet.grammar.text.gbnf import is_gbnf, lark_of_gbnf
from ramet.lang.graph.ir import Constraint
from ramet.runtime.server.errors import HttpError
from ramet.runtime.types import MAX_INT32, SamplingParams

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

# `ebnf`: GBNF or Lark's syntax, told apart by their looks; what comes of it is a `cfg`
Kind = Literal["json_schema", "regex", "cfg", "choice", "ebnf", "structural_tag"]
Asked = tuple[str, Kind, object]  # field, kind, source (None: not asked for)


def _boolean(value: object) -> object:
    """`Literal[True]` alone takes 1 and 1.0, which equal it."""
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


OnlyTrue = Annotated[Literal[True], BeforeValidator(_boolean)]
OnlyFalse = Annotated[Literal[False], BeforeValidator(_boolean)]


class Strict(BaseModel):
    """Base of every request model: no conversions between types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the usage. `continuous_usage_stats`: the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: OnlyFalse | None = None


class StructuredOutputs(Strict):
    """vLLM's name for one constraint in an object of its own."""

    json_schema: str | dict[str, Any] | bool | None = Field(default=None, alias="json")  # Any: JSON
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: OnlyTrue | None = None
    structural_tag: str | dict[str, Any] | None = None

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


class SamplingFields(Strict):
    """Sampling, constraints, and what only names or labels a request. `null` stands for the default throughout.

    Defaults are OpenAI's (temperature 1, top_p 1), not those of the model's generation_config.json.
    `user`, `safety_identifier` and `prompt_cache_key` are accepted as labels: they change neither prompt nor answer
    (prefixes are cached whatever the key; `cache_salt` keeps them apart). `metadata` comes back in the answer.
    """

    model: str | None = Field(default=None, description="the served model's name; null or `default` stands for it")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(default=None, ge=-1, le=MAX_INT32, description="0 or -1: off")
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_INT32)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1, description="choice i is drawn with seed + i")
    stop: str | list[str] | None = Field(default=None, max_length=10_000)
    stop_token_ids: list[int] | None = Field(default=None, max_length=1024)
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=4096)
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
    structured_outputs: StructuredOutputs | None = None

    priority: int | None = Field(default=None, ge=-100, le=2**31 - 1, description="lower values run first")
    cache_salt: str | None = Field(default=None, max_length=200)
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=512)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    store: OnlyFalse | None = Field(default=None, description="completions are not stored")
    service_tier: Literal["auto", "default"] | None = None

    # What some clients always send. The values that are taken say what is done here anyway.
    skip_special_tokens: OnlyTrue | None = Field(default=None, description="special tokens are never text")
    no_stop_trim: OnlyFalse | None = Field(default=None, description="a stop string never belongs to the answer")
    include_stop_str_in_output: OnlyFalse | None = None
    use_beam_search: OnlyFalse | None = None
    return_hidden_states: OnlyFalse | None = None


def sampling_fields(body: SamplingFields, *, max_tokens: int | None, logprobs: int | None) -> dict[str, object]:
    """The fields of SamplingParams that a body asks for; choice i changes `seed` alone.

    Raises: InvalidSampling naming the field whose value is out of range; HttpError.
    """
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > MAX_STOPS:
        raise HttpError(400, f"stop has {len(stops)} strings; the limit is {MAX_STOPS}", param="stop")
    given: dict[str, object] = {
        "max_tokens": max_tokens,
        "temperature": body.temperature,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "top_p": body.top_p,
        "min_p": body.min_p,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "repetition_penalty": body.repetition_penalty,
        "min_tokens": body.min_tokens,
        "seed": body.seed,
        "ignore_eos": body.ignore_eos,
        "logprobs": logprobs,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    fields["max_tokens"] = max_tokens
    fields["stop"] = tuple(stops)
    fields["stop_token_ids"] = tuple(body.stop_token_ids or ())
    fields["logit_bias"] = logit_bias(body.logit_bias or {}, "logit_bias")
    SamplingParams(**fields)  # type: ignore[arg-type]  # only checks: the engine makes its own
    return fields


def seed_of_choice(seed: int | None, index: int) -> int | None:
    """`seed + index`, around the end of 64 bits; None stays None."""
    return None if seed is None else (seed + index + 2**63) % 2**64 - 2**63


def logit_bias(given: Mapping[str, float], name: str) -> dict[int, float]:
    """Token ids and what is added to their logits. Raises HttpError for the field `name`."""
    bias = {}
    for token, value in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise HttpError(400, f"{name} has the key {token!r}; keys are token ids", param=name)
        bias[int(token)] = value
    return bias


def asks_constraint(body: SamplingFields) -> bool:
    """Whether a field of its own asks for a constraint."""
    return any(source is not None for _, _, source in _asked(body))


def constraint_of(
    body: SamplingFields, schema: object, limit_bytes: int, *, in_order: bool = False, tag: object = None
) -> tuple[str, Constraint] | None:
    """(the field that asks for it, the one constraint of a body). `schema`: that of its response_format, or None.

    `in_order`: that schema's properties come in its order. `tag`: a structural tag in response_format.
    Raises: HttpError where several fields ask for one, its source is too large, or it is GBNF with a mistake.
    """
    formats: list[Asked] = [("response_format", "json_schema", schema), ("response_format", "structural_tag", tag)]
    found = one_constraint(formats + _asked(body), limit_bytes)
    if found is not None and in_order and found[0] == "response_format":
        return found[0], Constraint(found[1].kind, found[1].source, in_order=True)
    return found


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


def one_constraint(asked: Sequence[Asked], limit_bytes: int) -> tuple[str, Constraint] | None:
    """The one of (field, kind, source) that has a source, as a constraint. Raises HttpError as `constraint_of`."""
    given = [(name, kind, source) for name, kind, source in asked if source is not None]
    if not given:
        return None
    if len(given) > 1:
        names = " and ".join(name for name, _, _ in given)
        raise HttpError(400, f"{names} each constrain the answer; give only one of them", param=given[1][0])
    name, kind, source = given[0]
    text = source if isinstance(source, str) else compact_json(source)
    check_size(text, name, limit_bytes)
    if kind != "ebnf":
        return name, Constraint(kind, text)
    try:
        return name, Constraint("cfg", lark_of_gbnf(text) if is_gbnf(text) else text)
    except InvalidGrammar as error:
        raise HttpError(400, f"{name}: {error}", param=name, code="invalid_grammar") from None


def check_size(source: str, name: str, limit_bytes: int) -> None:
    """Raises HttpError where a constraint's source is larger than the server allows."""
    size = len(source.encode("utf-8", "surrogatepass"))
    if size > limit_bytes:
        raise HttpError(
            400,
            f"the source of {name} has {size:,} bytes; the limit is {limit_bytes:,} (--max-schema-bytes)",
            param=name,
            code="constraint_too_large",
        )


def compact_json(value: object) -> str:
    """JSON without spaces; keys keep their order, which is the order in which properties are written."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
