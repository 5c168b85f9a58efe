"""A server of programs in a thread: the real application over an engine of this process, scripted or tiny."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn

from ramet.lang.explain.plan import explain_on_server
from ramet.runtime.server.app import create_app
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.link.process import EngineServer
from ramet.runtime.server.link.protocol import Command, Hello, Report, command_decoder, report_decoder
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.metrics import RequestCollector, ServerMetrics
from ramet.runtime.server.served_model import ServedModel


class LocalProxy(EngineProxy):
    """The engine on this process's threads; commands and reports are encoded and decoded as on their way to another."""

    def __init__(self, engine: Any) -> None:  # Any: an Engine or a ScriptedEngine
        super().__init__(None, {})
        self.engine = engine

    async def start(self) -> None:
        loop = asyncio.get_running_loop()

        def send(report: Report) -> None:
            data = msgspec.msgpack.encode([report])
            loop.call_soon_threadsafe(lambda: self._take(report_decoder.decode(data)[0]))

        self._server = EngineServer(self.engine, send)
        vocab_size = self.engine.tokenizer.vocab_size
        self._take(Hello(os.getpid(), "test", self.engine.context_length, vocab_size, "cpu", "none", 0, 0.0))

    def _send(self, command: Command) -> None:
        self._server.carry_out(command_decoder.decode(msgspec.msgpack.encode([command]))[0])

    def crash(self) -> None:
        """As if the engine process had ended; on the server's loop."""
        from ramet.errors import EngineStopped

        self._fail_in_flight(EngineStopped("the engine process crashed while this was in flight (test)"))

    async def stop(self, drain_s: float = 0.0) -> None:
        self.fail_in_flight()
        self._folder.cleanup()
        self._context.destroy(linger=0)


@dataclass
class Served:
    """A running server and the engine behind it."""

    url: str
    engine: Any
    proxy: LocalProxy
    loop: asyncio.AbstractEventLoop
    client: httpx.Client


@contextmanager
def serve_engine(engine: Any, **config: Any) -> Iterator[Served]:  # Any: an engine; ServerConfig's fields
    """Serve `engine` on a free port of the loopback address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    proxy = LocalProxy(engine)
    served = ServedModel(
        ServerConfig(port=port, drain_s=0.0, **config), proxy, engine.tokenizer, "test", 0.0, explain_on_server
    )
    app = create_app(served, ServerMetrics(proxy, RequestCollector()))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    loops: list[asyncio.AbstractEventLoop] = []
    is_up = threading.Event()

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(server.serve([listener]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        is_up.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert is_up.wait(30)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            yield Served(url, engine, proxy, loops[0], client)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


@pytest.fixture
def serve() -> Callable[..., AbstractContextManager[Served]]:
    """`with serve(engine) as served`: see serve_engine."""
    return serve_engine
