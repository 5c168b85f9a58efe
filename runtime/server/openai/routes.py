"""The endpoints of OpenAI's API: chats, completions, embeddings, `/v1/models`, `/v1/tokenize` and `/v1/detokenize`."""

from __future__ import annotations

from functools import partial
from typing import Literal

from starlette.requests import Request

from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.openai.answers import ChatCompletion, Completion
from ramet.runtime.server.openai.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from ramet.runtime.server.openai.chat import ChatEndpoint
from ramet.runtime.server.openai.completions import CompletionEndpoint
from ramet.runtime.server.openai.embeddings import (
    EmbeddingBody,
    EmbeddingEndpoints,
    Embeddings,
    LabelScores,
    ScoreBody,
)
from ramet.runtime.server.routing import Endpoint
from ramet.runtime.server.sending import AnswerStruct
from ramet.runtime.server.served_model import ServedModel
from ramet.runtime.text.chat_encoding import encode_marked, render_marked

_TAG = "OpenAI"


class ModelCard(AnswerStruct):
    """`max_model_len`: the context in tokens. `parent`: of an adapter, the model that it adapts."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(AnswerStruct):
    object: Literal["list"]
    data: list[ModelCard]


class TokenIds(AnswerStruct):
    tokens: list[int]
    count: int
    max_model_len: int | None


class DecodedText(AnswerStruct):
    text: str


class ModelEndpoints:
    """Endpoints for the served model and its tokenizer."""

    def __init__(self, served: ServedModel, chat: ChatEndpoint) -> None:
        self._served = served
        self._chat = chat

    async def models(self, request: Request) -> ModelList:
        """List the served model and its adapters."""
        return ModelList(object="list", data=[self._card(name) for name in self._served.names])

    async def model(self, request: Request) -> ModelCard:
        """Describe the served model or an adapter, by its name."""
        return self._card(self._served.name_of(request.path_params["model_id"]))

    async def tokenize(self, request: Request, body: TokenizeBody) -> TokenIds:
        """Return the token ids of a text, or of a conversation rendered by the chat template."""
        self._served.adapter_of(body.model)
        tokens = await self._served.off_loop(self._tokens, body)
        return TokenIds(tokens=tokens, count=len(tokens), max_model_len=self._served.context_length)

    async def detokenize(self, request: Request, body: DetokenizeBody) -> DecodedText:
        """Return the text of token ids."""
        self._served.adapter_of(body.model)
        size = self._served.tokenizer.vocab_size
        wrong = next((token for token in body.tokens if token >= size), None)
        if wrong is not None:
            raise HttpError(400, f"token {wrong} is outside the vocabulary of {size:,} tokens", param="tokens")
        return DecodedText(text=await self._served.off_loop(self._served.tokenizer.decode, body.tokens))

    def _tokens(self, body: TokenizeBody) -> list[int]:
        tokenizer = self._served.tokenizer
        if body.prompt is not None:
            return tokenizer.encode(body.prompt, add_special=body.add_special_tokens, parse_special=True)
        messages = [message.plain() for message in body.messages or ()]
        adapted, tools = self._chat.style.adapt(messages, [tool.plain() for tool in body.tools or ()])
        text = render_marked(
            tokenizer,
            adapted,
            add_generation_prompt=body.add_generation_prompt,
            tools=tools,
            variables=body.chat_template_kwargs,
        )
        return encode_marked(tokenizer, text)

    def _card(self, name: str) -> ModelCard:
        return ModelCard(
            id=name,
            object="model",
            created=int(self._served.started_s),
            owned_by="ramet",
            root=name,
            parent=None if name == self._served.name else self._served.name,
            max_model_len=self._served.context_length,
        )


def openai_endpoints(served: ServedModel, chat: ChatEndpoint) -> list[Endpoint]:
    """OpenAI's endpoints under /v1, except the Responses API."""
    models, embeddings = ModelEndpoints(served, chat), EmbeddingEndpoints(served)
    served.pool.submit(lambda: chat.style)  # takes most of a second: not in the first request
    post = partial(Endpoint, "POST", errors=(404, 429, 503), tag=_TAG)
    return [
        post("/v1/chat/completions", chat.answer, body=ChatBody, answer=ChatCompletion, has_stream=True),
        post(
            "/v1/completions",
            CompletionEndpoint(served).answer,
            body=CompletionBody,
            answer=Completion,
            has_stream=True,
        ),
        post("/v1/tokenize", models.tokenize, body=TokenizeBody, answer=TokenIds),
        post("/v1/detokenize", models.detokenize, body=DetokenizeBody, answer=DecodedText),
        post("/v1/embeddings", embeddings.embed, body=EmbeddingBody, answer=Embeddings),
        post("/v1/score", embeddings.score, body=ScoreBody, answer=LabelScores),
        Endpoint("GET", "/v1/models", models.models, answer=ModelList, tag=_TAG),
        Endpoint(
            "GET",
            "/v1/models/{model_id:path}",
            models.model,
            answer=ModelCard,
            errors=(404,),
            tag=_TAG,
        ),
    ]
