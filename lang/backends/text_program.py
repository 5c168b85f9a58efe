"""Runs a program's graph where only text goes in and comes out: every node as soon as what it needs is there.

For backends without a runtime of ours (openai.py). One task a node, all on the backend's event loop. Failures, budgets
and deadlines are as in runtime/programs/executor.py: a failed node fails what needs it and cancels the rest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ramet.errors import CheckFailed, InvalidProgram, NotSupported, ProgramCancelled, RametError
from ramet.lang.backends.backend import OnEvent, ProgramOptions
from ramet.lang.backends.http_loop import Deadline, HttpLoop
from ramet.lang.graph import ir

logger = logging.getLogger(__name__)

NO_USAGE = ir.Usage()
_PROMPT_TAIL = 200  # characters


@dataclass(frozen=True, slots=True)
class Prompt:
    """What precedes a generation: plain text, or messages, of which the last may be an unfinished one (`is_open`)."""

    messages: tuple[tuple[str, str], ...] = ()  # (role, content)
    text: str = ""
    is_open: bool = False

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


@dataclass(frozen=True, slots=True)
class Written:
    """What a request brought."""

    text: str
    finish_reason: str
    usage: ir.Usage = NO_USAGE
    meta: dict[str, Any] | None = None  # Any: JSON
    first_token_s: float | None = None  # time.monotonic()


class Writer(Protocol):
    """An endpoint that writes text."""

    async def write(
        self,
        prompt: Prompt,
        node: ir.Generate,
        max_tokens: int | None,
        deadline: Deadline,
        on_text: Callable[[str], None] | None,
    ) -> Written: ...

    async def choose(self, prompt: Prompt, node: ir.Select, choices: Sequence[str], deadline: Deadline) -> Written:
        """`meta["index"]` of the result says which."""
        ...


@dataclass(slots=True, eq=False)
class _NodeRun:
    """One node. Owner: its program."""

    node: ir.AnyNode
    over: asyncio.Event = field(default_factory=asyncio.Event)
    users: list[_NodeRun] = field(default_factory=list)
    error: Exception | None = None
    text: str = ""
    value_text: str = ""
    value: Any = None  # JSON
    task: asyncio.Task[Any] | None = None
    answer: asyncio.Future[Any] | None = None  # of a tool
    start_s: float = 0.0


class TextSession:
    """One running program. Any thread may call; everything happens on the loop, in the order of the calls."""

    def __init__(self, http: HttpLoop, writer: Writer, options: ProgramOptions, on_event: OnEvent) -> None:
        self._http = http
        self._index = ir.GraphIndex()
        self._program = _TextProgram(http, writer, options, on_event)

    def extend(self, graph: ir.Graph, *, is_last: bool = False) -> None:
        unbound = [n.name for n in graph.nodes if isinstance(n, ir.Argument) and n.name not in graph.arguments]
        if unbound:
            raise InvalidProgram(f"argument {unbound[0]!r} has no value; give it when the graph is run")
        if graph.arguments:
            graph.to_json()
        self._index.add(graph)
        self._http.call(self._program.extend, graph)

    def cancel(self, nodes: Sequence[int] | None = None) -> None:
        self._http.call(self._program.cancel, None if nodes is None else list(nodes))

    def provide(self, node: int, value: Any = None, error: Exception | None = None) -> None:
        self._http.call(self._program.provide, node, value, error)

    def finish(self) -> None:
        """Nothing is kept for parts that will not come."""


class _TextProgram:
    """On the loop."""

    def __init__(self, http: HttpLoop, writer: Writer, options: ProgramOptions, on_event: OnEvent) -> None:
        self._http, self._writer, self._options, self._on_event = http, writer, options, on_event
        self._deadline = Deadline(options.deadline_s)
        self._runs: list[_NodeRun] = []
        self._arguments: dict[str, Any] = {}
        self._is_cancelled = False
        self._budget_left = options.token_budget
        self._budget_changed = asyncio.Condition()
        self._num_reserved = 0
        self._start_s = time.monotonic()

    def extend(self, graph: ir.Graph) -> None:
        self._arguments.update(graph.arguments)
        for node in graph.nodes:
            run = _NodeRun(node)
            self._runs.append(run)
            if self._is_cancelled:
                self._fail_all([run], ProgramCancelled("the program was cancelled"))
                continue
            for used in ir.dependencies(node):
                self._runs[used].users.append(run)
            self._http.spawn(self._work(run))

    def cancel(self, nodes: list[int] | None) -> None:
        reason = ProgramCancelled("the program was cancelled" if nodes is None else "this branch was cancelled")
        self._is_cancelled = self._is_cancelled or nodes is None
        self._fail_all(self._runs if nodes is None else [self._runs[node] for node in nodes], reason)

    def provide(self, node: int, value: Any, error: Exception | None) -> None:
        answer = self._runs[node].answer
        if answer is None or answer.done():
            return
        if error is None:
            answer.set_result(value)
        else:
            answer.set_exception(error)

    async def _work(self, run: _NodeRun) -> None:
        """Wait for what the node needs, then run it."""
        run.task = asyncio.current_task()
        try:
            for used in ir.dependencies(run.node):
                other = self._runs[used]
                await other.over.wait()
                if other.error is not None and not isinstance(run.node, ir.Join):
                    self._fail_all([run], other.error)
            if not run.over.is_set():
                run.start_s = time.monotonic()
                await self._execute(run)
        except asyncio.CancelledError:
            if not run.over.is_set():  # not by `_fail_all`: the loop is being closed
                self._fail_all([run], ProgramCancelled("the backend was closed while this ran"))
        except Exception as error:  # the node fails, whatever it is; who reads it gets that as the cause
            self._failed(run, error)

    async def _execute(self, run: _NodeRun) -> None:
        node = run.node
        if isinstance(node, ir.Text):
            self._done(run, text=self._render(node.parts))
        elif isinstance(node, ir.Argument):
            value = self._arguments[node.name]
            self._done(run, value=value, value_text=ir.value_text(value))
        elif isinstance(node, ir.Role | ir.Fork | ir.Join):
            self._done(run)
        elif isinstance(node, ir.Capture):
            text = "" if node.parent is None else self._text_up_to(node.parent, start=node.start)
            self._done(run, value=text, value_text=text)
        elif isinstance(node, ir.ToolCall):
            await self._call_tool(run, node)
        elif isinstance(node, ir.Select):
            choices = [self._render(choice) for choice in node.choices]
            chosen = await self._writer.choose(self._prompt(node), node, choices, self._deadline)
            self._done_written(run, chosen, chosen.text)
        elif isinstance(node, ir.Generate):
            await self._generate(run, node)
        else:
            raise NotSupported("this endpoint has no place for tools in a program's text; use Engine or Remote")

    async def _generate(self, run: _NodeRun, node: ir.Generate) -> None:
        if node.type == "tools":
            raise NotSupported("this endpoint can't constrain text to tool calls; use Engine or Remote")
        prompt, attempts, usage = self._prompt(node), [], ir.Usage()
        says_text = self._options.text_events and not node.checks
        on_text = (lambda text: self._emit(run, "text", text=text)) if says_text else None
        while True:
            max_tokens = await self._reserve(node)
            used = 0
            try:
                written = await self._writer.write(prompt, node, max_tokens, self._deadline, on_text)
                used = written.usage.completion_tokens
            finally:
                await self._refund(max_tokens, used)
            usage = usage + written.usage
            value, problem = _value_of(node, written)
            wrong = problem.message if problem is not None else None
            wrong = wrong or next((found for check in node.checks if (found := check.problem(value))), None)
            if not node.checks or wrong is None:
                break
            attempts.append({"text": written.text, "problem": wrong})
            if len(attempts) > node.retries:
                error = CheckFailed(
                    f"it failed its `where` checks {len(attempts)} times; the last text was {written.text[:200]!r}: "
                    f"{wrong}; loosen the checks, or raise retries ({node.retries})"
                )
                error.attempts = tuple(attempts)
                raise error
        meta = {**(written.meta or {}), **({"attempts": attempts} if node.checks else {})}
        self._done_written(run, written, value, usage=usage, meta=meta or None, error=problem)

    async def _call_tool(self, run: _NodeRun, node: ir.ToolCall) -> None:
        arguments = ir.parse_value("json", self._render(node.arguments))
        run.answer = asyncio.get_running_loop().create_future()
        self._emit(run, "tool", value={"tool": node.tool, "arguments": arguments})
        try:
            value = await run.answer
        except Exception as error:
            if node.on_error == "raise":
                raise
            value = {"error": str(error) or repr(error)}
        self._done(run, value=value, value_text=ir.value_text(value))

    # The budget.

    async def _reserve(self, node: ir.Generate) -> int | None:
        """How much this generation may write; waits until others have given back what they did not write."""
        wanted = node.sampling.max_tokens
        async with self._budget_changed:
            while self._budget_left is not None and self._budget_left <= 0:
                if self._num_reserved == 0:
                    raise RametError(f"the program's token budget of {self._options.token_budget} is used up")
                await self._budget_changed.wait()
            if self._budget_left is None:
                return wanted
            granted = min(wanted or self._budget_left, self._budget_left)
            self._budget_left -= granted
            self._num_reserved += 1
            return granted

    async def _refund(self, granted: int | None, used: int) -> None:
        if self._budget_left is None or granted is None:
            return
        async with self._budget_changed:
            self._budget_left += granted - used
            self._num_reserved -= 1
            self._budget_changed.notify_all()

    # Texts.

    def _render(self, template: ir.Template) -> str:
        return ir.render(template, lambda i: self._runs[i].value_text, lambda i: self._runs[i].value)

    def _prompt(self, node: ir.AnyNode) -> Prompt:
        """What precedes a node, as an endpoint takes it. Raises NotSupported where it has no such form."""
        messages: list[tuple[str, str]] = []
        plain, is_open = "", False
        for run in self._path(node.parent):
            if isinstance(run.node, ir.Role):
                is_open = run.node.is_open
                if is_open:
                    messages.append((run.node.role, ""))
            elif is_open:
                messages[-1] = (messages[-1][0], messages[-1][1] + run.text)
            else:
                plain += run.text
        if messages and plain.strip():
            raise NotSupported(
                f"the text {plain.strip()[:40]!r} stands outside of the messages; an endpoint takes messages or text"
            )
        return Prompt(tuple(messages), plain, is_open)

    def _path(self, tip: int | None) -> list[_NodeRun]:
        found: list[_NodeRun] = []
        while tip is not None:
            found.append(self._runs[tip])
            tip = self._runs[tip].node.parent
        return found[::-1]

    def _text_up_to(self, tip: int, start: int | None = None) -> str:
        texts, at = [], tip
        while at != start:
            texts.append(self._runs[at].text)
            parent = self._runs[at].node.parent
            if parent is None:
                break
            at = parent
        return "".join(reversed(texts))

    # Ends and events.

    def _done_written(self, run: _NodeRun, written: Written, value: Any, **fields: Any) -> None:
        timings = {"start_s": run.start_s - self._start_s, "end_s": time.monotonic() - self._start_s}
        if written.first_token_s is not None:
            timings["first_token_s"] = written.first_token_s - self._start_s
        found = {"usage": written.usage, "meta": written.meta, **fields}
        reason = None if isinstance(run.node, ir.Select) else written.finish_reason
        self._done(run, text=written.text, value=value, finish_reason=reason, timings=timings, **found)

    def _done(self, run: _NodeRun, *, text: str = "", value: Any = None, **fields: Any) -> None:
        if run.over.is_set():
            return
        run.text, run.value, run.value_text = text, value, fields.pop("value_text", text)
        run.over.set()
        self._emit(run, "done", text=text, value=value, **fields)

    def _failed(self, run: _NodeRun, error: Exception) -> None:
        """A node failed: so does what needs it, and everything else is cancelled."""
        if run.over.is_set():
            return
        self._fail_all([run], error)
        if not isinstance(error, ProgramCancelled):
            line = f" ({run.node.line})" if run.node.line else ""
            sibling = ProgramCancelled(f"cancelled because node {run.node.id}{line} failed: {error}")
            sibling.__cause__ = error
            self._fail_all(self._runs, sibling)

    def _fail_all(self, runs: Sequence[_NodeRun], error: Exception) -> None:
        stack = list(reversed(runs))
        while stack:
            run = stack.pop()
            if run.over.is_set():
                continue
            run.error = error
            run.over.set()
            if run.task is not None and run.task is not asyncio.current_task():
                run.task.cancel()
            tail = "" if run.node.parent is None else self._text_up_to(run.node.parent)[-_PROMPT_TAIL:]
            described = ir.NodeError(type(error).__name__, str(error) or repr(error), tail)
            self._emit(run, "error", error=described, cause=error)
            stack.extend(user for user in reversed(run.users) if not isinstance(user.node, ir.Join))

    def _emit(self, run: _NodeRun, kind: Any, **fields: Any) -> None:  # Any: fields of NodeEvent
        event = ir.NodeEvent(run.node.id, kind, name=getattr(run.node, "name", None), **fields)
        try:
            self._on_event(event)
        except Exception:  # the listener's own fault: other programs share this thread
            logger.exception("a listener failed at the %s event of node %d", kind, run.node.id)


def _value_of(node: ir.Generate, written: Written) -> tuple[Any, ir.NodeError | None]:
    try:
        return ir.parse_value(node.type, written.text), None
    except ValueError as bad:
        cut = " because it was cut by max_tokens" if written.finish_reason == "length" else ""
        message = f"not a value of type {node.type}{cut}: {written.text[:200]!r} ({bad})"
        return None, ir.NodeError("InvalidValue", message)


def messages_json(prompt: Prompt) -> list[Mapping[str, str]]:
    return [{"role": role, "content": content} for role, content in prompt.messages]
