"""Running and recently finished programs: their events, their followers, and their continuation.

A program keeps a log of its events (all but text), and the text of its unfinished nodes. Each follower has a position
in the log. A slow follower, or one that reconnects, therefore gets every event once, with text merged. Not here: HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ramet.errors import InvalidProgram, RametError
from ramet.lang.graph.ir import Argument, Graph, GraphIndex, NodeEvent, ToolCall
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.link.protocol import Abort, ExtendProgram, ProgramEvent, ProvideTool, StartProgram, row_id
from ramet.runtime.server.sending import AnswerStruct
from ramet.runtime.server.served_model import ServedModel

MAX_KEPT = 256  # finished programs that are kept


class RowStatus(AnswerStruct):
    """The results of one run so far: generated values by name, and every finished node's event."""

    status: str
    error: str | None
    error_type: str | None
    values: dict[str, Any]  # Any: JSON
    nodes: list[dict[str, Any]]  # Any: JSON


class ProgramStatus(AnswerStruct, kw_only=True):
    """`rows`: the results of each run so far, if requested."""

    id: str
    object: Literal["program"] | UnsetType = UNSET
    status: str
    rows: list[RowStatus] | UnsetType = UNSET


@dataclass(slots=True)
class Row:
    """One run. Owner: its program's task."""

    id: str
    done: list[NodeEvent] = field(default_factory=list)
    status: str = "running"  # done, failed, cancelled
    error: str | None = None
    error_type: str | None = None

    def fail(self, kind: str, message: str) -> None:
        """Record an error, unless there is one already."""
        if self.status == "running":
            self.status, self.error_type, self.error = "failed", kind, message

    def outcome(self) -> dict[str, Any]:  # Any: JSON
        return {"status": self.status, "error": self.error, "error_type": self.error_type}

    def described(self) -> RowStatus:
        return RowStatus(
            **self.outcome(),
            values={e.name: e.value for e in self.done if e.name is not None and e.kind == "done"},
            nodes=[event_json(event) for event in self.done],
        )


@dataclass(slots=True, eq=False)
class StoredProgram:
    """A program and all its rows. Owner: the store.

    `num_bytes`: those of its rows, held until it is over. `parts`: digest of each part by its first node. `texts`:
    texts of unfinished nodes by (row, node). `grace_s`: seconds that it runs without a follower; None: to its end.
    """

    id: str
    owner: str
    digest: str
    grace_s: float | None
    text_events: bool
    index: GraphIndex
    is_open: bool
    num_bytes: int
    rows: list[Row] = field(default_factory=list)
    parts: dict[int, str] = field(default_factory=dict)
    log: list[tuple[int, NodeEvent]] = field(default_factory=list)
    texts: dict[tuple[int, int], str] = field(default_factory=dict)
    followers: list[asyncio.Event] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    extending: asyncio.Lock = field(default_factory=asyncio.Lock)  # its parts are taken in one after the other
    num_attached: int = 0
    started_s: float = field(default_factory=time.time)
    ended_s: float | None = None
    giving_up: asyncio.TimerHandle | None = None

    @property
    def is_over(self) -> bool:
        return all(task.done() for task in self.tasks)

    @property
    def status(self) -> str:
        found = {row.status for row in self.rows}
        return next(s for s in ("running", "failed", "cancelled", "done") if s in found)

    def summary(self) -> ProgramStatus:
        return ProgramStatus(id=self.id, object="program", status=self.status)

    def described(self) -> ProgramStatus:
        """The program's results so far."""
        return ProgramStatus(
            id=self.id, object="program", status=self.status, rows=[row.described() for row in self.rows]
        )

    def note(self, row: int, event: NodeEvent) -> None:
        """Record an event."""
        if event.kind == "text":
            key = (row, event.node)
            self.texts[key] = self.texts.get(key, "") + event.text
        elif event.kind == "call":
            self.log.append((row, event))
        else:
            self.texts.pop((row, event.node), None)
            self.log.append((row, event))
            self.rows[row].done.append(event)
            error = event.error
            # A branch that the program itself cancelled has not failed.
            if event.kind == "error" and error is not None and not error.is_cancelled:
                self.rows[row].fail(error.type, error.message)
        self.wake()

    def wake(self) -> None:
        for follower in self.followers:
            follower.set()


def event_json(event: NodeEvent) -> dict[str, Any]:  # Any: JSON
    found: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(event, cause=None))
    return found


