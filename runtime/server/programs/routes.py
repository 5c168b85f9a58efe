"""Programs over HTTP: a graph comes in once and runs inside the engine; its events come back by node.

    POST   /v1/programs              a graph with its arguments, or with rows of arguments
    POST   /v1/programs/explain      what it would cost; nothing runs
    GET    /v1/programs/{id}         what it has done so far
    GET    /v1/programs/{id}/events  its events over SSE, from `Last-Event-ID` on
    POST   /v1/programs/{id}/parts   the next part of a program that was left open
    POST   /v1/programs/{id}/values  the answer to a tool call
    POST   /v1/programs/{id}/cancel  stop some of its nodes
    DELETE /v1/programs/{id}         stop all of it; its pages are free within one step

A finished program is kept for a while, so that a client that lost its connection can ask again, and a request repeated
with the same Idempotency-Key gets the same program instead of another run. Repeated parts and answers change nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from ramet.lang.graph.ir import Graph, ToolCall
from ramet.runtime.server.disconnect import until_disconnect
from ramet.runtime.server.link.protocol import StartProgram
from ramet.runtime.server.metrics import ServerMetrics
from ramet.runtime.server.programs.store import Program, ProgramStore, digest_of, event_json, read_graph
from ramet.runtime.server.sse import EventStream
from ramet.runtime.server.state import HttpError, ServerState

MAX_ROWS = 4096
PING_S = 15.0  # a stream without events says that it is still there this often


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ProgramBody(_Body):
    """`graph`: its JSON form. `arguments` for one run, or `rows` for one run each. `stream`: events over SSE.

    `open`: more parts will come. `timeout_s`: deadline of each run. `token_budget`: tokens that each run may generate.
    `grace_s`: how long the program goes on when nobody reads it any more. With `detach` the answer comes at once, and
    the program goes on to its end whoever reads it. `text_events`: report text as it is generated, too.
    """

    graph: dict[str, Any]  # Any: JSON; checked by the graph's own reader
    arguments: dict[str, Any] = Field(default_factory=dict)
    rows: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_ROWS)
    stream: bool = False
    detach: bool = False
    open: bool = False
    text_events: bool = True
    grace_s: float = Field(default=0.0, ge=0, le=600)
    priority: int = Field(default=0, ge=-100, le=100)
    cache_salt: str = Field(default="", max_length=200)
    timeout_s: float | None = Field(default=None, gt=0)
    token_budget: int | None = Field(default=None, gt=0, le=2**62)


class ExplainBody(_Body):
    """`program`: a name for it."""

    graph: dict[str, Any]  # Any: JSON
    arguments: dict[str, Any] = Field(default_factory=dict)
    program: str = Field(default="program", max_length=200)


class PartBody(_Body):
    """`graph`: nodes from the program's next id on; null where none are left. `open`: still more parts will come."""

    graph: dict[str, Any] | None = None  # Any: JSON
    open: bool = False


class ValueBody(_Body):
    """The `value` of tool call `node`, or the `error` that it ended with."""

    node: int
    row: int = 0
    value: Any = None  # JSON
    error: str | None = None


class CancelBody(_Body):
    """What needs these nodes is stopped as well."""

    nodes: list[int] = Field(min_length=1)
    row: int = 0


