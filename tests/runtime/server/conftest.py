"""A whole server with a tiny model in this process's event loop thread, for all tests of a module."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

from ramet.runtime.models.dummy import TINY_MODEL
from ramet.runtime.server.app import make_server
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.state import ServerState

ENGINE = {"num_kv_tokens": 4096, "max_running_requests": 8, "device": "cpu"}


@dataclass
class RunningServer:
    url: str
    state: ServerState
    client: httpx.Client


def run_server(model: str = TINY_MODEL, engine: dict[str, Any] | None = None, **config: Any) -> Iterator[RunningServer]:
    """Serve on a free port of the loopback address until the generator is closed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ServerConfig(port=port, drain_s=config.pop("drain_s", 0.0), **config)
    app, state = make_server(model, {**ENGINE, **(engine or {})}, settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]

    async def serve() -> None:
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            for _ in range(600):
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                thread.join(0.1)
            else:
                raise AssertionError("the server does not become ready")
            yield RunningServer(url, state, client)
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    yield from run_server()


@pytest.fixture
def start_server() -> Callable[..., AbstractContextManager[RunningServer]]:
    """Start another server, as a context manager; takes what `run_server` takes."""
    return contextmanager(run_server)
