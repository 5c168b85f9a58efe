"""Bodies of the native endpoints. Names are SGLang's where they mean the same; what has no effect here is refused.

Not here: what all bodies share, and how one that is wrong becomes an error (`validation`).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ramet.errors import InvalidSampling
from ramet.lang.graph.ir import Constraint
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.sampling_fields import (
    MAX_CHOICES,
    MAX_STOPS,
    OnlyFalse,
    OnlyTrue,
    Strict,
    logit_bias,
    one_constraint,
)
from ramet.runtime.types import MAX_INT32, SamplingParams

MAX_PROMPTS = 1024
_NAMES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}


class NativeSampling(Strict):
    """How tokens are chosen, and what the text must match. Defaults are these, whatever the model's files say."""

    max_new_tokens: int | None = Field(default=128, ge=1, le=MAX_INT32, description="null: to the end of the context")
    min_new_tokens: int = Field(default=0, ge=0, le=MAX_INT32)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(default=-1, ge=-1, le=MAX_INT32, description="0 or -1: off")
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, description="answers; number i is drawn with sampling_seed + i")
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=1024)
    ignore_eos: bool = False
    logit_bias: dict[str, float] | None = Field(default=None, max_length=4096)
    sampling_seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    json_schema: str | dict[str, Any] | bool | None = None  # Any: JSON
    regex: str | None = None
    cfg: str | None = Field(default=None, description="a grammar in Lark's syntax")
    ebnf: str | None = Field(default=None, description="a grammar in GBNF with a rule `root`, or in Lark's syntax")
    structural_tag: str | dict[str, Any] | None = Field(default=None, description="free text with constrained parts")
    skip_special_tokens: OnlyTrue = Field(default=True, description="special tokens are never text")
    spaces_between_special_tokens: bool | None = Field(default=None, description="special tokens are never text")
    no_stop_trim: OnlyFalse = Field(default=False, description="a stop string never belongs to the text")

    def fields(self, num_logprobs: int | None) -> dict[str, object]:
        """Fields of SamplingParams. Raises HttpError naming the field whose value is out of range."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS:
            raise HttpError(
                400, f"stop has {len(stops)} strings; the limit is {MAX_STOPS}", param="sampling_params.stop"
            )
        fields: dict[str, object] = {
            "max_tokens": self.max_new_tokens,
            "min_tokens": self.min_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(self.top_k, 0),
            "min_p": self.min_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "stop": tuple(stops),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": self.ignore_eos,
            "logit_bias": logit_bias(self.logit_bias or {}, "sampling_params.logit_bias"),
            "seed": self.sampling_seed,
            "logprobs": num_logprobs,
        }
        try:
            SamplingParams(**fields)  # type: ignore[arg-type]  # only checks: the engine makes its own
        except InvalidSampling as error:
            theirs = error.param or ""
            ours = _NAMES.get(theirs, theirs)
            message = str(error).replace(theirs, ours)
            raise HttpError(400, message, param=f"sampling_params.{ours}", code="invalid_value") from None
        return fields

    def constraint(self, limit_bytes: int) -> tuple[str, Constraint] | None:
        """(field, constraint) of what the text must match. Raises HttpError where there are several, or it is large."""
        return one_constraint(
            [
                ("sampling_params.json_schema", "json_schema", self.json_schema),
                ("sampling_params.regex", "regex", self.regex),
                ("sampling_params.cfg", "cfg", self.cfg),
                ("sampling_params.ebnf", "ebnf", self.ebnf),
                ("sampling_params.structural_tag", "structural_tag", self.structural_tag),
            ],
            limit_bytes,
        )


class GenerateBody(Strict):
    """`text` or `input_ids`, one or several; several answers (`n` counts) come as a list, or in events with an `index`.

    `stream`: events; each holds all that was generated so far, as SGLang's do, or with `cumulative` false what is new.
    `return_logprob`: of generated tokens, with `top_logprobs_num` likeliest ones each, and of the prompt's tokens from
    `logprob_start_len` on (-1: none of them). `timeout_s`: seconds until the request is given up.
    """

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: NativeSampling | list[NativeSampling] = Field(default_factory=NativeSampling)
    stream: bool = False
    cumulative: bool = True
    rid: str | None = Field(
        default=None, min_length=1, max_length=200, description="the request's id; further answers get `-1`, ..."
    )
    return_logprob: bool = False
    logprob_start_len: int = Field(default=-1, ge=-1, le=MAX_INT32)
    top_logprobs_num: int = Field(default=0, ge=0, le=64)
    return_text_in_logprobs: bool = False
    priority: int = Field(default=0, ge=-100, le=2**31 - 1, description="lower values run first")
    cache_salt: str = Field(default="", max_length=200)
    timeout_s: float | None = Field(default=None, gt=0, le=86_400)


class AbortBody(Strict):
    rid: str | None = Field(default=None, description="the exact id of a request")
    abort_all: bool = False
