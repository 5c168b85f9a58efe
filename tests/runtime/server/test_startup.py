"""From the command to the first request: what can be seen meanwhile, and engines that never last."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import httpx
import pytest

from ramet.errors import EngineStopped, InvalidRegex
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.catalog import TINY_MODEL
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.server.link import proxy as engine_proxy
from ramet.runtime.server.link.process import EngineServer
from ramet.runtime.server.link.protocol import Submit
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.types import SamplingParams

Served = Any  # ServedProcess of conftest.py, which importlib mode cannot import by name


def test_grammars_are_loaded_before_the_first_constraint(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine(tiny_model, num_kv_tokens=4096) as engine:
        server = EngineServer(engine, lambda report: None)
        server.prepare_grammars()
        assert server._host.model.grammars._vocabulary is not None
        assert not [r for r in caplog.records if r.name == "ramet.runtime.server.link.process"]
        failed: Future[Any] = Future()
        failed.set_exception(InvalidRegex("no token writes it"))
        monkeypatch.setattr(server._host.model.grammars, "get", lambda constraint: failed)
        server.prepare_grammars()  # the engine starts all the same
        assert "no token writes it" in caplog.text
        server._host.model.grammars.close()


def test_loading_can_be_watched_at_ready_and_in_the_log(serve_command: Callable[..., Served]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serve_command("--port", str(port))
    seen: list[tuple[int, dict[str, Any]]] = []
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10, trust_env=False) as client:
        deadline_s = time.monotonic() + 180
        while not (seen and seen[-1][0] == 200):
            assert time.monotonic() < deadline_s
            try:
                answer = client.get("/ready")
            except httpx.TransportError:
                time.sleep(0.02)
                continue
            seen.append((answer.status_code, answer.json()))
            if len(seen) == 1 and answer.status_code == 503:
                health = client.get("/health").json()
                assert health["status"] == "unhealthy"
                assert "starting" in health["reason"]
                refused = client.post("/generate", json={"text": "x"})
                assert refused.status_code == 503
                assert "starting" in refused.json()["error"]["message"]
                assert int(refused.headers["retry-after"]) >= 1
    before = [body for status, body in seen if status == 503]
    assert before, "the server was never seen before it was ready"
    for body in before:
        assert (body["ready"], body["attempt"], body["reason"]) == (False, 1, None)
        assert body["stage"]
        assert body["seconds"] >= 0
    assert seen[-1][1]["stage"] == "ready"
    text = server.log.read_text()
    assert "starting: loading the model tiny-random" in text
    assert "starting: measuring memory" in text


def test_engines_that_never_come_up_are_given_up_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(engine_proxy, "_RESTART_PAUSES_S", (0.0,))

    async def scenario() -> None:
        proxy = EngineProxy(TINY_MODEL, {}, max_engine_failures=3)
        await proxy.start()
        try:
            error = await asyncio.wait_for(proxy.wait_given_up(), 30)
            assert "3 engine processes in a row" in str(error)
            assert "status 1" in str(error)
            with pytest.raises(EngineStopped, match="3 engine processes in a row"):
                await proxy.wait_ready(1)
            with pytest.raises(EngineStopped, match="3 engine processes in a row"):
                proxy.submit(Submit("x", [1], SamplingParams()))
            assert proxy.startup["stage"] == "given up"
            assert proxy.num_starts == proxy.num_crashes == 3
        finally:
            await proxy.stop()

    asyncio.run(scenario())


def test_an_engine_process_that_the_system_does_not_start_is_an_error_and_no_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*command: str, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    async def main() -> None:
        proxy = EngineProxy(TINY_MODEL, {})
        await proxy.start()
        try:
            with pytest.raises(EngineStopped, match="Cannot allocate memory"):
                await proxy.wait_ready(30)
            assert "Cannot allocate memory" in str(await asyncio.wait_for(proxy.wait_given_up(), 30))
        finally:
            await proxy.stop()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    asyncio.run(main())


def test_a_server_starts_and_answers_where_no_compiler_can_be_found(
    serve_command: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")  # no nvcc, no gcc, no ninja
    server = serve_command()
    server.wait_ready()
    with server.client() as client:
        sampling = {"max_new_tokens": 4, "regex": "[ab]{4}"}
        answer = client.post("/generate", json={"text": "hello", "sampling_params": sampling})
        assert set(answer.json()["text"]) <= {"a", "b"}, answer.text


def test_ctrl_c_while_the_engine_is_loaded_is_a_quiet_end(serve_command: Callable[..., Served]) -> None:
    server = serve_command()
    deadline_s = time.monotonic() + 60
    while "startup complete" not in server.log.read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    time.sleep(0.3)  # the engine process loads its modules now
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_server_whose_engine_keeps_ending_ends_and_says_why(serve_command: Callable[..., Served]) -> None:
    server = serve_command("--max-engine-failures", "2")
    server.wait_ready()
    os.kill(server.engine_pid(), signal.SIGKILL)
    with server.client() as client:
        deadline_s = time.monotonic() + 60
        reasons = set()
        while not (startup := client.get("/ready").json())["ready"] or startup["attempt"] != 2:
            assert time.monotonic() < deadline_s
            reasons.add(startup["reason"])
            time.sleep(0.05)
        assert any("SIGKILL" in reason for reason in reasons if reason), reasons
    os.kill(server.engine_pid(), signal.SIGKILL)
    assert server.process.wait(30) == 1
    text = server.log.read_text()
    assert "error: 2 engine processes in a row ended within 60 s" in text
    assert "as the system does when memory runs out" in text
    assert "ramet doctor" in text


def test_a_stopped_engine_turns_health_red_and_a_continued_one_green(serve_command: Callable[..., Served]) -> None:
    server = serve_command("--health-patience-s", "1")
    server.wait_ready()
    pid = server.engine_pid()
    with server.client() as client:
        assert client.get("/health").status_code == 200
        os.kill(pid, signal.SIGSTOP)
        try:
            deadline_s = time.monotonic() + 15
            while (answer := client.get("/health")).status_code == 200:
                assert time.monotonic() < deadline_s, "health stays green beside an engine that does nothing"
                time.sleep(0.1)
            assert "has not answered for" in answer.json()["reason"]
        finally:
            os.kill(pid, signal.SIGCONT)
        while client.get("/health").status_code != 200:
            assert time.monotonic() < deadline_s + 15
            time.sleep(0.1)
