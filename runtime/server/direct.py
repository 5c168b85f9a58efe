"""A short way to the endpoints that take the request alone.

FastAPI has nothing to solve, validate or serialise for them, and what it does all the same, trying one route after the
other first, took a third of a request's time. Their routes stay: the OpenAPI document is made of them.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from ramet.errors import RametError
from ramet.runtime.server.state import HttpError

logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


class Direct:
    """Middleware that calls such an endpoint itself and leaves every other request to the application."""

    def __init__(self, app: ASGIApp, routers: Iterable[APIRouter]) -> None:
        self._app = app
        self._endpoints: dict[tuple[str, str], Endpoint] = {
            (method, route.path): route.endpoint
            for router in routers
            for route in router.routes
            if isinstance(route, APIRoute) and list(inspect.signature(route.endpoint).parameters) == ["request"]
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = (scope["method"], scope["path"]) if scope["type"] == "http" else None
        endpoint = None if key is None else self._endpoints.get(key)
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await endpoint(Request(scope, receive))
        except Exception as error:
            response = error_response(error)
        await response(scope, receive, send)


def error_response(error: Exception) -> Response:
    """What a request is answered that raised this; what nobody expected is logged."""
    if not isinstance(error, HttpError | RametError | UnicodeEncodeError):
        logger.error("a request failed", exc_info=error)
    return HttpError.of(error).response()
