"""Ramet's own endpoints: generation by text or token ids, health, information, the cache, aborts, metrics."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ramet.lang.ir import Constraint
from ramet.runtime.server.disconnect import until_disconnect
from ramet.runtime.server.metrics import ServerMetrics
from ramet.runtime.server.protocol import Output, Submit
from ramet.runtime.server.state import HttpError, ServerState


class NativeSampling(BaseModel):
    """Names as in SGLang's native API, where they mean the same."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    json_schema: str | dict[str, Any] | None = None  # Any: JSON
    regex: str | None = None
    ebnf: str | None = None

    def fields(self, top_logprobs: int | None) -> dict[str, object]:
        """Fields of SamplingParams."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "max_tokens": self.max_new_tokens,
            "min_tokens": self.min_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": max(self.top_k, 0),
            "min_p": self.min_p,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "stop": stop,
            "stop_token_ids": self.stop_token_ids or [],
            "ignore_eos": self.ignore_eos,
            "logit_bias": self.logit_bias or {},
            "seed": self.sampling_seed,
            "logprobs": top_logprobs,
        }

    def constraint(self, limit: int) -> Constraint | None:
        """The one constraint that is asked for. Raises HttpError where there are several, or it is too large."""
        given = {
            "json_schema": self.json_schema if isinstance(self.json_schema, str) else _canonical(self.json_schema),
            "regex": self.regex,
            "cfg": self.ebnf,
        }
        asked = {kind: source for kind, source in given.items() if source is not None}
        if len(asked) > 1:
            raise HttpError(400, f"only one of json_schema, regex and ebnf can be given, not {len(asked)}")
        for kind, source in asked.items():
            if len(source) > limit:
                raise HttpError(400, f"the {kind} has {len(source):,} characters, more than {limit:,}", param=kind)
            return Constraint(kind, source)  # type: ignore[arg-type]
        return None


def _canonical(schema: dict[str, Any] | None) -> str | None:  # Any: JSON
    return None if schema is None else msgspec.json.encode(schema, order="sorted").decode()


class GenerateBody(BaseModel):
    """`text` or `input_ids`. With `stream`, each `data:` line holds what is new; `cumulative` repeats what was."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str | None = None
    input_ids: list[int] | None = None
    sampling_params: NativeSampling = Field(default_factory=NativeSampling)
    stream: bool = False
    cumulative: bool = False
    rid: str | None = Field(default=None, max_length=200)
    return_logprob: bool = False
    top_logprobs_num: int = Field(default=0, ge=0, le=64)
    priority: int = 0
    cache_salt: str = Field(default="", max_length=200)
    timeout_s: float | None = Field(default=None, gt=0)


class AbortBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    rid: str = ""
    abort_all: bool = False


