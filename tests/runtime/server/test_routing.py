"""A table of endpoints as an application: its routes, its answers, its errors."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, cast

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from ramet.errors import InvalidRequest
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.routing import Endpoint, make_app
from ramet.runtime.server.sending import AnswerStruct
from ramet.runtime.server.served_model import ServedModel
from ramet.runtime.server.tenants import Tenants
from ramet.runtime.server.validation import Strict
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer


class Sized(AnswerStruct):
    size: int


class Named(Strict):
    name: str


async def size(request: Request) -> Sized:
    return Sized(len(await request.body()))


async def greet(request: Request, body: Named) -> Response:
    return Response(f"{body.name} at {request.path_params['place']}", 201)


async def wrong(request: Request) -> Response:
    raise InvalidRequest("too odd", param="n")


async def broken(request: Request) -> Response:
    raise ZeroDivisionError


ENDPOINTS = [
    Endpoint("POST", "/size", size, answer=Sized),
    Endpoint("GET", "/size", size, answer=Sized),
    Endpoint("POST", "/greet/{place}", greet, body=Named),
    Endpoint("POST", "/wrong", wrong),
    Endpoint("POST", "/broken", broken),
]


def ask(method: str, path: str, content: bytes = b"four") -> httpx.Response:
    served = ServedModel(
        ServerConfig(), cast(EngineProxy, None), Tenants(ServerConfig()), ByteTokenizer(), "fake", time.time()
    )
    app = make_app(ENDPOINTS, served)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.request(method, path, content=content)

    return asyncio.run(send())


def test_a_struct_is_answered_as_json_and_a_response_as_it_is() -> None:
    answer = ask("POST", "/size")
    assert (answer.status_code, answer.headers["content-type"], answer.content) == (
        200,
        "application/json",
        b'{"size":4}',
    )
    answer = ask("POST", "/greet/home", b'{"name": "Ann"}')
    assert (answer.status_code, answer.text) == (201, "Ann at home")


@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        (b"{}", "name", "missing_required_parameter"),
        (b'{"name": 1}', "name", "invalid_value"),
        (b'{"name": "a", "x": 1}', "x", "unknown_parameter"),
        (b"four", None, "invalid_json"),
    ],
)
def test_a_body_that_is_not_as_the_table_says_never_reaches_the_handler(
    content: bytes, param: str | None, code: str
) -> None:
    answer = ask("POST", "/greet/home", content)
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/wrong", 405, "method_not_allowed"),
        ("PUT", "/size", 405, "method_not_allowed"),
        ("POST", "/nowhere", 404, "not_found"),
    ],
)
def test_what_the_table_does_not_have_is_refused(method: str, path: str, status: int, code: str | None) -> None:
    answer = ask(method, path)
    assert answer.status_code == status
    assert method == "HEAD" or answer.json()["error"]["code"] == code


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
