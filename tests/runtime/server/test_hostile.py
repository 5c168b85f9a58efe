"""Clients that send what nobody should, read slowly, or wait: others are served on, memory stays, nothing is logged."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn

from ramet.runtime.server.connections import PatientProtocol

Served = Any  # ServedProcess of conftest.py, which importlib mode cannot import by name
BODY = {"text": "hello", "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
ENDPOINTS = (
    "/generate",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/programs",
    "/v1/tokenize",
    "/v1/detokenize",
    "/abort_request",
)
SECRET = "the heron's password"


def rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def served(serve_command: Callable[..., Served]) -> Served:
    server = serve_command("--max-running-requests", "8", "--log-level", "debug")
    server.wait_ready()
    with server.client() as client:
        assert client.post("/generate", json=BODY).status_code == 200
    return server


# -- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    "raw",
    [
        b'{"text": "\xff\xfe\x80"}',
        b'{"prompt": "\xc3\x28"}',
        b'{"text": "\\ud800"}',
        b"[" * 200_000,
        b'{"text": ' + b'{"a": ' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"text": "x", "text": 7}',
        b'{"text": 1e999999}',
        b'{"input_ids": [' + b"9" * 5_000 + b"]}",
        b"\x00" * 100,
        b"",
    ],
    ids=[
        "invalid UTF-8",
        "truncated UTF-8",
        "half a surrogate pair",
        "open lists",
        "open objects",
        "deep lists",
        "deep messages",
        "a key twice",
        "a huge exponent",
        "a huge integer",
        "zeros",
        "nothing",
    ],
)
def test_bodies_that_nobody_should_send_get_an_error_that_says_so(served: Served, path: str, raw: bytes) -> None:
    with served.client() as client:
        answer = client.post(path, content=raw, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["message"]
        assert client.post("/generate", json=BODY).status_code == 200


def test_a_hundred_megabytes_are_refused_and_not_kept(served: Served) -> None:
    before = rss_bytes(served.process.pid)
    with served.client() as client:
        for path in ("/generate", "/v1/chat/completions"):
            answer = client.post(path, content=b" " * (100 << 20))
            assert answer.status_code == 413
            assert "--max-body-bytes" in answer.json()["error"]["message"]
    for _ in range(3):
        with served.client() as client:

            def pieces() -> Iterator[bytes]:
                for _ in range(100):
                    yield b" " * (1 << 20)

            with contextlib.suppress(httpx.TransportError):  # it may close while the client is still sending
                assert client.post("/v1/completions", content=pieces()).status_code == 413
    with served.client() as client:
        assert client.post("/generate", json=BODY).status_code == 200
    assert rss_bytes(served.process.pid) - before < 96 << 20, "bodies that were refused are still in memory"


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("media_type", ["text/plain", "Text/Plain; charset=utf-8", "application/x-www-form-urlencoded"])
def test_bodies_that_any_web_page_may_let_a_browser_send_are_refused(
    served: Served, path: str, media_type: str
) -> None:
    with served.client() as client:
        answer = client.post(path, content=json.dumps(BODY).encode(), headers={"content-type": media_type})
        assert answer.status_code == 415
        assert media_type in answer.json()["error"]["message"]
        page = client.post(path, content=json.dumps(BODY).encode(), headers={"origin": "https://example.com"})
        assert page.status_code == 415


@pytest.mark.parametrize("media_type", ["application/json", "application/json; charset=utf-8", None])
def test_bodies_of_programs_are_taken(served: Served, media_type: str | None) -> None:
    headers = {} if media_type is None else {"content-type": media_type}
    with served.client() as client:
        assert client.post("/generate", content=json.dumps(BODY).encode(), headers=headers).status_code == 200


def test_a_client_that_leaves_in_the_middle_of_its_body_is_one_line_of_debugging(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    before = len(served.log.read_text())
    for _ in range(3):
        with socket.create_connection((host, int(port)), 5) as raw:
            raw.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    with served.client() as client:
        deadline_s = time.monotonic() + 60
        while (text := served.log.read_text()[before:]).count("left before its body was whole") < 3:
            assert time.monotonic() < deadline_s, text
        assert client.post("/generate", json=BODY).status_code == 200
    assert "Traceback" not in text
    assert "ERROR" not in text


# -- readers ---------------------------------------------------------------------------------------------------------


def test_a_reader_that_does_not_read_costs_its_own_answer_once_and_holds_up_nobody(served: Served) -> None:
    """Eight choices with 20 log-probabilities a token: 20 MB of events, of which the client takes nothing at first."""
    body = {
        "prompt": "go on",
        "max_tokens": 900,
        "ignore_eos": True,
        "n": 8,
        "logprobs": 20,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    host, port = served.url.removeprefix("http://").split(":")
    before = rss_bytes(served.process.pid)
    with served.client() as client, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        head = f"POST /v1/completions HTTP/1.0\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
        slow.sendall(head.encode() + data)
        deadline_s = time.monotonic() + 120
        while client.get("/get_server_info").json()["in_flight"] == 0:
            assert time.monotonic() < deadline_s
        assert client.post("/generate", json=BODY).status_code == 200
        while client.get("/get_server_info").json()["in_flight"]:
            assert time.monotonic() < deadline_s, "the engine waits for a client that does not read"
            time.sleep(0.2)
        grown = rss_bytes(served.process.pid) - before
        print(f"the server grew by {grown:,} bytes")
        assert grown < 80 << 20, f"the server holds {grown:,} bytes more for one slow reader"
        slow.settimeout(60)
        received = bytearray()
        while piece := slow.recv(1 << 16):
            received += piece
    events = [json.loads(line[6:]) for line in bytes(received).split(b"\n") if line.startswith(b"data: {")]
    assert b"data: [DONE]" in received
    assert events[-1]["usage"]["completion_tokens"] == 8 * 900
    told = [token for event in events for choice in event["choices"] for token in choice["logprobs"]["tokens"]]
    assert len(told) == 8 * 900, "a slow reader gets every token once"


# -- connections -----------------------------------------------------------------------------------------------------


class HastyProtocol(PatientProtocol):
    head_timeout_s = 0.4


async def waiting_app(scope: Any, receive: Any, send: Any) -> None:  # Any: ASGI's own types
    """Answers after a second, then waits another second between the parts of its answer."""
    assert scope["type"] == "http"
    await asyncio.sleep(1.0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"one ", "more_body": True})
    await asyncio.sleep(1.0)
    await send({"type": "http.response.body", "body": b"two", "more_body": False})


@pytest.fixture(scope="module")
def hasty_url() -> Iterator[str]:
    """A server whose limits for heads and idle connections are shorter than its requests take."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            waiting_app, http=HastyProtocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=1
        )
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def test_requests_that_take_longer_than_idle_connections_may_are_not_cut(hasty_url: str) -> None:
    with httpx.Client(base_url=hasty_url, timeout=10, trust_env=False) as client:
        for _ in range(2):
            assert client.get("/").text == "one two"


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: "], ids=["silent", "half a head"])
def test_connections_that_never_finish_a_head_are_closed(hasty_url: str, sent: bytes) -> None:
    host, port = hasty_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as raw:
        raw.sendall(sent)
        start_s = time.monotonic()
        assert closes(raw)
        assert 0.2 < time.monotonic() - start_s < 4


