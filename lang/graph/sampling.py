"""Sampling: the parameters, their limits, and the parameters of a retry.

`SamplingParams` is the complete form, which goes from every interface (a program, HTTP, Python) to the sampler.
`Sampling` is a program's form: the same fields, each of which may be left open. `FIELDS` holds the rules of each field,
which hold for every interface. A new parameter is a row in each of the three.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ramet.errors import InvalidRequest

MAX_INT32 = 2**31 - 1  # a step's request data is int32
RETRY_TEMPERATURE = 0.7  # of a retry of a greedy generation, which would repeat its text


@dataclass(frozen=True, slots=True)
class SamplingField:
    """The rules of one parameter: its kind, its range, and its names elsewhere.

    `low`, `high`: the range of a number, or of each bias; `is_open` excludes `low`. `limit`: the range in the words of
    errors.
    `takes_none`: None is a value of its own in SamplingParams, so null does not mean the default.
    `native`: its name in the body of /generate, if SGLang's name differs. `is_openai`: it is part of OpenAI's own API;
    the others are extensions.
    """

    name: str
    kind: Literal["int", "float", "bool", "texts", "tokens", "biases"]
    low: float = -math.inf
    high: float = math.inf
    limit: str = ""
    is_open: bool = False
    takes_none: bool = False
    native: str | None = None
    is_openai: bool = False

    def holds(self, value: Any) -> bool:  # Any: whatever a caller gave
        """Return whether a value other than None has the right kind and is in the range."""
        if self.kind == "float":
            return _is_real(value) and self.low <= value <= self.high and not (self.is_open and value == self.low)
        if self.kind == "int":
            return _is_int(value) and self.low <= value <= self.high
        if self.kind == "texts":
            return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)
        if self.kind == "tokens":
            return isinstance(value, Collection) and all(_is_token(token) for token in value)
        if self.kind == "biases":
            if not isinstance(value, Mapping):  # a graph has pairs because they are hashable
                pairs = value if isinstance(value, tuple) else ("no pairs",)
                return all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs) and self.holds(dict(pairs))
            return all(_is_token(t) and _is_real(bias) and self.low <= bias <= self.high for t, bias in value.items())
        return isinstance(value, bool)

    def problem(self, value: Any) -> str:  # Any: as above
        """Return the error text for a wrong value."""
        limit = self.limit or f"in {'(' if self.is_open else '['}{self.low}, {self.high}]"
        return f"{self.name} is {value!r} but must be {limit}"

    def check(self, value: Any) -> None:  # Any: as above
        """Check a value other than None. Raises InvalidRequest."""
        if not self.holds(value):
            raise InvalidRequest(self.problem(value), param=self.name)


_TABLE = (
    SamplingField("max_tokens", "int", 1, limit="an integer >= 1, or None", takes_none=True, native="max_new_tokens"),
    SamplingField("temperature", "float", 0, 100, is_openai=True),
    SamplingField("top_k", "int", 0, MAX_INT32, f"an integer in [0, {MAX_INT32}] (0: off)"),
    SamplingField("top_p", "float", 0, 1, is_open=True, is_openai=True),
    SamplingField("min_p", "float", 0, 1),
    SamplingField("frequency_penalty", "float", -2, 2, is_openai=True),
    SamplingField("presence_penalty", "float", -2, 2, is_openai=True),
    SamplingField("repetition_penalty", "float", 0, 10, is_open=True),
    SamplingField(
        "logit_bias", "biases", -100, 100, "a map from token ids >= 0 to values in [-100, 100]", is_openai=True
    ),
    SamplingField("seed", "int", limit="an integer or None", takes_none=True, native="sampling_seed", is_openai=True),
    SamplingField("min_tokens", "int", 0, limit="an integer >= 0", native="min_new_tokens"),
    SamplingField("string_tokens", "int", 1, limit="an integer >= 1, or None", takes_none=True),
    SamplingField("stop", "texts", limit="strings that are not empty", is_openai=True),
    SamplingField("stop_regex", "texts", limit="patterns that are not empty"),
    SamplingField("stop_token_ids", "tokens", limit="token ids >= 0"),
    SamplingField("ignore_eos", "bool", limit="True or False"),
    SamplingField("logprobs", "int", 0, 64, "in [0, 64], or None", takes_none=True, is_openai=True),
)
FIELDS: Mapping[str, SamplingField] = {field.name: field for field in _TABLE}


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The sampling parameters of a request. A value outside its range raises InvalidRequest, which names the field.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed` None draws a seed at submission; with
    the same seed a request gives the same tokens in every batch. `logprobs` None returns none; n >= 0 returns those of
    the chosen token and of the n likeliest. A text ends before a string of `stop`, or what a pattern of `stop_regex`
    matches, that is complete first. `max_tokens` None: the limit of the engine's configuration and the context.
    `string_tokens`: the most tokens of each string in constrained JSON, which is then ended; None: no limit.
    """

    max_tokens: int | None = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = {}
    seed: int | None = None
    min_tokens: int = 0
    string_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, default in _DEFAULTS:
            value = getattr(self, name)
            if value is default:  # valid; most fields have their default, and this runs for each request
                continue
            field = FIELDS[name]
            if not (field.takes_none if value is None else field.holds(value)):
                raise InvalidRequest(field.problem(value), param=name)
        problem = _too_few_tokens(self.min_tokens, self.max_tokens)
        if problem is not None:
            raise InvalidRequest(problem, param="min_tokens")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_stops(self) -> bool:
        """True if the text ends before a string or a pattern, which may begin inside a token."""
        return bool(self.stop or self.stop_regex)

    @property
    def edits_logits(self) -> bool:
        """True if the model's logits are changed before sampling: by penalties, biases or a minimum length."""
        return bool(
            self.frequency_penalty
            or self.presence_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.min_tokens
        )


