"""What every endpoint needs: the engine, the tokenizer, the configuration, and how errors become HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse

from ramet.errors import (
    EngineStopped,
    GrammarError,
    InvalidProgram,
    InvalidRequest,
    Overloaded,
    RametError,
    RequestCancelled,
)
from ramet.lang.graph.ir import Graph
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.text.tokenizer import Tokenizer

T = TypeVar("T")
LITTLE_BYTES = 1024  # a conversation of so many is rendered and cut into tokens in 0.2 ms

# The plan of a graph as JSON: (graph, the program's name, tokenizer, the model's name, context length). The language's
# affair, so whoever starts the server hands it in.
Explain = Callable[[Graph, str, Tokenizer, str, Mapping[str, int]], dict[str, Any]]  # Any: JSON


@dataclass(slots=True)
class ServerState:
    """One server. `pool`: threads for tokenising and rendering, so that the event loop never waits for them.

    `configured_context_length`: what the engine will have once it has started.
    """

    config: ServerConfig
    proxy: EngineProxy
    tokenizer: Tokenizer
    model_name: str
    started_s: float  # time.time()
    explain: Explain | None = None
    configured_context_length: int | None = None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="ramet-text"))

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together; known before the engine has started."""
        hello = self.proxy.hello
        return self.configured_context_length if hello is None else hello.context_length

    async def off_loop(self, work: Callable[..., T], *args: Any) -> T:  # Any: the work's own arguments
        """Run CPU work (tokenising, templates, schema checks) on the pool."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *args)

    async def compute(self, size: int, work: Callable[..., T], *args: Any) -> T:  # Any: the work's own arguments
        """Run CPU work on `size` bytes of input: on the pool, unless they are so few that a thread costs more."""
        return work(*args) if size <= LITTLE_BYTES else await self.off_loop(work, *args)

    def cache_salt(self, request: Request, asked: str) -> str:
        """The salt of a request: what it asks for, and its key where keys are isolated."""
        key = getattr(request.state, "api_key_digest", "") if self.config.isolate_cache_by_key else ""
        return f"{key}/{asked}" if key else asked


class HttpError(Exception):
    """An error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        if status == 400 and param is not None and code is None:
            code = "invalid_value"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.retry_after_s = retry_after_s
        self.error_class: str | None = None  # of ramet.errors; a header, since the body's shape is OpenAI's

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}
        if self.error_class is not None:
            headers["X-Ramet-Error"] = self.error_class
        return JSONResponse(self.body, self.status, headers)

    @classmethod
    def of(cls, error: Exception) -> HttpError:
        """The HTTP form of one of our errors."""
        if isinstance(error, HttpError):
            return error
        found = cls._of(error)
        found.error_class = type(error).__name__ if isinstance(error, RametError) else None
        return found

    @classmethod
    def _of(cls, error: Exception) -> HttpError:
        message = str(error)
        if isinstance(error, Overloaded):
            return cls(429, message, kind="rate_limit_error", code="overloaded", retry_after_s=error.retry_after_s)
        if isinstance(error, InvalidRequest):
            code = "context_length_exceeded" if type(error).__name__ == "ContextOverflow" else None
            return cls(400, message, param=error.param, code=code)
        if isinstance(error, GrammarError):
            return cls(400, message, param="response_format", code="invalid_grammar")
        if isinstance(error, InvalidProgram):
            return cls(400, message, param="graph", code="invalid_program")
        if isinstance(error, RequestCancelled):
            return cls(499, message, kind="cancelled", code="cancelled")
        if isinstance(error, EngineStopped):
            return cls(503, message, kind="server_error", code="engine_unavailable", retry_after_s=2.0)
        if isinstance(error, RametError):
            return cls(400, message)
        if isinstance(error, UnicodeEncodeError):
            return cls(400, f"a text is not valid Unicode: it holds {error.object[error.start : error.end]!r} alone")
        return cls(500, "an internal error; the server's log has the details", kind="server_error", code="internal")
