"""Errors in OpenAI's shape: the answer to a client for each exception, as a struct and as a response."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Literal

import msgspec
from starlette.responses import Response

from ramet.errors import (
    ContextOverflow,
    EngineStopped,
    GrammarError,
    InvalidProgram,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    RametError,
    RequestCancelled,
)

logger = logging.getLogger(__name__)

ErrorKind = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "cancelled", "server_error"]


_CLASSES = {
    429: "Overloaded",
    499: "RequestCancelled",
    503: "EngineStopped",
    **dict.fromkeys((400, 404, 422), "InvalidRequest"),
}


class ErrorFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`param`: the wrong field of the request, if there is one. `code`: identifies the error for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of every error answer: OpenAI's, with the `type` that Anthropic's clients read."""

    error: ErrorFields
    type: Literal["error"] = "error"


class HttpError(Exception):
    """An error that ends a request with a status and an `Error` as the answer's body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: ErrorKind = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        error_class: str | None = None,
        allow: Iterable[str] = (),
    ) -> None:
        """`error_class`: a class name of ramet.errors; default: what the status stands for. It is sent as a header,
        because the body has OpenAI's shape. `allow`: the methods that the path has.
        """
        super().__init__(message)
        if status == 400 and param is not None and code is None:
            code = "invalid_value"
        self.status = status
        self.body = Error(ErrorFields(message, kind, param, code))
        self.retry_after_s = retry_after_s
        self.error_class = error_class or _CLASSES.get(status, "RametError")
        self.allow = sorted(allow)

    def response(self) -> Response:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}
        headers["X-Ramet-Error"] = self.error_class
        if self.allow:
            headers["Allow"] = ", ".join(self.allow)
        return Response(msgspec.json.encode(self.body), self.status, headers, "application/json")

    @classmethod
    def of(cls, error: Exception) -> HttpError:
        """The HTTP form of any exception. An unexpected one is an internal error."""
        if isinstance(error, HttpError):
            return error
        if isinstance(error, RametError):
            return cls._of_ours(error, type(error).__name__)
        if isinstance(error, UnicodeEncodeError):
            return cls(400, f"a text is not valid Unicode: it holds {error.object[error.start : error.end]!r} alone")
        return cls(500, "an internal error; the server's log has the details", kind="server_error", code="internal")

    @classmethod
    def _of_ours(cls, error: RametError, name: str) -> HttpError:
        message = str(error)
        if isinstance(error, Overloaded):
            wait_s = error.retry_after_s
            return cls(429, message, kind="rate_limit_error", code="overloaded", retry_after_s=wait_s, error_class=name)
        if isinstance(error, InvalidRequest):
            code = "context_length_exceeded" if isinstance(error, ContextOverflow) else None
            return cls(400, message, param=error.param, code=code, error_class=name)
        if isinstance(error, GrammarError):
            return cls(400, message, param="response_format", code="invalid_grammar", error_class=name)
        if isinstance(error, InvalidProgram):
            return cls(400, message, param="graph", code="invalid_program", error_class=name)
        if isinstance(error, RequestCancelled):
            return cls(499, message, kind="cancelled", code="cancelled", error_class=name)
        if isinstance(error, EngineStopped | OutOfMemory):  # of a step: the request is not to blame
            return cls(
                503, message, kind="server_error", code="engine_unavailable", retry_after_s=2.0, error_class=name
            )
        return cls(400, message, error_class=name)


def error_response(error: Exception) -> Response:
    """The answer to a request that raised this exception. An unexpected exception is logged."""
    if not isinstance(error, HttpError | RametError | UnicodeEncodeError):
        logger.error("a request failed", exc_info=error)
    return HttpError.of(error).response()
