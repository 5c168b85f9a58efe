"""Several models in one program: `backend={"small": engine, "big": "http://..."}`, and `gen(..., model="big")`.

Each model has a session of its own backend, with its share of the graph: the nodes that it writes and all that these
need. What another model writes stands there as a call of the caller (ir.ToolCall, `is_written`), which is answered once
that model is done. So nodes of one model follow each other without this process, and each model reads the branch in
its own chat template and tokens.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from ramet.errors import InvalidProgram
from ramet.lang.backends.protocol import Backend, Session
from ramet.lang.graph import ir
from ramet.lang.graph.events import OnEvent
from ramet.lang.graph.following import children_of, followers
from ramet.lang.graph.options import ProgramOptions

logger = logging.getLogger(__name__)


class Models(Backend):
    """Backends by the names of their models. The first one runs what names no model."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self.backends = dict(backends)
        # Answers from one model to another. Not on the thread of an event: it holds the lock of its own session.
        self.answers = ThreadPoolExecutor(1, "ramet-models")

    @property
    def first(self) -> str:
        return next(iter(self.backends))

    def start(self, options: ProgramOptions, on_event: OnEvent) -> ModelsSession:
        return ModelsSession(self, options, on_event)


@dataclass(slots=True)
class _Share:
    """One model's part of the graph. `new_id`: its number of a node of the whole graph; `old_id`: the way back."""

    session: Session
    new_id: dict[int, int] = field(default_factory=dict)
    old_id: list[int | None] = field(default_factory=list)  # None: it only marks that something follows
    asked: set[int] = field(default_factory=set)  # nodes that wait for an answer
    failure: ir.NodeEvent | None = None  # of a node that another model reports


