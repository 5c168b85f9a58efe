"""The engine process. It receives commands on one socket and sends reports on another.

`proxy` starts it as `python -m ramet.runtime.server.link.process` and writes its settings, one JSON object, to its
standard input. It ends on SIGTERM, when its parent is gone, or when its engine's thread has died; in the last case the
parent starts a new one.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import os
import queue
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from socket import gethostname
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
import zmq

from ramet.errors import ConfigError, EngineStopped, InvalidRequest, RametError, RequestCancelled
from ramet.lang.graph.ir import Constraint, Graph, NodeEvent
from ramet.lang.graph.options import ProgramOptions
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.engine import Engine
from ramet.runtime.engine.loading import config_of_replica, load
from ramet.runtime.programs.engine import EngineRequest
from ramet.runtime.programs.executor import ProgramExecutor, ProgramHost
from ramet.runtime.server.link.logs import set_up_logging
from ramet.runtime.server.link.on_ray import fingerprint
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
    command_decoder,
)
from ramet.runtime.types import FinishReason, RequestOutput, TokenIds

if TYPE_CHECKING:
    from ramet.grammar import CompiledGrammar  # loads numba

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
_LARGE_BYTES = 1 << 16  # of a program's part: about a thousand nodes, which take 20 ms
# How long a thread runs before another one gets the interpreter: ten times shorter than by default. A step gives it up
# some hundred times, and waits so long for it again and again while a grammar is compiled.
_SWITCH_S = 0.0005
# Of garbage: the middle generation is collected when the young one was, more often than `_MIDDLE`; after `_MANY`
# collections of it (about 14 million objects) a full one no longer waits; `_FEW` make another full one worth its time.
_MIDDLE, _MANY, _FEW = 2, 7000, 35


class Sender(threading.Thread):
    """Owns the report socket. Reports that arrive while a message is being sent go together into the next message."""

    def __init__(self, context: zmq.Context[Any], settings: Settings) -> None:
        super().__init__(name="ramet-sender", daemon=True)
        self._context = context
        self._settings = settings
        self._queue: queue.SimpleQueue[Report | None] = queue.SimpleQueue()

    def put(self, report: Report) -> None:
        self._queue.put(report)

    def close(self) -> None:
        """Send the remaining reports and end the thread."""
        self._queue.put(None)
        self.join(5.0)

    def run(self) -> None:
        socket = _socket(self._context, zmq.PUSH, self._settings)
        socket.setsockopt(zmq.SNDHWM, 0)  # the reader merges what waits, so messages never pile up for long
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(self._settings.reports)
        encoder = msgspec.msgpack.Encoder()
        is_open = True
        while is_open:
            first = self._queue.get()
            reports: list[Report] = []
            while first is not None:
                reports.append(first)
                if len(reports) == 1024 or self._queue.empty():
                    break
                first = self._queue.get()
            is_open = first is not None
            if reports:
                socket.send(encoder.encode(reports))
        socket.close()


def _socket(context: zmq.Context[Any], kind: int, settings: Settings) -> zmq.Socket[Any]:
    """A socket to the parent, which knows this process by its key where they talk over a network."""
    socket: zmq.Socket[Any] = context.socket(kind)
    if settings.keys is not None:
        parent, public, secret = (key.encode() for key in settings.keys)
        socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = parent, public, secret
    return socket


class EngineServer:
    """Carries out commands on an engine and reports their results."""

    def __init__(self, engine: Engine, send: Callable[[Report], None], identity: str = "") -> None:
        """identity: as in `Hello`; only pages with the same are taken in."""
        self.engine = engine
        self._send = send
        self._identity = identity
        self._host = ProgramHost(engine)
        self._programs: dict[str, ProgramExecutor] = {}
        # Requests whose grammars compile, by id: each with the future, and the time.monotonic() of its deadline.
        self._compiling: dict[str, tuple[Submit, Future[CompiledGrammar], float]] = {}
        self._lock = threading.Lock()
        self._aside = ThreadPoolExecutor(1, "ramet-large-programs")
        self._num_aside: Counter[str] = Counter()  # commands that it has, by program
        self.questions: dict[str, Callable[..., object]] = {
            "stats": engine.stats,
            "flush_cache": lambda: engine.flush_cache(),  # engines of tests need not have what nobody asks for
            "check_integrity": lambda: engine.check_integrity(),
            "whole_cache": lambda: engine.whole_cache(),
            "activity": lambda: engine.take_activity(),
            "segments": lambda: engine.segments(),
            "load_adapter": self._load_adapter,
            "unload_adapter": self._unload_adapter,
            "latest_prefixes": self._latest_prefixes,
            "give_pages": self._give_pages,
            "take_pages": self._take_pages,
        }

    def prepare_grammars(self) -> None:
        """Load the grammars' loops and the vocabulary's tries (0.3 s), so the first constraint need not wait."""
        error = self._host.model.grammars.get(Constraint("regex", "a")).exception()
        if error is not None:  # a vocabulary that cannot write it; other constraints may do
            logger.warning("a first constraint failed: %s", error)

    def carry_out(self, command: Command) -> None:
        """Start one command. Nothing is raised: an error, a bug of ours too, is reported to its caller alone.

        Reading a large program takes seconds. A thread of its own does it, and all that follows for this program.
        """
        program = command.id.partition("/")[0]
        with self._lock:
            is_large = isinstance(command, StartProgram | ExtendProgram) and len(command.graph or b"") > _LARGE_BYTES
            if is_large or program in self._num_aside:
                self._num_aside[program] += 1
                self._aside.submit(self._carry_out_aside, command, program)
                return
        self._try(command)

    def _carry_out_aside(self, command: Command, program: str) -> None:
        self._try(command)
        with self._lock:
            self._num_aside[program] -= 1
            if not self._num_aside[program]:
                del self._num_aside[program]

    def _try(self, command: Command) -> None:
        try:
            self._start(command)
        except Exception as error:  # the other commands must not pay for it
            self._fail(command, error)

    def _start(self, command: Command) -> None:
        if isinstance(command, Submit):
            self._submit(command)
        elif isinstance(command, Abort):
            self._abort(command)
        elif isinstance(command, StartProgram):
            self._start_program(command)
        elif isinstance(command, ExtendProgram):
            self._extend_program(command)
        elif isinstance(command, ProvideTool):
            self._provide(command)
        else:
            self._answer(command)

    def _fail(self, command: Command, error: Exception) -> None:
        """Tell the caller of a command that it failed for a reason that nobody expected."""
        logger.error("a command failed: %s", type(command).__name__, exc_info=error)
        told = EngineStopped(f"the engine could not carry this out: {error!r}")
        if isinstance(command, Submit):
            self._report_error(command, told)
        elif isinstance(command, Ask):
            self._send(Answer(command.id, error=ErrorInfo.of(told)))
        else:
            for name in command.row_ids() if isinstance(command, StartProgram) else [command.id]:
                executor = self._programs.pop(name, None)
                if isinstance(command, StartProgram) or executor is not None:  # who aborts a request has left already
                    self._send(ProgramEvent(name, error=ErrorInfo.of(told)))
                if executor is not None:
                    executor.cancel()

    def _submit(self, command: Submit) -> None:
        if command.constraint is None:
            self._submit_compiled(command, None)
            return
        start_s, deadline_s = time.monotonic(), command.options.deadline_s

        def compiled(future: Future[CompiledGrammar]) -> None:
            with self._lock:
                if self._compiling.pop(command.id, None) is None:  # it has ended meanwhile
                    return
            error = future.exception()
            if error is not None:
                self._report_error(command, error)
                return
            try:
                self._submit_compiled(command, future.result(), time.monotonic() - start_s)
            except Exception as unexpected:  # a future keeps what its callbacks raise to itself
                self._fail(command, unexpected)

        future = self._host.model.grammars.get(command.constraint, command.client)
        with self._lock:
            self._compiling[command.id] = command, future, start_s + (math.inf if deadline_s is None else deadline_s)
        future.add_done_callback(compiled)

    def end_late(self) -> None:
        """End the requests whose deadline passes while their grammars compile."""
        now_s = time.monotonic()
        with self._lock:
            late = [request_id for request_id, (_, _, due_s) in self._compiling.items() if due_s <= now_s]
        for request_id in late:
            self._end_compiling(request_id, f"request {request_id} passed its deadline while its grammar was compiled")

    def _end_compiling(self, request_id: str, reason: str) -> bool:
        """End a request whose grammar compiles; nobody else may need that. Returns False if there is none."""
        with self._lock:
            found = self._compiling.pop(request_id, None)
        if found is None:
            return False
        command, future, _ = found
        future.cancel()
        self._report_error(command, RequestCancelled(reason), FinishReason.ABORT)
        return True

    def _submit_compiled(
        self, command: Submit, grammar: CompiledGrammar | None, grammar_s: float | None = None
    ) -> None:
        options, constraint = command.options, command.constraint
        changes: dict[str, Any] = {}  # Any: fields of the options
        if command.client:
            changes |= {"owner": command.client[0], "task": "/".join(command.client[1:])}
        if grammar_s is not None and options.deadline_s is not None:
            changes["deadline_s"] = max(options.deadline_s - grammar_s, 0.0)
        request = EngineRequest(command.prompt_ids, command.sampling)
        if command.heals:
            is_typed = constraint is not None and constraint.kind == "json_schema"
            request = self._host.healed(command.prompt_ids, command.sampling, grammar, is_typed=is_typed)
        token_bytes = self._host.model.tokenizer.token_bytes
        border, lead = request.before or request.lead, request.lead.decode()  # no part of the answer

        def on_output(output: RequestOutput) -> None:
            nonlocal border, lead
            report = _to_report(output)
            if border and report.token_ids:
                if token_bytes[report.token_ids[0]] == border:
                    del report.token_ids[0]
                border = b""
            if lead and report.text:
                report.text, lead = report.text.removeprefix(lead), ""
            if grammar_s is not None and report.timings is not None:
                report.timings["grammar_s"] = grammar_s
            self._send(report)

        try:
            self.engine.submit(
                request.prompt,
                request.sampling,
                options.changed(changes),
                grammar=self._host.model.grammars.between(grammar, request.before, request.after, request.lead),
                request_id=command.id,
                on_output=on_output,
            )
        except RametError as error:
            self._report_error(command, error)

    def _report_error(self, command: Submit, error: BaseException, reason: FinishReason = FinishReason.ERROR) -> None:
        num_prompt = len(command.prompt_ids)
        self._send(Output(command.id, num_prompt, 0, 0, finish_reason=reason.value, error=ErrorInfo.of(error)))

    def _abort(self, command: Abort) -> None:
        request_id = command.id
        program = self._programs.get(request_id)
        if command.nodes is not None:
            if program is not None:
                program.cancel(command.nodes)
        elif program is not None:
            program.cancel()
            program.finish()
            self._end_if_over(request_id)
        elif not self._end_compiling(request_id, f"request {request_id} was aborted"):
            self.engine.abort(request_id)

    def _start_program(self, command: StartProgram) -> None:
        """Start every row. They share the graph's nodes and texts."""
        try:
            graph = Graph.from_json(command.graph)
        except RametError as error:
            for name in command.row_ids():
                self._send(ProgramEvent(name, error=ErrorInfo.of(error)))
            return
        for name, arguments in zip(command.row_ids(), command.rows, strict=True):
            bound = msgspec.structs.replace(graph, arguments=msgspec.json.decode(arguments))
            self._start_row(command, name, bound)

    def _start_row(self, command: StartProgram, name: str, graph: Graph) -> None:
        def on_event(event: NodeEvent) -> None:
            self._send(ProgramEvent.of(name, event))
            self._end_if_over(name)

        deadline_s = None if command.deadline_s is None else time.monotonic() + command.deadline_s
        options = ProgramOptions(
            deadline_s=deadline_s,
            token_budget=command.token_budget,
            priority=command.priority,
            cache_salt=command.cache_salt,
            adapter=command.adapter,
            text_events=command.text_events,
        )
        self._programs[name] = self._host.start(options, on_event, name, client=command.client)
        self._extend(name, lambda: graph, is_last=not command.is_open)

    def _extend_program(self, command: ExtendProgram) -> None:
        data = command.graph
        self._extend(command.id, lambda: None if data is None else Graph.from_json(data), is_last=command.is_last)

    def _extend(self, name: str, read: Callable[[], Graph | None], *, is_last: bool) -> None:
        executor = self._programs.get(name)
        if executor is None:
            return
        try:
            graph = read()
            if graph is not None:
                executor.extend(graph)
            if is_last:
                executor.finish()
        except RametError as error:
            self._programs.pop(name, None)
            executor.cancel()
            self._send(ProgramEvent(name, error=ErrorInfo.of(error)))
            return
        self._end_if_over(name)

    def _end_if_over(self, program_id: str) -> None:
        executor = self._programs.get(program_id)
        if executor is not None and executor.is_over and self._programs.pop(program_id, None) is not None:
            self._send(ProgramEvent(program_id))

    def _provide(self, command: ProvideTool) -> None:
        program = self._programs.get(command.id)
        if program is not None:
            error = None if command.error is None else RametError(command.error)
            program.provide(command.node, msgspec.json.decode(command.value), error)

    def _load_adapter(self, name: str, path: str) -> list[str]:
        """Returns the names of all adapters."""
        self.engine.load_adapter(name, path)
        return self.engine.adapters

    def _unload_adapter(self, name: str) -> list[str]:
        self.engine.unload_adapter(name)
        return self.engine.adapters

    def _latest_prefixes(self) -> list[tuple[str, list[int]]]:
        """As many of the cached prefixes as the pool has room for, the last used first. Those of adapters stay here:
        their names are this engine's own (`types.Adapter`).
        """
        most = int(self.engine.stats()["num_pages"]) * self.engine.page_size
        found = self.engine.latest_prefixes(most)
        return [(cache_salt, tokens.tolist()) for cache_salt, tokens in found if not cache_salt.startswith("\0")]

    def _give_pages(self, tokens: bytes, cache_salt: str, first: int, most: int) -> memoryview:
        """Up to `most` cached pages of a prefix, from page `first` on; none if they are not cached. tokens: int32."""
        return self.engine.export_pages(_read_tokens(tokens), cache_salt, first, most).numpy().data

    def _take_pages(self, tokens: bytes, cache_salt: str, first: int, pages: bytes, identity: str) -> int:
        """Take in pages of a prefix, from page `first` on. Returns how many of its pages are cached now.

        tokens: int32, to the end of the pages. identity: of the engine that gave them (`Hello`).
        """
        if identity != self._identity:
            raise InvalidRequest(
                "the KV pages are of an engine with another model, data type or page size than this one: nothing was "
                "taken in"
            )
        given = torch.from_numpy(np.frombuffer(bytearray(pages), dtype=np.uint8))
        return self.engine.import_pages(_read_tokens(tokens), cache_salt, first, given)

    def _answer(self, command: Ask) -> None:
        """Answer a question on a thread of its own: it waits for the engine's."""

        def answer() -> None:
            try:
                self._send(Answer(command.id, self.questions[command.what](**command.arguments)))
            except RametError as error:
                self._send(Answer(command.id, error=ErrorInfo.of(error)))
            except Exception as error:
                self._fail(command, error)

        threading.Thread(target=answer, name="ramet-answer", daemon=True).start()


