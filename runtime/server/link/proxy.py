"""The HTTP process's side of the engine process: start it, keep it alive, send commands, read reports.

One event loop owns a proxy. If the engine process dies, everything in flight ends with EngineStopped, and a new process
is started. Until it is ready, new work is refused with EngineStopped. Backpressure: increments that a reader has not
taken yet are merged into one, so a slow reader holds at most its own request's output.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec
import zmq

from ramet.errors import EngineStopped, InvalidRequest, RametError, RequestCancelled
from ramet.lang.graph.events import NodeEvent, Usage
from ramet.runtime.cache.prefix_log import CacheChanges
from ramet.runtime.server.link.launchers import Launcher, LocalLauncher
from ramet.runtime.server.link.logs import LogFormat
from ramet.runtime.server.link.protocol import (
    Abort,
    Answer,
    Ask,
    Command,
    EngineFailed,
    ErrorInfo,
    ExtendProgram,
    Heartbeat,
    Hello,
    Output,
    ProgramEvent,
    ProvideTool,
    Report,
    Settings,
    Starting,
    StartProgram,
    Submit,
    new_id,
    report_decoder,
)
from ramet.runtime.server.link.streams import AnyStream, ReportStream
from ramet.runtime.server.link.tracing import add_output

logger = logging.getLogger(__name__)

_RESTART_PAUSES_S = (0.0, 0.5, 2.0, 5.0, 15.0)  # pause before the n-th restart in a row after early ends
_NOBODY = ("",)  # the client of a request whose reader has left
# Hears of the life of one engine among several, on the proxy's event loop: a process is ready, with an empty cache; its
# cache has changed; it has ended (None), and what is in flight ends after this call.
Listener = Callable[[Hello | CacheChanges | None], None]
_LOADING_S = 300.0  # until an adapter is read
LASTS_S = 60.0  # an engine that was ready for this long did not end early: its end is no crash loop


class Accounts(Protocol):
    """Admits requests and counts what they use. Called on the proxy's event loop.

    `client`: a request's, of which the first part is its key's name.
    """

    def enter(self, name: str, num_requests: int, num_tokens: int, *, is_program: bool = False) -> None:
        """Count requests with so many prompt tokens. Raises Overloaded, and counts nothing, if they pass a limit.

        Tokens of a program are a guess: they wait, but only `note_node` tells how many are used.
        """

    def begin(self, name: str, num_tokens: int) -> None:
        """Note that a request with so many prompt tokens waits no longer."""

    def leave(self, name: str) -> None:
        """Note the end of a request."""

    def note_tokens(self, name: str, num_tokens: int) -> None:
        """Count generated tokens."""

    def note_finish(self, client: tuple[str, ...], output: Output) -> None:
        """Count a request's last increment."""

    def note_node(self, client: tuple[str, ...], usage: Usage, finish_reason: str) -> None:
        """Count what a program's node has used."""

    def note_gap(self, seconds: float) -> None:
        """Record the time between two increments of a request."""

    def note_heartbeat(self, stats: dict[str, float], replica: int | None = None) -> None:
        """Record an engine's counters."""


@dataclass(slots=True)
class _InFlight:
    """A request or a row of a program. `num_waiting`: its prompt's tokens until it begins to answer.

    `accounts`: count it; None: it is a part of a request that another engine counts. `is_held`: it is not sent yet.
    """

    client: tuple[str, ...]
    num_waiting: int
    stream: AnyStream
    is_program: bool
    arrived_s: float  # time.monotonic()
    accounts: Accounts | None
    is_held: bool
    num_generated: int = 0
    heard_s: float | None = None  # time.monotonic() of the last increment

    @property
    def name(self) -> str:
        return self.client[0]


