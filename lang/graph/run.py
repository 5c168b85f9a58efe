"""One run of a graph: the rules for ready nodes, failures, the token budget, and the caller's events.

`GraphRun` is a state machine without threads. Its driver takes the ready nodes, works on them, and reports the result
of each. The run answers with events and with the nodes that are ready next. There are three drivers: the executor of
the runtime (runtime/programs/executor.py), the runner for text endpoints (lang/backends/text_program.py), and the
simulation of the passes (lang/passes/requests.py).

Not here: tokens, requests, threads. A driver with several threads holds its own lock around each call.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from ramet.errors import CheckFailed, InvalidProgram, ProgramCancelled, RametError
from ramet.lang.graph import ir
from ramet.lang.graph.events import OnEvent
from ramet.lang.graph.options import Deadline, ProgramOptions
from ramet.lang.graph.sampling import Sampling, SamplingParams
from ramet.lang.graph.written_json import WrittenJson

logger = logging.getLogger(__name__)

_CLOSING = frozenset('",]}')  # a part of a JSON value is closed by one of these
PROMPT_TAIL = 200  # characters of the prompt shown in errors

S = TypeVar("S", Sampling, SamplingParams)
# Gives the text of a Role, Tools or Thinking node. It gets what it returned for the last such node before it on the
# branch (None: there was none), the text of the Role right before it (or "") and the node. It returns what the next one
# needs, and the text.
Mark: TypeAlias = Callable[[object, str, ir.Marked], tuple[object, str]]


@dataclass(slots=True, eq=False)
class NodeRun:
    """One node of a run. Owner: its GraphRun; a driver reads it.

    `missing`: the number of things that the node still waits for: unfinished dependencies, and its release if it
    `is_held`. `reserved`: tokens of the budget that it holds. `attempts`: texts that its checks refused. `spent`: the
    tokens of these texts. `written`: its JSON so far, if that can be read early; `value` has the parts that others use.
    `early`: users that wait for parts of the value alone, with the paths to the parts. `talk`: of the branch up to
    here, as `Mark` has it.
    """

    node: ir.AnyNode
    missing: int = 0
    is_held: bool = False
    users: list[NodeRun] = field(default_factory=list)
    status: Literal["waiting", "ready", "running", "done", "failed"] = "waiting"
    text: str = ""
    value: ir.JsonValue = None
    value_text: str = ""
    error: Exception | None = None
    reserved: int = 0
    attempts: list[dict[str, str]] = field(default_factory=list)
    spent: ir.Usage = field(default_factory=ir.Usage)
    start_s: float = 0.0
    written: WrittenJson | None = None
    early: tuple[tuple[NodeRun, set[tuple[str | int, ...]]], ...] = ()
    talk: object = None

    @property
    def is_over(self) -> bool:
        return self.status in ("done", "failed")

    @property
    def needs_release_alone(self) -> bool:
        """True when the node is held and waits for nothing else."""
        return self.is_held and self.missing == 1


class GraphRun:
    """The state of one run. `nodes[i]` is the run of node i.

    `rests`: set once the program's function rests, which goes on because of an event; a driver may wait for it.
    """

    def __init__(
        self,
        options: ProgramOptions,
        on_event: OnEvent | None = None,
        *,
        mark: Mark | None = None,
        tokens: Callable[[int | None], ir.JsonValue] = lambda tip: None,
        is_held: Callable[[ir.AnyNode], bool] | None = None,
    ) -> None:
        """Make a run without nodes; `extend` adds them.

        `on_event` must be quick; its exceptions are logged. `mark`: see Mark. `tokens` returns the token path of the
        branch that ends at a node. A node for which `is_held` is true also waits for `release`.
        """
        self.nodes: list[NodeRun] = []
        self._graph_nodes: list[ir.AnyNode] = []
        self.options = options
        self.deadline = Deadline(options.deadline_s)
        self.start_s = time.monotonic()
        self._on_event, self._mark, self._is_held = on_event, mark, is_held
        self._tokens = tokens
        self.rests: threading.Event | None = None
        self._arguments: dict[str, ir.JsonValue] = {}
        self._ready: deque[NodeRun] = deque()
        self._stopped: list[NodeRun] = []
        self._failed_branches: defaultdict[int, set[int]] = defaultdict(set)  # of forks that are races
        self._num_over = 0
        self._is_cancelled = False
        self._budget_left = options.token_budget
        self._num_reserved = 0  # nodes that hold a part of the budget
        self._over_budget: deque[NodeRun] = deque()

    @property
    def is_over(self) -> bool:
        """True when every node so far is done or failed."""
        return self._num_over == len(self.nodes)

    # Called by the driver to get work.

    def extend(self, graph: ir.Graph) -> list[NodeRun]:
        """Add a part that GraphIndex has checked, and return its nodes. Nodes without dependencies are ready."""
        self._arguments.update(graph.arguments)
        added = [NodeRun(node) for node in graph.nodes]
        for run in added:
            self._add(run)
        return added

    def take_ready(self) -> NodeRun | None:
        """Return the next ready node and mark it as running, or return None."""
        while self._ready:
            run = self._ready.popleft()
            if not run.is_over:
                run.status = "running"
                run.start_s = run.start_s or time.monotonic()
                return run
        return None

    def take_stopped(self) -> list[NodeRun]:
        """Return the nodes that failed while they ran, each once. The driver must end its work for them."""
        stopped, self._stopped = self._stopped, []
        return stopped

    def evaluate(self, run: NodeRun) -> ir.NodeResult | None:
        """Evaluate a node, or ask the caller for the result of a tool call.

        Returns None if a model or the caller gives the result. The driver reports any exception with `failed`.
        """
        if run.node.run_by == "model":
            return None
        result = run.node.evaluate(self)
        if run.node.run_by == "caller":
            self._emit(run, "tool", value=result.value)
            return None
        return result

    # The methods of ir.Scope, which nodes call.

    def render(self, template: ir.Template) -> str:
        return ir.render(template, lambda i: self.nodes[i].value_text, lambda i: self.nodes[i].value)

    def argument(self, name: str) -> ir.JsonValue:
        return self._arguments[name]

    def mark(self, node: ir.Marked) -> str:
        assert self._mark is not None
        parent = None if node.parent is None else self.nodes[node.parent]
        opening = parent.text if parent is not None and isinstance(parent.node, ir.Role) else ""
        self.nodes[node.id].talk, text = self._mark(None if parent is None else parent.talk, opening, node)
        return text

    def tokens(self, tip: int | None) -> ir.JsonValue:
        return self._tokens(tip)

    def text_after(self, start: int | None, tip: int | None) -> str:
        return self._text_up_to(tip, start=start)

    def branch(self, tip: int | None) -> list[ir.AnyNode]:
        """Return the nodes of the branch that ends at `tip`, root first."""
        return ir.branch(self._graph_nodes, tip)

    # Called by the driver to report results.

    def tells_text(self, run: NodeRun) -> bool:
        """Return whether the caller wants text as it is generated. Text that checks may still refuse is held back."""
        node = run.node
        return isinstance(node, ir.Generate) and (self.options.text_events or node.tells_text) and not node.checks

    def say(self, run: NodeRun, text: str) -> None:
        """Report a piece of generated text, if the caller wants it."""
        if self.tells_text(run):
            self._emit(run, "text", text=text)

    def tell_call(self, run: NodeRun, index: int, call: Mapping[str, ir.JsonValue]) -> None:
        """Report a tool call that a generation has closed: its `name` and `arguments`."""
        if not run.is_over:
            self._emit(run, "call", value={"index": index, "tool": call["name"], "arguments": call["arguments"]})

    def wants_text(self, run: NodeRun) -> bool:
        """Return whether text of a node is needed as it is generated: by the caller, or by nodes that use its parts."""
        return self.tells_text(run) or bool(run.early)

    def wrote(self, run: NodeRun, text: str) -> bool:
        """Take a piece of generated text. Return whether nodes are ready now that waited for a part of the value."""
        if run.written is None:
            return False
        run.written.push(text)
        return any(char in _CLOSING for char in text) and self._read_parts(run)

    def judge(
        self, run: NodeRun, result: ir.NodeResult, read: Callable[[str], ir.JsonValue] | None = None
    ) -> ir.NodeResult | None:
        """Read and check the value of a generated text. Return the result to pass to `done`, or None if it was refused.

        A refused node is ready for its next try, or has failed if no tries are left. `read`: reads the value, where the
        text alone does not give it.
        """
        node = run.node
        if run.is_over or not isinstance(node, ir.Generate):
            return result
        value, problem = _value(node, result, read)
        wrong = None
        if node.checks:
            wrong = problem.message if problem is not None else None
            wrong = wrong or next((found for check in node.checks if (found := check.problem(value))), None)
        usage = run.spent + (result.usage or ir.Usage())
        if wrong is not None:
            self._refuse(run, node, result, wrong)
            return None
        meta = dict(result.meta or {})
        if node.checks:
            meta["attempts"] = run.attempts
            if result.text and self.options.text_events:
                self._emit(run, "text", text=result.text)
        return msgspec.structs.replace(result, value=value, usage=usage, meta=meta or None, error=problem)

    def done(self, run: NodeRun, result: ir.NodeResult) -> None:
        """Mark a node done, tell the caller, and make nodes ready that waited for it alone."""
        if run.is_over:
            return
        run.status = "done"
        self._num_over += 1
        run.text, run.value = result.text, result.value
        if run.node.parent is not None and not isinstance(run.node, ir.Role | ir.Tools | ir.Thinking):
            run.talk = self.nodes[run.node.parent].talk
        run.value_text = result.text if result.value_text is None else result.value_text
        self._refund(run, result.usage.completion_tokens - run.spent.completion_tokens if result.usage else 0)
        self._emit_done(run, result)
        users, run.users = run.users, []
        for user in users:
            self._satisfy(user)

    def failed(self, run: NodeRun, error: Exception) -> None:
        """Fail a node and all that needs it, and cancel the rest of the program, unless other branches race with it."""
        if run.is_over:
            return
        self._fail_all([run], error)
        if not isinstance(error, ProgramCancelled) and not self._has_rivals(run.node):
            line = f" ({run.node.line})" if run.node.line else ""
            sibling = ProgramCancelled(f"cancelled because node {run.node.id}{line} failed: {error}")
            sibling.__cause__ = error
            self._fail_all(self.nodes, sibling)

    def _has_rivals(self, node: ir.Node | None) -> bool:
        """Note that a node's branches are out of their races. Returns whether one races with a branch that is not."""
        while node is not None:
            if isinstance(node, ir.Fork) and node.is_race:
                failed = self._failed_branches[node.group]
                failed.add(node.index)
                if len(failed) < node.width:
                    return True
            node = None if node.parent is None else self.nodes[node.parent].node
        return False

    def cancel(self, nodes: Sequence[int] | None = None) -> None:
        """Stop these nodes and all that need them. None stops the whole program, including its later parts."""
        reason = ProgramCancelled("the program was cancelled" if nodes is None else "this branch was cancelled")
        self._is_cancelled = self._is_cancelled or nodes is None
        for index in nodes or ():
            self._has_rivals(self.nodes[index].node)  # what was given up in a race is no rival of what goes on
        self._fail_all(self.nodes if nodes is None else [self.nodes[i] for i in nodes], reason)

    def provide(self, node: int, value: ir.JsonValue = None, error: Exception | None = None) -> None:
        """Take a tool's result. An error fails the node, or becomes its value if the call's `on_error` is "report"."""
        run = self.nodes[node]
        if error is None and isinstance(run.node, ir.ToolCall):
            try:
                self.done(run, run.node.answered(value))
            except InvalidProgram as wrong:
                self.failed(run, wrong)
        elif error is None:
            raise InvalidProgram(f"node {node} is no tool call, and needs no answer")
        elif isinstance(run.node, ir.ToolCall) and run.node.on_error == "report":
            reported = {"error": f"{type(error).__name__}: {error}"}
            self.done(run, ir.NodeResult(value=reported, value_text=ir.value_text(reported), meta=dict(reported)))
        else:
            self.failed(run, error)

    def release(self, run: NodeRun) -> None:
        """Release a held node."""
        if run.is_held:
            run.is_held = False
            self._satisfy(run)

    def within_budget(self, run: NodeRun, sampling: S) -> S | None:
        """Limit a generation's `max_tokens` to the rest of the budget. The node reserves these tokens until it ends.

        Returns None if nothing is left now. The node becomes ready again when another node returns tokens.

        Raises:
            RametError: nothing is left, and no node will return tokens.
        """
        if self._budget_left is None:
            return sampling
        if self._budget_left <= 0:
            if not self._num_reserved:
                raise RametError(f"the program's token budget of {self.options.token_budget} is used up")
            run.status = "ready"
            self._over_budget.append(run)
            return None
        run.reserved = min(sampling.max_tokens or self._budget_left, self._budget_left)
        self._budget_left -= run.reserved
        self._num_reserved += 1
        min_tokens = None if sampling.min_tokens is None else min(sampling.min_tokens, run.reserved)
        return msgspec.structs.replace(sampling, max_tokens=run.reserved, min_tokens=min_tokens)

    # The rules.

    def _add(self, run: NodeRun) -> None:
        self.nodes.append(run)
        self._graph_nodes.append(run.node)
        if self._is_cancelled:
            self._fail_all([run], ProgramCancelled("the program was cancelled"))
            return
        for used in ir.dependencies(run.node):
            other = self.nodes[used]
            if other.status == "failed" and not run.node.takes_failures:
                assert other.error is not None
                self._fail_all([run], other.error)
                return
            if not other.is_over:
                other.users.append(run)
                run.missing += 1
        if self._is_held is not None and self._is_held(run.node):
            run.is_held = True
            run.missing += 1
        if run.missing == 0:
            self._make_ready(run)
        self._add_early(run)

    def _add_early(self, run: NodeRun) -> None:
        """Let a node that uses only parts of a value wait for these parts.

        Where a budget is shared, it depends on the order of the generations, so nothing begins early.
        """
        if isinstance(run.node, ir.Generate) and run.node.is_readable_early and self._budget_left is None:
            run.written = WrittenJson()
        for used, paths in ir.parts_used(run.node).items():
            other = self.nodes[used]
            if other.written is not None and not other.is_over:
                other.early = (*other.early, (run, paths))
                self._read_parts(other)

    def _read_parts(self, run: NodeRun) -> bool:
        """Satisfy the users whose parts are closed. Return whether there was one."""
        assert run.written is not None
        waiting, run.early = run.early, ()
        for user, paths in waiting:
            found = {path: run.written.field(path) for path in paths}
            if None in found.values():
                run.early = (*run.early, (user, paths))
                continue
            for path, part in found.items():
                assert part is not None
                run.value = _with_part(run.value, path, part[0])
            num_edges = run.users.count(user)
            run.users = [one for one in run.users if one is not user]
            for _ in range(num_edges):
                self._satisfy(user)
        return len(run.early) < len(waiting)

    def _make_ready(self, run: NodeRun) -> None:
        run.status = "ready"
        self._ready.append(run)

    def _satisfy(self, run: NodeRun) -> None:
        run.missing -= 1
        if run.missing == 0 and run.status == "waiting":
            self._make_ready(run)

    def _fail_all(self, runs: Sequence[NodeRun], error: Exception) -> None:
        """Fail these nodes and all that need them to be done. A join only needs them to be over, so it goes on."""
        stack = [run for run in reversed(runs) if not run.is_over]
        while stack:
            run = stack.pop()
            if run.is_over:
                continue
            if run.status == "running":
                self._stopped.append(run)
            run.status, run.error = "failed", error
            self._num_over += 1
            self._refund(run, 0)
            self._emit_error(run, error)
            users, run.users = run.users, []
            for user in users:
                if user.node.takes_failures:
                    self._satisfy(user)
                else:
                    stack.append(user)

    def _refuse(self, run: NodeRun, node: ir.Generate, result: ir.NodeResult, problem: str) -> None:
        """Handle a text that failed its checks: try the node again, or fail it."""
        usage = result.usage or ir.Usage()
        run.attempts.append({"text": result.text, "problem": problem})
        run.spent = run.spent + usage
        if len(run.attempts) <= node.retries:
            self._refund(run, usage.completion_tokens)
            self._make_ready(run)
            return
        times = "once" if not node.retries else f"{len(run.attempts)} times"
        error = CheckFailed(
            f"it failed its `where` checks {times}; the last text was {result.text[:200]!r}: {problem}; loosen the "
            f"checks, or raise retries ({node.retries})"
        )
        error.attempts = tuple(run.attempts)
        self.failed(run, error)

    def _refund(self, run: NodeRun, num_used: int) -> None:
        """Return the reserved tokens that a node did not write. Nodes that waited for the budget try again."""
        if run.reserved and self._budget_left is not None:
            self._budget_left += run.reserved - num_used
            self._num_reserved -= 1
            run.reserved = 0
            self._ready.extend(self._over_budget)
            self._over_budget.clear()

    # Events.

    def _emit_done(self, run: NodeRun, result: ir.NodeResult) -> None:
        if self._on_event is None:
            return
        now = time.monotonic()
        timings = {"start_s": (run.start_s or now) - self.start_s, "end_s": now - self.start_s}
        if result.first_token_s is not None:
            timings["first_token_s"] = result.first_token_s - self.start_s
        if result.queue_s is not None:
            timings["queue_s"] = result.queue_s
        self._emit(
            run,
            "done",
            text=result.text,
            value=result.value,
            usage=result.usage,
            finish_reason=result.finish_reason,
            meta=result.meta,
            timings=timings,
            error=result.error,
        )

    def _emit_error(self, run: NodeRun, error: Exception) -> None:
        if self._on_event is None:
            return
        parent = run.node.parent  # behind a node that failed there is no text yet
        is_behind = parent is not None and self.nodes[parent].status == "failed"
        tail = "" if is_behind else self._text_up_to(parent, limit=PROMPT_TAIL)
        described = ir.NodeError(type(error).__name__, str(error) or repr(error), tail)
        meta = {"attempts": run.attempts} if run.attempts else None
        usage = run.spent if run.attempts else None
        self._emit(run, "error", error=described, cause=error, meta=meta, usage=usage)

    def _emit(self, run: NodeRun, kind: Any, **fields: Any) -> None:  # Any: fields of NodeEvent
        if self._on_event is None:
            return
        event = ir.NodeEvent(run.node.id, kind, name=run.node.label, **fields)
        try:
            self.rests = self._on_event(event) or self.rests
        except Exception:  # a listener's error must not end the thread, which may be the engine's
            logger.exception("a listener failed at the %s event of node %d", kind, run.node.id)

    def _text_up_to(self, tip: int | None, *, limit: int | None = None, start: int | None = None) -> str:
        """Return the text of a branch after node `start`; with `limit`, the end of it: at most so many characters, and
        those of as many nodes.
        """
        parts: list[str] = []
        size = 0
        while tip is not None and tip != start and (limit is None or max(size, len(parts)) < limit):
            parts.append(self.nodes[tip].text)
            size += len(parts[-1])
            tip = self.nodes[tip].node.parent
        text = "".join(reversed(parts))
        return text if limit is None else text[-limit:]


def _with_part(value: ir.JsonValue, path: Sequence[str | int], part: ir.JsonValue) -> ir.JsonValue:
    """Return a value with a part in its place. What stands beside it and is not known is left out, or None."""
    if not path:
        return part
    step, rest = path[0], path[1:]
    if isinstance(step, str):
        return {**(value or {}), step: _with_part((value or {}).get(step), rest, part)}
    items = [*(value or ()), *[None] * (step + 1 - len(value or ()))]
    items[step] = _with_part(items[step], rest, part)
    return items


def _value(
    node: ir.Generate, result: ir.NodeResult, read: Callable[[str], ir.JsonValue] | None
) -> tuple[ir.JsonValue, ir.NodeError | None]:
    """Return the value of a generated text, or the reason why it has none."""
    try:
        return read(result.text) if read is not None else ir.parse_value(node.type, result.text), None
    except ValueError as bad:
        why = (result.meta or {}).get("incomplete")
        why = why or ("it was cut by max_tokens" if result.finish_reason == "length" else "")
        because = f" because {why}" if why else ""
        return None, ir.NodeError(
            "InvalidValue", f"not a value of type {node.type}{because}: {result.text[:200]!r} ({bad})"
        )
