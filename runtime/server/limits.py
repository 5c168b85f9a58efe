"""The middleware of every request: it checks the key, bounds the body, and counts and logs the answer.

Plain ASGI, no buffering. The log contains prompts only with `log_prompts`, and never keys.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ramet.errors import EngineStopped
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.metrics import RequestCollector

logger = logging.getLogger(__name__)

BODY_TIMEOUT_S = 75.0  # maximum time between two pieces of a body
MAX_LOGGED_BYTES = 16 << 10
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})  # requested every few seconds; logged only at DEBUG
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/docs", "/openapi.json"})
ADMIN_PATHS = frozenset({"/flush_cache", "/abort_request"})


class HttpLimits:
    """The middleware. It puts a digest of the key into `scope["state"]["api_key_digest"]`, for isolation by key."""

    def __init__(self, app: ASGIApp, config: ServerConfig, requests: RequestCollector) -> None:
        self._app = app
        self._config = config
        self._requests = requests
        self._keys = [_digest(key.encode()) for key in config.api_key]
        self._admin_key = None if config.admin_api_key is None else _digest(config.admin_api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        start_s, status = time.monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._requests.note_response(status)
            await send(message)

        limited = _LimitedBody(receive, self._config.max_body_bytes, keeps_text=self._config.log_prompts)
        try:
            refusal = self.refusal(scope)
            if refusal is not None:
                await _answer(refusal, counted)
            else:
                await self._app(scope, limited.receive, counted)
        except asyncio.CancelledError:  # the server ends without waiting for this answer
            if status:
                raise
            await _answer(HttpError.of(EngineStopped("the server is shutting down")), counted)
        finally:
            _log(scope, status, time.monotonic() - start_s, limited.text)

    def refusal(self, scope: Scope) -> HttpError | None:
        """The error of a request that is refused by its head alone; None if it may pass."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._config.max_body_bytes:
            return _too_large(self._config.max_body_bytes)
        path = scope["path"]
        is_admin = path in ADMIN_PATHS or (path == "/metrics" and self._config.protect_metrics)
        if path in OPEN_PATHS and not is_admin:
            return None
        digest = _digest(headers.get(b"x-api-key") or _bearer(headers.get(b"authorization", b"")))
        if is_admin and self._admin_key is not None:
            allowed = hmac.compare_digest(digest, self._admin_key)
        else:
            # Every key is compared, in constant time: how long it takes says nothing of which one it was.
            allowed = not self._keys or sum(hmac.compare_digest(digest, key) for key in self._keys) > 0
        if not allowed:
            return HttpError(
                401,
                "a valid API key is needed: send the header `Authorization: Bearer KEY`, or `x-api-key: KEY`",
                kind="authentication_error",
                code="invalid_api_key",
            )
        scope.setdefault("state", {})["api_key_digest"] = digest[:16] if self._keys else ""
        return None


class _LimitedBody:
    """Reads a body. Raises HttpError if the body is too large or arrives too slowly."""

    def __init__(self, receive: Receive, limit: int, *, keeps_text: bool) -> None:
        self._receive = receive
        self._limit = limit
        self._size = 0
        self._is_whole = False
        self._kept: bytearray | None = bytearray() if keeps_text else None

    @property
    def text(self) -> str | None:
        """The beginning of the body, if it is kept for the log."""
        return None if self._kept is None else bytes(self._kept).decode("utf-8", "backslashreplace")

    async def receive(self) -> Message:
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                message = await self._receive()
        except TimeoutError:
            raise _too_slow() from None
        if message["type"] == "http.request":
            body = message.get("body", b"")
            self._size += len(body)
            self._is_whole = not message.get("more_body", False)
            if self._size > self._limit:
                raise _too_large(self._limit)
            if self._kept is not None:
                self._kept += body[: MAX_LOGGED_BYTES - len(self._kept)]
        return message


def _log(scope: Scope, status: int, seconds: float, text: str | None) -> None:
    level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
    # A status of 0: the client left before there was an answer. %r keeps line breaks in a path out of the log.
    logger.log(level, "%s %r %d in %.1f ms", scope["method"], scope["path"], status, 1000 * seconds)
    if text:
        logger.info("body: %r", text)


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than {limit:,} bytes; send less, or raise --max-body-bytes")


def _too_slow() -> HttpError:
    return HttpError(408, f"no more of the body came for {BODY_TIMEOUT_S:.0f} s", code="request_timeout")


def _bearer(header: bytes) -> bytes:
    """The key in an Authorization header. The scheme's name is case-insensitive (RFC 9110, section 11.1)."""
    scheme, _, key = header.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else header.strip()


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


async def _answer(error: HttpError, send: Send) -> None:
    response = error.response()
    await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})
