"""Programs on a server: `Remote("http://host:port")` sends a program's graph and receives its events by node.

A program that needs no value in Python costs one round trip; any other program costs one for each stage. Data lost with
a connection is requested again. Requests carry keys, parts carry their position, and events carry their number, so that
nothing runs twice and nothing is missed. Checks and tools in Python run in this process.

Not here: the HTTP client (http_loop.py), the server (runtime/server/programs/routes.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ramet.errors import DeadlineExceeded, EngineStopped, ProgramCancelled, RametError, RemoteError
from ramet.errors import from_name as error_from_name
from ramet.lang.backends.http_loop import HttpLoop, retry_pause
from ramet.lang.backends.protocol import BlockBackend
from ramet.lang.backends.sse import ServerSentEvent
from ramet.lang.graph import ir
from ramet.lang.graph.events import OnEvent
from ramet.lang.graph.options import Deadline, ProgramOptions
from ramet.lang.graph.run import PROMPT_TAIL

logger = logging.getLogger(__name__)

_ROWS = 1024  # of a batch in one request


class Remote(BlockBackend):
    """A server of programs (`ramet serve`). As a context manager it is the default backend of the block.

    `grace_s`: how long the server continues a program whose connection broke. `max_connections`: the most complete
    programs that run at once; a program that waits for values in Python never waits for other programs. `max_retries`:
    the most retries in a row.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        grace_s: float = 15.0,
        max_connections: int = 256,
        max_retries: int = 4,
        connect_s: float = 10.0,
        verify: bool = True,
    ) -> None:
        super().__init__()
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.http = HttpLoop(url, headers, connect_s=connect_s, silence_s=45.0, max_retries=max_retries, verify=verify)
        self.url = self.http.url
        self.grace_s = grace_s
        self._max_connections = max_connections
        self._gate: asyncio.Semaphore | None = None  # made on the loop

    def start(self, options: ProgramOptions, on_event: OnEvent) -> RemoteSession:
        return RemoteSession(_Program(self, options, [on_event]), 0)

    def start_rows(
        self, options: ProgramOptions, graph: ir.Graph, rows: Sequence[Mapping[str, Any]], on_events: Sequence[OnEvent]
    ) -> list[RemoteSession]:
        """Run a whole graph for each row of arguments (JSON values), with many rows in one request.

        The rows start when the first of their sessions is finished.
        """
        sessions: list[RemoteSession] = []
        for first in range(0, len(rows), _ROWS):
            program = _Program(self, options, on_events[first : first + _ROWS])
            program.rows_of_arguments = list(rows[first : first + _ROWS])
            sessions += [RemoteSession(program, row, graph) for row in range(len(program.rows))]
        return sessions

    def explain(self, graph: ir.Graph, program: str = "program") -> dict[str, Any]:  # Any: JSON
        """Return the graph's predicted cost, by the server's tokenizer. Nothing runs. Raises RametError."""
        body = {"graph": graph, "program": program}
        found: dict[str, Any] = self.http.wait(self.http.request("POST", "/v1/programs/explain", body))
        return found

    def close(self) -> None:
        """End the connections and abandon running programs. The backend may be used again."""
        self.http.close()
        self._gate = None

    def gate(self) -> asyncio.Semaphore:
        """Return the limit of connections. Must be called on the loop."""
        if self._gate is None:
            self._gate = asyncio.Semaphore(self._max_connections)
        return self._gate

    def __repr__(self) -> str:
        return f"Remote({self.url!r})"


