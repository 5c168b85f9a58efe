"""What ends a server or its engine: signals to one or the other, with work in flight, over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

Bodies = tuple[dict[str, Any], ...]  # taken in turns
Served = Any  # ServedProcess of conftest.py, which importlib mode cannot import by name
LONG: dict[str, Any] = {"text": "go on", "stream": True, "sampling_params": {"max_new_tokens": 480, "ignore_eos": True}}
SHORT: dict[str, Any] = {
    "text": "go on",
    "sampling_params": {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0.0},
}


@dataclass
class Servers:
    """Started at once, because each takes seconds to load."""

    killed: Served
    drained: Served


@pytest.fixture(scope="module")
def servers(serve_command: Callable[..., Served]) -> Servers:
    found = Servers(
        serve_command("--max-running-requests", "8"),
        serve_command("--max-running-requests", "2", "--drain-s", "3"),
    )
    for server in (found.killed, found.drained):
        server.wait_ready()
    return found


@dataclass
class Answer:
    """How a request ended. `events`: of its stream; `error`: the last one's, or the body's."""

    status: int
    events: list[Any]
    is_whole: bool

    @property
    def error(self) -> Any:
        return self.events[-1].get("error") if self.events else None


async def request(client: httpx.AsyncClient, body: dict[str, Any], started: asyncio.Event) -> Answer:
    """Send one request and read its answer to the end."""
    events: list[Any] = []
    is_whole = False
    async with client.stream("POST", "/generate", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith(":"):
                continue  # a comment: nothing came yet
            started.set()
            text = line.removeprefix("data: ")
            if text == "[DONE]":
                is_whole = True
            elif text:
                events.append(json.loads(text))
    return Answer(response.status_code, events, is_whole)


async def in_flight(server: Served, number: int, act: Callable[[], None], bodies: Bodies = (LONG,)) -> list[Answer]:
    """Send requests; once the first tokens are there, do something to the server; return how each one ended."""
    ends = await ends_of(server, number, act, bodies)
    for end in ends:
        if isinstance(end, BaseException):
            raise end
    return [end for end in ends if isinstance(end, Answer)]


async def ends_of(server: Served, number: int, act: Callable[[], None], bodies: Bodies) -> list[Answer | BaseException]:
    """As `in_flight`; what a request raised stands in its place."""
    started = asyncio.Event()
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        work = [asyncio.create_task(request(client, bodies[i % len(bodies)], started)) for i in range(number)]
        await asyncio.wait_for(started.wait(), 30)
        await asyncio.sleep(0.05)  # the others are in flight by now
        act()
        return await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 60)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_gone(pid: int, limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while is_alive(pid):
        assert time.monotonic() < deadline_s, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_killed_engine_answers_everything_in_flight_and_comes_back(servers: Servers) -> None:
    server = servers.killed
    pid = server.engine_pid()
    whole = {**LONG, "stream": False}
    answers = asyncio.run(in_flight(server, 24, lambda: os.kill(pid, signal.SIGKILL), (LONG, whole)))
    cut = [(answer, i % 2 == 0) for i, answer in enumerate(answers) if answer.error is not None]
    assert len(cut) >= 16, "the engine had finished most of it before it was killed"
    for answer, is_stream in cut:
        assert answer.error["code"] == "engine_unavailable"
        assert "crashed" in answer.error["message"]
        assert answer.status == 503 or (is_stream and answer.is_whole)
    assert any(answer.status == 200 for answer, _ in cut), "no stream had begun"

    with server.client() as client:
        refused = client.post("/generate", json=SHORT)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 503
        assert client.get("/ready").status_code == 503
        metrics = client.get("/metrics").text
        assert "ramet_engine_crashes_total 1.0" in metrics
        assert "ramet_in_flight 0.0" in metrics
        deadline_s = time.monotonic() + 60
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < deadline_s, "the engine does not come back"
            time.sleep(0.05)
        assert client.post("/generate", json=SHORT).json()["meta_info"]["completion_tokens"] == 8
        assert client.get("/health").status_code == 200
    assert server.engine_pid() != pid


def test_sigterm_lets_what_is_in_flight_finish_up_to_the_limit_and_takes_nothing_new(servers: Servers) -> None:
    """Two run at once: a long one that hardly finishes, and a short one, behind which others wait."""
    server = servers.drained
    pid = server.engine_pid()
    start_s = time.monotonic()
    short, *others = asyncio.run(drained(server))
    assert server.process.wait(30) == 0
    assert time.monotonic() - start_s < 30
    assert (short.status, short.is_whole, short.error) == (200, True, None)
    assert short.events[-1]["meta_info"]["finish_reason"] == {"type": "length"}
    assert short.events[-1]["meta_info"]["completion_tokens"] == 200
    refused = [answer for answer in others if answer.error is not None]
    assert len(refused) >= 16, "more than could run were let in"
    for answer in refused:
        assert answer.is_whole or answer.status == 503
        assert "shutting down" in answer.error["message"]
    for answer in others:  # a fast machine may finish a long one
        assert answer.error is not None or answer.is_whole
    assert not is_alive(pid)
    with pytest.raises(httpx.ConnectError), server.client() as client:
        client.get("/health")


async def drained(server: Served) -> list[Answer]:
    """End a server once a short stream runs beside a long one; how the short one ended, then the others."""
    long = {**LONG, "sampling_params": {**LONG["sampling_params"], "max_new_tokens": 1900}}
    short = {**SHORT, "stream": True, "sampling_params": {**SHORT["sampling_params"], "max_new_tokens": 200}}
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        work = []
        for body in (long, short):
            started = asyncio.Event()
            work.append(asyncio.create_task(request(client, body, started)))
            await asyncio.wait_for(started.wait(), 30)
        work += [asyncio.create_task(request(client, long, asyncio.Event())) for _ in range(18)]
        while num_in_flight((await client.get("/metrics")).text) < 19:  # the short one may have ended
            await asyncio.sleep(0.01)
        server.process.terminate()
        first, *others = await asyncio.wait_for(asyncio.gather(*work), 60)
        return [others.pop(0), first, *others]


def num_in_flight(metrics: str) -> float:
    found = re.search(r"^ramet_in_flight (\S+)$", metrics, re.MULTILINE)
    assert found
    return float(found[1])


def test_a_second_sigterm_ends_at_once(servers: Servers) -> None:
    server = servers.killed  # its engine is back from the first test
    pid = server.engine_pid()

    def twice() -> None:
        server.process.terminate()
        time.sleep(0.3)
        assert server.process.poll() is None
        server.process.terminate()

    start_s = time.monotonic()
    whole = {**LONG, "stream": False}
    ends = asyncio.run(ends_of(server, 48, twice, (LONG, whole)))
    server.process.wait(15)
    assert time.monotonic() - start_s < 20, "as long as a drain may take"
    wait_gone(pid, 10)
    cut = [end for end in ends if not isinstance(end, Answer) or end.error is not None]
    assert len(cut) >= 16, "most had finished before the second signal"
    for end in cut:
        if not isinstance(end, httpx.TransportError):
            assert isinstance(end, Answer), repr(end)
            assert "shutting down" in end.error["message"]
            assert (end.status, end.is_whole) in ((503, False), (200, True))


@pytest.mark.slow
def test_an_engine_does_not_outlive_its_server(serve_command: Callable[..., Served]) -> None:
    server = serve_command()
    server.wait_ready()
    pid = server.engine_pid()
    server.process.kill()
    wait_gone(pid, 10)


def test_a_taken_port_is_reported_before_anything_is_loaded(serve_command: Callable[..., Served]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = serve_command("--port", str(taken.getsockname()[1]))
        assert server.process.wait(120) == 1
    text = server.log.read_text()
    assert "cannot listen on 127.0.0.1 port" in text
    assert "--port" in text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.model
def test_after_a_kill_under_load_requests_work_within_15_s_of_the_model_being_loaded(tmp_path: Path) -> None:
    """SmolLM2 under fifty streams. What is in flight ends at once with an error; nothing hangs."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "ramet.cli", "serve", "smollm2-135m", "--port", "0", "--num-kv-tokens", "16384"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + 120
        while not (found := re.search(r"ready in .* at (http://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        asyncio.run(kill_under_load(found[1]))
    finally:
        process.terminate()
        process.wait(30)


async def kill_under_load(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        engine = (await client.get("/get_server_info")).json()["engine"]
        started = asyncio.Event()
        work = [asyncio.create_task(request(client, LONG, started)) for _ in range(50)]
        await asyncio.wait_for(started.wait(), 60)
        os.kill(engine["pid"], signal.SIGKILL)
        killed_s = time.monotonic()
        answers = await asyncio.wait_for(asyncio.gather(*work), 10)
        ended_s = time.monotonic() - killed_s
        assert all(answer.error["code"] == "engine_unavailable" for answer in answers)
        while (await client.post("/generate", json=SHORT)).status_code != 200:
            assert time.monotonic() - killed_s < 60, "the engine does not come back"
            await asyncio.sleep(0.1)
        back_s = time.monotonic() - killed_s
        again = (await client.get("/get_server_info")).json()["engine"]
    print(
        f"in flight ended in {ended_s:.2f} s; served again after {back_s:.1f} s, {again['start_s']:.1f} of them loading"
    )
    assert back_s - again["start_s"] < 15
