"""Runs a program's graph inside an engine: every node as soon as what it needs is there.

A graph comes in one or several parts (`extend`); between two generations of a branch nobody is asked: the branch's
token path is extended and the next request submitted from the engine's own thread. The executor sees an engine's
interface only, so it is the same in process, behind a server, and over the scripted model.

Threads: any thread may call; events are delivered on the thread that caused them, one node's events in order. One
thread at a time starts nodes (`_pump`), the lock guards the bookkeeping, and nothing foreign is called under it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from ramet.errors import DeadlineExceeded, InvalidProgram, ProgramCancelled, RametError, RequestCancelled
from ramet.lang.graph import ir
from ramet.runtime.constraints.grammar_cache import GrammarCache
from ramet.runtime.programs.dead_branches import TakesHints, dead_branches
from ramet.runtime.programs.engine import Handle, ProgramEngine, ProgramLimits, ProgramTokenizer
from ramet.runtime.programs.generation import Generation
from ramet.runtime.programs.next_use import Hint, NextUses, TakesNextUse
from ramet.runtime.programs.path import Path, PieceEncoder
from ramet.runtime.programs.selection import Selection
from ramet.runtime.programs.shared_nodes import SharedRequests
from ramet.runtime.text.role_marks import RoleMarks
from ramet.runtime.types import FinishReason, Grammar, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from ramet.grammar import CompiledGrammar

logger = logging.getLogger(__name__)

PROMPT_TAIL = 200  # characters of the prompt shown in errors


@dataclass(slots=True, eq=False)
class NodeRun:
    """One node of this run. Owner: the executor. `missing`: dependencies that are not done."""

    node: ir.AnyNode
    missing: int = 0
    users: list[NodeRun] = field(default_factory=list)
    status: str = "waiting"  # ready, running, done, failed
    path: Path = field(default_factory=Path)
    text: str = ""  # what it added to its branch
    value_text: str = ""
    value: Any = None  # a JSON value
    error: Exception | None = None
    handles: list[Handle] = field(default_factory=list)
    grammar: Grammar | None = None
    reserved: int = 0  # tokens of the budget
    attempts: list[dict[str, str]] = field(default_factory=list)  # texts that failed their checks: text, problem
    spent: ir.Usage = field(default_factory=ir.Usage)  # tokens of these
    start_s: float = 0.0

    @property
    def is_over(self) -> bool:
        return self.status in ("done", "failed")


class ProgramHost:
    """Runs programs in one engine, and keeps what they share: compiled grammars, the template's marks.

    `share_nodes`: generations of a program that surely write the same are run once.
    """

    def __init__(self, engine: ProgramEngine, *, share_nodes: bool = True) -> None:
        self.engine = engine
        self.share_nodes = share_nodes
        self.num_ended = 0  # requests of all programs: their clock
        self.tokenizer: ProgramTokenizer = engine.tokenizer
        self.encoder = PieceEncoder(self.tokenizer)
        self.marks = RoleMarks(engine.tokenizer.chat_template)
        # Only an engine with a model has it; its automata may run on the device.
        self.grammars = GrammarCache(self.tokenizer, getattr(engine, "device_grammars", None))

    def start(self, on_event: Callable[[ir.NodeEvent], None], limits: ProgramLimits | None = None) -> ProgramExecutor:
        """A new program without nodes; `extend` it. `on_event` is called for everything that happens.

        It may be called on any thread, must be quick and must not raise.
        """
        return ProgramExecutor(self, on_event, limits or ProgramLimits())


class ProgramExecutor:
    """One running program; see ProgramHost.start."""

    def __init__(self, host: ProgramHost, on_event: Callable[[ir.NodeEvent], None], limits: ProgramLimits) -> None:
        self.tokenizer = host.tokenizer
        self.encoder = host.encoder
        self._cache = host.engine
        self.context_length = host.engine.context_length
        self._engine = SharedRequests(host.engine) if host.share_nodes else host.engine
        self.marks = host.marks
        self._grammars = host.grammars
        self._on_event = on_event
        self.limits = limits
        self._index = ir.GraphIndex()
        self._arguments: dict[str, Any] = {}  # JSON values
        self._runs: list[NodeRun] = []
        self._num_over = 0  # of them, done or failed
        self._ready: deque[NodeRun] = deque()
        self._over_budget: deque[NodeRun] = deque()
        self._budget_left = limits.token_budget
        self._is_pumping = False
        self._is_cancelled = False
        self._is_complete = False
        self._is_let_go = False
        self._to_cancel: list[Handle] = []
        self._host = host
        self._next_uses = NextUses(self._runs) if isinstance(self._cache, TakesNextUse) else None
        self._released: list[NodeRun] = []  # whose sequences have ended
        self.lock = threading.RLock()
        self.start_s = time.monotonic()

    def extend(self, graph: ir.Graph, *, is_last: bool = False) -> None:
        """Add a part of the program; what can run starts at once. Raises InvalidProgram and changes nothing then.

        `is_last`: `finish` follows; for a backend that can send both at once.
        """
        with self.lock:
            unbound = [n.name for n in graph.nodes if isinstance(n, ir.Argument) and n.name not in graph.arguments]
            if unbound:
                raise InvalidProgram(f"argument {unbound[0]!r} has no value; give it when the graph is run")
            self._index.add(graph)
            self._arguments.update(graph.arguments)
            added = [NodeRun(node) for node in graph.nodes]
            for run in added:
                self._add(run)
        for run in added:
            self._ask_for_grammar(run)
        self.pump()

    def cancel(self, nodes: Sequence[int] | None = None) -> None:
        """Stop these nodes and all that need them (None: the whole program). Their requests end within one step."""
        reason = ProgramCancelled("the program was cancelled" if nodes is None else "this branch was cancelled")
        with self.lock:
            self._is_cancelled = self._is_cancelled or nodes is None
            self._fail_all(self._runs if nodes is None else [self._runs[i] for i in nodes], reason)
        self.pump()

    def provide(self, node: int, value: Any = None, error: Exception | None = None) -> None:
        """Give the result (a JSON value) of a tool call that an event of kind `tool` asked for.

        An error fails the node, or becomes its value where the call is to report it.
        """
        with self.lock:
            run = self._runs[node]
            if run.is_over:
                return
            is_reported = isinstance(run.node, ir.ToolCall) and run.node.on_error == "report"
            if error is None:
                self.done(run, value=value, value_text=ir.value_text(value))
            elif is_reported:
                value = {"error": f"{type(error).__name__}: {error}"}
                self.done(run, value=value, value_text=ir.value_text(value), meta={"error": value["error"]})
            else:
                self.failed(run, error)
        self.pump()

    def finish(self) -> None:
        """No more parts will come."""
        with self.lock:
            self._is_complete = True
        self._let_go()

    def _let_go(self) -> None:
        """When the program is over: tell the cache which branches nobody will read again."""
        with self.lock:
            if not self.is_over or self._is_let_go:
                return
            self._is_let_go = True
            hints = [] if self._next_uses is None else self._next_uses.clear()
        self._give_hints(hints)
        if isinstance(self._cache, TakesHints):
            for tokens, num_live in dead_branches(self._index.nodes, lambda node: self._runs[node].path):
                self._cache.mark_dead(tokens, self.limits.cache_salt, num_live)

    @property
    def is_over(self) -> bool:
        """True when no more parts will come, and every node is done or failed."""
        with self.lock:
            return self._is_complete and self._num_over == len(self._runs)

    # Bookkeeping. All of it runs under the lock.

    def _add(self, run: NodeRun) -> None:
        self._runs.append(run)
        if self._next_uses is not None:
            self._next_uses.added(run.node)
        if self._is_cancelled:
            self._fail_all([run], ProgramCancelled("the program was cancelled"))
            return
        for used in ir.dependencies(run.node):
            other = self._runs[used]
            if other.status == "failed" and not isinstance(run.node, ir.Join):
                assert other.error is not None
                self.failed(run, other.error, is_root=False)
                return
            if not other.is_over:
                other.users.append(run)
                run.missing += 1
        if isinstance(run.node, ir.Generate) and run.node.constraint is not None:
            run.missing += 1  # until its grammar is compiled
        if run.missing == 0:
            self._make_ready(run)

    def _ask_for_grammar(self, run: NodeRun) -> None:
        """Not under the lock: the answer may be there at once, and starts the node on this thread."""
        if not isinstance(run.node, ir.Generate) or run.node.constraint is None:
            return

        def on_grammar(done: Future[CompiledGrammar]) -> None:
            error = done.exception()
            with self.lock:
                if run.is_over:
                    return
                if error is None:
                    run.grammar = done.result()
                    self._satisfy(run)
                else:
                    self.failed(run, error if isinstance(error, Exception) else RametError(repr(error)))
            self.pump()

        self._grammars.get(run.node.constraint).add_done_callback(on_grammar)

    def _make_ready(self, run: NodeRun) -> None:
        run.status = "ready"
        self._ready.append(run)

    def _satisfy(self, run: NodeRun) -> None:
        run.missing -= 1
        if run.missing == 0 and run.status == "waiting":
            self._make_ready(run)

    def done(self, run: NodeRun, *, text: str = "", path: Path | None = None, value: Any = None, **more: Any) -> None:
        """Mark a node done, tell the caller, and count down its users. `more`: value_text and fields of the event."""
        with self.lock:
            if run.is_over:
                return
            run.status = "done"
            self._num_over += 1
            run.text, run.value = text, value
            run.value_text = more.pop("value_text", text)
            run.path = path if path is not None else self.path_before(run)
            run.handles.clear()
            if isinstance(run.node, ir.Generate | ir.Select):
                self._host.num_ended += 1
                self._released.append(run)
            usage: ir.Usage | None = more.get("usage")
            self._refund(run, usage.completion_tokens - run.spent.completion_tokens if usage else 0)
            self.emit(run, "done", text=text, value=value, **more)
            users, run.users = run.users, []
            for user in users:
                self._satisfy(user)

    def failed(self, run: NodeRun, error: Exception, *, is_root: bool = True) -> None:
        """Fail a node and all that needs it. Where it is the first (`is_root`), the rest of the program stops, too."""
        with self.lock:
            if run.is_over:
                return
            self._fail_all([run], error)
            if is_root and not isinstance(error, ProgramCancelled):
                line = f" ({run.node.line})" if run.node.line else ""
                sibling = ProgramCancelled(f"cancelled because node {run.node.id}{line} failed: {error}")
                sibling.__cause__ = error
                self._fail_all([other for other in self._runs if other is not run], sibling)

    def _fail_all(self, runs: Sequence[NodeRun], error: Exception) -> None:
        stack = [run for run in reversed(runs) if not run.is_over]
        handles: list[Handle] = []
        while stack:
            run = stack.pop()
            if run.is_over:
                continue
            run.status, run.error = "failed", error
            self._num_over += 1
            handles.extend(run.handles)
            run.handles.clear()
            self._refund(run, 0)
            self._emit_error(run, error)
            users, run.users = run.users, []
            for user in users:
                if isinstance(user.node, ir.Join):
                    self._satisfy(user)
                else:
                    stack.append(user)
        self._to_cancel.extend(handles)

    def again(self, run: NodeRun, usage: ir.Usage) -> None:
        """Start a generation anew: `usage` is that of its last try, which is to be noted in `attempts` already."""
        with self.lock:
            if run.is_over:
                return
            run.spent = run.spent + usage
            run.handles.clear()
            self._refund(run, usage.completion_tokens)
            self._make_ready(run)

    def _refund(self, run: NodeRun, num_used: int) -> None:
        if run.reserved and self._budget_left is not None:
            self._budget_left += run.reserved - num_used
            run.reserved = 0
            while self._over_budget:
                self._ready.append(self._over_budget.popleft())

    def path_before(self, run: NodeRun) -> Path:
        return Path() if run.node.parent is None else self._runs[run.node.parent].path

    # Events.

    def emit(self, run: NodeRun, kind: Any, **fields: Any) -> None:  # Any: fields of NodeEvent
        now = time.monotonic()
        timings = fields.pop("timings", None) or {}
        if kind == "done":
            timings = {"start_s": (run.start_s or now) - self.start_s, "end_s": now - self.start_s, **timings}
        name = getattr(run.node, "name", None)
        event = ir.NodeEvent(run.node.id, kind, name=name, timings=timings or None, **fields)
        try:
            self._on_event(event)
        except Exception:  # the listener's own fault: it must not end the engine's thread, where this may run
            logger.exception("a listener failed at the %s event of node %d", kind, run.node.id)

    def _emit_error(self, run: NodeRun, error: Exception) -> None:
        tail = "" if run.node.parent is None else self._text_up_to(run.node.parent, PROMPT_TAIL)
        described = ir.NodeError(type(error).__name__, str(error) or repr(error), tail)
        meta = {"attempts": run.attempts} if run.attempts else None
        usage = run.spent if run.attempts else None
        self.emit(run, "error", error=described, cause=error, meta=meta, usage=usage)

    def _text_up_to(self, tip: int, limit: int | None = None, start: int | None = None) -> str:
        """The text of a branch behind node `start`, or about its last `limit` characters."""
        parts: list[str] = []
        size, at = 0, tip
        while at != start and (limit is None or size < limit):
            parts.append(self._runs[at].text)
            size += len(parts[-1])
            parent = self._runs[at].node.parent
            if parent is None:
                break
            at = parent
        text = "".join(reversed(parts))
        return text if limit is None else text[-limit:]

    # Running nodes. One thread at a time, without the lock.

    def pump(self) -> None:
        """Start what is ready and end what was cancelled, unless another thread is at it: then that one does."""
        with self.lock:
            if self._is_pumping:
                return
            self._is_pumping = True
        while True:
            with self.lock:
                to_cancel, self._to_cancel = self._to_cancel, []
                if not (self._ready or to_cancel):
                    self._is_pumping = False
                    break
                run = self._ready.popleft() if self._ready else None
                if run is not None and not run.is_over:
                    run.status = "running"
                    run.start_s = run.start_s or time.monotonic()
            for handle in to_cancel:
                handle.cancel()
            if run is not None and not run.is_over:
                self._try(run, self._start)
        self._hint_next_uses()
        self._let_go()

    def _hint_next_uses(self) -> None:
        """Tell the cache which prefixes will be read again, though nothing holds them."""
        with self.lock:
            released, self._released = self._released, []
            if self._next_uses is None or self._is_let_go:
                return
            hints = [hint for run in released for hint in self._next_uses.released(run, self._host.num_ended)]
        self._give_hints(hints)

    def _give_hints(self, hints: Sequence[Hint]) -> None:
        if isinstance(self._cache, TakesNextUse):
            for tokens, when in hints:
                self._cache.set_next_use(tokens, when, self.limits.cache_salt)

    def _try(self, run: NodeRun, work: Callable[[NodeRun], None]) -> None:
        """Do a part of a node's work. The node fails alone, whatever is raised; who reads it gets that as the cause."""
        try:
            work(run)
        except Exception as error:
            self.failed(run, error)

    def _start(self, run: NodeRun) -> None:
        node = run.node
        if isinstance(node, ir.Text):
            text = self.render(node.parts)
            self.done(run, text=text, path=self.path_before(run).append(text))
        elif isinstance(node, ir.Argument):
            value = self._arguments[node.name]
            self.done(run, value=value, value_text=ir.value_text(value))
        elif isinstance(node, ir.Role | ir.Tools):
            self._mark(run, node)
        elif isinstance(node, ir.Fork):
            self.done(run, path=self.path_before(run).flush(self.encoder))
        elif isinstance(node, ir.Join):
            self.done(run)
        elif isinstance(node, ir.Capture):
            text = "" if node.parent is None else self._text_up_to(node.parent, start=node.start)
            self.done(run, value=text, value_text=text)
        elif isinstance(node, ir.ToolCall):
            arguments = ir.parse_value("json", self.render(node.arguments))
            self.emit(run, "tool", value={"tool": node.tool, "arguments": arguments})
        elif isinstance(node, ir.Select):
            Selection(self, run, node).start()
        else:
            Generation(self, run, node).start()

    def render(self, template: ir.Template) -> str:
        return ir.render(template, lambda i: self._runs[i].value_text, lambda i: self._runs[i].value)

    def _mark(self, run: NodeRun, node: ir.Role | ir.Tools) -> None:
        text = self.marks.text(self._index.path(node.parent), node)
        self.done(run, text=text, path=self.path_before(run).append(text, is_markup=True))

    def is_in_role(self, node: ir.AnyNode) -> bool:
        roles = [n for n in self._index.path(node.parent) if isinstance(n, ir.Role)]
        return bool(roles) and roles[-1].is_open

    def reserve(self, run: NodeRun, sampling: SamplingParams) -> SamplingParams | None:
        """Take this generation's share of the budget, or put it off (None) until another one gives some back."""
        with self.lock:
            if self._budget_left is None:
                return sampling
            if self._budget_left <= 0:
                if not any(other.reserved for other in self._runs):
                    raise RametError(f"the program's token budget of {self.limits.token_budget} is used up")
                run.status = "ready"
                self._over_budget.append(run)
                return None
            run.reserved = min(sampling.max_tokens or self._budget_left, self._budget_left)
            self._budget_left -= run.reserved
            min_tokens = min(sampling.min_tokens, run.reserved)
            return msgspec.structs.replace(sampling, max_tokens=run.reserved, min_tokens=min_tokens)

    def submit(
        self,
        run: NodeRun,
        prompt: list[int],
        sampling: SamplingParams,
        on_output: Callable[[RequestOutput], None],
        *,
        grammar: Grammar | None = None,
        score_from: int | None = None,
    ) -> None:
        limits = self.limits
        left_s = None if limits.deadline_s is None else limits.deadline_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("the program's deadline passed")
        handle = self._engine.submit(
            prompt,
            sampling,
            grammar=grammar,
            cache_salt=limits.cache_salt,
            program_id=limits.program_id,
            priority=limits.priority,
            deadline_s=left_s,
            score_from=score_from,
            on_output=lambda output: self._take_in(run, output, on_output),
        )
        with self.lock:
            if not run.is_over:
                run.handles.append(handle)
                return
        handle.cancel()

    def _take_in(self, run: NodeRun, output: RequestOutput, on_output: Callable[[RequestOutput], None]) -> None:
        """An output, on the engine's thread, which nothing that goes wrong in a program may break."""
        self._try(run, lambda _: on_output(output))
        if output.finish_reason is not None:
            self.pump()

    def request_error(self, output: RequestOutput) -> Exception | None:
        if output.finish_reason not in (FinishReason.ERROR, FinishReason.ABORT):
            return None
        deadline = self.limits.deadline_s
        if deadline is not None and time.monotonic() >= deadline:
            return DeadlineExceeded("the program's deadline passed")
        return output.error or RequestCancelled("the request was aborted")
