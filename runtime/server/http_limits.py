"""What every request passes first: its key, the size of its body, a count of its answer. Plain ASGI, no buffering."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.metrics import ServerMetrics
from ramet.runtime.server.state import HttpError

Message: TypeAlias = MutableMapping[str, Any]  # ASGI's own types
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/docs", "/openapi.json"})
ADMIN_PATHS = frozenset({"/flush_cache", "/abort_request"})


class Limits:
    """Middleware. `scope["state"]["api_key_digest"]` names the key for those who isolate by it."""

    def __init__(self, app: App, config: ServerConfig, metrics: ServerMetrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        self._keys = [_digest(key) for key in config.api_key]
        self._admin_key = _digest(config.admin_api_key) if config.admin_api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.note_response(message["status"])
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await _answer(refusal, counted)
            return
        limited = _LimitedBody(receive, counted, self._config.max_body_bytes)
        await self._app(scope, limited.receive, limited.send)

    def _refusal(self, scope: Scope) -> HttpError | None:
        """Why this request is not let in, by its head alone."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._config.max_body_bytes:
            return _too_large(self._config.max_body_bytes)
        path = scope["path"]
        is_admin = path in ADMIN_PATHS or (path == "/metrics" and self._config.protect_metrics)
        if path in OPEN_PATHS and not is_admin:
            return None
        digest = _digest(headers.get(b"authorization", b"").decode("latin-1").removeprefix("Bearer ").strip())
        if is_admin and self._admin_key is not None:
            allowed = hmac.compare_digest(digest, self._admin_key)
        else:
            # Every key is compared, in constant time: how long it takes says nothing of which one it was.
            allowed = not self._keys or sum(hmac.compare_digest(digest, key) for key in self._keys) > 0
        if not allowed:
            return HttpError(
                401,
                "a valid API key is needed: send the header `Authorization: Bearer KEY`",
                kind="authentication_error",
                code="invalid_api_key",
            )
        scope.setdefault("state", {})["api_key_digest"] = digest[:16] if self._keys else ""
        return None


class BodyTooLarge(Exception):
    """The body grew past the limit while it was read."""


class _LimitedBody:
    """Counts a body without a stated length. Once it is too large, the application's answer becomes a 413."""

    def __init__(self, receive: Receive, send: Send, limit: int) -> None:
        self._receive = receive
        self._send = send
        self._limit = limit
        self._size = 0
        self._has_answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self._limit:
                raise BodyTooLarge(f"the body is larger than {self._limit:,} bytes")
        return message

    async def send(self, message: Message) -> None:
        if self._size <= self._limit:
            await self._send(message)
        elif not self._has_answered:
            self._has_answered = True
            await _answer(_too_large(self._limit), self._send)


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than {limit:,} bytes; send less, or raise --max-body-bytes")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


async def _answer(error: HttpError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
