"""Runs a program's graph inside an engine: every node starts as soon as its dependencies are done.

A graph comes in one or several parts (`extend`). Between two generations of a branch there is no round trip: the
engine's own thread extends the branch's token path and submits the next request. The executor uses only an engine's
interface, so it is the same in process, behind a server, and with the scripted model. lang/graph/run.py decides which
nodes are ready, and handles failures and the token budget.

Threads: any thread may call. Events are delivered on the thread that caused them; one node's events come in order. One
thread at a time starts nodes (`_pump`). The lock guards the bookkeeping, and no foreign code is called under it.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from ramet.errors import InvalidProgram, RametError, RequestCancelled
from ramet.lang.graph import ir
from ramet.lang.graph.events import OnEvent
from ramet.lang.graph.following import children_of, following, is_ended_by_following, known_start
from ramet.lang.graph.options import Deadline, ProgramOptions
from ramet.lang.graph.prompt_tokens import takes_space
from ramet.lang.graph.run import GraphRun, NodeRun
from ramet.runtime.programs.cache_hints import CacheHints
from ramet.runtime.programs.engine import EngineRequest, Handle, ProgramEngine
from ramet.runtime.programs.generation import Generation, with_one_more
from ramet.runtime.programs.model import ProgramModel
from ramet.runtime.programs.path import Path
from ramet.runtime.programs.selection import Selection
from ramet.runtime.programs.shared_nodes import SharedRequests
from ramet.runtime.types import MAX_INT32, FinishReason, Grammar, RequestOptions, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from ramet.grammar import CompiledGrammar

Work: TypeAlias = Generation | Selection  # of one node: a new one for each try
_EMPTY = Path()
MANY_REQUESTS = 256  # of a node: what they say together is read beside the engine's thread
PATIENCE_S = 0.005  # before a step, for functions of programs that go on because of the last one


class ProgramHost:
    """Runs programs in one engine. `model`: what they share: compiled grammars, the template's marks.

    `share_nodes`: generations of a program that always write the same text are run once. `patience_s`: how long the
    next step waits for functions of programs.
    """

    def __init__(self, engine: ProgramEngine, *, share_nodes: bool = True) -> None:
        self.engine = engine
        self.share_nodes = share_nodes
        self.num_ended = 0  # requests of all programs: their clock
        self.patience_s = PATIENCE_S
        self._going_on: list[threading.Event] = []  # each set when a function rests
        self.model = ProgramModel(
            engine.tokenizer,
            context_length=engine.context_length,
            page_size=engine.page_size,
            form=engine.json_form,
            device=engine.device_grammars,
        )
        self._numbers = itertools.count()

    def start(
        self,
        options: ProgramOptions,
        on_event: OnEvent,
        program_id: str | None = None,
        *,
        client: tuple[str, ...] = (),
    ) -> ProgramExecutor:
        """Return a new program without nodes; `extend` adds them. `on_event` is called for every event.

        `on_event` may be called on any thread, must be quick and must not raise. `program_id` names the program to the
        scheduler; None creates a new name. `client`: whose program it is, for fairness between requests and between
        grammars: its owner, then what tells the owner's clients apart.
        """
        name = program_id or f"{options.program}-{next(self._numbers)}"
        return ProgramExecutor(self, options, on_event, name, client or ("", name))

    @cached_property
    def vocabulary(self) -> str:
        """What tells the tokens of this tokenizer from those of another."""
        return hashlib.blake2b(b"\0".join(self.model.token_bytes), digest_size=16).hexdigest()

    def healed(
        self, prompt: list[int], sampling: SamplingParams, grammar: CompiledGrammar | None, *, is_typed: bool = False
    ) -> EngineRequest:
        """Return the request for a text that stands in no program, with the border that one in a program has.

        See lang/graph/prompt_tokens.py. `is_typed`: the answer is read, so that a space before it does not change it.
        """
        again = self.model.given_back(prompt[-1], MAX_INT32) if len(prompt) > 1 else b""
        if again and (grammar is None or grammar.goes_on(again)):
            return EngineRequest(prompt[:-1], with_one_more(sampling), before=again)
        may_lead = is_typed and bool(prompt) and takes_space(self.model.token_bytes[prompt[-1]])
        lead = _lead(grammar, sampling.stop, sampling.stop_regex) if may_lead else b""
        return EngineRequest(prompt, sampling, lead=lead)

    def let_go_on(self, rests: threading.Event) -> None:
        """Let what a program's function asks for, until `rests` is set, be part of the next step.

        The step waits for all such functions together, but not long: where one took longer, the next wait is shorter.
        """
        self._going_on.append(rests)
        self.engine.before_next_step(self._wait_for_functions)

    def _wait_for_functions(self) -> None:
        going_on, self._going_on = self._going_on, []
        if not going_on:
            return  # another call of this step waited for them
        end_s = time.monotonic() + self.patience_s
        is_in_time = all(rests.wait(max(0.0, end_s - time.monotonic())) for rests in going_on)
        self.patience_s = PATIENCE_S if is_in_time else self.patience_s / 4

    def count_ended(self) -> None:
        """Count an ended request of a program."""
        self.num_ended += 1


@dataclass(slots=True, eq=False)
class _AtEngine:
    """A node whose requests the engine has. Owner: the executor, under its lock."""

    work: Work
    num_left: int
    handles: list[Handle] = field(default_factory=list)


class ProgramExecutor:
    """One running program; see ProgramHost.start."""

    def __init__(
        self, host: ProgramHost, options: ProgramOptions, on_event: OnEvent, program_id: str, client: tuple[str, ...]
    ) -> None:
        self._host, self._model, self._client = host, host.model, client
        self._options, self._program_id = options, program_id
        self._engine = SharedRequests(host.engine) if host.share_nodes else host.engine
        self._index = ir.GraphIndex()
        self._graph = GraphRun(
            options, on_event, mark=self._model.marks.mark, tokens=self._tokens, is_held=_has_grammar
        )
        self._paths: dict[int, Path] = {}  # read when a node is done
        self._grammars: dict[int, CompiledGrammar] = {}
        self._following: dict[int, ir.Template] = {}  # constrained node -> the text after it, where one is known
        self._at_engine: dict[int, _AtEngine] = {}
        self._hints = CacheHints(host.engine, options.cache_salt, self._graph.nodes, self._path_of)
        self._is_pumping = False
        self._is_complete = False
        self._has_told_end = False  # to the cache
        self._lock = threading.RLock()

    def extend(self, graph: ir.Graph, *, is_last: bool = False) -> None:
        """Add a part of the program; ready nodes start at once. A wrong part raises InvalidProgram and changes nothing.

        `is_last`: `finish` follows, for a backend that can send both at once.
        """
        with self._lock:
            self._index.add(graph, is_bound=True)
            added = self._graph.extend(graph)
            children = children_of(graph.nodes)
            for run in added:
                self._hints.added(run.node)
                if is_ended_by_following(run.node):
                    self._following[run.node.id] = following(run.node, children)
        for run in added:
            self._ask_for_grammar(run)
        self._pump()

    def cancel(self, nodes: Sequence[int] | None = None) -> None:
        """Stop these nodes and all that need them (None: the whole program). Their requests end within one step."""
        with self._lock:
            self._graph.cancel(nodes)
        self._pump()

    def provide(self, node: int, value: Any = None, error: Exception | None = None) -> None:
        """Give the result (a JSON value) of a tool call that an event of kind `tool` asked for.

        An error fails the node, or becomes its value if the call's `on_error` is "report".
        """
        with self._lock:
            run = self._graph.nodes[node]
            is_news = not run.is_over
            self._graph.provide(node, value, error)
            if is_news and run.status == "done":
                self._paths[node] = self._path_before(run).append(run.text)
        self._pump()

    def finish(self) -> None:
        """Declare that no more parts will come."""
        with self._lock:
            self._is_complete = True
        self._tell_end()

    @property
    def is_over(self) -> bool:
        """True when no more parts will come, and every node is done or failed."""
        with self._lock:
            return self._is_complete and self._graph.is_over

    def _tell_end(self) -> None:
        """Tell the cache once, when the program is over."""
        with self._lock:
            if not self.is_over or self._has_told_end:
                return
            self._has_told_end = True
        self._hints.program_ended()

    # Starting nodes. One thread at a time, without the lock.

    def _pump(self) -> None:
        """Start ready nodes and end stopped ones. If another thread is doing so, leave it to that thread."""
        with self._lock:
            if self._is_pumping:
                return
            self._is_pumping = True
        while True:
            with self._lock:
                handles = [handle for run in self._graph.take_stopped() for handle in self._take_handles(run)]
                run = self._graph.take_ready()
                if run is None and not handles:
                    self._is_pumping = False
                    break
            for handle in handles:
                handle.cancel()
            if run is not None:
                self._start(run)
        with self._lock:
            hints = [] if self._has_told_end else self._hints.take(self._host.num_ended)
        self._hints.give(hints)
        self._tell_end()

    def _start(self, run: NodeRun) -> None:
        """Start a node. Any exception fails only this node, and becomes the cause of the error that a reader gets."""
        try:
            result = self._graph.evaluate(run)
            if result is not None:
                path = self._path_before(run).append(result.text, is_markup=run.node.is_markup)
                if isinstance(run.node, ir.Recalled):
                    path = self._recalled(run.node, path)
                self._done(run, result, path.flush(self._model.encode_pieces) if run.node.is_border else path)
            elif run.node.run_by == "model":
                self._start_requests(run)
        except Exception as error:
            self._failed(run, error)

    def _done(self, run: NodeRun, result: ir.NodeResult, path: Path) -> None:
        with self._lock:
            if not run.is_over:
                self._paths[run.node.id] = path
                self._graph.done(run, result)

    def _failed(self, run: NodeRun, error: Exception) -> None:
        with self._lock:
            self._graph.failed(run, error)

    def _path_of(self, node: int) -> Path:
        return self._paths[node] if self._graph.nodes[node].status == "done" else _EMPTY

    def _path_before(self, run: NodeRun) -> Path:
        return _EMPTY if run.node.parent is None else self._path_of(run.node.parent)

    def _tokens(self, tip: int | None) -> ir.JsonValue:
        path = _EMPTY if tip is None else self._path_of(tip)
        rest, digest = "".join(piece.text for piece in path.pending), ir.text_digest(self._graph.text_after(None, tip))
        return msgspec.to_builtins(ir.WrittenPath(tuple(path.token_ids()), rest, self._host.vocabulary, digest))

    def _recalled(self, node: ir.Recalled, path: Path) -> Path:
        """Return the path of the tokens that the branch had, or `path` if they are not of its text."""
        found, is_text = node.path, node.path.digest == ir.text_digest(self._graph.text_after(None, node.parent))
        if not is_text or found.vocabulary != self._host.vocabulary:
            return path
        num_tokens = len(self._model.token_bytes)
        if any(not 0 <= token < num_tokens for token in found.tokens):
            raise InvalidProgram(f"the recalled path has a token outside of the vocabulary of {num_tokens:,}")
        return _EMPTY.extend(found.tokens, found.rest)

    # Requests.

    def _start_requests(self, run: NodeRun, *, may_wait: bool = False) -> None:
        """Submit the requests of a node, by its kind.

        Whether a grammar goes on after the prompt's last token takes the grammar's time. If that is not known and this
        thread may not wait for it, another thread goes on.
        """
        node, before = run.node, self._path_before(run)
        if isinstance(node, ir.Select):
            choices = [self._graph.render(choice) for choice in node.choices]
            self._ask_engine(run, Selection(node, choices, self._model, before))
            return
        assert isinstance(node, ir.Generate)
        grammar = self._grammars.get(node.id)
        before = before.flush(self._model.encode_pieces)
        again = before.given_back(self._model.given_back)
        if again and grammar is not None:
            goes_on = grammar.goes_on(again) if may_wait else grammar.known_to_go_on(again)
            if goes_on is None:
                self._model.grammars.run_aside(lambda: self._start_aside(run))
                return
            again = again if goes_on else b""
        may_lead = not again and node.is_typed and before.takes_space(self._model.tokenizer)
        lead = _lead(grammar, node.sampling.stop or (), node.sampling.stop_regex or ()) if may_lead else b""
        is_in_message = ir.is_in_message(self._index.nodes, node)
        tries, after = len(run.attempts), self._after(node)
        work = Generation(
            node,
            tries,
            self._model,
            before,
            again=again,
            after=after,
            lead=lead,
            is_in_message=is_in_message,
            is_thinking=ir.is_thinking(self._index.nodes, node),
            on_call=partial(self._graph.tell_call, run) if node.tells_calls and node.type == "tools" else None,
        )
        self._ask_engine(run, work)

    def _start_aside(self, run: NodeRun) -> None:
        """Submit the requests of a node, on a thread beside the engine's."""
        try:
            self._start_requests(run, may_wait=True)
        except Exception as error:
            self._failed(run, error)
        self._pump()

    def _after(self, node: ir.Generate) -> bytes:
        """Return the text that ends a node's value. A value in that text counts if it is sure to be there by now."""
        template = self._following.get(node.id, ())
        if not template:
            return b""
        above = {one.id for one in ir.branch(self._index.nodes, node.parent)}
        return known_start(
            template,
            lambda ref: ref.node in above or isinstance(self._index.nodes[ref.node], ir.Argument),
            lambda ref: self._graph.render((ref,)),
        )

    def _ask_engine(self, run: NodeRun, work: Work) -> None:
        requests = work.requests
        if not requests:
            self._end(run, work)
            return
        with self._lock:
            if run.is_over:
                return
            at = self._at_engine[run.node.id] = _AtEngine(work, len(requests))
        for index in range(len(requests)):
            self._submit(run, at, index)

    def _submit(self, run: NodeRun, at: _AtEngine, index: int) -> None:
        request = at.work.requests[index]
        sampling: SamplingParams | None = request.sampling
        if request.score_from is None:
            with self._lock:
                sampling = self._graph.within_budget(run, request.sampling)
        if sampling is None:
            return
        if request.before:
            sampling = with_one_more(sampling)
        left_s = self._graph.deadline.left_s()
        if left_s == 0:
            raise Deadline.error()
        handle = self._engine.submit(
            request.prompt,
            sampling,
            RequestOptions(
                cache_salt=self._options.cache_salt,
                program_id=self._program_id,
                owner=self._client[0],
                task="/".join(self._client[1:]),
                priority=self._options.priority,
                deadline_s=left_s,
                score_from=request.score_from,
                draft=run.node.draft if isinstance(run.node, ir.Generate) else "",
                adapter=(run.node.adapter if isinstance(run.node, ir.Generate) else "") or self._options.adapter,
            ),
            grammar=self._grammar(run, request),
            on_output=lambda output: self._take_in(run, at, index, output),
        )
        with self._lock:
            if not run.is_over:
                at.handles.append(handle)
                return
        handle.cancel()

    def _grammar(self, run: NodeRun, request: EngineRequest) -> Grammar | None:
        grammar = self._grammars.get(run.node.id)
        return self._model.grammars.between(grammar, request.before, request.after, request.lead)

    def _take_in(self, run: NodeRun, at: _AtEngine, index: int, output: RequestOutput) -> None:
        """Take an output on the engine's thread, which no error of a program may end."""
        has_news = output.finish_reason is not None
        try:
            at.work.take(index, output)
            if not run.is_over:
                if output.text and at.work.requests[index].score_from is None:
                    self._graph.say(run, output.text)
                    if run.written is not None:
                        with self._lock:
                            has_news = self._graph.wrote(run, output.text) or has_news
                if output.finish_reason is not None:
                    self._request_ended(run, at, output)
        except Exception as error:
            self._failed(run, error)
        if has_news:
            self._pump()
        rests, self._graph.rests = self._graph.rests, None
        if rests is not None:
            self._host.let_go_on(rests)

    def _request_ended(self, run: NodeRun, at: _AtEngine, output: RequestOutput) -> None:
        with self._lock:
            at.num_left -= 1
            is_last = at.num_left == 0
        error = self._request_error(output)
        if error is not None:
            self._failed(run, error)
        elif is_last and (len(at.work.requests) > MANY_REQUESTS or _is_read_slowly(run.node)):
            self._model.grammars.run_aside(lambda: self._end_aside(run, at.work))
        elif is_last:
            self._end(run, at.work)

    def _request_error(self, output: RequestOutput) -> Exception | None:
        if output.finish_reason not in (FinishReason.ERROR, FinishReason.ABORT):
            return None
        if self._graph.deadline.has_passed:
            return Deadline.error()
        return output.error or RequestCancelled("the request was aborted")

    def _end(self, run: NodeRun, work: Work) -> None:
        """Complete a node after its last output: it is done, or tries again."""
        result, path = work.result(), work.path()
        with self._lock:
            self._take_handles(run)
            judged = self._graph.judge(run, result, work.read)
            if judged is None or run.is_over:
                return
            self._host.count_ended()
            self._hints.ended(run.node.id)
            self._done(run, judged, path)

    def _end_aside(self, run: NodeRun, work: Work) -> None:
        """Complete a node whose value takes long to read, on a thread beside the engine's."""
        try:
            self._end(run, work)
        except Exception as error:
            self._failed(run, error)
        self._pump()

    def _take_handles(self, run: NodeRun) -> list[Handle]:
        """Remove and return the handles of a node's requests."""
        at = self._at_engine.pop(run.node.id, None)
        return [] if at is None else at.handles

    def _ask_for_grammar(self, run: NodeRun) -> None:
        """Request a node's grammar. Not under the lock: a grammar that is ready starts the node on this thread."""
        if not isinstance(run.node, ir.Generate) or not _has_grammar(run.node):
            return

        def on_grammar(done: Future[CompiledGrammar | None]) -> None:
            error = done.exception()
            with self._lock:
                if run.is_over:
                    return
                if error is None:
                    found = done.result()
                    if found is not None:
                        self._grammars[run.node.id] = found
                    self._graph.release(run)
                else:
                    self._graph.failed(run, error if isinstance(error, Exception) else RametError(repr(error)))
            self._pump()

        self._model.grammars.get_narrowed(run.node, self._client).add_done_callback(on_grammar)


def _lead(grammar: CompiledGrammar | None, stops: Sequence[str], patterns: Sequence[str]) -> bytes:
    """Return the space that may stand before a value; none if the grammar allows it itself, or it may end the text."""
    if grammar is None or patterns or any(stop.startswith(" ") for stop in stops):
        return b""
    return b" " if grammar.advance_bytes(0, b" ") is None else b""


def _is_read_slowly(node: ir.AnyNode) -> bool:
    return isinstance(node, ir.Generate) and node.type == "captures"


def _has_grammar(node: ir.AnyNode) -> bool:
    """Return whether a node waits until its grammar is compiled."""
    return isinstance(node, ir.Generate) and (node.constraint is not None or bool(node.narrowed().masked))
