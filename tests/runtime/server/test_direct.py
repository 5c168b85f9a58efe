"""The short way to endpoints, past FastAPI's routes."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response

from ramet.errors import InvalidRequest
from ramet.runtime.server.direct import Direct


def ask(method: str, path: str) -> httpx.Response:
    router = APIRouter()

    @router.post("/direct")
    async def direct(request: Request) -> Response:
        return Response(f"{len(await request.body())} bytes, by FastAPI: {'route' in request.scope}")

    @router.post("/wrong")
    async def wrong(request: Request) -> Response:
        raise InvalidRequest("too odd", param="n")

    @router.post("/broken")
    async def broken(request: Request) -> Response:
        raise ZeroDivisionError

    @router.get("/named/{name}")
    async def named(name: str) -> Response:
        return Response(f"{name} by FastAPI")

    app = FastAPI()
    app.include_router(router)
    app.add_middleware(Direct, routers=[router])

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.request(method, path, content=b"four")

    return asyncio.run(send())


def test_an_endpoint_that_takes_the_request_alone_is_called_without_a_route() -> None:
    assert ask("POST", "/direct").text == "4 bytes, by FastAPI: False"


def test_every_other_request_goes_to_the_application() -> None:
    assert ask("GET", "/named/x").text == "x by FastAPI"
    assert ask("GET", "/direct").status_code == 405
    assert ask("POST", "/nowhere").status_code == 404


def test_errors_of_an_endpoint_are_answers_and_only_unexpected_ones_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "ramet"):
        wrong: Any = ask("POST", "/wrong")
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "n")
        assert not caplog.records
        broken: Any = ask("POST", "/broken")
        assert (broken.status_code, broken.json()["error"]["code"]) == (500, "internal")
        assert "ZeroDivisionError" in caplog.text
