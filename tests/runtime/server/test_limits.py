"""Overload, idle and half-open connections, against `ramet serve` in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest

from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.limits import HttpLimits
from ramet.runtime.server.tenants import Tenants

Served = Any  # ServedProcess of conftest.py, which importlib mode cannot import by name
BODY = {"text": "hello", "sampling_params": {"max_new_tokens": 16, "ignore_eos": True}}
MAX_IN_FLIGHT = 16


@pytest.fixture(scope="module")
def served(serve_command: Callable[..., Served]) -> Served:
    server = serve_command("--max-in-flight", str(MAX_IN_FLIGHT), "--max-running-requests", "8")
    server.wait_ready()
    return server


def rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


async def overload(server: Served, clients: int, seconds: float) -> Counter[int]:
    """So many clients ask again and again; what they were answered."""
    statuses: Counter[int] = Counter()
    end_s = time.monotonic() + seconds

    async def ask(client: httpx.AsyncClient) -> None:
        while time.monotonic() < end_s:
            answer = await client.post("/generate", json=BODY)
            statuses[answer.status_code] += 1
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "overloaded"
                await asyncio.sleep(0.05)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False, limits=limits) as client:
        await asyncio.gather(*(ask(client) for _ in range(clients)))
    return statuses


@pytest.mark.parametrize("seconds", [3.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_ten_times_the_load_gets_429_and_memory_stays(served: Served, seconds: float) -> None:
    pids = (served.process.pid, served.engine_pid())
    asyncio.run(overload(served, 10 * MAX_IN_FLIGHT, 1.0))  # buffers and caches reach their size
    before = [rss_bytes(pid) for pid in pids]
    statuses = asyncio.run(overload(served, 10 * MAX_IN_FLIGHT, seconds))
    grown = [rss_bytes(pid) - size for pid, size in zip(pids, before, strict=True)]
    print(f"{dict(statuses)} in {seconds:.0f} s; server and engine grew by {grown} bytes")
    assert set(statuses) == {200, 429}, statuses
    assert max(grown) < 32 << 20, f"the server and the engine grew by {grown} bytes"
    assert served.engine_pid() == pids[1]
    with served.client() as client:
        assert client.post("/generate", json=BODY).status_code == 200


async def hold(server: Served, number: int, sent: bytes) -> float:
    """Hold connections that have sent something; return the seconds that another client's health check takes then."""
    host, port = server.url.removeprefix("http://").split(":")
    writers = []
    try:
        for _ in range(number):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            writers.append(writer)
        async with httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False) as client:
            start_s = time.monotonic()
            assert (await client.get("/health")).status_code == 200
            assert (await client.post("/generate", json=BODY)).status_code == 200
            return time.monotonic() - start_s
    finally:
        for writer in writers:
            writer.transport.abort()
        for writer in writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nhost: ",
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
    ],
    ids=["silent", "keep-alive", "half a head", "half a body"],
)
@pytest.mark.parametrize("number", [250, pytest.param(10_000, marks=pytest.mark.slow)])
def test_connections_that_wait_do_not_keep_others_from_being_served(served: Served, number: int, sent: bytes) -> None:
    files = f"/proc/{served.process.pid}/fd"
    before = len(os.listdir(files))
    seconds = asyncio.run(hold(served, number, sent))
    print(f"beside {number:,} connections, a health check and a request take {seconds:.2f} s")
    assert seconds < 10
    deadline_s = time.monotonic() + 20
    while len(os.listdir(files)) > before + 5:
        assert time.monotonic() < deadline_s, "connections stay open after their clients have gone"
        time.sleep(0.05)


def test_an_answer_that_the_servers_end_cancels_is_a_clear_503() -> None:
    """Where a request is cancelled before its answer has begun; uvicorn would say 500 in plain text."""
    sent: list[Any] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def keep(message: Any) -> None:
        sent.append(message)

    async def scenario() -> None:
        limits = HttpLimits(endless, ServerConfig(), Tenants(ServerConfig()))
        scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}
        task = asyncio.create_task(limits(scope, AsyncMock(), keep))
        await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(scenario())
    assert sent[0]["status"] == 503
    assert b"retry-after" in dict(sent[0]["headers"])
    assert json.loads(sent[1]["body"])["error"]["code"] == "engine_unavailable"
