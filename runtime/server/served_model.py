"""The served model, with everything that endpoints need: engine, tokenizer, limits, threads."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request

from ramet.errors import ContextOverflow
from ramet.lang.graph.ir import Graph
from ramet.runtime.programs.model import ProgramModel
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.link.replicas import MakeProxy, Replicas
from ramet.runtime.server.prompt_log import PromptLog
from ramet.runtime.server.tenants import Tenants
from ramet.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

T = TypeVar("T")
LITTLE_BYTES = 1024  # a conversation of this size is rendered and tokenised in 0.2 ms

# The plan of a graph as JSON: (graph, the program's name, tokenizer and limits). Only the language can make it, so the
# caller that starts the server passes the function.
Explain = Callable[[Graph, str, ProgramModel], dict[str, Any]]  # Any: JSON


@dataclass(slots=True)
class ServedModel:
    """One model on one server. `pool`: threads for tokenising and rendering, so the event loop never blocks.

    `configured_context_length`: the context that the engine will have after its start.
    """

    config: ServerConfig
    proxy: EngineProxy | Replicas
    tenants: Tenants
    tokenizer: Tokenizer
    name: str
    started_s: float  # time.time()
    explain: Explain | None = None
    configured_context_length: int | None = None
    others: Callable[[str | None, dict[str, Any]], MakeProxy] | None = None  # Any: fields of EngineConfig
    before_shutdown: list[Callable[[], None]] = field(default_factory=list)  # ends what would run for ever
    tracing: TracerProvider | None = None
    prompts: PromptLog = field(init=False)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="ramet-text"))

    def __post_init__(self) -> None:
        self.prompts = PromptLog(self.tokenizer)

    @property
    def context_length(self) -> int | None:
        """Maximum tokens of prompt and answer together. Known before the engine has started."""
        hello = self.proxy.hello
        return self.configured_context_length if hello is None else hello.context_length

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters, which are models of their own for clients."""
        hello = self.proxy.hello
        return [] if hello is None else hello.adapters

    def adapter_of(self, name: str | None, param: str = "model") -> str:
        """The adapter that a model's name chooses; empty for the model alone. Raises HttpError (404) about `param`."""
        if name in (None, "default", self.name):
            return ""
        if name in self.adapters:
            return name
        raise HttpError(
            404,
            f"the model {name!r} does not exist here; this server serves {', '.join(map(repr, self.names))}",
            param=param,
            code="model_not_found",
        )

    @property
    def names(self) -> list[str]:
        """The names that clients may choose: the model's, and those of its adapters."""
        return [self.name, *self.adapters]

    def name_of(self, name: str | None) -> str:
        """The name that an answer gives to the model that was asked for."""
        return self.adapter_of(name) or self.name

    def one_of_many(self, ids: Sequence[int]) -> Sequence[int]:
        """The tokens of one prompt of a list of prompts, in 4 bytes a token; in a list of Python's it takes up to 36.

        Raises ContextOverflow for one that cannot fit, before the others are cut into tokens.
        """
        if self.context_length is not None and len(ids) > self.context_length:
            raise ContextOverflow(
                f"a prompt has {len(ids):,} tokens, but the context is {self.context_length:,}; shorten it, or raise "
                f"--context-length",
                param="prompt",
            )
        return array("i", ids)

    async def off_loop(self, work: Callable[..., T], *args: Any) -> T:  # Any: the work's own arguments
        """Run CPU work (tokenising, templates, schema checks) on the pool."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *args)

    async def compute(self, size: int, work: Callable[..., T], *args: Any) -> T:  # Any: the work's own arguments
        """Run CPU work on `size` bytes of input, on the pool unless the input is so small that a thread costs more."""
        return work(*args) if size <= LITTLE_BYTES else await self.off_loop(work, *args)

    def prompt_owner(self, request: Request, salt: str) -> str:
        """The name under which a request's prompt is compared with others: those of its key and its salt."""
        return f"{key_name(request)}/{salt}"

    def cache_salt(self, request: Request, asked: str) -> str:
        """The salt of a request: its requested salt, combined with its key if keys are isolated."""
        key = key_name(request) if self.config.isolate_cache_by_key else ""
        return f"{key}/{asked}" if key else asked


def client_of(request: Request) -> tuple[str, ...]:
    """The sender of a request: its key's name, its connection, and its id. Empty texts without the middleware."""
    client: tuple[str, ...] = request.scope.get("state", {}).get("client", ("", ""))
    return client


def key_name(request: Request) -> str:
    """The name of the request's API key; empty if the server has no keys."""
    return client_of(request)[0]
