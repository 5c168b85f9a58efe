"""Programs over HTTP: a client sends a graph once, it runs inside the engine, and events report each node.

    POST   /v1/programs              a graph with its arguments, or with rows of arguments
    POST   /v1/programs/explain      the plan and its cost; nothing runs
    GET    /v1/programs/{id}         its results so far
    GET    /v1/programs/{id}/events  its events over SSE, from `Last-Event-ID` on
    POST   /v1/programs/{id}/parts   the next part of an open program
    POST   /v1/programs/{id}/values  the answer to a tool call
    POST   /v1/programs/{id}/cancel  cancel some of its nodes
    DELETE /v1/programs/{id}         cancel the whole program; its pages are free within one step

A finished program is kept for a while, so a client that lost its connection can ask again. A repeated request with the
same Idempotency-Key gets the same program instead of a second run. Repeated parts and answers change nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from ramet.lang.graph.ir import Graph, GraphIndex, ToolCall
from ramet.runtime.programs.model import ProgramModel
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.link.protocol import StartProgram
from ramet.runtime.server.programs.store import (
    ProgramStatus,
    ProgramStore,
    StoredProgram,
    bound_values,
    digest_of,
    event_json,
)
from ramet.runtime.server.routing import Endpoint, Handler
from ramet.runtime.server.sending import EventStream, Json, event, json_response, until_disconnect
from ramet.runtime.server.served_model import ServedModel, client_of, key_name
from ramet.runtime.server.validation import NULL, FieldRule, Strict

MAX_ROWS = 4096
MAX_PLANNED = 1_000_000  # nodes before all generations, which `explain` looks at
_TAG = "programs"
_BYTES_A_NODE = 64  # of an answer, at least
PING_S = 15.0  # interval of keep-alive pings in a stream without events


_KNOWN_BY = "ask for stream or detach, so that its id is known before its end"
GraphJson = Annotated[Json, Field(json_schema_extra={"format": "graph"})]  # the graph's own reader checks it


class ProgramBody(Strict):
    """`graph`: its JSON form. `arguments`: for one run. `rows`: arguments of one run each. `stream`: events over SSE.

    `open`: more parts will come. `timeout_s`: deadline of each run. `token_budget`: maximum generated tokens of each
    run. `grace_s`: seconds until a program without a reader is cancelled. With `detach` the answer comes at once, and
    the program runs to its end even without a reader. `text_events`: also report text while it is generated.
    """

    rules = (
        FieldRule(
            "a program with rows can't be left open: send it whole, or one program a row",
            ({"open": (None, False)}, {"rows": NULL}),
            ("open",),
        ),
        FieldRule(
            f"an open program waits for its next part: {_KNOWN_BY}",
            ({"open": (None, False)}, {"stream": (True,)}, {"detach": (True,)}),
            ("open",),
        ),
    )

    graph: GraphJson
    arguments: dict[str, Any] = Field(default_factory=dict)
    rows: list[dict[str, Any]] | None = Field(default=None, min_length=1, max_length=MAX_ROWS)
    stream: bool = False
    detach: bool = False
    open: bool = False
    text_events: bool = True
    grace_s: float = Field(default=0.0, ge=0, le=600)
    priority: int = Field(default=0, ge=-100, le=100)
    cache_salt: str = Field(default="", max_length=200)
    adapter: str = Field(default="", max_length=200, description="the adapter of generations that name none")
    timeout_s: float | None = Field(default=None, gt=0)
    token_budget: int | None = Field(default=None, gt=0, le=2**62)


class ExplainBody(Strict):
    """`program`: a name for the program."""

    graph: GraphJson
    arguments: dict[str, Any] = Field(default_factory=dict)
    program: str = Field(default="program", max_length=200)


class PartBody(Strict):
    """`graph`: nodes, starting with the program's next id; null if none are left. `open`: more parts will come."""

    graph: Annotated[Json, Field(json_schema_extra={"format": "part-of-a-graph"})] | None = None
    open: bool = False


class ValueBody(Strict):
    """The `value` of the tool call `node`, or the `error` with which it failed."""

    node: int
    row: int = 0
    value: Any = None  # JSON
    error: str | None = None


class CancelBody(Strict):
    """The nodes to cancel. Nodes that depend on them are cancelled as well."""

    nodes: list[int] = Field(min_length=1)
    row: int = 0


