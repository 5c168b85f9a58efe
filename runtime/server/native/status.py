"""Endpoints for health, model and server information, the cache, aborts and metrics."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from prometheus_client import generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from ramet.errors import ConfigError
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.link.protocol import Submit
from ramet.runtime.server.link.proxy import EngineProxy
from ramet.runtime.server.link.replicas import Replicas
from ramet.runtime.server.metrics import make_registry
from ramet.runtime.server.native.bodies import AbortBody, AppendBody, LoadAdapterBody, ScaleBody, UnloadAdapterBody
from ramet.runtime.server.openapi import VERSION
from ramet.runtime.server.routing import Endpoint
from ramet.runtime.server.sending import AnswerStruct, json_response
from ramet.runtime.server.served_model import ServedModel
from ramet.runtime.types import RequestOptions, SamplingParams


class Health(AnswerStruct):
    status: Literal["ok", "unhealthy"]
    reason: str | None


class Readiness(AnswerStruct):
    """`stage`: the current stage of the start. `seconds`: its duration so far. `reason`: why the last process ended."""

    ready: bool
    stage: str
    attempt: int
    reason: str | None
    seconds: float | UnsetType = UNSET


class HealthGenerate(AnswerStruct):
    status: Literal["ok"]
    seconds: float


class ModelInfo(AnswerStruct):
    model_path: str
    served_model_name: str
    context_length: int
    vocab_size: int
    is_generation: Literal[True]
    has_chat_template: bool


class ServerInfo(AnswerStruct):
    """`server`: its configuration, without keys. `engine`: null while it starts. `stats`: the engine's counters."""

    version: str
    server: dict[str, Any]  # Any: the fields' own types
    engine: dict[str, Any] | None  # Any: the fields of Hello
    stats: dict[str, float]
    in_flight: int
    uptime_s: float


class FlushedCache(AnswerStruct):
    freed_pages: int


class Appended(AnswerStruct):
    success: Literal[True]


class Scaled(AnswerStruct):
    replicas: Annotated[list[int], Meta(description="the numbers of the engines, as on /metrics")]


class Aborted(AnswerStruct):
    aborted: Annotated[list[str], Meta(description="ids of the requests that were ended")]


