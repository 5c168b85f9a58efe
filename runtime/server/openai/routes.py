"""The routes of OpenAI's API, and what our OpenAPI document says of them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ramet.runtime.server.openai.chat import ChatEndpoint
from ramet.runtime.server.openai.completions import CompletionEndpoint
from ramet.runtime.server.openai.models import ModelEndpoints
from ramet.runtime.server.openai.types import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    openapi_body,
)
from ramet.runtime.server.sampling_fields import Strict
from ramet.runtime.server.state import ServerState


def make_router(state: ServerState) -> APIRouter:
    """Routes under /v1. They raise HttpError and RametError, which the application turns into responses."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    chat = ChatEndpoint(state)
    completions = CompletionEndpoint(state)
    models = ModelEndpoints(state, chat)
    state.pool.submit(lambda: chat.style)  # asking the template takes most of a second: not in the first request

    def taking(body: type[Strict]) -> dict[str, Any]:  # Any: arguments of a route
        return {"response_model": None, "openapi_extra": openapi_body(body)}

    @router.post("/chat/completions", **taking(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation; with `stream` as server-sent events."""
        return await chat(request)

    @router.post("/completions", **taking(CompletionBody))
    async def text_completions(request: Request) -> Response:
        """Continue one text or several."""
        return await completions(request)

    @router.post("/tokenize", **taking(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, or of a conversation as the model gets it."""
        return await models.tokenize(request)

    @router.post("/detokenize", **taking(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return await models.detokenize(request)

    @router.get("/models", response_model=None)
    async def list_models() -> Response:
        """The served model."""
        return await models.models()

    @router.get("/models/{model_id:path}", response_model=None)
    async def retrieve_model(model_id: str) -> Response:
        """The served model, by its name."""
        return await models.model(model_id)

    return router