class ModelsSession:
    """One running program. The first model's share is the whole graph; it reports what no model writes."""

    def __init__(self, models: Models, options: ProgramOptions, on_event: OnEvent) -> None:
        self._models, self._options, self._on_event = models, options, on_event
        self._nodes: list[ir.AnyNode] = []
        self._arguments: dict[str, ir.JsonValue] = {}
        self._shares: dict[str, _Share] = {}
        self._ended: dict[int, ir.NodeEvent] = {}  # of written nodes, and of nodes that failed
        self._provided: dict[int, tuple[Any, Exception | None]] = {}  # of tool calls; Any: JSON
        self._called: set[int] = set()  # tool calls that the caller knows of
        self._lock = threading.Lock()  # of the bookkeeping; no session is called under it

    def extend(self, graph: ir.Graph, *, is_last: bool = False) -> None:
        names = [self._writer(node) for node in graph.nodes]
        unknown = next((i for i, name in enumerate(names) if name not in self._models.backends), None)
        if unknown is not None:
            node, known = graph.nodes[unknown], ", ".join(self._models.backends)
            raise InvalidProgram(
                f"{node.kind_name} {node.label!r} ({node.line}) asks for model {names[unknown]!r}; known: {known}",
                program=self._options.program,
                node=node.id,
                source_line=node.line,
            )
        self._nodes.extend(graph.nodes)
        self._arguments |= graph.arguments
        children = children_of(graph.nodes)
        for name in self._models.backends:
            own = {node.id for node, writer in zip(graph.nodes, names, strict=True) if writer == name}
            is_first = name == self._models.first
            wanted = {node.id for node in graph.nodes} if is_first else self._needed(name, own)
            if not wanted:
                continue
            if name not in self._shares:
                session = self._models.backends[name].start(self._options, partial(self._take, name))
                self._shares[name] = _Share(session)
            share = self._shares[name]
            ends = [] if is_first else [child for node in own for child in followers(self._nodes[node], children)]
            part = self._part(name, wanted | self._needed(name, {n.id for n in ends if isinstance(n, ir.Text)}), ends)
            share.session.extend(part, is_last=is_last)

    def _writer(self, node: ir.AnyNode) -> str:
        return ir.model_of(node) or self._models.first

    def _needed(self, name: str, nodes: set[int]) -> set[int]:
        """Return these nodes and all that they need, as far as they are not in a model's share yet."""
        known = self._shares[name].new_id if name in self._shares else {}
        found, left = set[int](), list(nodes)
        while left:
            node = self._nodes[left.pop()]
            if node.id in found or node.id in known:
                continue
            found.add(node.id)
            left += ir.dependencies(node)
            if isinstance(node, ir.Fork):
                left += range(node.group, node.group + node.width)
            if isinstance(node, ir.Capture) and node.start is not None:
                left.append(node.start)
        return found

    def _part(self, name: str, wanted: set[int], ends: Sequence[ir.AnyNode]) -> ir.Graph:
        """Return the next part of a model's share. `ends`: nodes before which the values of its own nodes end."""
        share = self._shares[name]
        first, found = len(share.old_id), list[ir.AnyNode]()
        with self._lock:
            for old in sorted(wanted | {node.id for node in ends}):
                node, new = self._nodes[old], len(share.old_id)
                if old in wanted:
                    share.new_id[old] = new
                    found.append(ir.renumbered(self._seen_by(name, node), share.new_id))
                elif old not in share.new_id and node.parent in share.new_id:
                    found.append(ir.Text(id=new, parent=share.new_id[node.parent], parts=()))
                else:
                    continue
                share.old_id.append(old if old in wanted else None)
        arguments = {node.name for node in found if isinstance(node, ir.Argument)}
        return ir.Graph(tuple(found), {n: v for n, v in self._arguments.items() if n in arguments}, first)

    def _seen_by(self, name: str, node: ir.AnyNode) -> ir.AnyNode:
        """Return a node as this model sees it. What another one thought is not shown to it."""
        if not isinstance(node, ir.Generate | ir.Select | ir.Thinking):
            return node
        if self._writer(node) == name:
            return msgspec.structs.replace(node, model="")
        if isinstance(node, ir.Thinking) or ir.is_thinking(self._nodes, node):
            return ir.Text(id=node.id, parent=node.parent, line=node.line, parts=())
        what = f"model {self._writer(node)}"
        return ir.ToolCall(
            id=node.id, parent=node.parent, line=node.line, tool=what, arguments=("{}",), is_written=True
        )

    def cancel(self, nodes: Sequence[int] | None = None) -> None:
        for share in tuple(self._shares.values()):
            own = None if nodes is None else [share.new_id[node] for node in nodes if node in share.new_id]
            if own != []:
                share.session.cancel(own)

    def provide(self, node: int, value: Any = None, error: Exception | None = None) -> None:
        with self._lock:
            self._provided[node] = value, error
            asking = [share for share in self._shares.values() if node in share.asked]
        for share in asking:
            share.session.provide(share.new_id[node], value, error)

    def finish(self) -> None:
        for share in tuple(self._shares.values()):
            share.session.finish()

    # Events, on the threads of the backends.

    def _take(self, name: str, event: ir.NodeEvent) -> threading.Event | None:
        """Take an event of one model's session. Passes it on if this model is the one that reports the node."""
        share = self._shares[name]
        old = share.old_id[event.node]
        if old is None:
            return None
        node, event = self._nodes[old], msgspec.structs.replace(event, node=old)
        if event.kind == "tool":
            return self._asked(share, node, event)
        if self._writer(node) != name:
            if event.error is not None and not event.error.is_cancelled and old not in self._ended:
                share.failure = share.failure or event
            return None
        if share.failure is not None and event.error is not None and event.error.is_cancelled:
            event = msgspec.structs.replace(event, error=share.failure.error, cause=share.failure.cause)
        is_told = event.kind == "error" or (event.kind == "done" and node.run_by == "model")
        if is_told:
            with self._lock:
                self._ended[old] = event
                asking = [one for one in self._shares.values() if one is not share and old in one.new_id]
        rests = self._on_event(event)
        for one in asking if is_told else ():
            if event.kind == "error" or old in one.asked:
                self._models.answers.submit(self._answer, one, event)
        return rests

    def _asked(self, share: _Share, node: ir.AnyNode, event: ir.NodeEvent) -> threading.Event | None:
        """Note that a session waits for a tool, or for what another model writes."""
        with self._lock:
            share.asked.add(node.id)
            provided, ended = self._provided.get(node.id), self._ended.get(node.id)
            is_news = isinstance(node, ir.ToolCall) and node.id not in self._called
            self._called.add(node.id)
        if ended is not None:
            self._models.answers.submit(self._answer, share, ended)
        elif provided is not None:
            self._models.answers.submit(self._provide, share, node.id, *provided)
        return self._on_event(event) if is_news else None

    def _answer(self, share: _Share, event: ir.NodeEvent) -> None:
        """Tell a session how a node of another one ended."""
        if event.error is not None and event.kind == "error":
            self._provide(share, event.node, None, event.cause or InvalidProgram(event.error.message))
            return
        shown = ir.shown_text(self._nodes[event.node], event.text)
        self._provide(share, event.node, {"text": event.text, "value": event.value, "shown": shown}, None)

    def _provide(self, share: _Share, node: int, value: Any, error: Exception | None) -> None:  # Any: JSON
        try:
            share.session.provide(share.new_id[node], value, error)
        except Exception:  # nobody looks at this thread; without the answer, the session would wait for ever
            logger.exception("the answer for node %d did not reach a model's session; the program is cancelled", node)
            self.cancel()
