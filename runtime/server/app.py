"""The application with all its endpoints, and the server that runs it: socket, signals, engine start and end."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from ramet.errors import ConfigError, RametError
from ramet.runtime.cluster.autoscaler import ScalingRule
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.models.catalog import TINY_CONTEXT, TINY_MODEL, resolve_model
from ramet.runtime.models.description import describe_model
from ramet.runtime.server.anthropic.routes import anthropic_endpoints
from ramet.runtime.server.config import ServerConfig
from ramet.runtime.server.connections import PatientProtocol, bytes_of_heads
from ramet.runtime.server.explorer.routes import explorer_endpoints
from ramet.runtime.server.limits import HttpLimits
from ramet.runtime.server.link import on_ray
from ramet.runtime.server.link.launchers import LocalLauncher
from ramet.runtime.server.link.protocol import Hello
from ramet.runtime.server.link.proxy import EngineProxy, Listener
from ramet.runtime.server.link.replicas import MakeProxy, Replicas
from ramet.runtime.server.link.tracing import make_provider
from ramet.runtime.server.native.generate import generate_endpoints
from ramet.runtime.server.native.status import status_endpoints
from ramet.runtime.server.openai.chat import ChatEndpoint
from ramet.runtime.server.openai.routes import openai_endpoints
from ramet.runtime.server.openapi import description_endpoints
from ramet.runtime.server.programs.routes import program_endpoints
from ramet.runtime.server.programs.store import ProgramStore
from ramet.runtime.server.responses.routes import responses_endpoints
from ramet.runtime.server.routing import make_app
from ramet.runtime.server.served_model import Explain, ServedModel
from ramet.runtime.server.tenants import Tenants
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.bounded_tokenizer import BoundedTokenizer
from ramet.runtime.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

OnReady = Callable[[Hello, str], None]  # the engine's description and the server's address
KEEP_ALIVE_S = (
    75  # longer than the 60 s of nginx and most load balancers, so that they close first and no request is lost
)
LAST_WORDS_S = 0.5  # time for sending errors to requests in flight after a second signal


def create_app(served: ServedModel) -> Starlette:
    """Make the application. Its lifespan starts and stops the proxy."""
    tracing = served.tracing

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await served.proxy.start()
        yield
        await served.proxy.stop(served.config.drain_s)
        if tracing is not None:
            await asyncio.to_thread(tracing.shutdown)
        served.pool.shutdown(wait=False, cancel_futures=True)

    chat, store = ChatEndpoint(served), ProgramStore(served)
    endpoints = [
        *openai_endpoints(served, chat),
        *responses_endpoints(served, chat),
        *anthropic_endpoints(served, chat),
        *generate_endpoints(served),
        *status_endpoints(served),
        *program_endpoints(served, store),
        *explorer_endpoints(served, store),
    ]
    app = make_app([*endpoints, *description_endpoints(endpoints, served)], served, lifespan)
    if served.config.cors_allow_origin:
        origins = list(served.config.cors_allow_origin)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(HttpLimits, config=served.config, tenants=served.tenants, tracing=tracing)
    return app


def open_tokenizer(model: str | None) -> tuple[str, Tokenizer, int]:
    """Return a model's name, tokenizer and context in tokens, without loading weights. Raises ModelError."""
    if model == TINY_MODEL:
        return TINY_MODEL, ByteTokenizer(), TINY_CONTEXT
    path = resolve_model(model)
    described = describe_model(path)
    return model or path.stem, described.tokenizer, described.config.max_position_embeddings


def make_server(
    model: str | None,
    engine: dict[str, Any],
    config: ServerConfig,
    *,
    log_level: str = "INFO",
    explain: Explain | None = None,
) -> tuple[Starlette, ServedModel]:  # Any: EngineConfig's fields
    """Make the whole server except its socket. Raises ModelError and ConfigError before anything is started."""
    wanted = EngineConfig.from_mapping(engine).context_length
    if config.ray_address is not None:
        on_ray.connect(config.ray_address)
    name, tokenizer, context_length = open_tokenizer(model)
    own_tokenizer, tenants = tokenizer, Tenants(config)
    tracing = None if config.otlp_endpoint is None else make_provider(config.otlp_endpoint)

    def engines(
        model: str | None, engine: dict[str, Any]
    ) -> Callable[[int | None, Listener | None], EngineProxy]:  # Any: EngineConfig's fields
        """What makes the proxies of this server's engines. Raises ConfigError for settings that cannot be."""
        checked = EngineConfig.from_mapping(engine)
        if config.ray_address is not None:
            on_ray.check_room(config.dp + config.prefill_replicas, checked)
        if config.prefill_replicas and (checked.tp > 1 or not checked.radix_cache):
            wrong = "--tp" if checked.tp > 1 else "--no-radix-cache"
            raise ConfigError(
                f"prefill_replicas is {config.prefill_replicas}, but with {wrong} KV pages cannot move from one engine "
                "to another; leave out one of the two"
            )

        def make_proxy(replica: int | None, listener: Listener | None) -> EngineProxy:
            return EngineProxy(
                model,
                engine,
                launcher=LocalLauncher() if config.ray_address is None else on_ray.RayLauncher(checked),
                max_engine_failures=config.max_engine_failures,
                log_level=log_level,
                log_format=config.log_format,
                accounts=tenants,
                replica=replica,
                listener=listener,
            )

        return make_proxy

    def others(other: str | None, changes: dict[str, Any]) -> MakeProxy:
        """What makes engines with another model, or other settings than those of the start."""
        if "context_length" in changes and changes["context_length"] != wanted:
            raise ConfigError("context_length cannot change while the server runs: start another server")
        made = engines(other or model, {**engine, **changes})
        if other is not None and not _is_like(open_tokenizer(other)[1], own_tokenizer):
            raise ConfigError(
                f"the model {other} has other tokens, or another chat template, than {name}: start another server"
            )
        return made

    make_proxy = engines(model, engine)
    is_alone = config.dp == 1 and config.ray_address is None and config.max_dp is None and not config.prefill_replicas
    most, ttft_s = config.max_dp, config.ttft_objective_s
    scaling = None if most is None else ScalingRule(config.dp, most, ttft_s=ttft_s)
    num_prefill = config.prefill_replicas
    replicas = partial(
        Replicas, make_proxy=make_proxy, scaling=scaling, drain_s=config.drain_s, num_prefill=num_prefill
    )
    proxy = make_proxy(None, None) if is_alone else replicas(config.dp)
    tokenizer = BoundedTokenizer(tokenizer, wanted or context_length)
    served = ServedModel(
        config,
        proxy,
        tenants,
        tokenizer,
        config.served_model_name or name,
        time.time(),
        explain,
        wanted or context_length,
        others=others,
        tracing=tracing,
    )
    return create_app(served), served


