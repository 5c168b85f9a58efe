"""The endpoints of OpenAI's API."""

from __future__ import annotations

from ramet.runtime.server.openai.answers import ChatCompletion, Completion
from ramet.runtime.server.openai.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from ramet.runtime.server.openai.chat import ChatEndpoint
from ramet.runtime.server.openai.completions import CompletionEndpoint
from ramet.runtime.server.openai.models import DecodedText, ModelCard, ModelEndpoints, ModelList, TokenIds
from ramet.runtime.server.routing import Endpoint
from ramet.runtime.server.served_model import ServedModel

_TAG = "OpenAI"


def openai_endpoints(served: ServedModel, chat: ChatEndpoint) -> list[Endpoint]:
    """OpenAI's endpoints under /v1, except the Responses API."""
    models = ModelEndpoints(served, chat)
    served.pool.submit(lambda: chat.style)  # takes most of a second: not in the first request
    return [
        Endpoint(
            "POST",
            "/v1/chat/completions",
            chat.answer,
            body=ChatBody,
            answer=ChatCompletion,
            errors=(404, 429, 503),
            has_stream=True,
            tag=_TAG,
        ),
        Endpoint(
            "POST",
            "/v1/completions",
            CompletionEndpoint(served).answer,
            body=CompletionBody,
            answer=Completion,
            errors=(404, 429, 503),
            has_stream=True,
            tag=_TAG,
        ),
        Endpoint(
            "POST",
            "/v1/tokenize",
            models.tokenize,
            body=TokenizeBody,
            answer=TokenIds,
            errors=(404, 429, 503),
            tag=_TAG,
        ),
        Endpoint(
            "POST",
            "/v1/detokenize",
            models.detokenize,
            body=DetokenizeBody,
            answer=DecodedText,
            errors=(404, 429, 503),
            tag=_TAG,
        ),
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