_DEFAULTS = tuple(zip(SamplingParams.__struct_fields__, SamplingParams.__struct_defaults__, strict=True))


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The sampling values that a program sets. None leaves a field open; the engine's default fills it at last.

    The constructor does not check the values.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    string_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    stop_regex: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None

    def said(self) -> dict[str, Any]:
        """Return the fields that are set, by name."""
        return {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}

    def filled(self, defaults: Sampling) -> Sampling:
        """Return these values, with open fields filled from `defaults`."""
        if defaults == _OPEN:  # of most programs; this runs for each node
            return self
        return Sampling(**{**defaults.said(), **self.said()})

    def params(self) -> SamplingParams:
        """Return the engine's form, with its defaults in open fields. Raises InvalidRequest."""
        said = self.said()
        if self.logit_bias is not None:
            said["logit_bias"] = dict(self.logit_bias)
        return SamplingParams(**said)


_OPEN = Sampling()


def to_sampling(values: Mapping[str, Any]) -> Sampling:  # Any: whatever a caller gave
    """Check sampling values by type and range; None leaves a field open. Raises InvalidRequest, naming the field."""
    unknown = [name for name in values if name not in Sampling.__struct_fields__]
    if unknown:
        known = ", ".join(Sampling.__struct_fields__)
        raise InvalidRequest(f"{unknown[0]!r} is no sampling value; known: {known}", param=unknown[0])
    given = {name: value for name, value in values.items() if value is not None}
    for name in ("stop", "stop_regex"):
        if isinstance(given.get(name), str):
            given[name] = (given[name],)
    if isinstance(given.get("logit_bias"), Mapping):
        given["logit_bias"] = tuple(sorted(given["logit_bias"].items()))
    try:
        sampling = msgspec.convert(given, Sampling)
    except msgspec.ValidationError as error:
        name = str(error).partition("$.")[2].partition("[")[0].strip("`")
        raise InvalidRequest(f"{name or 'sampling'} is {given.get(name)!r}: {error}", param=name or None) from error
    problem = sampling_problem(sampling)
    if problem:
        raise InvalidRequest(problem, param=problem.split()[0])
    return sampling


def sampling_problem(sampling: Sampling) -> str | None:
    """Return the problem of the fields that are set, or None. The text begins with the field's name."""
    for name, value in sampling.said().items():
        if not FIELDS[name].holds(value):
            return FIELDS[name].problem(value)
    return _too_few_tokens(sampling.min_tokens or 0, sampling.max_tokens)


def is_repeatable(sampling: Sampling | SamplingParams) -> bool:
    """Return whether the same prompt always gives the same text: sampling is greedy or has a seed."""
    return sampling.temperature == 0 or sampling.top_k == 1 or sampling.seed is not None


def retry_sampling(sampling: Sampling, attempt: int) -> Sampling:
    """Return the sampling of a generation's try number `attempt` (0: the first).

    Each try adds one to the seed. A greedy generation is sampled from its second try on, with a fixed seed, so that
    runs are repeatable.
    """
    if attempt == 0:
        return sampling
    changes: dict[str, object] = {}
    if sampling.temperature == 0 or sampling.top_k == 1:
        changes = {"temperature": RETRY_TEMPERATURE, "top_k": None, "seed": (sampling.seed or 0) + attempt}
    elif sampling.seed is not None:
        changes = {"seed": sampling.seed + attempt}
    return msgspec.structs.replace(sampling, **changes)


def _too_few_tokens(min_tokens: int, max_tokens: int | None) -> str | None:
    if max_tokens is None or min_tokens <= max_tokens:
        return None
    return f"min_tokens is {min_tokens} but must be at most max_tokens ({max_tokens})"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
