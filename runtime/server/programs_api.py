"""Programs over HTTP: a graph comes in once and runs inside the engine; its events come back by node.

    POST   /v1/programs        a graph with its arguments, or with rows of arguments
    GET    /v1/programs/{id}   what it has done so far
    DELETE /v1/programs/{id}   cancel it; its pages are free within one step

A finished program is kept for a while, so that a client that lost its connection can ask again, and a request repeated
with the same Idempotency-Key gets the same program instead of another run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ramet.errors import InvalidProgram, RametError
from ramet.lang.ir import Argument, Graph, NodeEvent
from ramet.runtime.server.disconnect import until_disconnect
from ramet.runtime.server.metrics import ServerMetrics
from ramet.runtime.server.protocol import StartProgram
from ramet.runtime.server.state import HttpError, ServerState

MAX_KEPT = 256  # finished programs that are kept
MAX_ROWS = 4096
MAX_BUFFERED = 4096  # events that a slow reader of a stream may be behind; older text is merged before


class ProgramBody(BaseModel):
    """`graph`: its JSON form. `arguments` for one run, or `rows` for one run each. `stream`: events over SSE.

    `timeout_s`: deadline of each run. `token_budget`: tokens that each run may generate. With `detach` the answer comes
    at once, and the program goes on when the connection is closed.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    graph: dict[str, Any]  # Any: JSON; checked by the graph's own reader
    arguments: dict[str, Any] = Field(default_factory=dict)
    rows: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_ROWS)
    stream: bool = False
    detach: bool = False
    priority: int = Field(default=0, ge=-100, le=100)
    cache_salt: str = Field(default="", max_length=200)
    timeout_s: float | None = Field(default=None, gt=0)
    token_budget: int | None = Field(default=None, gt=0)


@dataclass(slots=True)
class _Row:
    """One run. Owner: its program's task."""

    id: str
    done: list[NodeEvent] = field(default_factory=list)
    status: str = "running"  # done, failed, cancelled
    error: str | None = None

    def to_json(self) -> dict[str, Any]:  # Any: JSON
        values = {e.name: e.value for e in self.done if e.name is not None and e.kind == "done"}
        nodes = [msgspec.to_builtins(msgspec.structs.replace(e, cause=None)) for e in self.done]
        return {"status": self.status, "error": self.error, "values": values, "nodes": nodes}


@dataclass(slots=True, eq=False)
class _Program:
    """A program and all its rows."""

    id: str
    rows: list[_Row]
    listeners: list[asyncio.Queue[tuple[int, NodeEvent | None]]] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def status(self) -> str:
        found = {row.status for row in self.rows}
        return next(s for s in ("running", "failed", "cancelled", "done") if s in found)

    def to_json(self) -> dict[str, Any]:  # Any: JSON
        return {"id": self.id, "object": "program", "status": self.status, "rows": [row.to_json() for row in self.rows]}


class ProgramStore:
    """Programs that run or were finished lately. One event loop owns it."""

    def __init__(self, state: ServerState, metrics: ServerMetrics) -> None:
        self._state = state
        self._metrics = metrics
        self._programs: OrderedDict[str, _Program] = OrderedDict()
        self._by_key: dict[str, str] = {}

    def get(self, program_id: str) -> _Program:
        program = self._programs.get(program_id)
        if program is None:
            raise HttpError(
                404, f"no program {program_id!r}; finished ones are kept only for a while", code="not_found"
            )
        return program

    def with_key(self, key: str | None) -> _Program | None:
        return None if key is None else self._programs.get(self._by_key.get(key, ""))

    def start(self, body: ProgramBody, key: str | None, cache_salt: str) -> _Program:
        """Send every row to the engine. Raises HttpError and InvalidProgram before anything has started."""
        graph = Graph.from_json(msgspec.json.encode(body.graph))
        rows = body.rows if body.rows is not None else [body.arguments]
        if not rows:
            raise HttpError(400, "rows is empty: give arguments for at least one run", param="rows")
        bound = [_bind(graph, arguments) for arguments in rows]
        program = _Program(self._state.proxy.new_id("program"), [])
        for index, data in enumerate(bound):
            row = _Row(f"{program.id}/{index}")
            command = StartProgram(row.id, data, cache_salt, body.priority, body.timeout_s, body.token_budget)
            try:
                stream = self._state.proxy.start_program(command)
            except RametError:
                for earlier in program.rows:
                    self._state.proxy.abort(earlier.id)
                raise
            program.rows.append(row)
            program.tasks.append(asyncio.create_task(self._follow(program, index, stream.__aiter__())))
        self._programs[program.id] = program
        if key is not None:
            self._by_key[key] = program.id
        self._forget_old()
        return program

    def cancel(self, program: _Program) -> None:
        for row in program.rows:
            if row.status == "running":
                row.status = "cancelled"
                self._state.proxy.abort(row.id)

    async def _follow(self, program: _Program, index: int, events: AsyncIterator[NodeEvent]) -> None:
        row = program.rows[index]
        try:
            async for event in events:
                if event.kind != "text":
                    row.done.append(event)
                if event.kind == "error" and row.status == "running":
                    row.status = "failed"
                    row.error = event.error.message if event.error is not None else "failed"
                _tell(program, (index, event))
        except RametError as error:
            row.status = "failed" if row.status == "running" else row.status
            row.error = str(error)
        if row.status == "running":
            row.status = "done"
        self._metrics.note_program(row.status)
        _tell(program, (index, None))

    def _forget_old(self) -> None:
        while len(self._programs) > MAX_KEPT:
            oldest = next((p for p in self._programs.values() if p.status != "running"), None)
            if oldest is None:
                return
            del self._programs[oldest.id]
            self._by_key = {key: found for key, found in self._by_key.items() if found != oldest.id}


