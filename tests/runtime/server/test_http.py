"""HTTP as proxies and clients expect it: ids, methods, slashes, compressed bodies, comments while nothing comes."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import threading
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import zstandard

from ramet import Remote, State, function, gen
from ramet.runtime.server import limits, sending
from ramet.runtime.server.connections import bytes_of_heads
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.sending import COMMENT, EventStream

Server = Any  # RunningServer of conftest.py
ASK = {"prompt": "Hi", "max_tokens": 1}


def test_every_answer_has_an_id_which_may_be_the_clients(server: Server) -> None:
    given = server.client.get("/v1/models", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    for wrong in ("two words", "x" * 200):
        made = server.client.get("/v1/models", headers={"x-request-id": wrong}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)
    assert server.client.get("/nowhere").headers["x-request-id"]


SCHEMA = {
    "type": "object",
    "properties": {
        "b": {"enum": ["x", "é/"]},
        "a": {"type": "integer"},
        "list": {"items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["a", "b"],
}


@pytest.mark.parametrize("prompt", ["Note: Ada is 36. JSON: ", "A list of facts:\n", "Facts:", "Ada is 36", "("])
def test_a_schema_is_answered_over_completions_as_the_language_answers_it(server: Server, prompt: str) -> None:
    body = {"prompt": prompt, "max_tokens": 60, "temperature": 0, "json_schema": SCHEMA}
    answer = server.client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    @function(temperature=0)
    def program(s: State) -> None:
        s += prompt
        s += gen("facts", SCHEMA, max_tokens=60)

    with Remote(server.url) as remote:
        said = program.run(backend=remote).text()
    assert said in (prompt + answer, f"{prompt} {answer}")
    with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: {")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == answer
    assert list(json.loads(answer))[:2] == ["b", "a"]


def test_a_program_may_return_an_integer_of_any_size(server: Server) -> None:
    @function(temperature=0)
    def program(s: State) -> None:
        s += "Facts: " + gen("digits", int, regex="[1-9][0-9]{39}", max_tokens=50)
        s += gen("object", {"const": {"n": [10**30]}}, max_tokens=50)

    with Remote(server.url) as remote:
        state = program.run(backend=remote)
        assert state["digits"] >= 10**39
        assert state["object"] == {"n": [10**30]}


def test_a_wrong_method_is_told_the_right_ones(server: Server) -> None:
    answer = server.client.put("/v1/chat/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert server.client.put("/v1/responses/x").headers["allow"] == "DELETE, GET"
    assert server.client.post("/v1/models").headers["allow"] == "GET, HEAD"


def test_head_is_answered_as_get_without_a_body(server: Server) -> None:
    answer = server.client.head("/v1/models")
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_slash_at_the_end_changes_nothing(server: Server) -> None:
    assert server.client.get("/v1/models/").json() == server.client.get("/v1/models").json()
    assert server.client.post("/v1/completions/", json=ASK).status_code == 200


def test_every_error_names_a_class(server: Server) -> None:
    for answer in (
        server.client.get("/nowhere"),
        server.client.post("/v1/completions", json={}),
        server.client.put("/v1/models"),
    ):
        assert answer.headers["x-ramet-error"]


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_a_compressed_body_is_read(server: Server, coding: str) -> None:
    plain = json.dumps(ASK).encode()
    data = gzip.compress(plain) if coding == "gzip" else zstandard.ZstdCompressor().compress(plain)
    headers = {"content-encoding": coding, "content-type": "application/json"}
    assert server.client.post("/v1/completions", content=data, headers=headers).status_code == 200
    wrong = server.client.post("/v1/completions", content=b"not compressed", headers=headers)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_encoding")


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_a_body_that_grows_beyond_the_limit_is_refused(server: Server, coding: str) -> None:
    plain = b" " * ((32 << 20) + 1)
    data = gzip.compress(plain) if coding == "gzip" else zstandard.ZstdCompressor().compress(plain)
    answer = server.client.post("/v1/completions", content=data, headers={"content-encoding": coding})
    assert answer.status_code == 413


def test_while_a_body_is_expanded_the_answers_of_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expanding waits for a step of the server's loop, which it would wait for in vain on the loop's own thread."""
    stepped = threading.Event()

    def expanded(*arguments: object) -> bytes:
        assert stepped.wait(20)
        return b"{}"

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"small"}

    async def read() -> Any:  # Any: an ASGI message
        body = limits._LimitedBody(receive, 1 << 20, bytes_of_heads(), keeps_text=False)
        body.coding = "gzip"
        asyncio.get_running_loop().call_later(0.01, stepped.set)
        return await body.receive()

    monkeypatch.setattr(limits, "_expanded", expanded)
    assert asyncio.run(read())["body"] == b"{}"


def test_an_unknown_coding_is_refused_by_its_name(server: Server) -> None:
    answer = server.client.post("/v1/completions", content=b"x", headers={"content-encoding": "br"})
    assert (answer.status_code, "'br'" in answer.json()["error"]["message"]) == (415, True)


def sent_by(events: AsyncGenerator[bytes, None]) -> list[Any]:
    """The messages of a stream of events."""
    messages: list[Any] = []

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        messages.append(message)

    asyncio.run(EventStream(events, lambda: None)({"type": "http"}, receive, send))
    return messages


def test_a_stream_that_waits_sends_comments_and_then_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "PATIENCE_S", 0.01)
    monkeypatch.setattr(sending, "COMMENT_S", 0.01)
    comments = asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        while len(seen) < 4:  # the head and three comments
            await asyncio.sleep(0)
        yield b"data: 1\n\n"

    seen: list[Any] = []

    async def receive() -> Any:
        await comments.wait()

    async def send(message: Any) -> None:
        seen.append(message)

    asyncio.run(EventStream(events(), lambda: None)({"type": "http"}, receive, send))
    assert [message["type"] for message in seen[:2]] == ["http.response.start", "http.response.body"]
    assert [message["body"] for message in seen[1:4]] == [COMMENT] * 3
    assert b"data: 1\n\n" in [message.get("body") for message in seen]
    assert seen[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


def test_an_error_before_the_first_event_has_its_status() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        if True:
            raise HttpError(400, "no")
        yield b""

    assert sent_by(events())[0]["status"] == 400