class RemoteSession:
    """One run on the server. Any thread may call. The backend's loop does all work, in the order of the calls."""

    def __init__(self, program: _Program, row: int, whole: ir.Graph | None = None) -> None:
        """`whole`: the graph of all rows, which will not be extended."""
        self._program, self._row = program, row
        self._whole = whole
        self._call = program.remote.http.call
        self._is_complete = False
        self._index = ir.GraphIndex()

    def extend(self, graph: ir.Graph, *, is_last: bool = False) -> None:
        if graph.arguments:
            graph.to_json()  # a wrong part raises here, in the caller
        self._index.add(graph, is_bound=True)
        self._is_complete = is_last
        self._call(self._program.take_part, graph, is_last)

    def finish(self) -> None:
        if not self._is_complete:
            self._is_complete = True
            if self._whole is not None:
                self._call(self._program.begin, self._whole)
            else:
                self._call(self._program.take_part, None, True)

    def cancel(self, nodes: Sequence[int] | None = None) -> None:
        self._call(self._program.cancel, self._row, None if nodes is None else list(nodes))

    def provide(self, node: int, value: Any = None, error: Exception | None = None) -> None:
        if error is None and not ir.is_json(value):
            error = TypeError(
                f"the tool returned {value!r}, which has no JSON form; return text, numbers, lists, dicts"
            )
        self._call(self._program.provide, self._row, node, value, error)


@dataclass(slots=True)
class _Row:
    """The client's view of one run. `received`: the number of text characters of each unfinished node."""

    on_event: OnEvent
    unfinished: set[int] = field(default_factory=set)
    received: dict[int, int] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    tool_errors: dict[int, Exception] = field(default_factory=dict)
    root: Exception | None = None  # the first failed node
    is_cancelled: bool = False