@dataclass(slots=True)
class _State:
    """The proxy's view of the current engine process."""

    hello: Hello | None = None
    stats: dict[str, float] = field(default_factory=dict)
    heard_s: float = 0.0  # time.monotonic() of the last heartbeat
    num_steps: float = -1.0
    progressed_s: float = 0.0  # time when num_steps last changed or the engine was idle
    failure: RametError | None = None  # the error that keeps this process from starting, or has stopped its engine
    before: RametError | None = None  # the error that ended the process before it
    ready_s: float = 0.0  # 0: it was never ready
    stage: str = "the engine process starts"
    started_s: float = field(default_factory=time.monotonic)

    def note_end(self, stage: str) -> None:
        """Note that the process takes no requests any more."""
        self.hello, self.stage, self.started_s = None, stage, time.monotonic()


class EngineProxy:
    """Owns the engine process. Call `start`, then `submit`, `start_program` or `ask`, and `stop` at the end."""

    def __init__(
        self,
        model: str | None,
        config: dict[str, Any],
        *,
        launcher: Launcher | None = None,
        max_engine_failures: int = 5,
        log_level: str = "INFO",
        log_format: LogFormat = "text",
        accounts: Accounts | None = None,
        replica: int | None = None,
        listener: Listener | None = None,
    ) -> None:  # Any: fields of EngineConfig, checked in the engine process
        """`launcher`: starts the engine's processes; None: on this machine.

        `accounts`: of one proxy, or of several together; None admits everything and counts nothing.
        `max_engine_failures`: number of engine processes in a row that may end early; see `wait_given_up`.
        `replica`, `listener`: of one engine among several (`replicas`).
        """
        self._max_failures = max_engine_failures
        self._accounts = accounts
        self._in_flight: dict[str, _InFlight] = {}
        # Totals since the start, for metrics.
        self.num_starts = 0
        self.num_crashes = 0
        self.num_aborts = 0
        self._replica = replica
        self._listener = listener
        self._launcher = launcher or LocalLauncher()
        self._reports, address = self._launcher.listen(zmq.PULL, "reports")
        self._settings = Settings("", address, model, config, log_level, log_format, replica)
        self._commands: zmq.Socket[bytes] | None = None
        self._state = _State()
        self._questions: dict[str, asyncio.Future[Any]] = {}  # Any: as `ask`
        self._ready = asyncio.Event()
        self._given_up: asyncio.Future[EngineStopped] | None = None
        self._is_stopping = False
        self._supervisor: asyncio.Task[None] | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._outbox: list[msgspec.Raw] = []

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the process and the proxy's tasks. Returns before the engine is ready."""
        loop = asyncio.get_running_loop()
        loop.add_reader(int(self._reports.getsockopt(zmq.FD)), self._read)
        self._given_up = loop.create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        self._supervisor.add_done_callback(self._note_supervisors_end)

    async def wait_ready(self, timeout_s: float | None = None) -> Hello:
        """Wait until the engine is ready. Raises the error that keeps it from starting, or TimeoutError."""
        await asyncio.wait_for(self._ready.wait(), timeout_s)
        if self._state.hello is None:
            raise self._state.before or EngineStopped("the engine did not start")
        return self._state.hello

    async def wait_given_up(self) -> EngineStopped:
        """Wait until so many engines in a row have ended early that no other is started. Returns the error."""
        assert self._given_up is not None
        return await asyncio.shield(self._given_up)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Wait up to `drain_s` for requests in flight, then end the process."""
        deadline_s = time.monotonic() + drain_s
        while self._in_flight and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        self._is_stopping = True
        await self._launcher.end()
        self.fail_in_flight()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            asyncio.get_running_loop().remove_reader(int(self._reports.getsockopt(zmq.FD)))
        await self._launcher.close()

    def kill(self) -> None:
        """End the process at once. For signal handlers."""
        self._is_stopping = True
        self._launcher.kill()

    def fail_in_flight(self) -> None:
        """End everything in flight with an error, because the server shuts down."""
        self._fail_in_flight(EngineStopped("the server is shutting down"))

    @property
    def hello(self) -> Hello | None:
        """The engine's description; None while no engine is ready."""
        return self._state.hello

    @property
    def startup(self) -> dict[str, object]:
        """The state of the engine's start: whether it is ready, the stage and its duration, and the last failure.

        `attempt`: 1 for the first engine process of this server.
        """
        state = self._state
        if state.hello is not None:
            return {"ready": True, "stage": "ready", "attempt": self.num_starts, "reason": None}
        reason = None if state.before is None else str(state.before)
        seconds = round(time.monotonic() - state.started_s, 1)
        return {
            "ready": False,
            "stage": state.stage,
            "seconds": seconds,
            "attempt": self.num_starts,
            "reason": reason,
        }

    @property
    def stats(self) -> dict[str, float]:
        """The engine's counters at the last heartbeat."""
        return self._state.stats

    def engines(self) -> list[tuple[int | None, EngineProxy]]:
        """Every engine with its number: this one, which has none."""
        return [(None, self)]

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def num_programs(self) -> int:
        return sum(request.is_program for request in self._in_flight.values())

    def health(self, patience_s: float = 20.0) -> str | None:
        """None if the engine is healthy; otherwise the problem: not ready, silent, or working without progress."""
        state = self._state
        now_s = time.monotonic()
        if state.hello is None:
            seconds = time.monotonic() - state.started_s
            doing = f"the engine is starting: {state.stage} ({seconds:.0f} s)"
            return doing if state.before is None else str(state.before)
        if now_s - state.heard_s > patience_s:
            return f"the engine has not answered for {now_s - state.heard_s:.0f} s"
        if self.num_in_flight and now_s - state.progressed_s > patience_s:
            return f"the engine has work and made no progress for {now_s - state.progressed_s:.0f} s"
        return None

    # -- work ----------------------------------------------------------------------------------------------------

    def new_id(self, prefix: str) -> str:
        """Return a new unique id."""
        return new_id(prefix)

    def submit(
        self,
        command: Submit,
        *,
        is_whole: bool = False,
        stream: ReportStream[Output] | None = None,
        is_held: bool = False,
        is_counted: bool = True,
    ) -> ReportStream[Output]:
        """Send a request. `is_whole`: the reader wants only the complete output. `stream`: gets it; None makes one.

        `is_held`: it is admitted now, and sent by `send_held`. `is_counted`: False for a part of a request that another
        engine's proxy counts.
        Raises: Overloaded, EngineStopped (not ready), InvalidRequest (the id is in use).
        """
        stream = stream or ReportStream(command.id, self.drop, is_whole=is_whole)
        accounts = self._accounts if is_counted else None
        self._admit(command, [stream], [len(command.prompt_ids)], accounts, is_held=is_held)
        return stream

    def send_held(self, command: Submit) -> None:
        """Send a request that was held, unless it has ended."""
        request = self._in_flight.get(command.id)
        if request is not None and request.is_held:
            request.is_held = False
            self._send(command)

    def start_program(
        self, command: StartProgram, *, streams: Sequence[ReportStream[ProgramEvent]] = ()
    ) -> Sequence[ReportStream[ProgramEvent]]:
        """Send a program. Returns each row's stream: `streams`, or new ones. Raises as `submit`; nothing is sent."""
        streams = streams or [ReportStream(name, self.drop) for name in command.row_ids()]
        self._admit(command, streams, command.num_tokens(), self._accounts)
        return streams

    def send_to_program(self, command: ExtendProgram | Abort | ProvideTool) -> None:
        """Send a command to a running program. It has no effect if the program has ended."""
        self._send(command)

    def abort(self, request_id: str) -> bool:
        """Abort by exact id. Its reader gets RequestCancelled. Returns False if this id is not in flight."""
        request = self._in_flight.get(request_id)
        if request is None:
            return False
        self.num_aborts += 1
        if request.is_held:
            info = ErrorInfo.of(RequestCancelled(f"request {request_id} was aborted"))
            self._take(Output(request_id, 0, 0, 0, finish_reason="abort", error=info))
        else:
            self._send(Abort(request_id))
        return True

    def in_flight(self) -> list[str]:
        return list(self._in_flight)

    def requests(self) -> list[tuple[str, str, float, int, int]]:
        """Of each request in flight that is no program: its id, its key's name, the seconds since it arrived, the
        tokens of its prompt while it waits for an answer (then 0), and the tokens of its answer."""
        now_s = time.monotonic()
        return [
            (name, one.name, now_s - one.arrived_s, one.num_waiting, one.num_generated)
            for name, one in self._in_flight.items()
            if not one.is_program
        ]

    async def change_adapters(self, what: Literal["load_adapter", "unload_adapter"], **arguments: str) -> None:
        """Load or unload an adapter. Raises as `ask`."""
        adapters = await self.ask(what, _LOADING_S, **arguments)
        if self._state.hello is not None:
            self._state.hello = msgspec.structs.replace(self._state.hello, adapters=adapters)

    async def ask(self, what: str, timeout_s: float = 10.0, **arguments: object) -> Any:  # Any: of what msgpack has
        """Ask the engine (`EngineServer.questions`). Raises the engine's error, TimeoutError, or EngineStopped."""
        self._check_ready()
        question = Ask(self.new_id("ask"), what, arguments)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._questions[question.id] = future
        self._send(question)
        try:
            return await asyncio.wait_for(future, timeout_s)
        finally:
            self._questions.pop(question.id, None)

    def _check_ready(self) -> None:
        if self._state.hello is None or self._is_stopping:
            raise EngineStopped(self.health() or "the server is shutting down")

    def _admit(
        self,
        command: Submit | StartProgram,
        streams: Sequence[AnyStream],
        tokens: Sequence[int],
        accounts: Accounts | None,
        *,
        is_held: bool = False,
    ) -> None:
        """Send the command of new requests, if there is room for them. `tokens`: the number of each one's prompt."""
        self._check_ready()
        check_unused([stream.id for stream in streams], self._in_flight)
        client = command.client or _NOBODY
        is_program = isinstance(command, StartProgram)
        if accounts is not None:
            accounts.enter(client[0], len(streams), sum(tokens), is_program=is_program)
        now_s = time.monotonic()
        for stream, num_tokens in zip(streams, tokens, strict=True):
            self._in_flight[stream.id] = _InFlight(client, num_tokens, stream, is_program, now_s, accounts, is_held)
        try:
            if is_held:
                self._encoded(command)  # what cannot be sent is refused now
            else:
                self._send(command)
        except InvalidRequest:
            for stream in streams:
                self._leave(stream.id)
            raise

    def _begin(self, request: _InFlight) -> None:
        """Note that a request waits no longer."""
        if request.num_waiting and request.accounts is not None:
            request.accounts.begin(request.name, request.num_waiting)
        request.num_waiting = 0

    def _leave(self, request_id: str) -> None:
        """Forget a request that has ended, or that nobody waits for any longer."""
        request = self._in_flight.pop(request_id)
        if request.accounts is not None:
            self._begin(request)
            request.accounts.leave(request.name)

    def drop(self, request_id: str) -> None:
        """Remove the stream of a reader that left, and abort its request in the engine."""
        if request_id in self._in_flight:
            self.num_aborts += 1
            self._leave(request_id)
            self._send(Abort(request_id))

    def _send(self, command: Command) -> None:
        """Queue a command. It is encoded here, so an encoding error is raised to its own caller."""
        encoded = self._encoded(command)
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(encoded)

    def _encoded(self, command: Command) -> msgspec.Raw:
        try:
            return msgspec.Raw(self._encoder.encode(command))
        except (OverflowError, TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest(f"the request holds a value that cannot be sent on: {error}") from error

    # -- to and from the engine ----------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Send all commands of this turn of the event loop in one message."""
        if not self._outbox or self._commands is None:
            return
        try:
            self._commands.send(self._encoder.encode(self._outbox), zmq.NOBLOCK)
            self._outbox = []
        except zmq.Again:  # the engine has not connected yet, or it is gone, and `_fail_in_flight` clears the outbox
            asyncio.get_running_loop().call_later(0.01, self._flush)

    def _read(self) -> None:
        """Take the reports of one message, and those of the next one in the loop's next turn, so that others have one.

        The file descriptor signals only once for all messages.
        """
        if self._reports.closed:
            return
        with contextlib.suppress(zmq.Again):
            message = self._reports.recv(zmq.NOBLOCK)
            asyncio.get_running_loop().call_soon(self._read)
            for report in report_decoder.decode(message):
                self._take(report)

    def _take(self, report: Report) -> None:
        if isinstance(report, Output | ProgramEvent):
            request = self._in_flight.get(report.id)
            if isinstance(report, Output):
                self._count(request, report)
            elif request is not None and report.event is not None:
                self._count_event(request, report.event)
            if request is not None:
                if report.is_last:
                    self._leave(report.id)
                    _trace_end(request, report)
                request.stream.push(report)
        elif isinstance(report, Answer):
            future = self._questions.get(report.id)
            if future is not None and not future.done():
                if report.error is not None:
                    future.set_exception(report.error.to_exception())
                else:
                    future.set_result(report.value)
        elif isinstance(report, Heartbeat):
            self._note_heartbeat(report.stats)
        elif isinstance(report, Hello):
            now_s = time.monotonic()
            self._state.hello, self._state.heard_s, self._state.progressed_s = report, now_s, now_s
            self._state.ready_s = now_s
            if self._listener is not None:
                self._listener(report)
            self._ready.set()
        elif isinstance(report, CacheChanges):
            if self._listener is not None:
                self._listener(report)
        elif isinstance(report, Starting):
            self._state.stage, self._state.started_s = report.stage, time.monotonic()
            logger.info("starting: %s", report.stage)
        else:
            assert isinstance(report, EngineFailed)
            self._state.failure = report.error.to_exception()
            self._state.note_end("the engine process ends")

    def _count(self, request: _InFlight | None, output: Output) -> None:
        """Count an increment for the key of its request. `request`: None if its reader has left."""
        accounts = self._accounts if request is None else request.accounts
        if accounts is None:
            return
        if request is not None:
            self._begin(request)
            now_s = time.monotonic()
            if output.token_ids:
                request.num_generated += len(output.token_ids)
                accounts.note_tokens(request.name, len(output.token_ids))
                if request.heard_s is not None:
                    accounts.note_gap(now_s - request.heard_s)
            request.heard_s = now_s
        if output.finish_reason is not None:
            accounts.note_finish(_NOBODY if request is None else request.client, output)

    def _count_event(self, request: _InFlight, event: NodeEvent) -> None:
        if event.usage is not None or event.kind == "text":
            self._begin(request)  # the model has written something
        if event.usage is not None and self._accounts is not None:
            self._accounts.note_node(request.client, event.usage, event.finish_reason or event.kind)

    def _note_heartbeat(self, stats: dict[str, float]) -> None:
        state, now_s = self._state, time.monotonic()
        state.stats, state.heard_s = stats, now_s
        if self._accounts is not None:
            self._accounts.note_heartbeat(stats, self._replica)
        if stats["num_steps"] != state.num_steps or not (stats["num_running"] or stats["num_waiting"]):
            state.num_steps, state.progressed_s = stats["num_steps"], now_s

    async def _supervise(self) -> None:
        """Start the process, wait for its end, fail everything in flight, and start it again."""
        failures = 0
        while not self._is_stopping:
            await asyncio.sleep(_RESTART_PAUSES_S[min(failures, len(_RESTART_PAUSES_S) - 1)])
            end = await self._run_process()
            self._state.note_end("the engine process has ended")
            await asyncio.sleep(0.05)  # its last reports may be on their way
            ready_s, failure = self._state.ready_s, self._state.failure
            was_ready = ready_s > 0
            if self._is_stopping:
                return
            lasted = was_ready and time.monotonic() - ready_s >= LASTS_S
            failures = 0 if lasted else failures + 1
            self.num_crashes += 1
            cause = str(failure) if failure is not None else end
            if failures >= self._max_failures:
                self._give_up(failures, cause)
                return
            logger.error("the engine process ended (%s); starting another", cause)
            self._state = _State(before=failure or EngineStopped(f"the engine process crashed: {cause}; it restarts"))
            if self._listener is not None:
                self._listener(None)
            self._ready = asyncio.Event() if was_ready else self._ready
            if failure is not None and not was_ready:
                self._ready.set()  # all waiting callers get the reason
            self._fail_in_flight(EngineStopped(f"the engine process crashed while this was in flight ({cause})"))

    def _give_up(self, failures: int, cause: str) -> None:
        error = EngineStopped(
            f"{failures} engine processes in a row ended within {LASTS_S:.0f} s of being ready or earlier; the last "
            f"one: {cause}. No other is started. The log above says more; `ramet doctor` checks the machine"
        )
        self._start_no_more(error)

    def _note_supervisors_end(self, supervisor: asyncio.Task[None]) -> None:
        """Record the supervisor's error, for example that the system cannot start a process: no engine can start."""
        error = None if supervisor.cancelled() else supervisor.exception()
        if error is not None:
            self._start_no_more(EngineStopped(f"no engine process can be started: {error!r}"))

    def _start_no_more(self, error: EngineStopped) -> None:
        logger.critical("%s", error)
        self._state = _State(before=error, stage="given up")
        if self._listener is not None:
            self._listener(None)
        self._ready.set()
        self._fail_in_flight(error)
        assert self._given_up is not None
        self._given_up.set_result(error)

    async def _run_process(self) -> str:
        """Start a process, and wait for its end. Returns it in words."""
        if self._commands is not None:
            self._commands.close(0)
        number = self.num_starts
        self.num_starts += 1
        self._commands, address = self._launcher.listen(zmq.PUSH, f"commands-{number}")
        self._outbox.clear()
        try:
            await self._launcher.start(msgspec.structs.replace(self._settings, commands=address))
        except RametError as error:
            self._state.failure = error
            return str(error)
        return await self._launcher.wait()

    def _fail_in_flight(self, error: EngineStopped) -> None:
        info = ErrorInfo.of(error)
        requests = list(self._in_flight.items())
        for request_id, _ in requests:  # before they are told: what is lost may be sent elsewhere
            self._leave(request_id)
        for request_id, request in requests:
            if request.is_program:
                end: Output | ProgramEvent = ProgramEvent(request_id, error=info)
            else:
                end = Output(request_id, 0, 0, 0, finish_reason="error", error=info)
            request.stream.push(end)
        for future in self._questions.values():
            if not future.done():
                future.set_exception(error)
        self._outbox.clear()


def _trace_end(request: _InFlight, report: Output | ProgramEvent) -> None:
    add = request.stream.trace
    if add is None:
        return
    if isinstance(report, Output):
        add_output(add, report)
    else:
        error = "" if report.error is None else report.error.kind
        add("program", request.arrived_s, time.monotonic(), {"ramet.program": report.id, "error.type": error})


def check_unused(request_ids: Sequence[str], in_flight: Collection[str]) -> None:
    """Raise InvalidRequest if one of the ids is in flight."""
    for request_id in request_ids:
        if request_id in in_flight:
            raise InvalidRequest(f"request id {request_id!r} is in use; choose another", param="rid")