def test_a_head_that_comes_drop_by_drop_is_closed_too(hasty_url: str) -> None:
    """A timer that every byte starts anew would let one client hold a connection for ever."""
    host, port = hasty_url.removeprefix("http://").split(":")
    start_s = time.monotonic()
    with socket.create_connection((host, int(port)), 5) as raw, pytest.raises(OSError):  # noqa: PT012
        for byte in b"GET / HTTP/1.1\r\nx: " + b"y" * 200:
            raw.sendall(bytes([byte]))
            time.sleep(0.05)
    assert time.monotonic() - start_s < 4


def test_an_idle_connection_is_closed_after_its_answer(hasty_url: str) -> None:
    host, port = hasty_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        received = b""
        while b"two" not in received:
            received += raw.recv(4096)
        assert closes(raw)


def closes(raw: socket.socket) -> bool:
    """Whether the other side ends the connection within the socket's timeout."""
    try:
        while raw.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


# -- logs ------------------------------------------------------------------------------------------------------------


def say_secrets(client: httpx.Client) -> None:
    """Prompts in every kind of body, right and wrong ones."""
    messages = [{"role": "user", "content": SECRET}]
    nodes = [
        {"kind": "text", "id": 0, "parts": [SECRET]},
        {"kind": "generate", "id": 1, "parent": 0, "name": "x", "sampling": {"max_tokens": 4}},
    ]
    program = {"graph": {"version": 1, "nodes": nodes}, "arguments": {}}
    assert client.post("/generate", json={**BODY, "text": SECRET}).status_code == 200
    assert client.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 4}).status_code == 200
    assert client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4}).status_code == 200
    assert client.post("/v1/programs", json=program).status_code == 200
    assert client.post("/v1/tokenize", json={"prompt": SECRET}).status_code == 200
    assert client.post("/generate", json={"text": SECRET, "no_such_field": 1}).status_code == 400
    assert client.post("/generate", content=f'{{"text": "{SECRET}'.encode()).status_code == 400
    assert client.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 10**6}).status_code == 400
    schema = {"text": SECRET, "sampling_params": {"json_schema": json.dumps({"type": SECRET})}}
    assert client.post("/generate", json=schema).status_code == 400


def test_no_prompt_is_in_the_log_not_even_for_debugging(served: Served) -> None:
    with served.client() as client:
        say_secrets(client)
        client.post("/generate", json=BODY, headers={"authorization": f"Bearer {SECRET}"})
    text = served.log.read_text()
    assert "POST '/v1/chat/completions' 200" in text
    assert "POST '/generate' 400" in text
    assert SECRET not in text
    assert "heron" not in text


def test_prompts_are_in_the_log_where_they_are_asked_for(serve_command: Callable[..., Served]) -> None:
    server = serve_command("--log-prompts")
    server.wait_ready()
    with server.client() as client:
        say_secrets(client)
        client.post("/generate", json={**BODY, "text": "x\n2026 INFO forged line"})
        client.post("/generate", json=BODY, headers={"authorization": "Bearer my-key"})
    text = server.log.read_text()
    assert text.count("heron") >= 8
    assert "\n2026 INFO forged" not in text, "a prompt can write lines of its own into the log"
    assert "my-key" not in text
