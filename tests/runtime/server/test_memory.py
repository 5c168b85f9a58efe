"""What one client sends cannot fill the memory of the HTTP process: each refusal names its limit and the way out."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.errors import Overloaded
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.connections import MAX_AHEAD, MAX_HEAD_BYTES, MAX_HEADERS
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.tenants import Held
from ramet.runtime.server.validation import Strict, parsed

Served = Any  # ServedProcess of conftest.py, which importlib mode cannot import by name
BODY = {"text": "hello", "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
MOST_BYTES = 100 << 20


@pytest.fixture(scope="module")
def served(serve_command: Callable[..., Served]) -> Served:
    server = serve_command("--max-running-requests", "8")
    server.wait_ready()
    return server


@pytest.fixture(autouse=True)
def bounded(served: Served, request: pytest.FixtureRequest) -> Iterator[None]:
    """Measure the peak of the HTTP process during each test, and serve a request after it."""
    if "served" not in request.fixturenames:
        yield
        return
    files = f"/proc/{served.process.pid}"
    with open(f"{files}/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    before = resident_bytes(files, "VmRSS")
    yield
    grown = resident_bytes(files, "VmHWM") - before
    print(f"the HTTP process grew by {grown:,} bytes")
    assert grown < MOST_BYTES, f"the HTTP process grew by {grown:,} bytes"
    with served.client() as client:
        assert client.post("/generate", json=BODY).status_code == 200


def resident_bytes(files: str, name: str) -> int:
    with open(f"{files}/status") as file:
        found = re.search(rf"{name}:\s+(\d+)", file.read())
    assert found is not None
    return int(found[1]) * 1024


def send(served: Served, parts: Iterable[bytes]) -> bytes:
    """Send bytes on a new connection; what comes back."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as raw:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                raw.sendall(part)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := raw.recv(1 << 16):
                received += piece
    return received


def many_lines() -> Iterator[bytes]:
    for start in range(0, 1_500_000, 1000):
        yield b"".join(b"x%d: %s\r\n" % (number, b"y" * 50) for number in range(start, start + 1000))


# -- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "more", "limit"),
    [
        (b"POST /generate HTTP/1.1\r\nhost: x\r\n", "lines", f"{MAX_HEADERS} header lines"),
        (b"POST /generate HTTP/1.1\r\nhost: x\r\na: ", "letters", f"{MAX_HEAD_BYTES:,} bytes"),
        (b"POST /generate HTTP/1.1\r\n", "letters", f"{MAX_HEAD_BYTES:,} bytes"),
        (b"GET /", "letters", f"{MAX_HEAD_BYTES:,} bytes"),
    ],
    ids=["many lines", "one long value", "one long name", "a long path"],
)
def test_a_head_of_a_hundred_megabytes_is_refused_by_its_size(
    served: Served, start: bytes, more: str, limit: str
) -> None:
    rest = many_lines() if more == "lines" else (b"y" * (1 << 20) for _ in range(96))
    answer = send(served, [start, *rest])
    assert answer.startswith(b"HTTP/1.1 431 "), answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "head_too_large"
    assert limit in error["message"]


def test_lines_behind_a_chunked_body_count_as_those_of_the_head(served: Served) -> None:
    start = b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    send(served, [start, *many_lines()])


