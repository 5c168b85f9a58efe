"""A server around the scripted engine, whose answers stand in the prompts."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import httpx
import pytest
import uvicorn

from ramet.runtime.cache.prefix_log import CacheChanges
from ramet.runtime.handle import RequestHandle
from ramet.runtime.server.app import create_app
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.link.process import EngineServer
from ramet.runtime.server.link.protocol import Command, Hello, Report
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.served_model import ServedModel
from ramet.runtime.server.tenants import Tenants
from ramet.runtime.testing.scripted_model import ScriptedEngine
from ramet.runtime.types import RequestOutput, Usage

Json = dict[str, Any]
CONTEXT = 300_000  # the prompts of coding agents have tens of thousands of characters, which are tokens here


def scripted_answer(prompt: str) -> str:
    """The answer to a prompt with ⟦first‖second⟧: the one whose turn it is. A line `call NAME JSON` is a tool call."""
    start = prompt.rfind("⟦")
    end = prompt.find("⟧", start)
    if start < 0 or end < 0:
        return "Nothing to say."
    answers = prompt[start + 1 : end].split("‖")
    turn = prompt.count("<|im_start|>assistant", end) - 1
    answer = answers[min(max(turn, 0), len(answers) - 1)]
    return re.sub(r"^call (\S+) (.*)$", written_call, answer, flags=re.MULTILINE)


def written_call(found: re.Match[str]) -> str:
    """A call as the model writes it, in the layout of its grammar."""
    value = {"name": found[1], "arguments": json.loads(found[2])}
    return f"<tool_call>\n{json.dumps(value)}\n</tool_call>"


class ServedScript(ScriptedEngine):
    """The scripted engine with what the engine process asks of an engine besides requests.

    `usages`: of every request that has ended, in their order.
    """

    def __init__(self) -> None:
        super().__init__(scripted_answer, context_length=CONTEXT, latency_s=0.002)
        self.usages: list[Usage] = []

    def submit(
        self, *args: Any, on_output: Callable[[RequestOutput], None] | None = None, **options: Any
    ) -> RequestHandle:
        """As the engine it is, and notes what each request took from the cache."""

        def note(output: RequestOutput) -> None:
            if output.finish_reason is not None:
                self.usages.append(output.usage)
            if on_output is not None:
                on_output(output)

        return super().submit(*args, on_output=note, **options)

    def flush_cache(self) -> int:
        self._trie.clear()
        return 0

    def whole_cache(self) -> CacheChanges:
        """There are no pages."""
        return CacheChanges(0, is_whole=True)

    def check_integrity(self) -> None:
        """There are no pages."""


class ScriptedProxy(EngineProxy):
    """A proxy whose engine is in this process."""

    def __init__(self, engine: ServedScript, tenants: Tenants) -> None:
        super().__init__(None, {}, accounts=tenants)
        self._engine = engine

    async def start(self) -> None:
        loop = asyncio.get_running_loop()

        def send(report: Report) -> None:
            loop.call_soon_threadsafe(self._take, report)

        self._server = EngineServer(cast(Any, self._engine), send)
        names = ("scripted", CONTEXT, self._engine.tokenizer.vocab_size, "cpu", "float32", 1 << 20)
        self._take(Hello(0, *names, start_s=0.0))

    def _send(self, command: Command) -> None:
        self._server.carry_out(command)


@dataclass(frozen=True)
class Scripted:
    """The server. `engine`: what it asked, and its cache."""

    url: str
    engine: ServedScript


def serve_script() -> Iterator[Scripted]:
    engine, tenants = ServedScript(), Tenants(ServerConfig())
    proxy = ScriptedProxy(engine, tenants)
    served = ServedModel(ServerConfig(), proxy, tenants, engine.tokenizer, "scripted", time.time())
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    app = create_app(served)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        while not server.started:
            thread.join(0.02)
            assert thread.is_alive()
        yield Scripted(url, engine)
    finally:
        server.should_exit = True
        thread.join(30)
        engine.shutdown()


@pytest.fixture(scope="session")
def scripted() -> Iterator[Scripted]:
    yield from serve_script()


@pytest.fixture
def http(scripted: Scripted) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=scripted.url, timeout=60, trust_env=False) as client:
        yield client