def _bind(graph: Graph, arguments: dict[str, Any]) -> bytes:  # Any: JSON
    names = {node.name for node in graph.nodes if isinstance(node, Argument)}
    values = {**graph.arguments, **arguments}
    unknown, unbound = sorted(set(arguments) - names), sorted(names - set(values))
    if unknown:
        raise InvalidProgram(f"the graph has no argument {unknown[0]!r}; it has {', '.join(sorted(names)) or 'none'}")
    if unbound:
        raise InvalidProgram(f"argument {unbound[0]!r} has no value; give it in arguments or rows")
    return msgspec.structs.replace(graph, arguments=values).to_json()


def _tell(program: _Program, item: tuple[int, NodeEvent | None]) -> None:
    for queue in list(program.listeners):
        try:
            queue.put_nowait(item)
        except asyncio.QueueFull:  # too slow a reader is let go: GET tells it the rest
            program.listeners.remove(queue)


def make_router(state: ServerState, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter()
    store = ProgramStore(state, metrics)

    @router.post("/v1/programs", response_model=None)
    async def run(body: ProgramBody, request: Request) -> Response:
        key = request.headers.get("idempotency-key")
        program = store.with_key(key)
        is_new = program is None
        if program is None:
            program = store.start(body, key, state.cache_salt(request, body.cache_salt))
        if body.detach:
            return JSONResponse({"id": program.id, "object": "program", "status": program.status}, 202)
        if body.stream:
            return StreamingResponse(_events(store, program, is_new), media_type="text/event-stream")
        tasks = list(program.tasks)

        async def finished() -> None:
            await asyncio.gather(*tasks)

        def left() -> None:
            if is_new:
                store.cancel(program)

        await until_disconnect(request, finished(), left)
        return JSONResponse(program.to_json())

    @router.get("/v1/programs/{program_id}")
    async def show(program_id: str) -> Response:
        return JSONResponse(store.get(program_id).to_json())

    @router.delete("/v1/programs/{program_id}")
    async def cancel(program_id: str) -> Response:
        program = store.get(program_id)
        store.cancel(program)
        return JSONResponse({"id": program.id, "object": "program", "status": program.status})

    return router


async def _events(store: ProgramStore, program: _Program, is_owner: bool) -> AsyncIterator[bytes]:
    """What has happened, then what happens. Its owner leaving early cancels the program."""
    queue: asyncio.Queue[tuple[int, NodeEvent | None]] = asyncio.Queue(MAX_BUFFERED)
    program.listeners.append(queue)
    past = [(index, event) for index, row in enumerate(program.rows) for event in row.done]
    left = sum(row.status == "running" for row in program.rows)
    is_complete = False
    try:
        yield _sse("program", {"id": program.id, "rows": len(program.rows)})
        for index, event in past:
            yield _node_event(index, event)
        while left and queue in program.listeners:
            with contextlib.suppress(TimeoutError):
                index, happened = await asyncio.wait_for(queue.get(), 15.0)
                if happened is None:
                    left -= 1
                else:
                    yield _node_event(index, happened)
                continue
            yield b": still here\n\n"
        is_complete = True
        yield _sse("end", {"id": program.id, "status": program.status})
    finally:
        if queue in program.listeners:
            program.listeners.remove(queue)
        if is_owner and not is_complete:
            store.cancel(program)


def _node_event(row: int, event: NodeEvent) -> bytes:
    data = msgspec.to_builtins(msgspec.structs.replace(event, cause=None))
    return _sse("node", {"row": row, **data})


def _sse(kind: str, data: object) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"
