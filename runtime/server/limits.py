"""The middleware of every request: it finds whose key it is, bounds the body, and counts and logs the answer.

Plain ASGI, no buffering. The log contains prompts only with `log_prompts`, and never keys.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
import zlib
from typing import TYPE_CHECKING

import zstandard
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ramet.errors import EngineStopped
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.keys import digest_of_key
from ramet.runtime.server.link.tracing import traced
from ramet.runtime.server.tenants import Held, Tenants, Used

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

BODY_TIMEOUT_S = 75.0  # maximum time between two pieces of a body
MAX_LOGGED_BYTES = 16 << 10
_PLAIN_ID = re.compile(r"[\x21-\x7e]{1,128}")  # an id that a log line and a header can hold
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})  # requested every few seconds; logged only at DEBUG
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/docs", "/openapi.json", "/ui"})
ADMIN_PATHS = frozenset(
    {
        "/flush_cache",
        "/reset_prefix_cache",
        "/abort_request",
        "/scale",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    }
)


class HttpLimits:
    """The middleware. It puts the key's name, the connection and the request's id into `scope["state"]["client"]`."""

    def __init__(
        self, app: ASGIApp, config: ServerConfig, tenants: Tenants, tracing: TracerProvider | None = None
    ) -> None:
        self._app = app
        self._tracing = tracing
        self._tenants = tenants
        self._config = config
        self._admin_key = None if config.admin_api_key is None else digest_of_key(config.admin_api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._tracing is None or scope["path"] in QUIET_PATHS:
            await self._answer(scope, receive, send)
        else:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            with traced(self._tracing, scope["method"], scope["path"], headers) as span:
                status = await self._answer(scope, receive, send)
                span.set_attribute("http.response.status_code", status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Answer a request. Returns the status."""
        start_s, status = time.monotonic(), 0
        if len(scope["path"]) > 1:
            scope["path"] = scope["path"].rstrip("/") or "/"
        request_id = _request_id(scope)
        is_anthropic = scope["path"].startswith("/v1/messages")  # its clients read the id from another header

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._tenants.requests.note_response(status)
                names = (b"x-request-id", b"request-id") if is_anthropic else (b"x-request-id",)
                message["headers"] = [*message.get("headers", ()), *((name, request_id.encode()) for name in names)]
            await send(message)

        limited = _LimitedBody(
            receive, self._config.max_body_bytes, self._tenants.bytes, keeps_text=self._config.log_prompts
        )
        client = scope.setdefault("state", {})["client"] = ("", _connection(scope) or request_id, request_id)
        try:
            refusal = self.refusal(scope)
            if refusal is not None:
                await _answer(refusal, counted)
            else:
                limited.coding = _header(scope, b"content-encoding").strip().lower()
                client = scope["state"]["client"]
                limited.key = client[0]
                self._tenants.open(client)
                await self._app(scope, limited.receive, counted)
        except asyncio.CancelledError:  # the server ends without waiting for this answer
            if status:
                raise
            await _answer(HttpError.of(EngineStopped("the server is shutting down")), counted)
        finally:
            limited.release()
            used = self._tenants.close(client)
            _log(scope, request_id, client[0], status, time.monotonic() - start_s, used, limited.text)
        return status

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
        if sum(name == b"authorization" for name, _ in scope["headers"]) > 1:
            return HttpError(400, "the request has several Authorization headers; send one")
        key = headers.get(b"x-api-key") or _bearer(headers.get(b"authorization", b""))
        if self._admin_key is not None and (is_admin or path.startswith("/ui/")):
            allowed = hmac.compare_digest(digest_of_key(key), self._admin_key)
            scope["state"]["is_admin"] = allowed
            if not allowed and not is_admin:
                allowed = self._is_let_in(scope, key)
        else:
            allowed = self._is_let_in(scope, key)
        if not allowed:
            return HttpError(
                401,
                "a valid API key is needed: send the header `Authorization: Bearer KEY`, or `x-api-key: KEY`",
                kind="authentication_error",
                code="invalid_api_key",
            )
        return None

    def _is_let_in(self, scope: Scope, key: bytes) -> bool:
        """Whether a request with this key may use the server. Notes whose key it is."""
        if not self._tenants.need_keys:
            return True
        entry = self._tenants.find(key)
        if entry is not None:
            scope["state"]["client"] = (entry.name, *scope["state"]["client"][1:])
        return entry is not None


