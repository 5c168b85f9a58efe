"""Runs a program's graph on an endpoint that only takes and returns text, for backends without Ramet's runtime.

Everything runs on the backend's event loop; each generation or selection is a separate task. lang/graph/run.py decides
which nodes are ready, and handles failures and the token budget.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import msgspec

from ramet.errors import NotSupported, ProgramCancelled
from ramet.lang.backends.http_loop import HttpLoop
from ramet.lang.graph import ir
from ramet.lang.graph.events import NodeResult, OnEvent
from ramet.lang.graph.options import Deadline, ProgramOptions
from ramet.lang.graph.run import GraphRun, NodeRun


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of a generation: plain text, or messages in OpenAI's form. The last one may be unfinished (`is_open`).

    `tools`: those that the branch declares.
    """

    messages: tuple[dict[str, Any], ...] = ()  # Any: JSON
    text: str = ""
    is_open: bool = False
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


OnText: TypeAlias = Callable[[str], None]  # the next piece of a text
OnCall: TypeAlias = Callable[[int, Mapping[str, Any]], None]  # a tool call: its index, its name and arguments
# The text of a generation, with its reason to end; the last two arguments want it, and its calls, as they come. The
# value of one that may call tools is {"text": ..., "calls": [...]}, with the arguments as JSON text.
Write: TypeAlias = Callable[
    [Prompt, ir.Generate, Deadline, OnText | None, OnCall | None], Coroutine[Any, Any, NodeResult]
]
# One of the choices; `meta["index"]` says which.
Choose: TypeAlias = Callable[[Prompt, ir.Select, Sequence[str], Deadline], Coroutine[Any, Any, NodeResult]]