class ProgramEndpoints:
    """Starts, shows, extends and cancels programs, and takes answers to their tool calls."""

    def __init__(self, served: ServedModel, store: ProgramStore) -> None:
        self._served = served
        self._store = store

    async def run(self, request: Request, body: ProgramBody) -> Response:
        """Run a graph once, or once for each row of arguments."""
        size = len(await request.body())
        command, index, digest = await self._served.compute(size, self._read, body, request)
        key, owner = request.headers.get("idempotency-key"), key_name(request)
        program = None if key is None else self._store.with_key(key, owner, digest)
        if program is None:
            grace_s = None if body.detach else body.grace_s
            program = self._store.start(command, index, owner=owner, digest=digest, key=key, grace_s=grace_s)
        if body.detach:
            return json_response(program.summary(), 202)
        if body.stream:
            return self._event_stream(program, 0)
        self._store.attach(program)
        try:
            await until_disconnect(request.receive, _ended(program))
        finally:
            self._store.detach(program)
        return await self._described(program)

    async def explain(self, request: Request, body: ExplainBody) -> Response:
        """Estimate the cost of a program; nothing runs."""
        served, explain = self._served, self._served.explain
        if explain is None:
            raise HttpError(501, "this server was started without the planner; explain in process", code="no_planner")
        data = msgspec.json.encode(body.graph)
        hello = served.proxy.hello
        limits: dict[str, Any] = {}  # Any: each has its own type
        if hello is not None:
            limits = {name: getattr(hello, name) for name in ("context_length", "page_size")}
            limits["form"] = hello.json_form

        def plan() -> dict[str, Any]:  # Any: JSON
            graph = Graph.from_json(data)
            _check_plannable(graph)
            graph = msgspec.structs.replace(graph, arguments={**graph.arguments, **body.arguments})
            return explain(graph, body.program, ProgramModel(served.tokenizer, name=served.name, **limits))

        return json_response(await asyncio.to_thread(plan))  # the pool, which others wait for, stays free

    async def show(self, request: Request) -> Response:
        """Return the results of a program so far."""
        return await self._described(self._program(request))

    async def events(self, request: Request) -> Response:
        """Stream a program's events, starting after `Last-Event-ID`."""
        after = request.headers.get("last-event-id", "0")
        if not (after.isascii() and after.isdigit()):
            raise HttpError(400, f"Last-Event-ID is {after!r}, but must be the id of an event", param="Last-Event-ID")
        return self._event_stream(self._program(request), int(after))

    async def extend(self, request: Request, body: PartBody) -> ProgramStatus:
        """Send the next part of an open program."""
        program = self._program(request)
        await self._store.extend(program, body.graph, is_open=body.open)
        return ProgramStatus(id=program.id, status=program.status)

    async def provide(self, request: Request, body: ValueBody) -> ProgramStatus:
        """Answer a tool call of a program."""
        program = self._program(request)
        self._store.provide(program, body.row, body.node, msgspec.json.encode(body.value), body.error)
        return ProgramStatus(id=program.id, status=program.status)

    async def cancel_nodes(self, request: Request, body: CancelBody) -> ProgramStatus:
        """Cancel some nodes of a program, and all nodes that depend on them."""
        program = self._program(request)
        self._store.cancel_nodes(program, body.row, body.nodes)
        return ProgramStatus(id=program.id, status=program.status)

    async def cancel(self, request: Request) -> ProgramStatus:
        """Cancel a whole program. Its pages are free within one step."""
        program = self._program(request)
        self._store.cancel(program)
        return program.summary()

    def _program(self, request: Request) -> StoredProgram:
        return self._store.get(request.path_params["program_id"], key_name(request))

    async def _described(self, program: StoredProgram) -> Response:
        """The answer with a program's results so far."""
        size = sum(len(row.done) for row in program.rows) * _BYTES_A_NODE
        return await self._served.compute(size, lambda: json_response(program.described()))

    def _read(self, body: ProgramBody, request: Request) -> tuple[StartProgram, GraphIndex, str]:
        """Read and check a program. Returns the command to start it, its graph, and what tells its body from others."""
        rows = body.rows if body.rows is not None else [body.arguments]
        graph = Graph.from_json(msgspec.json.encode(body.graph))
        _check_reachable(body, graph)
        bound = tuple(msgspec.json.encode(bound_values(graph, arguments)) for arguments in rows)
        shared = msgspec.structs.replace(graph, arguments={})
        index = GraphIndex()
        index.add(shared)
        command = StartProgram(
            id="",
            graph=shared.to_json(),
            rows=bound,
            cache_salt=self._served.cache_salt(request, body.cache_salt),
            adapter=body.adapter,
            priority=body.priority,
            deadline_s=body.timeout_s,
            token_budget=body.token_budget,
            is_open=body.open,
            text_events=body.text_events,
            client=client_of(request),
        )
        return command, index, digest_of(body.model_dump_json().encode())

    def _event_stream(self, program: StoredProgram, after: int) -> EventStream:
        self._store.attach(program)
        return EventStream(_events(self._store, program, after), lambda: self._store.detach(program))