class _LimitedBody:
    """Reads a body, decompresses it if `coding` says so, and counts it for `key` in `bytes_held` until `release`.

    Raises: HttpError if the body is too large, also decompressed, arrives too slowly, or is not what `coding` says;
    Overloaded if all bodies together are too large.
    """

    def __init__(self, receive: Receive, limit: int, bytes_held: Held, *, keeps_text: bool) -> None:
        self._receive = receive
        self._limit = limit
        self._bytes_held = bytes_held
        self._num_held = 0
        self._size = 0
        self._is_whole = False
        self._kept: bytearray | None = bytearray() if keeps_text else None
        self._compressed = bytearray()
        self.coding = ""
        self.key = ""

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
            self._hold(len(body))
            if self.coding not in ("", "identity"):
                self._compressed += body
                body = b""
                if self._is_whole:  # 32 MiB take 0.1 s, in which the answers of others would stand still
                    body = await asyncio.to_thread(_expanded, self._compressed, self.coding, self._limit)
                self._hold(len(body))
                message = {**message, "body": body}
            if self._kept is not None:
                self._kept += body[: MAX_LOGGED_BYTES - len(self._kept)]
        return message

    def _hold(self, num_bytes: int) -> None:
        self._bytes_held.take(self.key, num_bytes)
        self._num_held += num_bytes

    def release(self) -> None:
        """Hold nothing any longer: the request is over."""
        self._bytes_held.give(self.key, self._num_held)
        self._num_held = 0


def _expanded(data: bytes | bytearray, coding: str, limit: int) -> bytes:
    """Decompress a whole body. Raises HttpError for an unknown coding, wrong data, or more than `limit` bytes."""
    try:
        if coding in ("gzip", "deflate"):
            found = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, limit + 1)
        elif coding == "zstd":
            found = zstandard.ZstdDecompressor().stream_reader(bytes(data)).read(limit + 1)
        else:
            message = f"the body's content-encoding is {coding!r}; send it as gzip, deflate, zstd, or as it is"
            raise HttpError(415, message, code="unsupported_encoding")
    except (zlib.error, zstandard.ZstdError) as error:
        raise HttpError(400, f"the body is not {coding}, as its head says: {error}", code="invalid_encoding") from None
    if len(found) > limit:
        raise _too_large(limit)
    return found


def _header(scope: Scope, name: bytes) -> str:
    """The value of a request's header; empty if there is none."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _request_id(scope: Scope) -> str:
    """The id that a client or a proxy gave a request, or a new one."""
    given = _header(scope, b"x-request-id")
    return given if _PLAIN_ID.fullmatch(given) else uuid.uuid4().hex


def _connection(scope: Scope) -> str:
    address = scope.get("client")
    return "" if address is None else f"{address[0]}:{address[1]}"


def _log(scope: Scope, request_id: str, key: str, status: int, seconds: float, used: Used, text: str | None) -> None:
    level = logging.DEBUG if scope["path"] in QUIET_PATHS else logging.INFO
    if not logger.isEnabledFor(level):
        return
    # A status of 0: the client left before there was an answer. %r keeps line breaks in a path out of the log.
    method, path, more = scope["method"], scope["path"], used.fields()
    fields = {"id": request_id, "key": key or None, "method": method, "path": path, "status": status}
    fields |= {"seconds": round(seconds, 4), **more}
    shown = "".join(f", {name} {value}" for name, value in {**({"key": key} if key else {}), **more}.items())
    line = "%s %r %d in %.1f ms, %s%s"
    logger.log(level, line, method, path, status, 1000 * seconds, request_id, shown, extra={"fields": fields})
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


async def _answer(error: HttpError, send: Send) -> None:
    response = error.response()
    await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})
