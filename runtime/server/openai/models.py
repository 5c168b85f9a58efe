"""`/v1/models`, `/v1/tokenize` and `/v1/detokenize`."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from ramet.runtime.server.openai.chat import ChatEndpoint
from ramet.runtime.server.openai.types import DetokenizeBody, Json, TokenizeBody, check_model, parse_body
from ramet.runtime.server.sse import json_response
from ramet.runtime.server.state import HttpError, ServerState
from ramet.runtime.text.chat_encoding import encode_chat


class ModelEndpoints:
    """What is known of the one model, and its tokenizer."""

    def __init__(self, state: ServerState, chat: ChatEndpoint) -> None:
        self._state = state
        self._chat = chat

    async def models(self) -> Response:
        """The models that can be named in requests: one."""
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, model_id: str) -> Response:
        check_model(self._state, model_id)
        return json_response(self._card())

    async def tokenize(self, request: Request) -> Response:
        body = await parse_body(self._state, request, TokenizeBody)
        check_model(self._state, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise HttpError(400, "give either prompt or messages", param="prompt")
        for name in ("tools", "chat_template_kwargs"):
            if getattr(body, name) is not None and body.messages is None:
                raise HttpError(400, f"{name} is only allowed with messages", param=name)
        tokens = await self._state.off_loop(self._tokens, body)
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": self._state.context_length})

    async def detokenize(self, request: Request) -> Response:
        body = await parse_body(self._state, request, DetokenizeBody)
        check_model(self._state, body.model)
        size = self._state.tokenizer.vocab_size
        wrong = next((token for token in body.tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise HttpError(400, f"token {wrong} is outside the vocabulary of {size:,} tokens", param="tokens")
        return json_response({"text": await self._state.off_loop(self._state.tokenizer.decode, body.tokens)})

    def _tokens(self, body: TokenizeBody) -> list[int]:
        tokenizer = self._state.tokenizer
        if body.prompt is not None:
            return tokenizer.encode(body.prompt, add_special=body.add_special_tokens, parse_special=True)
        messages = [message.plain() for message in body.messages or ()]
        adapted, tools = self._chat.style.adapt(messages, [tool.plain() for tool in body.tools or ()])
        return encode_chat(
            tokenizer,
            tokenizer.chat_template,
            adapted,
            add_generation_prompt=body.add_generation_prompt,
            tools=tools,
            variables=body.chat_template_kwargs,
        )

    def _card(self) -> Json:
        return {
            "id": self._state.model_name,
            "object": "model",
            "created": int(self._state.started_s),
            "owned_by": "ramet",
            "root": self._state.model_name,
            "parent": None,
            "max_model_len": self._state.context_length,
        }
