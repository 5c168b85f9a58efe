"""A server of programs in a thread, over an engine of this process; the example programs; an engine that records."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn

from ramet import Function
from ramet.lang.explain.plan import explain_on_server
from ramet.runtime.handle import RequestHandle
from ramet.runtime.server.app import create_app
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.link.process import EngineServer
from ramet.runtime.server.link.protocol import Command, Hello, Report, command_decoder, report_decoder
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.served_model import ServedModel
from ramet.runtime.server.tenants import Tenants
from ramet.runtime.testing.scripted_model import ScriptedEngine
from ramet.runtime.types import NO_OPTIONS, RequestOptions, SamplingParams


class LocalProxy(EngineProxy):
    """The engine on this process's threads; commands and reports are encoded and decoded as on their way to another."""

    def __init__(self, engine: Any, tenants: Tenants) -> None:  # Any: an Engine or a ScriptedEngine
        super().__init__(None, {}, accounts=tenants)
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
        await super().stop()


@dataclass
class Served:
    """A running server and the engine behind it."""

    url: str
    engine: Any
    proxy: LocalProxy
    tenants: Tenants
    loop: asyncio.AbstractEventLoop
    client: httpx.Client


@contextmanager
def serve_engine(engine: Any, **config: Any) -> Iterator[Served]:  # Any: an engine; ServerConfig's fields
    """Serve `engine` on a free port of the loopback address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    settings = ServerConfig(port=port, drain_s=0.0, **config)
    tenants = Tenants(settings)
    proxy = LocalProxy(engine, tenants)
    app = create_app(ServedModel(settings, proxy, tenants, engine.tokenizer, "test", 0.0, explain_on_server))
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
            yield Served(url, engine, proxy, tenants, loops[0], client)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


@pytest.fixture
def serve() -> Callable[..., AbstractContextManager[Served]]:
    """`with serve(engine) as served`: see serve_engine."""
    return serve_engine


def import_from(path: Path) -> ModuleType:
    """Import a file that belongs to no package, anew at every call."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names in annotations
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Example:
    """An example, its main program, and the arguments that its EXAMPLE gives to it."""

    module: ModuleType
    program: Function
    arguments: dict[str, Any]


def example_from(path: Path) -> Example:
    """Import an example; its main program is the one whose parameters are those of EXAMPLE."""
    module = import_from(path)
    functions = [f for f in vars(module).values() if isinstance(f, Function)]
    found = [f for f in functions if {p.name for p in f.parameters} == set(module.EXAMPLE)]
    assert len(found) == 1, f"{path} has {len(found)} programs that take its EXAMPLE"
    return Example(module, found[0], module.EXAMPLE)


class RecordingEngine(ScriptedEngine):
    """Remembers the tokens of every prompt, and from which of them on it was to be scored."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[tuple[tuple[int, ...], int | None]] = []

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        options: RequestOptions = NO_OPTIONS,
        **more: Any,
    ) -> RequestHandle:
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self.prompts.append((tuple(tokens), options.score_from))
        return super().submit(prompt, sampling, options, **more)


# Of the whole session, as they keep nothing between two calls: Hypothesis refuses a fixture that each test has anew.


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path], ModuleType]:
    """`load_module(path)`: see import_from."""
    return import_from


@pytest.fixture(scope="session")
def load_example() -> Callable[[Path], Example]:
    """`load_example(path)`: see example_from."""
    return example_from


@pytest.fixture(scope="session")
def recording_engine() -> Callable[[], RecordingEngine]:
    """`with recording_engine() as engine`: see RecordingEngine."""
    return RecordingEngine
