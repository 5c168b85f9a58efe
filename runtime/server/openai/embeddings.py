"""`/v1/embeddings`, and `/v1/score`: likelihoods of labels after texts. Both are requests that generate nothing."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Annotated, Literal, cast

import numpy as np
from pydantic import Field
from starlette.requests import Request

from ramet.runtime.server.choices import Job, prompts_named, scored, scoring
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.link.protocol import Output, Submit
from ramet.runtime.server.sending import AnswerStruct, until_disconnect
from ramet.runtime.server.served_model import ServedModel, client_of
from ramet.runtime.server.validation import Ids, ModelName, Prompt, Strict, Token
from ramet.runtime.types import MAX_INT32, RequestOptions, SamplingParams

MAX_TEXTS = 2048  # of one request, as OpenAI's
_MAX_LABELS = 64

Texts = Prompt | Ids | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_TEXTS)] | (
    Annotated[list[Ids], Field(min_length=1, max_length=MAX_TEXTS)]
)  # fmt: skip


class EmbeddingBody(Strict):
    """`POST /v1/embeddings`. `pooling`: null: as the model's files say. `dimensions`: the vectors' first so many."""

    input: Texts = Field(union_mode="left_to_right")
    model: ModelName | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1, le=MAX_INT32)
    normalize: bool = Field(default=True, description="make the length of every vector 1")
    pooling: Literal["last", "mean", "cls"] | None = None
    priority: int = Field(default=0, ge=-100, le=MAX_INT32)
    cache_salt: str = Field(default="", max_length=200)
    user: str | None = None


class ScoreBody(Strict):
    """`POST /v1/score`: how likely is each label as the next token after the query and an item?"""

    query: Prompt | Ids = Field(union_mode="left_to_right")
    items: (
        Annotated[list[Prompt], Field(min_length=1, max_length=MAX_TEXTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_TEXTS)]
    )
    label_token_ids: list[Token] = Field(min_length=1, max_length=_MAX_LABELS)
    apply_softmax: bool = Field(default=False, description="divide each item's probabilities by their sum")
    item_first: bool = Field(default=False, description="the query follows the item")
    model: ModelName | None = None
    priority: int = Field(default=0, ge=-100, le=MAX_INT32)
    cache_salt: str = Field(default="", max_length=200)


class EmbeddingUsage(AnswerStruct):
    prompt_tokens: int
    total_tokens: int


class Embedding(AnswerStruct):
    """`embedding`: numbers, or with `base64` their bytes as little-endian fp32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(AnswerStruct):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class LabelScores(AnswerStruct):
    """`scores`: for each item the probability of each label."""

    object: Literal["scoring"]
    scores: list[list[float]]
    model: str
    usage: EmbeddingUsage


class EmbeddingEndpoints:
    """Answers both for one server."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    async def embed(self, request: Request, body: EmbeddingBody) -> Embeddings:
        """Return a vector for each text."""
        served = self._served
        options = RequestOptions(
            cache_salt=served.cache_salt(request, body.cache_salt),
            priority=body.priority,
            adapter=served.adapter_of(body.model),
            pooling=body.pooling or "model",
        )
        given = body.input
        texts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        asked = cast(Sequence[str | list[int]], texts)
        with prompts_named("input"):
            prompts = await served.compute(len(await request.body()), self._tokens, asked, [True] * len(asked))
        name, client = served.proxy.new_id("embd"), client_of(request)
        wanted = [
            Submit(f"{name}-{i}", list(ids), SamplingParams(max_tokens=1), None, options, client)
            for i, ids in enumerate(prompts)
        ]
        with prompts_named("input"):
            outputs = await until_disconnect(request.receive, scored(served.proxy, wanted))
        data = [Embedding(object="embedding", index=i, embedding=_shown(o, body)) for i, o in enumerate(outputs)]
        return Embeddings(object="list", data=data, model=options.adapter or served.name, usage=_usage(outputs))

    async def score(self, request: Request, body: ScoreBody) -> LabelScores:
        """Return the probability of each label as the next token after the query and each item."""
        served = self._served
        if len(body.items) * len(body.label_token_ids) > MAX_TEXTS:
            raise HttpError(
                400,
                f"{len(body.items)} items with {len(body.label_token_ids)} labels are more than {MAX_TEXTS:,} scores",
                param="items",
            )
        options = RequestOptions(
            cache_salt=served.cache_salt(request, body.cache_salt),
            priority=body.priority,
            adapter=served.adapter_of(body.model),
        )
        texts = [body.query, *body.items]
        begins = [not body.item_first, *[body.item_first] * len(body.items)]
        with prompts_named("items"):
            query, *items = await served.compute(len(await request.body()), self._tokens, texts, begins)
        prompts = [[*item, *query] if body.item_first else [*query, *item] for item in items]
        name, client, labels = served.proxy.new_id("score"), client_of(request), body.label_token_ids
        wanted = [
            scoring(
                f"{name}-{i}-{j}",
                Job([*prompt, label], SamplingParams(max_tokens=1), options=options, client=client),
                len(prompt),
            )
            for i, prompt in enumerate(prompts)
            for j, label in enumerate(labels)
        ]
        with prompts_named("items"):
            outputs = await until_disconnect(request.receive, scored(served.proxy, wanted))
        found = [math.exp((output.prompt_logprobs or [-math.inf])[0]) for output in outputs]
        scores = [found[start : start + len(labels)] for start in range(0, len(found), len(labels))]
        if body.apply_softmax:
            scores = [[value / max(sum(row), 1e-300) for value in row] for row in scores]
        firsts = outputs[:: len(labels)]
        return LabelScores(
            object="scoring", scores=scores, model=options.adapter or served.name, usage=_usage(firsts, beyond=1)
        )

    def _tokens(self, texts: Sequence[str | list[int]], begins: Sequence[bool]) -> list[Sequence[int]]:
        """The tokens of texts. begins: whether each has the tokens that the tokenizer puts before a text."""
        tokenizer, prompts = self._served.tokenizer, list[Sequence[int]]()
        for text, begin in zip(texts, begins, strict=True):
            ids = tokenizer.encode(text, add_special=begin, parse_special=True) if isinstance(text, str) else text
            wrong = next((token for token in ids if token >= tokenizer.vocab_size), None)
            if wrong is not None:
                raise HttpError(
                    400, f"token {wrong} is outside the vocabulary of {tokenizer.vocab_size:,} tokens", param="input"
                )
            prompts.append(self._served.one_of_many(ids))
        return prompts


def _shown(output: Output, body: EmbeddingBody) -> list[float] | str:
    vector = np.asarray(output.vector, dtype=np.float32)
    if body.dimensions is not None and body.dimensions > len(vector):
        raise HttpError(
            400, f"dimensions is {body.dimensions:,} but the model's vectors have {len(vector):,}", param="dimensions"
        )
    vector = vector[: body.dimensions]
    if body.normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]


def _usage(outputs: Sequence[Output], beyond: int = 0) -> EmbeddingUsage:
    """The tokens of prompts, each without the `beyond` that were put behind it."""
    count = sum(output.prompt_tokens - beyond for output in outputs)
    return EmbeddingUsage(prompt_tokens=count, total_tokens=count)