def _check_reachable(body: ProgramBody, graph: Graph) -> None:
    """Check that a program which waits for its caller also tells the caller its id first, by a stream or `detach`.

    Raises HttpError for a program that would wait for ever.
    """
    if body.stream or body.detach:
        return
    if any(isinstance(node, ToolCall) for node in graph.nodes):
        raise HttpError(400, f"the program calls tools and waits for their values: {_KNOWN_BY}", param="stream")


def _check_plannable(graph: Graph) -> None:
    """Check that a plan takes a few seconds at most. It looks at the whole branch before each generation.

    Raises HttpError.
    """
    lengths: list[int] = []
    for node in graph.nodes:
        lengths.append(1 if node.parent is None else 1 + lengths[node.parent])
    total = sum(length for node, length in zip(graph.nodes, lengths, strict=True) if node.run_by == "model")
    if total > MAX_PLANNED:
        message = f"the branches before all generations have {total:,} nodes together; the limit is {MAX_PLANNED:,}"
        raise HttpError(413, f"{message}: explain the program in a process of your own", param="graph")


async def _ended(program: StoredProgram) -> None:
    await asyncio.gather(*program.tasks)


async def _events(store: ProgramStore, program: StoredProgram, after: int) -> AsyncGenerator[bytes, None]:
    """Past events, then new ones as they happen."""
    yield event({"id": program.id, "rows": len(program.rows)}, "program")
    async with aclosing(store.follow(program, after, PING_S)) as events:
        async for found in events:
            if found is None:
                yield b": still here\n\n"
                continue
            place, row, happened, begun = found
            data = {"row": row, **event_json(happened)}
            if happened.kind == "text":
                yield event({**data, "offset": begun}, "node")
            else:
                yield event(data, "node", place)
    rows = [row.outcome() for row in program.rows]
    yield event({"id": program.id, "status": program.status, "rows": rows}, "end")


def program_endpoints(served: ServedModel, store: ProgramStore) -> list[Endpoint]:
    """The endpoints under /v1/programs."""
    programs = ProgramEndpoints(served, store)
    path = "/v1/programs/{program_id}"
    return [
        Endpoint(
            "POST",
            "/v1/programs",
            programs.run,
            body=ProgramBody,
            answer=ProgramStatus,
            others={202: ProgramStatus},
            errors=(422, 429, 503),
            has_stream=True,
            tag=_TAG,
        ),
        Endpoint(
            "POST",
            "/v1/programs/explain",
            programs.explain,
            body=ExplainBody,
            answer=dict[str, Any],  # Any: JSON, as `ramet explain --json` prints it
            errors=(501,),
            tag=_TAG,
        ),
        Endpoint("GET", path, programs.show, answer=ProgramStatus, errors=(404,), tag=_TAG),
        Endpoint("DELETE", path, programs.cancel, answer=ProgramStatus, errors=(404,), tag=_TAG),
        Endpoint("GET", f"{path}/events", programs.events, has_stream=True, errors=(400, 404), tag=_TAG),
        _feeding(f"{path}/parts", programs.extend, PartBody, 422),
        _feeding(f"{path}/values", programs.provide, ValueBody),
        _feeding(f"{path}/cancel", programs.cancel_nodes, CancelBody),
    ]


def _feeding(path: str, handler: Handler, body: type[Strict], *errors: int) -> Endpoint:
    """An endpoint that sends something to a running program."""
    return Endpoint(
        "POST", path, handler, body=body, answer=ProgramStatus, errors=(404, 409, 429, 503, *errors), tag=_TAG
    )
