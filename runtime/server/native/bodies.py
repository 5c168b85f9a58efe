"""Bodies of the native endpoints. A field with SGLang's meaning has SGLang's name. A field without effect is refused.

Not here: the base of all bodies, and errors for wrong bodies (`validation`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ramet.errors import InvalidRequest
from ramet.lang.graph.constraint import Constraint, Tokenization
from ramet.lang.graph.sampling import FIELDS
from ramet.runtime.server.config import MAX_REPLICAS
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.sampling_fields import (
    FORMS,
    MAX_CHOICES,
    NATIVE_CONSTRAINTS,
    NATIVE_VALUES,
    NO_HEALING,
    GrammarSource,
    JsonFormFields,
    JsonSchema,
    NativeValues,
    asked_constraint,
    constraint_of,
    constraint_rules,
    given_values,
    json_form_of,
)
from ramet.runtime.server.validation import NULL, FieldRule, Ids, OnlyFalse, OnlyTrue, Prompt, Strict
from ramet.runtime.types import MAX_INT32, SamplingParams

MAX_PROMPTS = 1024


class NativeSampling(JsonFormFields, NativeValues):
    """Sampling values and constraints. The defaults are those below; the model's generation_config.json is ignored."""

    rules = constraint_rules(NATIVE_CONSTRAINTS, FORMS)

    max_new_tokens: int | None = Field(
        default=SamplingParams().max_tokens,
        ge=0,
        le=MAX_INT32,
        description="null: to the end of the context; 0: the prompt is computed and cached, nothing is generated",
    )
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, description="answers; number i is drawn with sampling_seed + i")
    json_schema: JsonSchema | None = None
    regex: str | None = None
    cfg: GrammarSource | None = Field(default=None, description="a grammar in Lark's syntax")
    ebnf: GrammarSource | None = Field(
        default=None, description="a grammar in GBNF with a rule `root`, or in Lark's syntax"
    )
    structural_tag: str | dict[str, Any] | None = Field(default=None, description="free text with constrained parts")
    composed: str | dict[str, Any] | None = Field(default=None, description="a grammar composed of others, as JSON")
    tokenization: Tokenization = Field(default="canonical", description="of text that a constraint forces")
    skip_special_tokens: OnlyTrue = Field(default=True, description="special tokens are never text")
    spaces_between_special_tokens: bool | None = Field(default=None, description="special tokens are never text")
    no_stop_trim: OnlyFalse = Field(default=False, description="a stop string never belongs to the text")

    def params(self, num_logprobs: int | None) -> SamplingParams:
        """The engine's sampling parameters. Raises HttpError naming the field whose value is out of range."""
        values = given_values(self, NATIVE_VALUES)
        if self.max_new_tokens == 0:
            values["max_tokens"] = 1  # of a request that is not sent
        try:
            return SamplingParams(logprobs=num_logprobs, **values)
        except InvalidRequest as error:
            theirs = error.param or ""
            ours = FIELDS[theirs].native or theirs
            message = str(error).replace(theirs, ours)
            raise HttpError(400, message, param=f"sampling_params.{ours}", code="invalid_value") from None

    def constraint(self, limit_bytes: int) -> tuple[str, Constraint] | None:
        """(field, constraint), or None. Raises HttpError if the source is too large or has a mistake."""
        asked = asked_constraint(self, NATIVE_CONSTRAINTS)
        if asked is not None:
            asked = (f"sampling_params.{asked[0]}", *asked[1:])
        return constraint_of(asked, limit_bytes, self.tokenization, json_form_of(self, where="sampling_params."))


class GenerateBody(Strict):
    """`text` or `input_ids`, one or several. Several answers (also by `n`) are a list, or events with an `index`.

    `stream`: server-sent events. Each has the whole output so far, as in SGLang; with `cumulative` false, only the new
    part. `return_logprob`: log-probabilities of generated tokens, each with the `top_logprobs_num` most likely tokens,
    and of the prompt's tokens from `logprob_start_len` on (-1: none, or all if nothing is generated). `timeout_s`:
    seconds until the request is ended.
    `token_healing`: the model writes the prompt's last token again, as a part of any token that begins with it; null:
    for texts with a constraint.
    """

    rules = (
        FieldRule(
            "give either text or input_ids",
            ({"text": "given", "input_ids": NULL}, {"text": NULL, "input_ids": "given"}),
        ),
        FieldRule(
            NO_HEALING, ({"token_healing": (None, False)}, {"return_logprob": (None, False)}), ("token_healing",)
        ),
    )

    text: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    input_ids: Ids | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    sampling_params: NativeSampling | Annotated[list[NativeSampling], Field(min_length=1, max_length=MAX_PROMPTS)] = (
        Field(default_factory=NativeSampling)
    )
    stream: bool | None = None
    cumulative: bool = True
    rid: str | None = Field(
        default=None, min_length=1, max_length=200, description="the request's id; further answers get `-1`, ..."
    )
    return_logprob: bool | None = None
    logprob_start_len: int | None = Field(default=-1, ge=-1, le=MAX_INT32)
    top_logprobs_num: int | None = Field(default=0, ge=0, le=int(FIELDS["logprobs"].high))
    return_text_in_logprobs: bool | None = None
    priority: int = Field(default=0, ge=-100, le=2**31 - 1, description="lower values run first")
    cache_salt: str = Field(default="", max_length=200)
    timeout_s: float | None = Field(default=None, gt=0, le=86_400)
    token_healing: bool | None = None
    lora_path: str | None = Field(default=None, max_length=200, description="the name of a loaded adapter; empty: none")


class LoadAdapterBody(Strict):
    """`POST /v1/load_lora_adapter`, as in vLLM."""

    lora_name: str = Field(min_length=1, max_length=200, description="the name by which requests choose it as `model`")
    lora_path: str = Field(min_length=1, max_length=4096, description="a PEFT folder on the server's machine")


class UnloadAdapterBody(Strict):
    """`POST /v1/unload_lora_adapter`, as in vLLM."""

    lora_name: str = Field(min_length=1, max_length=200)


class AbortBody(Strict):
    rules = (FieldRule("give the rid of a request, or abort_all", ({"rid": "given"}, {"abort_all": (True,)})),)

    rid: str | None = Field(default=None, min_length=1, description="the exact id of a request")
    abort_all: bool = False


class ScaleBody(Strict):
    rules = (
        FieldRule(
            "a model or flags of engines take effect with restart alone",
            ({"restart": (True,)}, {"model": NULL, "engine": "none"}),
            ("restart",),
        ),
    )

    replicas: int | None = Field(
        default=None, ge=1, le=MAX_REPLICAS, description="how many engines there are to be; null: as many as now"
    )
    restart: bool = Field(default=False, description="restart them one after the other, while the others serve")
    model: str | None = Field(
        default=None, max_length=4096, description="with restart: another model with the same tokens; null: the start's"
    )
    engine: dict[str, Any] = Field(  # Any: EngineConfig checks its fields
        default_factory=dict, description="with restart: flags of the engines that differ from those of the start"
    )


class AppendBody(Strict):
    """`POST /concate_and_append_request`, which SGLang's frontend sends when branches are joined."""

    src_rids: list[str]
    dst_rid: str