def _read_tokens(tokens: bytes) -> TokenIds:
    return np.frombuffer(tokens, dtype=np.int32)


def identity_of(engine: Engine, model: str | None) -> str:
    """What the KV pages of two engines have in common, if they can move from one to the other; "" if none can move."""
    config = engine.config
    if config.tp > 1 or not config.radix_cache:
        return ""
    types = engine.model.decoder.dtype, config.kv_cache_dtype, config.quantization
    kind = types, config.model_impl, engine.page_size, engine.page_bytes
    parts = repr((fingerprint(model), engine.model.config, kind))
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()


def _to_report(output: RequestOutput) -> Output:
    usage = output.usage
    return Output(
        output.request_id,
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.completion_tokens,
        text=output.text,
        token_ids=list(output.token_ids),
        finish_reason=None if output.finish_reason is None else output.finish_reason.value,
        stop_match=output.stop_match,
        logprobs=None if output.logprobs is None else list(output.logprobs),
        top_logprobs=None if output.top_logprobs is None else [list(top) for top in output.top_logprobs],
        prompt_logprobs=None if output.prompt_logprobs is None else output.prompt_logprobs.tolist(),
        prompt_tops=None if output.prompt_tops is None else [list(top) for top in output.prompt_tops],
        vector=None if output.vector is None else output.vector.tolist(),
        error=None if output.error is None else ErrorInfo.of(output.error),
        timings=None if output.timings is None else dict(output.timings),
        incomplete=output.incomplete,
        was_closed=output.was_closed,
        drafted_tokens=usage.drafted_tokens,
        accepted_tokens=usage.accepted_tokens,
    )