def make_router(state: ServerState, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter()

    @router.api_route("/generate", methods=["POST", "PUT"], response_model=None)
    async def generate(body: GenerateBody, request: Request) -> Response:
        command = await _command(state, body, request)
        stream = state.proxy.submit(command)
        if not body.stream:
            output = await until_disconnect(request, stream.collect(), stream.close)
            return JSONResponse(_result(output, output.text, output.token_ids))
        return StreamingResponse(_events(stream.__aiter__(), body.cumulative), media_type="text/event-stream")

    @router.get("/health")
    async def health() -> Response:
        """200 while the engine answers and makes progress; 503 with the reason otherwise."""
        wrong = state.proxy.health(state.config.health_patience_s)
        return JSONResponse(
            {"status": "ok" if wrong is None else "unhealthy", "reason": wrong}, 200 if wrong is None else 503
        )

    @router.get("/ready")
    async def ready() -> Response:
        """200 once the engine takes requests."""
        hello = state.proxy.hello
        return JSONResponse({"ready": hello is not None}, 200 if hello is not None else 503)

    @router.get("/health_generate")
    async def health_generate() -> Response:
        """Generate one token, whatever it is."""
        start_s = time.monotonic()
        command = Submit(
            state.proxy.new_id("health"), [1], {"max_tokens": 1, "ignore_eos": True}, priority=-1_000, deadline_s=20.0
        )
        await state.proxy.submit(command).collect()
        return JSONResponse({"status": "ok", "seconds": round(time.monotonic() - start_s, 4)})

    @router.get("/get_model_info")
    async def model_info() -> dict[str, Any]:  # Any: JSON
        hello = state.proxy.hello
        if hello is None:
            raise HttpError(503, state.proxy.health() or "the engine is starting", kind="server_error")
        return {
            "model_path": hello.model,
            "served_model_name": state.model_name,
            "context_length": hello.context_length,
            "vocab_size": hello.vocab_size,
            "is_generation": True,
            "has_chat_template": state.tokenizer.chat_template is not None,
        }

    @router.get("/get_server_info")
    async def server_info() -> dict[str, Any]:  # Any: JSON
        hello = state.proxy.hello
        config = {
            k: v for k, v in dataclasses.asdict(state.config).items() if "api_key" not in k or isinstance(v, bool)
        }
        return {
            "version": "0.1.0",
            "server": config,
            "engine": None if hello is None else msgspec.to_builtins(hello),
            "stats": state.proxy.stats,
            "in_flight": state.proxy.num_in_flight,
            "uptime_s": round(time.time() - state.started_s, 1),
        }

    @router.api_route("/flush_cache", methods=["GET", "POST"])
    async def flush_cache() -> dict[str, int]:
        """Forget cached prefixes that nobody uses; running requests keep theirs."""
        return {"freed_pages": await state.proxy.ask("flush_cache")}

    @router.post("/abort_request")
    async def abort_request(body: AbortBody) -> dict[str, list[str]]:
        """Abort one request by its exact id, or all."""
        if not body.abort_all and not body.rid:
            raise HttpError(400, "give the rid of a request, or abort_all", param="rid")
        wanted = state.proxy.in_flight() if body.abort_all else [body.rid]
        return {"aborted": [rid for rid in wanted if state.proxy.abort(rid)]}

    @router.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _command(state: ServerState, body: GenerateBody, request: Request) -> Submit:
    if (body.text is None) == (body.input_ids is None):
        raise HttpError(400, "give either text or input_ids", param="text")
    ids = body.input_ids
    if ids is None:
        assert body.text is not None
        ids = await state.off_loop(lambda text: state.tokenizer.encode(text, add_special=True), body.text)
    return Submit(
        body.rid or state.proxy.new_id("generate"),
        ids,
        body.sampling_params.fields(body.top_logprobs_num if body.return_logprob else None),
        body.sampling_params.constraint(state.config.max_schema_bytes),
        cache_salt=state.cache_salt(request, body.cache_salt),
        priority=max(body.priority, -100),
        deadline_s=body.timeout_s,
    )


def _result(output: Output, text: str, token_ids: list[int]) -> dict[str, Any]:  # Any: JSON
    finish: dict[str, Any] | None = None
    if output.finish_reason is not None:
        finish = {"type": output.finish_reason}
        if output.stop_match is not None:
            finish["matched"] = output.stop_match
    meta: dict[str, Any] = {
        "id": output.id,
        "finish_reason": finish,
        "prompt_tokens": output.prompt_tokens,
        "completion_tokens": output.completion_tokens,
        "cached_tokens": output.cached_tokens,
    }
    if output.timings is not None:
        meta |= {"e2e_latency": output.timings["total_s"], "queue_time": output.timings["queue_s"]}
    if output.logprobs is not None:
        meta["output_token_logprobs"] = [[p, t, None] for p, t in zip(output.logprobs, output.token_ids, strict=True)]
        meta["output_top_logprobs"] = output.top_logprobs
    return {"text": text, "output_ids": token_ids, "meta_info": meta}


async def _events(outputs: AsyncIterator[Output], is_cumulative: bool) -> AsyncIterator[bytes]:
    text, ids = "", list[int]()
    try:
        async for output in outputs:
            text = text + output.text if is_cumulative else output.text
            ids = ids + output.token_ids if is_cumulative else output.token_ids
            yield b"data: " + msgspec.json.encode(_result(output, text, ids)) + b"\n\n"
    except Exception as error:  # the answer has begun: all that is left is an event that says so
        yield b"data: " + msgspec.json.encode(HttpError.of(error).body) + b"\n\n"
    yield b"data: [DONE]\n\n"
