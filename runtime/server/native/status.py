"""Health, what is known of model and server, the cache, aborts, metrics."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from ramet.runtime.server.link.protocol import Submit
from ramet.runtime.server.metrics import ServerMetrics
from ramet.runtime.server.native.types import AbortBody
from ramet.runtime.server.openai.types import openapi_body, parse_body
from ramet.runtime.server.sse import json_response
from ramet.runtime.server.state import HttpError, ServerState


def make_router(state: ServerState, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter(tags=["server"])
    _add_health(router, state)
    _add_descriptions(router, state)
    _add_administration(router, state)

    @router.get("/metrics")
    async def prometheus() -> Response:
        """Prometheus' text format."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _add_health(router: APIRouter, state: ServerState) -> None:
    @router.get("/health")
    async def health() -> Response:
        """200 while the engine answers and makes progress; 503 with the reason otherwise."""
        wrong = state.proxy.health(state.config.health_patience_s)
        status = "ok" if wrong is None else "unhealthy"
        return json_response({"status": status, "reason": wrong}, 200 if wrong is None else 503)

    @router.get("/ready")
    async def ready() -> Response:
        """200 once the engine takes requests; until then what it does, for how long, and what failed before."""
        startup = state.proxy.startup
        return json_response(startup, 200 if startup["ready"] else 503)

    @router.get("/health_generate")
    async def health_generate() -> Response:
        """Generate one token, whatever it is."""
        start_s = time.monotonic()
        command = Submit(
            state.proxy.new_id("health"), [1], {"max_tokens": 1, "ignore_eos": True}, priority=-1_000, deadline_s=20.0
        )
        await state.proxy.submit(command).collect()
        return json_response({"status": "ok", "seconds": round(time.monotonic() - start_s, 4)})


def _add_descriptions(router: APIRouter, state: ServerState) -> None:
    async def model_info() -> Response:
        """The model; 503 until it is loaded."""
        hello = state.proxy.hello
        if hello is None:
            raise HttpError(503, state.proxy.health() or "the engine is starting", kind="server_error")
        return json_response(
            {
                "model_path": hello.model,
                "served_model_name": state.model_name,
                "context_length": hello.context_length,
                "vocab_size": hello.vocab_size,
                "is_generation": True,
                "has_chat_template": state.tokenizer.chat_template is not None,
            }
        )

    async def server_info() -> Response:
        """The configuration, without keys, and the engine's counters."""
        hello = state.proxy.hello
        return json_response(
            {
                "version": "0.1.0",
                "server": _shown_config(state),
                "engine": None if hello is None else msgspec.to_builtins(hello),
                "stats": state.proxy.stats,
                "in_flight": state.proxy.num_in_flight,
                "uptime_s": round(time.time() - state.started_s, 1),
            }
        )

    for path, answer in (("model_info", model_info), ("server_info", server_info)):
        router.add_api_route(f"/get_{path}", answer, methods=["GET"], response_model=None)
        router.add_api_route(f"/{path}", answer, methods=["GET"], response_model=None, include_in_schema=False)


def _shown_config(state: ServerState) -> dict[str, Any]:  # Any: the fields' own types
    """The server's configuration without its keys."""
    fields = dataclasses.asdict(state.config)
    return {name: value for name, value in fields.items() if "api_key" not in name or isinstance(value, bool)}


def _add_administration(router: APIRouter, state: ServerState) -> None:
    async def flush_cache() -> Response:
        """Forget cached prefixes that nobody uses; running requests keep theirs."""
        return json_response({"freed_pages": await state.proxy.ask("flush_cache")})

    router.add_api_route("/flush_cache", flush_cache, methods=["POST"], response_model=None)
    router.add_api_route("/flush_cache", flush_cache, methods=["GET"], response_model=None, include_in_schema=False)

    @router.post("/abort_request", response_model=None, openapi_extra=openapi_body(AbortBody))
    async def abort_request(request: Request) -> Response:
        """Abort one request by its exact id, or all."""
        body = await parse_body(state, request, AbortBody)
        if not body.abort_all and not body.rid:
            raise HttpError(400, "give the rid of a request, or abort_all", param="rid")
        wanted = state.proxy.in_flight() if body.abort_all else [body.rid or ""]
        return json_response({"aborted": [rid for rid in wanted if state.proxy.abort(rid)]})