def make_router(state: ServerState, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter()
    store = ProgramStore(state, metrics)

    @router.post("/v1/programs", response_model=None)
    async def run(body: ProgramBody, request: Request) -> Response:
        program = _start(state, store, body, request)
        if body.detach:
            return JSONResponse({"id": program.id, "object": "program", "status": program.status}, 202)
        if body.stream:
            return _event_stream(store, program, 0)
        with store.attached(program):
            await until_disconnect(request.receive, _ended(program))
        return JSONResponse(program.to_json())

    @router.post("/v1/programs/explain")
    async def explain(body: ExplainBody) -> Response:
        if state.explain is None:
            raise HttpError(501, "this server was started without the planner; explain in process", code="no_planner")
        graph = read_graph(body.graph)
        graph = msgspec.structs.replace(graph, arguments={**graph.arguments, **body.arguments})
        hello = state.proxy.hello
        limits = {} if hello is None else {"context_length": hello.context_length, "page_size": hello.page_size}
        return JSONResponse(
            await state.off_loop(state.explain, graph, body.program, state.tokenizer, state.model_name, limits)
        )

    @router.get("/v1/programs/{program_id}")
    async def show(program_id: str, request: Request) -> Response:
        return JSONResponse(store.get(program_id, _owner(request)).to_json())

    @router.get("/v1/programs/{program_id}/events", response_model=None)
    async def events(program_id: str, request: Request) -> Response:
        after = request.headers.get("last-event-id", "0")
        if not (after.isascii() and after.isdigit()):
            raise HttpError(400, f"Last-Event-ID is {after!r}, but must be the id of an event", param="Last-Event-ID")
        return _event_stream(store, store.get(program_id, _owner(request)), int(after))

    @router.post("/v1/programs/{program_id}/parts")
    async def extend(program_id: str, body: PartBody, request: Request) -> Response:
        program = store.get(program_id, _owner(request))
        graph = None if body.graph is None else read_graph(body.graph)
        digest = "" if body.graph is None else digest_of(msgspec.json.encode(body.graph))
        store.extend(program, graph, is_open=body.open, digest=digest)
        return JSONResponse({"id": program.id, "status": program.status})

    @router.post("/v1/programs/{program_id}/values")
    async def provide(program_id: str, body: ValueBody, request: Request) -> Response:
        program = store.get(program_id, _owner(request))
        store.provide(program, body.row, body.node, msgspec.json.encode(body.value), body.error)
        return JSONResponse({"id": program.id, "status": program.status})

    @router.post("/v1/programs/{program_id}/cancel")
    async def cancel_nodes(program_id: str, body: CancelBody, request: Request) -> Response:
        program = store.get(program_id, _owner(request))
        store.cancel_nodes(program, body.row, body.nodes)
        return JSONResponse({"id": program.id, "status": program.status})

    @router.delete("/v1/programs/{program_id}")
    async def cancel(program_id: str, request: Request) -> Response:
        program = store.get(program_id, _owner(request))
        store.cancel(program)
        return JSONResponse({"id": program.id, "object": "program", "status": program.status})

    return router


def _owner(request: Request) -> str:
    return getattr(request.state, "api_key_digest", "")


def _start(state: ServerState, store: ProgramStore, body: ProgramBody, request: Request) -> Program:
    """The program that this request starts, or has started before. Raises HttpError."""
    key, owner = request.headers.get("idempotency-key"), _owner(request)
    digest = digest_of(body.model_dump_json().encode())
    known = None if key is None else store.with_key(key, owner, digest)
    if known is not None:
        return known
    rows = body.rows if body.rows is not None else [body.arguments]
    if not rows:
        raise HttpError(400, "rows is empty: give arguments for at least one run", param="rows")
    if body.open and body.rows is not None:
        raise HttpError(
            400, "a program with rows can't be left open: send it whole, or one program a row", param="open"
        )
    graph = read_graph(body.graph)
    _check_reachable(body, graph)
    command = StartProgram(
        id="",
        graph=b"",
        cache_salt=state.cache_salt(request, body.cache_salt),
        priority=body.priority,
        deadline_s=body.timeout_s,
        token_budget=body.token_budget,
        is_open=body.open,
        text_events=body.text_events,
    )
    grace_s = None if body.detach else body.grace_s
    return store.start(graph, rows, command, owner=owner, digest=digest, key=key, grace_s=grace_s)


def _check_reachable(body: ProgramBody, graph: Graph) -> None:
    """What waits for its caller has to tell its id first. Raises HttpError for what would wait for ever."""
    if body.stream or body.detach:
        return
    way = "ask for stream or detach, so that its id is known before its end"
    if body.open:
        raise HttpError(400, f"an open program waits for its next part: {way}", param="open")
    if any(isinstance(node, ToolCall) for node in graph.nodes):
        raise HttpError(400, f"the program calls tools and waits for their values: {way}", param="stream")


async def _ended(program: Program) -> None:
    await asyncio.gather(*program.tasks)


def _event_stream(store: ProgramStore, program: Program, after: int) -> EventStream:
    attachment = store.attached(program)
    attachment.__enter__()
    is_closed = False

    def close() -> None:
        nonlocal is_closed
        if not is_closed:
            is_closed = True
            attachment.__exit__(None, None, None)

    return EventStream(_events(store, program, after, close), close)


async def _events(
    store: ProgramStore, program: Program, after: int, close: Callable[[], None]
) -> AsyncGenerator[bytes, None]:
    """What has happened, then what happens."""
    try:
        yield _sse("program", {"id": program.id, "rows": len(program.rows)})
        async with aclosing(store.follow(program, after, PING_S)) as events:
            async for found in events:
                if found is None:
                    yield b": still here\n\n"
                    continue
                place, row, event, begun = found
                data = {"row": row, **event_json(event)}
                if event.kind == "text":
                    yield _sse("node", {**data, "offset": begun})
                else:
                    yield _sse("node", data, place)
        rows = [row.outcome() for row in program.rows]
        yield _sse("end", {"id": program.id, "status": program.status, "rows": rows})
    finally:
        close()


def _sse(kind: str, data: object, place: int | None = None) -> bytes:
    name = b"" if place is None else b"id: %d\n" % place
    return name + b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"
