"""The fields that /v1/chat/completions and /v1/completions share: how tokens are chosen, and what a text must match.

Names are OpenAI's, then SGLang's and vLLM's where those two agree with themselves. A field with no effect here is not
declared, so that it is refused by name; `openai_types.REFUSED` says why for the known ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ramet.lang.ir import Constraint
from ramet.runtime.server.state import HttpError
from ramet.runtime.types import SamplingParams

MAX_STOPS = 16
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

Kind = Literal["json_schema", "regex", "cfg", "choice", "substring", "tools"]


class Strict(BaseModel):
    """Base of every request model: no conversions between types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True, protected_namespaces=())


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the usage. `continuous_usage_stats`: the usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(Strict):
    """Sampling, constraints, and what only names or labels a request. `null` stands for the default throughout.

    Defaults are OpenAI's (temperature 1, top_p 1), not those of the model's generation_config.json.
    `user`, `safety_identifier` and `prompt_cache_key` are accepted as labels: they change neither prompt nor answer
    (prefixes are cached whatever the key; `cache_salt` keeps them apart). `metadata` comes back in the answer.
    """

    model: str | None = Field(default=None, description="the served model's name; null or `default` stands for it")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(default=None, ge=-1, description="0 or -1: off")
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
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
    ebnf: str | None = Field(default=None, description="a grammar in Lark's syntax, or in GBNF with a rule `root`")
    json_schema: str | dict[str, Any] | bool | None = None  # Any: JSON
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    priority: int | None = Field(default=None, ge=-100, le=2**31 - 1, description="lower values run first")
    cache_salt: str | None = Field(default=None, max_length=200)
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=512)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    store: Literal[False] | None = Field(default=None, description="completions are not stored")
    service_tier: Literal["auto", "default"] | None = None


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
    fields["logit_bias"] = _logit_bias(body.logit_bias or {})
    SamplingParams(**fields)  # type: ignore[arg-type]  # only checks: the engine makes its own
    return fields


def seed_of_choice(seed: int | None, index: int) -> int | None:
    """`seed + index`, around the end of 64 bits; None stays None."""
    return None if seed is None else (seed + index + 2**63) % 2**64 - 2**63


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    bias = {}
    for token, value in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise HttpError(400, f"logit_bias has the key {token!r}; keys are token ids", param="logit_bias")
        bias[int(token)] = value
    return bias


def constraint_of(
    body: SamplingFields, schema: object, limit_bytes: int, *, in_order: bool = False
) -> tuple[str, Constraint] | None:
    """(the field that asks for it, the one constraint of a body). `schema`: that of its response_format, or None.

    `in_order`: that schema's properties come in its order.

    Raises: HttpError where several fields ask for one, or its source is too large.
    """
    asked: list[tuple[str, Kind, object]] = [
        ("response_format", "json_schema", schema),
        ("json_schema", "json_schema", body.json_schema),
        ("guided_json", "json_schema", body.guided_json),
        ("regex", "regex", body.regex),
        ("guided_regex", "regex", body.guided_regex),
        ("cfg", "cfg", body.cfg),
        ("ebnf", "cfg", None if body.ebnf is None else lark_of(body.ebnf, "ebnf")),
        (
            "guided_grammar",
            "cfg",
            None if body.guided_grammar is None else lark_of(body.guided_grammar, "guided_grammar"),
        ),
        ("guided_choice", "choice", body.guided_choice),
    ]
    given = [(name, kind, source) for name, kind, source in asked if source is not None]
    if not given:
        return None
    if len(given) > 1:
        names = " and ".join(name for name, _, _ in given)
        raise HttpError(400, f"{names} each constrain the answer; give one of them", param=given[1][0])
    name, kind, source = given[0]
    text = source if isinstance(source, str) else compact_json(source)
    check_size(text, name, limit_bytes)
    return name, Constraint(kind, text, in_order and name == "response_format")


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


def lark_of(source: str, name: str) -> str:
    """A grammar in Lark's syntax: `source` as it is, or translated from GBNF. Raises HttpError naming the field."""
    if "::=" not in source:
        return source
    raise HttpError(400, f"{name} is written in GBNF (`::=`); write it in Lark's syntax (`start: ...`)", param=name)