class TextSession:
    """One running program. Any thread may call its methods; the rest runs on the loop, in the order of the calls."""

    def __init__(
        self, http: HttpLoop, write: Write, choose: Choose, options: ProgramOptions, on_event: OnEvent
    ) -> None:
        self._http, self._write, self._choose, self._adapter = http, write, choose, options.adapter
        self._index = ir.GraphIndex()
        self._graph = GraphRun(options, on_event, mark=_mark)
        self._tasks: dict[int, asyncio.Task[Any]] = {}  # of nodes that run

    def extend(self, graph: ir.Graph, *, is_last: bool = False) -> None:
        if graph.arguments:
            graph.to_json()  # a wrong part raises here, in the caller
        self._index.add(graph, is_bound=True)
        self._on_loop(self._graph.extend, graph)

    def cancel(self, nodes: Sequence[int] | None = None) -> None:
        self._on_loop(self._graph.cancel, None if nodes is None else list(nodes))

    def provide(self, node: int, value: Any = None, error: Exception | None = None) -> None:
        def take() -> None:
            self._graph.provide(node, value, error)
            self._end_task(self._graph.nodes[node])

        self._on_loop(take)

    def finish(self) -> None:
        """Do nothing: no resources are held for later parts."""

    def _on_loop(self, change: Callable[..., object], *args: object) -> None:
        """Change the run on the loop, and start what is ready then."""

        def work() -> None:
            change(*args)
            self._pump()

        self._http.call(work)

    # On the loop.

    def _pump(self) -> None:
        """Start ready nodes, and end the tasks of stopped ones."""
        while True:
            for stopped in self._graph.take_stopped():
                self._end_task(stopped)
            run = self._graph.take_ready()
            if run is None:
                return
            try:
                result = self._graph.evaluate(run)
            except Exception as error:  # any error fails the node, and is the cause of the error that a reader gets
                self._graph.failed(run, error)
                continue
            if result is not None:
                self._graph.done(run, result)
            else:
                self._http.spawn(self._work(run))

    def _end_task(self, run: NodeRun) -> None:
        task = self._tasks.pop(run.node.id, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def _work(self, run: NodeRun) -> None:
        """Write or choose, or wait for a tool."""
        if run.is_over:
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks[run.node.id] = task
        try:
            if self._adapter or (isinstance(run.node, ir.Generate) and run.node.adapter):
                raise NotSupported(
                    "an endpoint's adapters are models of their own: name one as its model, not adapter="
                )
            if isinstance(run.node, ir.Generate):
                await self._generate(run, run.node)
            elif isinstance(run.node, ir.Select):
                await self._select(run, run.node)
            else:
                await asyncio.get_running_loop().create_future()  # until `provide` or a failure ends this task
        except asyncio.CancelledError:
            if not run.is_over:  # not stopped by the program, but because the loop is closing
                for one in self._graph.nodes:
                    self._graph.failed(one, ProgramCancelled("the backend was closed while this ran"))
        except Exception as error:
            self._graph.failed(run, error)
        finally:
            if self._tasks.get(run.node.id) is task:
                del self._tasks[run.node.id]
        self._pump()

    async def _generate(self, run: NodeRun, node: ir.Generate) -> None:
        prompt = self._prompt(node)
        sampling = self._graph.within_budget(run, ir.retry_sampling(node.sampling, len(run.attempts)))
        if sampling is None:
            return
        asked = msgspec.structs.replace(node, sampling=sampling)
        on_text = partial(self._take_in, run) if self._graph.wants_text(run) else None
        on_call = partial(self._graph.tell_call, run) if node.tells_calls else None
        written = await self._write(prompt, asked, self._graph.deadline, on_text, on_call)
        judged = self._graph.judge(run, written, partial(_tool_calls, written) if node.type == "tools" else None)
        if judged is not None:
            self._graph.done(run, judged)

    def _take_in(self, run: NodeRun, text: str) -> None:
        self._graph.say(run, text)
        if self._graph.wrote(run, text):
            self._pump()

    async def _select(self, run: NodeRun, node: ir.Select) -> None:
        choices = [self._graph.render(choice) for choice in node.choices]
        chosen = await self._choose(self._prompt(node), node, choices, self._graph.deadline)
        self._graph.done(run, msgspec.structs.replace(chosen, value=chosen.text, finish_reason=None))

    def _prompt(self, node: ir.AnyNode) -> Prompt:
        """Return the prompt of a node in an endpoint's form. Raises NotSupported if it has no such form."""
        messages: list[dict[str, Any]] = []
        tools: dict[str, dict[str, Any]] = {}
        unanswered: deque[str] = deque()  # ids of calls
        plain, is_open = "", False
        for one in self._graph.branch(node.parent):
            if isinstance(one, ir.Tools):
                tools |= {tool["function"]["name"]: tool for tool in json.loads(one.tools)}
            elif isinstance(one, ir.Role):
                is_open = one.is_open
                if is_open:
                    answers = {"tool_call_id": unanswered.popleft()} if one.role == "tool" and unanswered else {}
                    messages.append({"role": one.role, "content": "", **answers})
            elif isinstance(one, ir.Generate) and one.type == "tools" and is_open:
                value = self._graph.nodes[one.id].value
                messages[-1] |= _with_calls(messages[-1]["content"], value, one.id)
                unanswered.extend(call["id"] for call in messages[-1].get("tool_calls", ()))
            elif is_open:
                messages[-1]["content"] += self._graph.nodes[one.id].text
            else:
                plain += self._graph.nodes[one.id].text
        if messages and plain.strip():
            raise NotSupported(
                f"the text {plain.strip()[:40]!r} stands outside of the messages; an endpoint takes messages or text"
            )
        return Prompt(tuple(messages), plain, is_open, tuple(tools.values()))


def _mark(talk: object, opening: str, node: ir.Marked) -> tuple[object, str]:
    """Return no text for the border of a message, because an endpoint takes messages."""
    if isinstance(node, ir.Thinking):
        raise NotSupported("this endpoint doesn't say how its model thinks; use Engine or Remote")
    return talk, ""


def _with_calls(content: str, value: Mapping[str, Any], node: int) -> dict[str, Any]:
    """Return the fields of an assistant's message that calls tools. Ids are of nine characters, as Mistral wants."""
    calls = [
        {
            "id": f"{node % 10**6:06}{index % 1000:03}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
        }
        for index, call in enumerate(value["calls"])
    ]
    return {"content": content + value["text"], **({"tool_calls": calls} if calls else {})}


def _tool_calls(written: NodeResult, text: str) -> dict[str, Any]:
    """Return the value of a generation that may call tools. Raises ValueError for arguments that are no JSON object."""
    calls = []
    for call in written.value["calls"]:
        arguments = json.loads(call["arguments"])
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of {call['name']!r} are no JSON object")
        calls.append({"name": call["name"], "arguments": arguments})
    return {"text": written.value["text"], "calls": calls}
