"""The table of endpoints. A row has the path, the body and answer types, the possible errors, and the handler.

The rows define Starlette's routes, the parsing of bodies, and the OpenAPI document (`openapi`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Lifespan, Receive, Scope, Send

from ramet.runtime.server.errors import HttpError, error_response
from ramet.runtime.server.sending import json_response
from ramet.runtime.server.served_model import ServedModel
from ramet.runtime.server.validation import Strict, parsed

logger = logging.getLogger(__name__)

LARGE_BYTES = 1 << 16  # a larger body is checked on another thread
_READING = frozenset({"GET", "HEAD"})  # methods that change nothing
# It gets the request, and the body if the row has a body type. It returns a response, or the struct of a 200 answer.
Handler = Callable[..., Awaitable[Any]]  # Any: a Response, or what msgspec encodes


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A row of the table of endpoints.

    Its description in the OpenAPI document is the handler's docstring. `answer`: the type of a 200 answer; None if that
    is not JSON. `others`: types of answers with other statuses. `errors`: statuses of errors besides those of key and
    body. `media_type`: the type of an answer that is not JSON. `has_stream`: a 200 answer may be server-sent events.
    `is_listed`: the document contains it; second names of endpoints are left out.
    """

    method: str
    path: str
    handler: Handler
    body: type[Strict] | None = None
    answer: Any = None  # Any: a type that msgspec knows
    others: Mapping[int, Any] = field(default_factory=dict)
    errors: tuple[int, ...] = ()
    media_type: str | None = None
    has_stream: bool = False
    is_listed: bool = True
    tag: str = "server"

    @property
    def about(self) -> str:
        return inspect.getdoc(self.handler) or ""


class _EndpointRoute(Route):
    """The route of an endpoint: reads the body, encodes the answer, and turns exceptions into answers.

    It has one method. HEAD is answered as GET, without the body, unless that could be a stream.
    """

    def __init__(self, endpoint: Endpoint, served: ServedModel) -> None:
        super().__init__(endpoint.path, endpoint.handler, methods=[endpoint.method])
        has_head = endpoint.method == "GET" and not endpoint.has_stream and endpoint.media_type is None
        self.methods = {endpoint.method, "HEAD"} if has_head else {endpoint.method}
        self.app = self._answer
        self._row = endpoint
        self._served = served

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._response(Request(scope, receive))
        except ClientDisconnect:
            logger.debug("%s %r: the client left before its body was whole", scope["method"], scope["path"])
            return
        except Exception as error:
            response = error_response(error)
        await response(scope, receive, send)

    async def _response(self, request: Request) -> Response:
        endpoint = self._row
        if endpoint.method not in _READING:
            _check_type(request)
        if endpoint.body is None:
            answer = await endpoint.handler(request)
        else:
            data = await request.body()
            limit = self._served.config.max_json_values
            if len(data) > LARGE_BYTES:
                body = await self._served.off_loop(parsed, endpoint.body, data, limit)
            else:
                body = parsed(endpoint.body, data, limit)
            answer = await endpoint.handler(request, body)
        return answer if isinstance(answer, Response) else json_response(answer)


def _check_type(request: Request) -> None:
    """Refuse a body that a page of any site may let a browser send here without asking, such as text/plain.

    Source: CORS-safelisted values of Content-Type, Fetch standard, section 2.2.2.
    """
    name = request.headers.get("content-type", "" if "origin" in request.headers else "application/json")
    media_type = name.partition(";")[0].strip().lower()
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    if has_body and not (media_type == "application/json" or media_type.endswith("+json")):
        raise HttpError(
            415, f"the body's content-type is {name!r}; send application/json", code="unsupported_media_type"
        )


def make_app(
    endpoints: Sequence[Endpoint], served: ServedModel, lifespan: Lifespan[Starlette] | None = None
) -> Starlette:
    """Make the application of these endpoints, in this order."""
    routes = [_EndpointRoute(endpoint, served) for endpoint in endpoints]

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
        return _no_route(request, error, {method for route in matching for method in route.methods or ()})

    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: no_route})


def _no_route(request: Request, error: HTTPException, allow: set[str]) -> Response:
    """The answer if Starlette finds no route for a path or for its method. `allow`: the methods that the path has."""
    place = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return HttpError(404, f"{place} is not here; GET /docs shows what is", code="not_found").response()
    if error.status_code == 405:
        message = f"{place} is not here, though {request.url.path} is; GET /docs shows its methods"
        return HttpError(405, message, code="method_not_allowed", allow=allow).response()
    return HttpError(error.status_code, str(error.detail)).response()
