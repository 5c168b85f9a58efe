"""A whole server with a tiny model in this process's event loop thread, for all tests of a module."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from ramet.runtime.models.catalog import TINY_MODEL
from ramet.runtime.server.app import make_server
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.served_model import ServedModel

ENGINE = {"num_kv_tokens": 4096, "max_running_requests": 8, "device": "cpu"}


@dataclass
class RunningServer:
    url: str
    served: ServedModel
    client: httpx.Client


def run_server(model: str = TINY_MODEL, engine: dict[str, Any] | None = None, **config: Any) -> Iterator[RunningServer]:
    """Serve on a free port of the loopback address until the generator is closed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ServerConfig(port=port, drain_s=config.pop("drain_s", 0.0), **config)
    app, served = make_server(model, {**ENGINE, **(engine or {})}, settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]

    async def serve() -> None:
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            for _ in range(1800):  # a first start compiles for this CPU
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                thread.join(0.1)
            else:
                raise AssertionError("the server does not become ready")
            yield RunningServer(url, served, client)
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    yield from run_server()


@pytest.fixture(scope="session")
def start_server() -> Callable[..., AbstractContextManager[RunningServer]]:
    """Start another server, as a context manager; takes what `run_server` takes."""
    return contextmanager(run_server)


@dataclass
class ServedProcess:
    """`ramet serve` as a process of its own. `log`: the file of its stdout and stderr."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def wait_ready(self, limit_s: float = 180.0) -> None:
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            found = re.search(r"ready in .* at (https?://\S+)", self.log.read_text())
            if found:
                self.url = found[1]
                return
            assert self.process.poll() is None, f"the server ended: {self.log.read_text()}"
            time.sleep(0.05)
        raise AssertionError(f"the server does not become ready: {self.log.read_text()}")

    def client(self, timeout_s: float = 60.0) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=False)

    def engine_pid(self) -> int:
        with self.client() as client:
            return int(client.get("/get_server_info").json()["engine"]["pid"])


def start_command(folder: Path, *flags: str, model: str = TINY_MODEL) -> ServedProcess:
    """Start `ramet serve` without waiting for it."""
    log = folder / f"serve-{len(list(folder.iterdir()))}.log"
    command = [sys.executable, "-m", "ramet.cli", "serve", model, "--port", "0", "--device", "cpu"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--num-kv-tokens", "8192", *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    return ServedProcess(process, log)


@pytest.fixture(scope="module")
def serve_command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServedProcess]]:
    """Start servers by command line; call `wait_ready` on what comes back. They are killed after the module."""
    folder = tmp_path_factory.mktemp("serve")
    started: list[ServedProcess] = []

    def start(*flags: str, model: str = TINY_MODEL) -> ServedProcess:
        started.append(start_command(folder, *flags, model=model))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(10)