class ProgramStore:
    """The programs of one server. Owner: one event loop."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._programs: OrderedDict[str, StoredProgram] = OrderedDict()
        self._by_key: dict[tuple[str, str], str] = {}

    def get(self, program_id: str, owner: str) -> StoredProgram:
        """Return a program. Raises HttpError if this owner has no program with this id."""
        program = self._programs.get(program_id)
        if program is None or program.owner != owner:
            raise HttpError(
                404, f"no program {program_id!r}; finished ones are kept only for a while", code="not_found"
            )
        return program

    def programs(self) -> list[StoredProgram]:
        """All running and kept programs, the oldest first."""
        return list(self._programs.values())

    def with_key(self, key: str, owner: str, digest: str) -> StoredProgram | None:
        """The program that a request with this key started. Raises HttpError if that request was a different one."""
        program = self._programs.get(self._by_key.get((owner, key), ""))
        if program is not None and program.digest != digest:
            raise HttpError(
                422,
                f"the idempotency key {key!r} was used with another body; a key stands for one request",
                code="idempotency_key_reused",
            )
        return program

    def start(
        self,
        command: StartProgram,
        index: GraphIndex,
        *,
        owner: str,
        digest: str,
        key: str | None,
        grace_s: float | None,
    ) -> StoredProgram:
        """Send a graph and every row's arguments to the engine. `command`: all but the id. `index`: of its graph.

        Raises HttpError before anything has started. Also raises Overloaded and EngineStopped.
        """
        rows = command.rows
        program_id = self._served.proxy.new_id("program")
        command = msgspec.structs.replace(command, id=program_id)
        num_bytes = len(command.graph) * len(rows) + sum(map(len, rows))  # every row's results hold the graph's texts
        limit = self._served.config.bytes_in_flight
        if num_bytes > limit:
            message = f"the program's {len(rows):,} rows have {num_bytes:,} bytes with the graph's texts"
            message += f"; the limit is {limit:,}: send fewer rows at once, or raise --max-in-flight-bytes"
            raise HttpError(413, message, param="rows")
        self._served.tenants.bytes.take(owner, num_bytes)
        try:
            streams = self._served.proxy.start_program(command)
        except RametError:
            self._served.tenants.bytes.give(owner, num_bytes)
            raise
        program = StoredProgram(
            program_id, owner, digest, grace_s, command.text_events, index, command.is_open, num_bytes
        )
        for number, stream in enumerate(streams):
            program.rows.append(Row(row_id(program.id, number)))
            program.tasks.append(asyncio.create_task(self._follow(program, number, stream.__aiter__())))
        self._programs[program.id] = program
        if key is not None:
            self._by_key[(owner, key)] = program.id
        self._forget_old()
        return program

    async def extend(
        self,
        program: StoredProgram,
        data: Mapping[str, Any] | None,
        *,
        is_open: bool,  # Any: JSON
    ) -> None:
        """Send the next part of an open program: a graph's JSON, or None. A part that was sent before changes nothing.

        Raises HttpError and InvalidProgram.
        """
        async with program.extending:
            graph, written, digest = None, b"", ""
            if data is not None:
                written = msgspec.json.encode(data)
                graph = await self._served.compute(len(written), Graph.from_json, written)
                digest = digest_of(written)
            if graph is not None and program.parts.get(graph.first) == digest:
                return
            if not program.is_open or program.is_over:
                if graph is None and not is_open:
                    return
                raise HttpError(409, f"program {program.id} takes no more parts", code="program_closed")
            if graph is not None:
                bound = msgspec.structs.replace(graph, arguments=bound_values(graph, {})).to_json()
                await self._served.compute(len(written), program.index.add, graph)
                program.parts[graph.first] = digest
                self._served.proxy.send_to_program(ExtendProgram(program.rows[0].id, bound, is_last=not is_open))
            elif not is_open:
                self._served.proxy.send_to_program(ExtendProgram(program.rows[0].id, is_last=True))
            program.is_open = is_open

    def provide(self, program: StoredProgram, row: int, node: int, value: bytes, error: str | None) -> None:
        """Answer a tool call. A second answer changes nothing. Raises HttpError."""
        self._check_nodes(program, row, [node])
        if not isinstance(program.index.nodes[node], ToolCall):
            raise HttpError(400, f"node {node} is no tool call", param="node")
        self._served.proxy.send_to_program(ProvideTool(program.rows[row].id, node, value, error))

    def cancel_nodes(self, program: StoredProgram, row: int, nodes: Sequence[int]) -> None:
        """Cancel nodes of a program. Raises HttpError."""
        self._check_nodes(program, row, nodes)
        self._served.proxy.send_to_program(Abort(program.rows[row].id, list(nodes)))

    def _check_nodes(self, program: StoredProgram, row: int, nodes: Sequence[int]) -> None:
        if not 0 <= row < len(program.rows):
            raise HttpError(400, f"row is {row}, but the program has {len(program.rows)} rows", param="row")
        total = len(program.index.nodes)
        wrong = next((node for node in nodes if not 0 <= node < total), None)
        if wrong is not None:
            raise HttpError(400, f"there is no node {wrong}; the program has {total} nodes", param="node")

    def cancel(self, program: StoredProgram) -> None:
        """Cancel a whole program."""
        program.is_open = False
        for row in program.rows:
            if row.status == "running":
                row.status, row.error_type, row.error = "cancelled", "ProgramCancelled", "the program was cancelled"
                self._served.proxy.abort(row.id)

    # -- followers -----------------------------------------------------------------------------------------------

    def attach(self, program: StoredProgram) -> None:
        """Count a follower of this program, until `detach` is called."""
        program.num_attached += 1
        if program.giving_up is not None:
            program.giving_up.cancel()
            program.giving_up = None

    def detach(self, program: StoredProgram) -> None:
        """Count a follower less. After the last one has left, the program is cancelled when its grace is over."""
        program.num_attached -= 1
        if program.num_attached or program.grace_s is None or program.is_over:
            return
        if program.grace_s == 0:
            self.cancel(program)
        else:
            program.giving_up = asyncio.get_running_loop().call_later(program.grace_s, self.cancel, program)

    async def follow(
        self, program: StoredProgram, after: int, patience_s: float
    ) -> AsyncGenerator[tuple[int, int, NodeEvent, int] | None, None]:
        """Yield (log position, row, event, offset of its text in the node's text) for entries after `after`.

        A text event has the position of the entry before it. Yields None if nothing happened for `patience_s`.
        """
        changed = asyncio.Event()
        program.followers.append(changed)
        sent: dict[tuple[int, int], int] = {}
        try:
            while True:
                changed.clear()
                is_over = program.is_over
                while after < len(program.log):
                    row, event = program.log[after]
                    begun = 0 if event.kind == "call" else sent.pop((row, event.node), 0)
                    is_text = program.text_events and event.finish_reason is not None
                    if is_text and len(event.text) > begun:
                        yield after, row, NodeEvent(event.node, "text", event.name, event.text[begun:]), begun
                    after += 1
                    yield after, row, event, 0
                for (row, node), text in list(program.texts.items()):
                    begun = sent.get((row, node), 0)
                    if len(text) > begun:
                        sent[row, node] = len(text)
                        name = program.index.nodes[node].label
                        yield after, row, NodeEvent(node, "text", name, text[begun:]), begun
                if is_over:
                    return
                if not changed.is_set():
                    try:
                        await asyncio.wait_for(changed.wait(), patience_s)
                    except TimeoutError:
                        yield None
        finally:
            program.followers.remove(changed)

    async def _follow(self, program: StoredProgram, number: int, events: AsyncIterator[ProgramEvent]) -> None:
        """Read the engine's events of one row."""
        row = program.rows[number]
        try:
            async for report in events:
                event = report.whole()
                if event is not None:  # the last one has none
                    program.note(number, event)
        except RametError as error:
            row.fail(type(error).__name__, str(error))
        if row.status == "running":
            row.status = "done"
        self._served.tenants.requests.note_program(row.status)
        # Followers are woken when this task is done, and not before.
        asyncio.get_running_loop().call_soon(self._note_end, program)

    def _note_end(self, program: StoredProgram) -> None:
        """Note that a row has ended."""
        if program.is_over:
            self._served.tenants.bytes.give(program.owner, program.num_bytes)
            program.num_bytes = 0
            program.ended_s = time.time()
        program.wake()

    def _forget_old(self) -> None:
        while len(self._programs) > MAX_KEPT:
            oldest = next((p for p in self._programs.values() if p.is_over), None)
            if oldest is None:
                return
            del self._programs[oldest.id]
            self._by_key = {key: found for key, found in self._by_key.items() if found != oldest.id}


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def bound_values(graph: Graph, arguments: Mapping[str, Any]) -> dict[str, Any]:  # Any: JSON
    """The values of a graph's arguments in one run. Raises InvalidProgram for a missing or unknown one."""
    names = {node.name for node in graph.nodes if isinstance(node, Argument)}
    values = {**graph.arguments, **arguments}
    unknown, unbound = sorted(set(arguments) - names), sorted(names - set(values))
    if unknown:
        raise InvalidProgram(f"the graph has no argument {unknown[0]!r}; it has {', '.join(sorted(names)) or 'none'}")
    if unbound:
        raise InvalidProgram(f"argument {unbound[0]!r} has no value; give it in arguments or rows")
    return values