def postpone_full_collections() -> None:
    """Keep all objects that exist now out of collections, and let full ones wait for `collect_if_idle`.

    A full collection looks at every object that holds others, with the interpreter's lock held: with some hundred
    grammars alive it took 74 ms, in the middle of a step. The middle generation is collected after three collections of
    young objects instead of eleven: the same work in shorter pauses, of 0.5 instead of 2 to 3 ms.
    """
    gc.collect()
    gc.freeze()
    young, _, _ = gc.get_threshold()
    gc.set_threshold(young, _MIDDLE, _MANY)


def collect_if_idle(stats: Mapping[str, float]) -> None:
    """Make a full collection if it is worth its time and the engine, with these `Engine.stats()`, has nothing to do."""
    if gc.get_count()[2] >= _FEW and not (stats["num_running"] or stats["num_waiting"]):
        gc.collect()


def _beat(engine: Engine, send: Callable[[Report], None], is_ending: threading.Event) -> None:
    """Report the engine's counters while its thread answers. No report means that the thread does not answer."""
    while not is_ending.is_set():
        engine.wait_stopped(HEARTBEAT_S)
        try:
            stats = engine.stats()
            send(Heartbeat(stats))
            collect_if_idle(stats)
        except EngineStopped as error:
            if not is_ending.is_set():
                send(EngineFailed(ErrorInfo.of(error)))
            is_ending.set()