class StatusEndpoints:
    """Endpoints for operators and load balancers."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._registry = make_registry(served.proxy, served.tenants.requests, served.tenants)

    async def health(self, request: Request) -> Response:
        """200 while the engine answers and makes progress; 503 with the reason otherwise."""
        wrong = self._served.proxy.health(self._served.config.health_patience_s)
        answer = Health(status="ok" if wrong is None else "unhealthy", reason=wrong)
        return json_response(answer, 200 if wrong is None else 503)

    async def ready(self, request: Request) -> Response:
        """200 once the engine takes requests; until then 503 with the stage, its duration and the last failure."""
        answer = msgspec.convert(self._served.proxy.startup, Readiness)
        return json_response(answer, 200 if answer.ready else 503)

    async def health_generate(self, request: Request) -> HealthGenerate:
        """Generate one token, to check that generation works."""
        proxy, start_s = self._served.proxy, time.monotonic()
        sampling, options = (
            SamplingParams(max_tokens=1, ignore_eos=True),
            RequestOptions(priority=-1_000, deadline_s=20.0),
        )
        await proxy.submit(Submit(proxy.new_id("health"), [1], sampling, options=options)).collect()
        return HealthGenerate(status="ok", seconds=round(time.monotonic() - start_s, 4))

    async def model_info(self, request: Request) -> ModelInfo:
        """Describe the model; 503 until it is loaded."""
        hello = self._served.proxy.hello
        if hello is None:
            reason = self._served.proxy.health() or "the engine is starting"
            raise HttpError(503, reason, kind="server_error")
        return ModelInfo(
            model_path=hello.model,
            served_model_name=self._served.name,
            context_length=hello.context_length,
            vocab_size=hello.vocab_size,
            is_generation=True,
            has_chat_template=self._served.tokenizer.chat_template is not None,
        )

    async def server_info(self, request: Request) -> ServerInfo:
        """Return the configuration, without keys, and the engine's counters."""
        proxy = self._served.proxy
        return ServerInfo(
            version=VERSION,
            server=_shown_config(self._served),
            engine=None if proxy.hello is None else msgspec.to_builtins(proxy.hello),
            stats=proxy.stats,
            in_flight=proxy.num_in_flight,
            uptime_s=round(time.time() - self._served.started_s, 1),
        )

    async def flush_cache(self, request: Request) -> FlushedCache:
        """Drop cached prefixes that are not in use; running requests keep theirs."""
        return FlushedCache(freed_pages=await self._served.proxy.ask("flush_cache"))

    async def append(self, request: Request, body: AppendBody) -> Appended:
        """Do nothing: the caller sends the joined text with its next request. SGLang's frontend asks for it."""
        return Appended(success=True)

    async def profile(self, request: Request) -> Response:
        """Refuse: profiles are made from outside, with py-spy or nsys."""
        raise HttpError(
            501,
            "profiles are not made over HTTP; attach py-spy, perf or nsys to the engine's process",
            code="no_profiler",
        )

    async def abort_request(self, request: Request, body: AbortBody) -> Aborted:
        """Abort one request by its exact id, or all requests."""
        proxy = self._served.proxy
        wanted = proxy.in_flight() if body.abort_all else [body.rid or ""]
        return Aborted(aborted=[rid for rid in wanted if proxy.abort(rid)])

    async def load_adapter(self, request: Request, body: LoadAdapterBody) -> Response:
        """Load an adapter (LoRA) from a PEFT folder on the server's machine. It is gone after the engine's restart."""
        if body.lora_name in ("default", self._served.name):
            raise HttpError(400, f"{body.lora_name!r} is the model's own name", param="lora_name")
        await self._single().change_adapters("load_adapter", name=body.lora_name, path=body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload_adapter(self, request: Request, body: UnloadAdapterBody) -> Response:
        """Unload an adapter: requests that run keep it, new ones cannot choose it."""
        engine = self._single()
        if body.lora_name not in self._served.adapters:
            raise HttpError(
                404, f"no adapter {body.lora_name!r} is loaded", param="lora_name", code="adapter_not_found"
            )
        await engine.change_adapters("unload_adapter", name=body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _single(self) -> EngineProxy:
        engine = self._served.proxy
        if isinstance(engine, Replicas):
            raise HttpError(
                409,
                "adapters of several engines are named at the start, by --lora name=path: an engine that starts later "
                "would not have those that were loaded meanwhile",
                code="several_engines",
            )
        return engine

    async def scale(self, request: Request, body: ScaleBody) -> Scaled:
        """Change the number of engines, or restart them in turn. Answers when it is done; no request is lost by it."""
        engines = self._served.proxy
        if not isinstance(engines, Replicas):
            raise HttpError(
                409, "this server has one engine; start it with --dp 2 to change their number", code="one_engine"
            )
        if body.replicas is not None:
            await engines.scale(body.replicas, self._served.config.drain_s)
        if body.restart:
            others = None
            if body.model is not None or body.engine:
                assert self._served.others is not None, "whoever makes several engines can make others"
                others = await self._served.off_loop(self._served.others, body.model, body.engine)
            try:
                await engines.restart(self._served.config.drain_s, others)
            except ConfigError as error:
                code = "one_engine" if len(engines.engines()) == 1 else "cannot_start"
                raise HttpError(409, str(error), code=code) from error
        return Scaled(replicas=[number for number, _ in engines.engines() if number is not None])

    async def metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(generate_latest(self._registry), media_type="text/plain; version=0.0.4; charset=utf-8")


def _shown_config(served: ServedModel) -> dict[str, Any]:  # Any: the fields' own types
    """The server's configuration without its keys."""
    fields = dataclasses.asdict(served.config)
    return {name: value for name, value in fields.items() if "api_key" not in name or isinstance(value, bool)}


def status_endpoints(served: ServedModel) -> list[Endpoint]:
    """The endpoints about the server itself."""
    status = StatusEndpoints(served)
    model_info = Endpoint("GET", "/get_model_info", status.model_info, answer=ModelInfo, errors=(503,))
    server_info = Endpoint("GET", "/get_server_info", status.server_info, answer=ServerInfo)
    flush_cache = Endpoint("POST", "/flush_cache", status.flush_cache, answer=FlushedCache, errors=(503,))
    return [
        Endpoint("GET", "/health", status.health, answer=Health, others={503: Health}),
        Endpoint("GET", "/ready", status.ready, answer=Readiness, others={503: Readiness}),
        Endpoint("GET", "/health_generate", status.health_generate, answer=HealthGenerate, errors=(429, 503)),
        model_info,
        dataclasses.replace(model_info, path="/model_info", is_listed=False),
        server_info,
        dataclasses.replace(server_info, path="/server_info", is_listed=False),
        flush_cache,
        dataclasses.replace(flush_cache, method="GET", is_listed=False),
        dataclasses.replace(flush_cache, path="/reset_prefix_cache", is_listed=False),
        Endpoint("POST", "/concate_and_append_request", status.append, body=AppendBody, answer=Appended),
        *(
            Endpoint(method, path, status.profile, errors=(501,), is_listed=False)
            for path in ("/start_profile", "/stop_profile")
            for method in ("GET", "POST")
        ),
        *(
            Endpoint(
                "POST", f"/v1/{path}_lora_adapter", handler, body=body, errors=(404, 409, 503), media_type="text/plain"
            )
            for path, handler, body in (
                ("load", status.load_adapter, LoadAdapterBody),
                ("unload", status.unload_adapter, UnloadAdapterBody),
            )
        ),
        Endpoint("POST", "/abort_request", status.abort_request, body=AbortBody, answer=Aborted),
        Endpoint("POST", "/scale", status.scale, body=ScaleBody, answer=Scaled, errors=(409, 503)),
        Endpoint("GET", "/metrics", status.metrics, media_type="text/plain", errors=(401,)),
    ]