class _Program:
    """One program on the server, with all its rows. Everything except the constructor runs on the loop."""

    def __init__(self, remote: Remote, options: ProgramOptions, on_events: Sequence[OnEvent]) -> None:
        self.remote = remote
        self.rows = [_Row(on_event) for on_event in on_events]
        self.rows_of_arguments: list[Mapping[str, Any]] | None = None
        self._options = options
        self._deadline = Deadline(options.deadline_s)
        self._nodes: list[ir.AnyNode] = []
        self._key = secrets.token_hex(16)
        self._first: dict[str, Any] | None = None  # the request that starts it
        self._id: str | None = None
        self._place = "0"  # of the last event in the server's log
        self._outbox: deque[tuple[str, dict[str, Any]]] = deque()  # (last part of the path, body)
        self._changed = asyncio.Event()
        self._started = asyncio.Event()
        self._failure: RametError | None = None
        self._task: asyncio.Task[None] | None = None

    # What the program says.

    def begin(self, graph: ir.Graph) -> None:
        """Start all rows, unless they are started."""
        if self._first is None:
            self.take_part(graph, True)

    def take_part(self, graph: ir.Graph | None, is_last: bool) -> None:
        if graph is not None:
            self._nodes.extend(graph.nodes)
            for row in self.rows:
                row.unfinished.update(node.id for node in graph.nodes)
        if self._failure is not None:
            self._fail(self._failure)
        elif self._first is not None:
            self._put("parts", {"graph": graph, "open": not is_last})
        elif graph is not None:
            self._first = self._opening(graph, is_last)
            # A program that needs nothing from this process while it runs may wait for others.
            can_wait = is_last and all(node.run_by != "caller" for node in graph.nodes)
            self.remote.http.spawn(self._run(can_wait))

    def _put(self, what: str, body: dict[str, Any]) -> None:  # Any: JSON
        self._outbox.append((what, body))
        self._changed.set()

    def provide(self, row: int, node: int, value: Any, error: Exception | None) -> None:
        if error is not None:
            self.rows[row].tool_errors[node] = error
        message = None if error is None else str(error) or repr(error)
        self.remote.http.spawn(self._send("values", {"row": row, "node": node, "value": value, "error": message}))

    def cancel(self, row: int, nodes: list[int] | None) -> None:
        if nodes is not None:
            self._put("cancel", {"row": row, "nodes": nodes})
            return
        self.rows[row].is_cancelled = True
        error = ProgramCancelled("the program was cancelled")
        if not all(one.is_cancelled for one in self.rows):
            unfinished = sorted(self.rows[row].unfinished)
            if unfinished:
                self._put("cancel", {"row": row, "nodes": unfinished})
            self._fail_row(self.rows[row], error)
            return
        was_running = self._first is not None and self._failure is None
        self._fail(error)
        if was_running:
            self.remote.http.spawn(self._abandon())

    async def _abandon(self) -> None:
        """Stop it on the server. Where that can't be reached, the program ends there by itself, after its grace."""
        with contextlib.suppress(RametError, TimeoutError):
            await asyncio.wait_for(self._started.wait(), self.remote.grace_s)
            await self.remote.http.request("DELETE", f"/v1/programs/{self._id}")
        if self._task is not None:
            self._task.cancel()

    # What is sent.

    def _opening(self, graph: ir.Graph, is_last: bool) -> dict[str, Any]:  # Any: JSON
        options = self._options
        body = {
            "graph": graph,
            "stream": True,
            "open": not is_last,
            "text_events": options.text_events,
            "grace_s": self.remote.grace_s,
            "priority": options.priority,
            "cache_salt": options.cache_salt,
            "adapter": options.adapter,
            "rows": self.rows_of_arguments,
            "timeout_s": self._deadline.left_s(),
            "token_budget": options.token_budget,
        }
        return {name: value for name, value in body.items() if value is not None}

    async def _run(self, can_wait: bool) -> None:
        """Follow the program to its end."""
        self._task = asyncio.current_task()
        writer = asyncio.ensure_future(self._write())
        try:
            async with self.remote.gate() if can_wait else contextlib.nullcontext():
                await self._read()
        except asyncio.CancelledError:
            self._fail(RemoteError(f"the backend was closed while {self._options.program} ran"))
        except Exception as error:  # any error must reach those who wait
            self._fail(error if isinstance(error, RametError) else RemoteError(f"{type(error).__name__}: {error}"))
        finally:
            writer.cancel()
            await asyncio.wait([writer])  # a request of it may take a moment to end

    async def _write(self) -> None:
        """Send parts and cancellations in their order; parts that wait go together."""
        await self._started.wait()
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._outbox:
                what, body = self._outbox.popleft()
                while what == "parts" and self._outbox and self._outbox[0][0] == "parts":
                    _, following = self._outbox.popleft()
                    body = {"graph": _merged(body["graph"], following["graph"]), "open": following["open"]}
                await self._send(what, body)

    async def _send(self, what: str, body: Mapping[str, Any]) -> None:
        path = f"/v1/programs/{self._id}/{what}"
        try:
            await self.remote.http.request("POST", path, body, deadline=self._deadline)
        except RametError as error:
            if self._failure is None:
                self._fail(error)
                self.remote.http.spawn(self._abandon())

    # What comes back.

    async def _read(self) -> None:
        """Take in events to the end; where the connection breaks, go on with the next one behind the last event."""
        failures = 0
        while True:
            try:
                async with self._events() as events:
                    async for event in events:
                        failures = 0 if event.name == "node" else failures
                        if self._take(event):
                            return
                if self._id is None:
                    raise RemoteError(f"{self.remote.url} answered without events; is `ramet serve` running there?")
                raise RemoteError(f"the connection to {self.remote.url} ended before the program did")
            except RametError as error:
                pause_s = retry_pause(error, failures)
                if pause_s is None or failures >= self.remote.http.max_retries:
                    raise
                if not self._deadline.allows(pause_s):
                    raise DeadlineExceeded(f"the program's deadline passed while {self.remote.url} was away") from error
                failures += 1
                logger.info("%s: %s; trying again in %.1f s", self._options.program, error, pause_s)
                await asyncio.sleep(pause_s)

    @contextlib.asynccontextmanager
    async def _events(self) -> AsyncIterator[AsyncIterator[ServerSentEvent]]:
        http = self.remote.http
        if self._id is None:
            opening = http.stream("POST", "/v1/programs", self._first, headers={"Idempotency-Key": self._key})
        else:
            opening = http.stream("GET", f"/v1/programs/{self._id}/events", headers={"Last-Event-ID": self._place})
        async with opening as events:
            yield events

    def _take(self, event: ServerSentEvent) -> bool:
        """Handle an event. Return True when the program has ended."""
        data = json.loads(event.data)
        if event.name == "program":
            self._id = data["id"]
            self._started.set()
        elif event.name == "node":
            row, offset = data.pop("row"), data.pop("offset", 0)
            self._take_node(self.rows[row], msgspec.convert(data, ir.NodeEvent), offset)
            self._place = event.id or self._place
        elif event.name == "end":
            for row, outcome in zip(self.rows, data["rows"], strict=True):
                kind, message = outcome["error_type"] or "EngineStopped", outcome["error"] or "the program has ended"
                self._fail_row(row, error_from_name(kind, message))
            self._failure = self._failure or EngineStopped("the program has ended on the server")
            return True
        return False

    def _take_node(self, row: _Row, event: ir.NodeEvent, offset: int) -> None:
        """Pass an event on, unless it came before: a new connection repeats some events."""
        if event.node not in row.unfinished:
            return
        if event.kind == "text":
            known = row.received.get(event.node, 0)
            text = event.text[max(0, known - offset) :]
            row.received[event.node] = max(known, offset + len(event.text))
            if text:
                self._tell(row, msgspec.structs.replace(event, text=text))
            return
        if event.kind == "call":
            self._tell(row, event)  # who takes it knows the calls that began
            return
        if event.kind == "tool":
            if event.node not in row.asked:
                row.asked.add(event.node)
                self._tell(row, event)
            return
        row.unfinished.discard(event.node)
        row.received.pop(event.node, None)
        row.texts[event.node] = event.text
        if event.kind == "error":
            event = _with_cause(event, row.tool_errors)
            if not isinstance(event.cause, ProgramCancelled):
                row.root = row.root or event.cause
            elif event.cause.__cause__ is None:
                event.cause.__cause__ = row.root
        self._tell(row, event)

    def _fail(self, error: RametError) -> None:
        """Fail all unfinished rows of the program."""
        self._failure = self._failure or error
        for row in self.rows:
            self._fail_row(row, error)

    def _fail_row(self, row: _Row, error: RametError) -> None:
        for node in sorted(row.unfinished):
            row.unfinished.discard(node)
            described = ir.NodeError(type(error).__name__, str(error), self._tail(row, node))
            name = self._nodes[node].label
            self._tell(row, ir.NodeEvent(node, "error", name, error=described, cause=error))

    def _tail(self, row: _Row, node: int) -> str:
        """Return the end of the text that a node continued."""
        text, at = "", self._nodes[node].parent
        while at is not None and len(text) < PROMPT_TAIL:
            text, at = row.texts.get(at, "") + text, self._nodes[at].parent
        return text[-PROMPT_TAIL:]

    def _tell(self, row: _Row, event: ir.NodeEvent) -> None:
        try:
            row.on_event(event)
        except Exception:  # a listener's error must not end this thread, which other programs share
            logger.exception("a listener failed at the %s event of node %d", event.kind, event.node)


def _merged(first: ir.Graph | None, second: ir.Graph | None) -> ir.Graph | None:
    if first is None or second is None:
        return first or second
    return ir.Graph((*first.nodes, *second.nodes), {**first.arguments, **second.arguments}, first.first)


def _with_cause(event: ir.NodeEvent, tool_errors: Mapping[int, Exception]) -> ir.NodeEvent:
    """Add an exception as the event's cause. If a tool of this process failed, it is the tool's own."""
    error = event.error
    if error is None or event.cause is not None:
        return event
    for raised in tool_errors.values():
        if error.type == "RametError" and error.message == (str(raised) or repr(raised)):
            described = msgspec.structs.replace(error, type=type(raised).__name__)
            return msgspec.structs.replace(event, error=described, cause=raised)
    return msgspec.structs.replace(event, cause=error_from_name(error.type, error.message))