def serve(settings: Settings) -> int:
    """Make the engine and carry out commands until the process must end. Returns the exit status."""
    parent = os.getppid() if settings.parent_pid is None else settings.parent_pid
    is_ending = threading.Event()

    context: zmq.Context[Any] = zmq.Context()
    sender = Sender(context, settings)

    def end(number: int, frame: FrameType | None) -> None:
        is_ending.set()
        sender.put(EngineFailed(ErrorInfo.of(EngineStopped("the engine process was told to end"))))

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    sender.start()
    start_s = time.monotonic()
    try:
        config = EngineConfig.from_mapping(settings.config)
        if settings.fingerprint is not None and fingerprint(settings.model) != settings.fingerprint:
            raise ConfigError(
                f"the model {settings.model or 'of the catalogue'} on {gethostname()} has other files than the "
                "server's; put the same ones on every node"
            )
        if settings.replica is not None:
            config = config_of_replica(config, settings.replica, torch.cuda.device_count())
        sender.put(Starting(f"loading the model {settings.model or 'of the catalogue'}"))
        model = load(settings.model, config)
        sender.put(Starting("measuring memory, making the KV cache and what runs on the device"))
        engine = Engine(model, config, on_stage=lambda stage: sender.put(Starting(stage)))
    except RametError as error:
        sender.put(EngineFailed(ErrorInfo.of(error)))
        sender.close()
        context.term()  # waits until the report is sent
        return 1
    identity = identity_of(engine, settings.model)
    server = EngineServer(engine, sender.put, identity)
    server.prepare_grammars()
    stats = engine.stats()
    hello = Hello(
        pid=os.getpid(),
        model=engine.model.name,
        context_length=engine.context_length,
        vocab_size=engine.model.config.vocab_size,
        device=str(engine.model.decoder.device),
        dtype=str(engine.model.decoder.dtype).removeprefix("torch."),
        num_kv_tokens=int(stats["num_pages"]) * engine.page_size,
        start_s=time.monotonic() - start_s,
        page_size=engine.page_size,
        json_form=engine.config.json_form,
        adapters=engine.adapters,
        identity=identity,
        page_bytes=engine.page_bytes,
    )
    postpone_full_collections()
    sender.put(hello)
    if settings.replica is not None:
        engine.watch_cache(sender.put)
    threading.Thread(target=_beat, args=(engine, sender.put, is_ending), name="ramet-heartbeat", daemon=True).start()
    commands = _socket(context, zmq.PULL, settings)
    commands.connect(settings.commands)
    try:
        while not is_ending.is_set() and os.getppid() == parent:
            server.end_late()
            if not commands.poll(200):
                continue
            for command in command_decoder.decode(commands.recv()):
                server.carry_out(command)
    finally:
        is_ending.set()
        engine.shutdown(5.0)
        sender.close()
        commands.close(0)
        context.term()
    return 0


def main() -> None:
    sys.setswitchinterval(_SWITCH_S)
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=Settings)
    set_up_logging(settings.log_level, settings.log_format, "engine")
    status = serve(settings)
    logging.shutdown()
    os._exit(status)  # nothing is left to be done, and torch's and triton's own endings take half a second and write


if __name__ == "__main__":
    main()