def _is_like(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two models read and write the same tokens, in the same form of chats."""
    forms = [None if each.chat_template is None else each.chat_template.source for each in (one, other)]
    return one.token_bytes == other.token_bytes and forms[0] == forms[1]


class Server(uvicorn.Server):
    """A server that shuts down gracefully on the first SIGTERM or Ctrl-C, and at once on the second.

    A graceful shutdown accepts no new connection; requests in flight have `drain_s` to finish, then they get an error.
    On the second signal they get the error at once. `failure`: the error that keeps the engine from starting, or ends
    it repeatedly. The server then ends, because only its operator can help.
    """

    def __init__(self, config: uvicorn.Config, served: ServedModel, on_ready: OnReady | None = None) -> None:
        super().__init__(config)
        self.failure: RametError | None = None
        self._served = served
        self._on_ready = on_ready
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sys.platform != "win32":
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload)
        self._tasks += [asyncio.create_task(self._wait_ready()), asyncio.create_task(self._wait_given_up())]

    def reload(self) -> None:
        """Read the file of keys and the certificate again. What is wrong is logged, and the old ones stay."""
        try:
            num_names = self._served.tenants.reload()
            if self.config.ssl is not None:
                load_certificate(self.config.ssl, self._served.config)
        except ConfigError as error:
            logger.error("nothing was read again: %s", error)
            return
        logger.info("keys of %d names were read again", num_names)

    async def _wait_ready(self) -> None:
        try:
            hello = await self._served.proxy.wait_ready()
        except RametError as error:
            self.failure = error
            self.should_exit = True
            return
        if self._on_ready is not None:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "http" if self.config.ssl is None else "https"
            self._on_ready(hello, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")

    async def _wait_given_up(self) -> None:
        self.failure = await self._served.proxy.wait_given_up()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            self._served.proxy.kill()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._tasks:
            task.cancel()
        for end in self._served.before_shutdown:
            end()
        asyncio.get_running_loop().call_later(self._served.config.drain_s, self._served.proxy.fail_in_flight)
        await super().shutdown(sockets)
        if self.force_exit:
            self._served.proxy.fail_in_flight()
            if self.server_state.tasks:
                await asyncio.wait(self.server_state.tasks, timeout=LAST_WORDS_S)


def bind(config: ServerConfig) -> socket.socket:
    """Bind the port before anything is loaded. Raises ConfigError with the reason if that fails."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {reason}; choose another with --host and --port"
        ) from error
    return listener


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """The certificate and the authorities of clients, or None for a server of plain HTTP. Raises ConfigError."""
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, config)
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except OSError as error:
            raise ConfigError(f"--ssl-ca-certs {config.ssl_ca_certs} cannot be read: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def load_certificate(context: ssl.SSLContext, config: ServerConfig) -> None:
    """Load the certificate, for new connections. Raises ConfigError; the context keeps what it had then."""
    assert config.ssl_certfile is not None
    try:
        for each in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):  # the first one shows whether it can be loaded
            each.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = f"--ssl-certfile {config.ssl_certfile}, --ssl-keyfile {config.ssl_keyfile or '(the same file)'}"
        raise ConfigError(f"the certificate cannot be loaded ({files}): {error}") from error


def _no_password() -> str:
    """Without this, a password would be asked for at the terminal, where nobody may be."""
    raise ValueError("the private key has a password; store it without one, readable by the server's user alone")


def serve(
    model: str | None,
    engine: dict[str, Any],
    config: ServerConfig,
    *,
    log_level: str = "INFO",
    on_ready: OnReady | None = None,
    explain: Explain | None = None,
) -> None:  # Any: EngineConfig's fields
    """Serve until a signal ends the server. Raises ConfigError and ModelError, also those of the engine process."""
    with bind(config) as listener:
        context = tls_context(config)
        app, served = make_server(model, engine, config, log_level=log_level, explain=explain)
        settings = uvicorn.Config(
            app,
            http=partial(PatientProtocol, heads=bytes_of_heads()),  # type: ignore[arg-type]  # it is only called
            ws="none",
            log_config=None,
            log_level=log_level.lower(),
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(config.drain_s) + 1,
        )
        settings.load()
        settings.ssl = context
        server = Server(settings, served, on_ready)
        # Objects that exist now live as long as the process. Full collections over them took a tenth of request time.
        gc.collect()
        gc.freeze()
        try:
            server.run([listener])
        finally:
            gc.unfreeze()  # otherwise extension modules report leaked objects at exit
    if server.failure is not None:
        raise server.failure