def test_a_connection_sends_a_few_requests_ahead_and_not_thousands(served: Served) -> None:
    one = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    answer = send(served, [one * MAX_AHEAD + one.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")])
    assert answer.count(b"HTTP/1.1 200") == MAX_AHEAD + 1
    send(served, [one * 10_000] * 50)


def test_connections_that_hold_half_a_head_each_hold_little_together(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(700):
            raw = stack.enter_context(socket.create_connection((host, int(port)), 30))
            with contextlib.suppress(ConnectionError):
                raw.sendall(b"GET /health HTTP/1.1\r\nx: " + b"y" * 60_000)
        with served.client() as client:
            answer = client.get("/health")
            if answer.status_code == 429:
                assert "of requests' heads" in answer.json()["error"]["message"]
    # their bytes are given back
    with served.client() as client:
        assert client.get("/health", headers={"x": "y" * 50_000}).status_code == 200


def test_what_is_no_http_gets_an_answer_in_the_form_of_all_errors(served: Served) -> None:
    answer = send(served, [b"EHLO example.org\r\n\r\n"])
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


# -- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/programs"])
@pytest.mark.parametrize("item", [b"[]", b"{}", b"7"])
def test_a_body_of_millions_of_values_is_refused_before_it_is_read(served: Served, path: str, item: bytes) -> None:
    body = b'{"prompt": [' + b",".join([item] * 4_000_000) + b"]}"
    with served.client() as client:
        answer = client.post(path, content=body)
    assert answer.status_code == 413
    assert "--max-json-values" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/completions", "prompt"),
        ("/v1/chat/completions", "messages"),
        ("/generate", "text"),
        ("/v1/responses", "input"),
        ("/v1/messages", "messages"),
        ("/v1/programs", "rows"),
    ],
)
def test_a_list_of_wrong_items_is_read_up_to_the_first_one(served: Served, path: str, field: str) -> None:
    """An error for each item took 842 MB and 22 s for a body of 600 kB."""
    for item in (b"{}", b"[]"):
        with served.client() as client:
            body = b'{"graph": 1, "model": "default", "max_tokens": 1, "%s": [' % field.encode()
            answer = client.post(path, content=body + b",".join([item] * 90_000) + b"]}")
        assert answer.status_code in (400, 404), answer.text


def test_bodies_that_arrive_together_are_bounded_together(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 31000000\r\n\r\n"
    refused = 0
    with contextlib.ExitStack() as stack:
        holders = [stack.enter_context(socket.create_connection((host, int(port)), 30)) for _ in range(6)]
        for raw in holders:
            raw.settimeout(10)
            with contextlib.suppress(OSError):
                raw.sendall(head)
                for _ in range(30):
                    raw.sendall(b" " * 1_000_000)
        for raw in holders:
            raw.settimeout(0.5)
            with contextlib.suppress(OSError):
                answer = raw.recv(4096)
                refused += answer.startswith(b"HTTP/1.1 429 ") and b"--max-in-flight-bytes" in answer
    assert refused >= 3


def test_a_bomb_is_not_unpacked(served: Served) -> None:
    with served.client() as client:
        packed = gzip.compress(b" " * (300 << 20), 1)
        answer = client.post("/generate", content=packed, headers={"content-encoding": "gzip"})
    assert answer.status_code == 413


def program(text: str, rows: int) -> dict[str, Any]:
    nodes = [
        {"kind": "argument", "id": 0, "name": "city"},
        {"kind": "text", "id": 1, "parts": [text, {"node": 0}]},
        {"kind": "generate", "id": 2, "parent": 1, "name": "x", "sampling": {"max_tokens": 2}},
    ]
    return {"graph": {"version": 1, "nodes": nodes}, "rows": [{"city": str(row)} for row in range(rows)]}


def test_a_program_is_bounded_by_the_texts_of_all_its_rows(served: Served) -> None:
    with served.client() as client:
        answer = client.post("/v1/programs", json=program("a word " * 150_000, 600))
        assert answer.status_code == 413
        assert "--max-in-flight-bytes" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "rows"


def test_rows_share_the_text_of_their_graph(served: Served) -> None:
    with served.client() as client:
        for _ in range(3):  # what they held is given back
            answer = client.post("/v1/programs", json=program("a word " * 100, 400))
            assert answer.status_code == 200, answer.text
            assert [row["status"] for row in answer.json()["rows"]] == ["done"] * 400


def test_a_program_that_would_be_planned_for_minutes_is_explained_elsewhere(served: Served) -> None:
    nodes = [{"kind": "generate", "id": i, "parent": i - 1 if i else None, "name": f"v{i}"} for i in range(2000)]
    with served.client() as client:
        answer = client.post("/v1/programs/explain", json={"graph": {"version": 1, "nodes": nodes}})
        assert (answer.status_code, answer.json()["error"]["param"]) == (413, "graph")
        assert "have 2,001,000 nodes together; the limit is 1,000,000" in answer.json()["error"]["message"]
        few = {"version": 1, "nodes": nodes[:100]}
        assert client.post("/v1/programs/explain", json={"graph": few}).status_code == 200


def test_texts_beyond_the_context_are_not_cut_into_tokens_whole(served: Served) -> None:
    def tokenize(number: int) -> httpx.Response:
        with served.client() as client:
            answer: httpx.Response = client.post("/v1/tokenize", json={"prompt": f"word{number} " * 150_000})
            return answer

    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(tokenize, range(4)):
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "prompt"), ("/generate", "text")])
def test_the_first_prompt_of_many_that_cannot_fit_refuses_all(served: Served, path: str, field: str) -> None:
    with served.client() as client:
        answer = client.post(path, json={field: ["a word " * 1000] * 900})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


# -- counting --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.integers() | st.text(alphabet='\\",[]{}x\u20ac', max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='\\",[{', max_size=6), inner, max_size=4)
    ),
    max_leaves=30,
)


def weight(value: Any) -> int:
    """Commas, and ten for each list and object."""
    if isinstance(value, list | dict):
        inner = list(value.values()) if isinstance(value, dict) else value
        return 10 + max(len(inner) - 1, 0) + sum(map(weight, inner))
    return 0


class Anything(Strict):
    x: Any


@given(value=JSON, ensure_ascii=st.booleans(), chunk=st.integers(1, 40))
def test_values_are_counted_without_what_stands_in_strings(value: Any, ensure_ascii: bool, chunk: int) -> None:
    data = json.dumps({"x": value}, ensure_ascii=ensure_ascii).encode()
    count = weight({"x": value})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ramet.runtime.server.validation._CHUNK_BYTES", chunk)
        assert parsed(Anything, data, count).x == value
        with pytest.raises(HttpError, match="--max-json-values"):
            parsed(Anything, data, count - 1)


def test_a_depth_that_cannot_be_read_is_refused_by_name() -> None:
    with pytest.raises(HttpError, match="200 deep"):
        parsed(Anything, b'{"x": ' + b"[" * 1000 + b"]" * 1000 + b"}", 1_000_000)


def test_a_full_limit_still_lets_a_key_in_that_holds_less_than_its_share() -> None:
    held = Held(10, "things", "wait")
    held.take("big", 10)
    with pytest.raises(Overloaded, match="10 things are in flight already, of 10 at most; wait"):
        held.take("big")
    held.take("small", 5)
    with pytest.raises(Overloaded):
        held.take("small")
    with pytest.raises(Overloaded):
        held.take("big")
    held.give("small", 5)
    held.give("big", 10)
    assert held.total == 0
    with pytest.raises(Overloaded):
        held.take("big", 11)


def test_the_bytes_in_flight_are_at_least_those_of_a_body() -> None:
    assert ServerConfig(max_body_bytes=1 << 20).bytes_in_flight == 2 << 20
    with pytest.raises(ValueError, match="at least max_body_bytes"):
        ServerConfig(max_in_flight_bytes=1 << 20)
