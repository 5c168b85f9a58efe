"""One run of a program: records nodes, submits them when a value is needed, and reads their values.

All branches of the program share the run. The program's own threads record; events come from the backend's threads.
Not here: waiting for events (outcomes.py), recording a branch (lang/recording).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

import ramet.errors
from ramet.errors import CheckFailed, DeadlineExceeded, InvalidProgram, ProgramCancelled, ProgramError
from ramet.lang.backends.protocol import Backend, Session, block_backend
from ramet.lang.graph import ir
from ramet.lang.graph.options import ProgramOptions
from ramet.lang.graph.run_record import RunRecord, Stage
from ramet.lang.graph.written_json import WrittenJson
from ramet.lang.running.outcomes import Outcomes
from ramet.lang.running.output_types import OutputType
from ramet.lang.running.placeholders import Placeholders
from ramet.lang.running.source_lines import caller_line
from ramet.lang.running.tool_runner import ToolRunner
from ramet.lang.running.turns import together

current_run: ContextVar[Run | None] = ContextVar("ramet_current_run", default=None)
T = TypeVar("T")
_GRACE_S = 0.5  # time after a deadline for the backend to report the nodes that it ended


class Run:
    """The nodes of one run and their outcomes. Owner: the call of a program that made it.

    `nodes`: the recorded nodes. `index`: the submitted ones. `stages`: the stops where a value was needed. `parent`:
    the run of the enclosing program, or the one that this one continues, if there is one. `is_continued`: no function
    records it any more, so what is read from it is the value itself.
    """

    def __init__(
        self,
        backend: Backend | None,
        options: ProgramOptions,
        *,
        seed: int | None = None,
        stage_always: bool = False,
        keep_events: bool = False,
        tools: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
        graph: ir.Graph | None = None,
        placeholders: Placeholders | None = None,
        is_continued: bool = False,
    ) -> None:
        """`stage_always`: wait after each generation and the text that ends its value.

        `keep_events`: keep all events for later listeners.
        `graph`: the recorded nodes and the arguments of a compiled program, or the text of a branch that goes on.
        `placeholders`: those in its texts. `is_continued`: no function records it.
        """
        self.options = options
        self.seed = seed
        self.stage_always = stage_always
        self.placeholders = placeholders or Placeholders()
        self.parent = current_run.get()
        self.is_continued = is_continued
        self.index = ir.GraphIndex()  # submitted nodes
        self.nodes: list[ir.AnyNode] = list(graph.nodes) if graph else []  # recorded nodes
        self.stages: list[Stage] = []
        self.arguments: dict[str, Any] = dict(graph.arguments) if graph else {}  # JSON values of Argument nodes
        self.is_recording = True
        self.returned: Any = None  # the result of the program's function, its values not read
        self.tools = ToolRunner(tools)
        self._backend = backend
        self._session: Session | None = None
        self.outcomes = Outcomes(keep_events=keep_events)
        self._lock = threading.Lock()  # of recording and submitting
        self._converted: dict[int, Any] = {}  # node -> its value in its Python type
        self._told: set[tuple[str, str]] = set()  # errors of nodes that were raised in whoever read a value
        self._given_up: set[int] = set()  # nodes of branches that the program has cancelled
        self._attempts: dict[int, list[dict[str, str]]] = {}  # node -> texts refused before it by checks in Python
        self._waits: dict[object, tuple[str, int | None, float]] = {}  # line, node, since when; None: several nodes
        self._staged: int | None = None  # the generation that `stage_always` waits for before the next node
        self._held_back: list[Callable[[], None]] = []  # each records the text that a branch holds back

    # Recording.

    @contextmanager
    def recording(self, *, stays_open: bool = False) -> Iterator[None]:
        """Record the run while the program's function runs in the block. An error in the block ends the run.

        `stays_open`: the run goes on after the block.
        """
        token = current_run.set(self)
        block = block_backend.set(self._backend or block_backend.get())  # programs that run inside use it, too
        try:
            yield
            self.is_continued = stays_open
            if not stays_open:
                self.finish()
        except BaseException:
            self.is_recording = False
            self.outcomes.rests.set()
            self.cancel()
            raise
        finally:
            block_backend.reset(block)
            current_run.reset(token)

    def record(
        self, kind: Callable[..., ir.AnyNode], parent: int | None, line: str | None = None, **fields: Any
    ) -> int:  # Any: the node's own fields
        """Append a node, and return its id. `line` None: the current line of the program."""
        if kind not in (ir.Text, ir.Capture, ir.Join):  # these may end the value of a generation: see following.py
            self._wait_for_staged()
        with self._lock:
            node = len(self.nodes)
            self.nodes.append(kind(id=node, parent=parent, line=line or caller_line(), **fields))
        return node

    def record_fork(self, parent: int | None, width: int, *, is_race: bool = False) -> list[int]:
        """Append the Fork nodes of all branches of one fork, and return their ids."""
        self._wait_for_staged()
        line = caller_line()
        with self._lock:
            group = len(self.nodes)
            for index in range(width):
                fork = ir.Fork(
                    id=group + index, parent=parent, line=line, group=group, index=index, width=width, is_race=is_race
                )
                self.nodes.append(fork)
        return list(range(group, group + width))

    def stage(self, node: int) -> None:
        """Let the run wait for a generation before it goes on, if it waits for each of them."""
        if self.stage_always:
            self._wait_for_staged()
            self._staged = node

    def _wait_for_staged(self) -> None:
        node, self._staged = self._staged, None
        if node is not None:
            self.read_quietly(node)

    def before_end(self, record: Callable[[], None]) -> None:
        """Call `record` before the run ends, because a branch holds text back."""
        self._held_back.append(record)

    @property
    def backend(self) -> Backend:
        """The backend that runs the nodes; a trace has none."""
        assert self._backend is not None, "a trace has no backend"
        return self._backend

    def submit(self, *, is_last: bool = False) -> None:
        """Send the nodes recorded since the last call. Raises InvalidProgram, or the backend's error.

        Raises the failure of the run if there is one: a cancelled run starts nothing more.
        """
        with self._lock:
            first = len(self.index.nodes)
            if len(self.nodes) == first:
                return
            self.outcomes.check_alive()
            nodes = tuple(self.nodes[first:])
            names = {node.name for node in nodes if isinstance(node, ir.Argument)}
            graph = ir.Graph(nodes, {n: v for n, v in self.arguments.items() if n in names}, first)
            self.index.add(graph)
        if self._session is None:
            self._session = self.backend.start(self.options, self.on_event)
        self._session.extend(graph, is_last=is_last)
        if self.outcomes.failure is not None:  # it was cancelled meanwhile, when there was no session to cancel
            self._session.cancel()

    def attach(self, session: Session, index: ir.GraphIndex) -> None:
        """Use a session that already has all recorded nodes, which are in `index` (it may be shared).

        For a compiled batch.
        """
        self.index = index
        self._session = session
        self.is_recording = False

    # Reading.

    def read(self, node: int, output: OutputType, why: str) -> Any:
        """Return the value of a node in its Python type; submits and waits. Raises ProgramError."""
        self.read_quietly(node, why)
        return self._value(node, output)

    async def aread(self, node: int, output: OutputType) -> Any:
        """`read` for an event loop."""
        await self.aread_quietly(node, "await")
        return self._value(node, output)

    def can_follow(self, node: int) -> bool:
        """Return whether the JSON of a generation can be read while it is written, and see to it that it can."""
        with self._lock:
            found = self.nodes[node]
            if self.outcomes.is_followed(node) or node in self.outcomes:
                return node not in self.outcomes
            is_sent = node < len(self.index.nodes)
            if is_sent or self._backend is None or self.stage_always or not isinstance(found, ir.Generate):
                return False
            if not found.is_readable_early:
                return False
            self.nodes[node] = msgspec.structs.replace(found, tells_text=True)
            self.outcomes.follow(node)
        return True

    def written(self, node: int, why: str) -> Iterator[WrittenJson]:
        """Yield the JSON of a generation that can be followed, at each piece, until it is whole or has failed."""
        json, size = WrittenJson(), 0

        def has_more(known: int) -> bool:
            return node in self.outcomes or len(self.outcomes.text_of(node)) > known

        self.need(node, why)
        while node not in self.outcomes:
            text = self.outcomes.text_of(node)
            if len(text) == size:
                self.wait(partial(has_more, size), node)
                continue
            json.push(text[size:])
            size = len(text)
            yield json

    def read_text(self, text: str) -> str:
        """Return the text with every placeholder replaced by its value."""
        return "".join(self.text_of_item(item) for item in self.placeholders.split(text, self.foreign))

    def read_placeholder(self, index: int) -> str:
        """Return the text that replaces a placeholder of this run."""
        return self.text_of_item(self.placeholders.get(index))

    def text_of_item(self, item: object) -> str:
        """Return the text of a part of a text: itself, or the value that a reference names."""
        if isinstance(item, str):
            return item
        if not isinstance(item, ir.Ref):
            raise InvalidProgram(f"{item!r} is in a text whose value is needed; append the text to the state first")
        self.read_quietly(item.node, "a text with this value in it")
        event = self._checked(item.node)
        value = event.value
        text = ir.shown_text(self.nodes[item.node], event.text) or ir.value_text(value)
        return ir.render((item,), lambda _: text, lambda _: value)

    def foreign(self, key: bytes, index: int) -> object:
        """Return the text of another run's placeholder. Only enclosing runs can be asked."""
        run = self.parent
        while run is not None:
            if run.placeholders.key == key:
                return run.read_placeholder(index)
            run = run.parent
        raise InvalidProgram("a text holds a value of another program that is not running here; use its .value")

    def _value(self, node: int, output: OutputType) -> Any:
        event = self._checked(node)
        if node not in self._converted:
            try:
                read = output.from_event
                self._converted[node] = output.convert(event.value) if read is None else read(event)
            except Exception as error:  # any error of a type's own validation
                raise self._error(node, f"its text is no {output.wire} of the wanted type: {error}", error) from error
        return self._converted[node]

    def _checked(self, node: int) -> ir.NodeEvent:
        error = self.error_of(node)
        if error is not None:
            raise error
        return self.outcomes[node]

    def error_of(self, node: int) -> ProgramError | None:
        """Return the error of a failed node, or None."""
        event = self.outcomes.get(node)
        if event is None or event.error is None:
            return None
        return self._error(node, event.error.message, event.cause, event.error)

    def _error(
        self, node_id: int, message: str, cause: Exception | None, error: ir.NodeError | None = None
    ) -> ProgramError:
        node = self.nodes[node_id]
        what = f"{node.kind_name} {node.label!r}" if node.label else node.kind_name
        tail = error.prompt_tail if error else ""
        if isinstance(node, ir.ToolCall) and error is not None:
            what, message = f"tool {node.tool!r}", f"{error.type}: {message}"
        if error is not None:
            self._told.add((error.type, error.message))
        text = f"{self.options.program}: {what} (node {node_id}, {node.line or 'unknown line'}) failed: {message}"
        if tail:
            text += f"; the prompt ends with {tail[-60:]!r}"
        known = getattr(ramet.errors, error.type, ProgramError) if error else ProgramError
        is_of_programs = isinstance(known, type) and issubclass(known, ProgramError)
        kind: type[ProgramError] = known if is_of_programs and known is not InvalidProgram else ProgramError
        raised = kind(text, program=self.options.program, node=node_id, source_line=node.line or None, prompt_tail=tail)
        if cause is None and not is_of_programs and error is not None:
            cause = ramet.errors.from_name(error.type, error.message)
        raised.__cause__ = cause
        if isinstance(raised, CheckFailed):
            raised.attempts = tuple(self.attempts_of(node_id))
        return raised

    def note_attempts(self, node: int, attempts: list[dict[str, str]]) -> None:
        """Note the texts that were refused before generation `node` was recorded, because of a check in Python."""
        self._attempts[node] = attempts

    def attempts_of(self, node: int) -> list[dict[str, str]]:
        """Return a generation's refused texts, each with its `text` and the `problem`."""
        event = self.outcomes.get(node)
        found: list[dict[str, str]] = (event.meta or {}).get("attempts", []) if event is not None else []
        return [*self._attempts.get(node, ()), *found]

    def need(self, node: int, why: str) -> None:
        """Note that the program needs a value that does not exist yet, and so will wait for it."""
        if self.is_recording:
            self.note_stage(node, why)

    def note_stage(self, node: int, why: str) -> Stage:
        self.stages.append(Stage(caller_line(), why, self._value_name(node), len(self.nodes)))
        return self.stages[-1]

    # Waiting.

    def together(self, body: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
        """Make calls that take turns where they wait; one after the other if the run waits for each generation."""
        return [body(*one) for one in zip(*arguments, strict=True)] if self.stage_always else together(body, *arguments)

    def event(self, node: int) -> ir.NodeEvent:
        """Return the last event of a node; submits and waits. Raises ProgramError if the node failed."""
        self.read_quietly(node)
        return self._checked(node) if self.outcomes[node].kind == "error" else self.outcomes[node]

    def read_quietly(self, node: int, why: str = "reading") -> None:
        """Submit, and wait until the node is done or failed. Raises the exception that ended the program's function."""
        self.check_function()
        if node not in self.outcomes:
            self.need(node, why)
            self.wait(lambda: node in self.outcomes, node)

    async def aread_quietly(self, node: int, why: str) -> None:
        """`read_quietly` for an event loop."""
        self.check_function()
        if node not in self.outcomes:
            self.need(node, why)
            await self._until(lambda: node in self.outcomes, node)

    def pick(self, values: Sequence[T], choose: Callable[[], tuple[int, T]]) -> tuple[int, T]:
        """Choose one of several branches that differ in nothing but their `values`. Returns its index and value."""
        return choose()

    def first_done(self, nodes: list[int]) -> int:
        """Wait until one of these nodes is done, and return its index. If all fail, raises the first one's error."""

        def done() -> list[int]:
            return [i for i, node in enumerate(nodes) if node in self.outcomes and self.outcomes[node].kind == "done"]

        self.need(nodes[0], "the first branch that is done")
        self.wait(lambda: bool(done()) or all(node in self.outcomes for node in nodes))
        found = done()
        failed = [error for node in nodes if (error := self.error_of(node)) is not None]
        if not found:
            raise failed[0] if failed else InvalidProgram("no branch is done")
        return found[0]

    def wait_all(self, *, quietly: bool = False) -> None:
        """Submit, and wait until every node is done or failed. `quietly`: return at once if the run has failed."""
        if quietly and self.outcomes.failure is not None:
            return
        self.submit()  # raises for bad nodes, even if nothing else is to be waited for
        self.wait(self.is_done)

    async def await_all(self) -> None:
        await self._until(self.is_done)

    def usage(self) -> ir.Usage:
        """Return the token counts of all nodes that are done."""
        total = ir.Usage()
        for event in self.outcomes.copy().values():
            if event.usage is not None:
                total = total + event.usage
        return total

    def first_error(self) -> ProgramError | None:
        """Return the run's first error, the cause of later ones, or None. Cancellations by the program don't count."""
        for event in self.outcomes.copy().values():
            if event.error is not None and not event.error.is_cancelled:
                return self.error_of(event.node)
        failure = self.outcomes.failure
        if failure is None or isinstance(failure, ProgramError):
            return failure
        error = ProgramError(
            f"{self.options.program}: its function raised {type(failure).__name__}: {failure}",
            program=self.options.program,
        )
        error.__cause__ = failure
        return error

    def check(self) -> None:
        """Raise the first error of the run, unless its program read the value, or cancelled the branch, and went on."""
        for event in self.outcomes.copy().values():
            if event.error is None or event.error.is_cancelled:
                continue
            told = (event.error.type, event.error.message)
            if event.node in self._given_up:
                self._told.add(told)  # those that needed this node have its error
            if told not in self._told:
                self._checked(event.node)
        self.check_function()

    def check_function(self) -> None:
        """Raise the exception that ended the program's function, if it was kept for those who read the state."""
        failure = self.outcomes.failure
        if failure is not None and not isinstance(failure, ProgramCancelled):
            raise failure

    def is_done(self) -> bool:
        """Return whether every submitted node is done or failed."""
        return len(self.outcomes) == len(self.index.nodes)

    def wait(self, ready: Callable[[], bool], node: int | None = None) -> None:
        """Submit what is recorded, and wait until `ready()`. `node`: the one whose end makes it ready; None: several.

        Raises if the deadline passed and `ready` stays false after all nodes have failed.
        """
        with self._noted(node):
            while not self.outcomes.wait(ready, self._time_left, node, self._submit_and_rest):
                self._expire(ready)

    def _submit_and_rest(self) -> None:
        try:
            self.submit()
        finally:
            self.outcomes.rests.set()

    async def _until(self, ready: Callable[[], bool], node: int | None = None) -> None:
        self.submit()
        with self._noted(node):
            while not await self.outcomes.until(ready, self._time_left, node):
                self._expire(ready)

    @contextmanager
    def _noted(self, node: int | None) -> Iterator[None]:
        """Note in the block which line of the program waits."""
        key = object()
        self._waits[key] = (caller_line(), node, time.monotonic())
        try:
            yield
        finally:
            del self._waits[key]

    def where(self) -> list[str]:
        """Return the lines that wait, the nodes that run, and how many nodes are not sent yet, as sentences."""
        now, waits, sent = time.monotonic(), tuple(self._waits.values()), len(self.index.nodes)
        found = [
            f"{line} has waited {now - since:.1f} s for {'several values' if node is None else self._value_name(node)}"
            for line, node, since in waits
        ]
        for node in self.nodes[:sent]:
            is_begun = all(one in self.outcomes for one in ir.dependencies(node))
            if node.id not in self.outcomes and is_begun:
                found.append(
                    f"{self._value_name(node.id)} of {node.line or 'an unknown line'} runs, or waits for its turn"
                )
        left = len(self.nodes) - sent
        return [*found, f"{left:,} recorded nodes are not sent yet"] if left else found

    def _value_name(self, node: int) -> str:
        found = self.nodes[node]
        return f"{found.kind_name} {found.label!r}" if found.label else f"{found.kind_name} (node {node})"

    def _time_left(self) -> float | None:
        deadline = self.options.deadline_s
        return None if deadline is None else max(0.0, deadline - time.monotonic()) + _GRACE_S

    def _expire(self, ready: Callable[[], bool]) -> None:
        """Fail the unfinished nodes, because the deadline passed and the backend did not report it."""
        with self._lock:
            late = [node for node in range(len(self.index.nodes)) if node not in self.outcomes]
        for node in late:  # before the backend is told, because it would report them as cancelled
            error = ir.NodeError("DeadlineExceeded", "the deadline passed, and the backend did not answer")
            self.on_event(ir.NodeEvent(node, "error", error=error))
        self.tools.cancel()
        if self._session is not None:
            self._session.cancel()
        if not ready():
            raise DeadlineExceeded(f"{self.options.program}: the deadline passed", program=self.options.program)

    def cancel(self, nodes: list[int] | None = None) -> None:
        """Stop the run, or these nodes and all that need them."""
        if nodes is not None:
            self._given_up.update(nodes)
            self.submit()
        else:
            cancelled = ProgramCancelled(f"{self.options.program} was cancelled", program=self.options.program)
            self.outcomes.fail(self.outcomes.failure or cancelled)
            self.tools.cancel()
        if self._session is not None:
            self._session.cancel(nodes)
        self.outcomes.wake_all()

    # Events, on the backend's threads.

    def on_event(self, event: ir.NodeEvent) -> threading.Event | None:
        """Take an event of a node (see OnEvent). Backends call this."""
        if event.kind == "tool":
            self._call_tool(event)
        elif event.kind == "call" and self.outcomes.failure is None:
            call = event.value
            self.tools.begin((event.node, call["index"]), call["tool"], call["arguments"])
        elif event.kind == "error":
            self.tools.drop(event.node)
        self.outcomes.put(event)
        return self.outcomes.rests if self.is_recording and not self.outcomes.rests.is_set() else None

    def _call_tool(self, event: ir.NodeEvent) -> None:
        session = self._session
        assert session is not None

        def done(result: Any, error: Exception | None) -> None:
            session.provide(event.node, result, error)

        self.tools.call(self._call_of(event.node), event.value["tool"], event.value["arguments"], done)

    def _call_of(self, node: int) -> tuple[int, int]:
        """Return the message and the index of the call that a ToolCall node makes, or the node itself and 0."""
        for ref in ir.refs(self.nodes[node]):
            if ref.path[:1] == ("calls",) and isinstance(index := ref.path[1], int):
                return ref.node, index
        return node, 0

    def finish(self) -> None:
        """Send the rest; no more nodes will be recorded."""
        try:
            for record in self._held_back:
                record()
            self.submit(is_last=True)
        finally:
            self.is_recording = False
            self.outcomes.rests.set()
        if self._session is not None:
            self._session.finish()

    # Texts.

    def text_of(self, tip: int | None, start: int | None = None) -> str:
        """Return the text of the branch that ends at `tip`, after node `start`. Waits for it. Raises ProgramError."""
        self.check_function()
        ids: list[int] = []
        while tip is not None and tip != start:
            ids.append(tip)
            tip = self.nodes[tip].parent
        missing = [node for node in ids if node not in self.outcomes]
        if missing:
            self.need(missing[-1], "the text so far")

            def is_there() -> bool:
                while missing and missing[-1] in self.outcomes:
                    missing.pop()
                return not missing

            self.wait(is_there)
        failed = [self.outcomes[node] for node in reversed(ids) if self.outcomes[node].kind == "error"]
        for event in sorted(failed, key=lambda e: e.error is not None and e.error.is_cancelled):
            self._checked(event.node)
        return "".join(self.outcomes[node].text for node in reversed(ids))

    def report(self) -> RunRecord:
        """Return the record of the run so far."""
        with self._lock:
            graph = ir.Graph(tuple(self.nodes), dict(self.arguments))
            attempts = {node.id: tuple(found) for node in self.nodes if (found := self.attempts_of(node.id))}
            return RunRecord(self.options.program, graph, self.outcomes.copy(), tuple(self.stages), attempts)

    def successor(self, graph: ir.Graph) -> Run:
        """Return the run of a branch that goes on after the end of this one. `graph`: the branch's text.

        Raises InvalidProgram if this run failed or was cancelled, or was a trace.
        """
        name, options = self.options.program, self.options
        if self.outcomes.failure is not None or self._backend is None:
            what = "was only traced" if self._backend is None else "has failed, or was cancelled"
            raise InvalidProgram(f"the program {what}; nothing can be appended to its state", program=name)
        options = ProgramOptions(
            name, priority=options.priority, cache_salt=options.cache_salt, adapter=options.adapter
        )
        found = Run(self._backend, options, seed=self.seed, graph=graph, is_continued=True)
        found.parent, found.returned = self, self.returned
        return found

    def transcript(self, tip: int | None) -> ir.Graph:
        """Return the graph of a branch's text, without what wrote it. Waits for it; raises ProgramError.

        The token path is in it, if `note_path` asked for it.
        """
        self.text_of(tip)
        path, nodes = self.path(tip), list[ir.AnyNode]()
        last = _last_border(path)
        paths = (one for one in reversed(self.nodes) if isinstance(one, ir.Capture) and one.of == "tokens")
        asked = next((one for one in paths if one.parent == last), None)

        def add(node: ir.AnyNode) -> None:
            parent = len(nodes) - 1 if nodes else None
            nodes.append(msgspec.structs.replace(node, id=len(nodes), parent=parent))

        for node in path:
            text = self.outcomes[node.id].text
            if isinstance(node, ir.Role | ir.Tools | ir.Thinking):
                add(node)
            elif text:
                add(ir.Text(id=0, line=node.line, parts=(text,)))
            if node.id == last:
                recalled = None if asked is None else self.event(asked.id).value
                if recalled is not None:
                    add(ir.Recalled(id=0, line=node.line, path=msgspec.convert(recalled, ir.WrittenPath)))
                elif isinstance(node, ir.Recalled):
                    add(node)
        return ir.Graph(tuple(nodes))

    def note_path(self, tip: int | None) -> None:
        """Ask for the token path of the branch that ends at `tip`, up to the text that is not tokenised yet."""
        last = _last_border(self.path(tip))
        if last is not None:
            self.record(ir.Capture, last, of="tokens")

    def path(self, tip: int | None) -> list[ir.AnyNode]:
        """Return the nodes of the branch that ends at `tip`, root first."""
        found: list[ir.AnyNode] = []
        while tip is not None:
            found.append(self.nodes[tip])
            tip = self.nodes[tip].parent
        return found[::-1]

    def messages_of(self, tip: int | None) -> list[dict[str, str]]:
        """Return the messages of the branch that ends at `tip`. Text outside of roles has the role `text`. Waits."""
        self.text_of(tip)
        found: list[dict[str, str]] = []
        is_inside = False
        for node in self.path(tip):
            if isinstance(node, ir.Role):
                is_inside = node.is_open
                if is_inside:
                    found.append({"role": node.role, "content": ""})
                continue
            event = self.outcomes.get(node.id)
            text = event.text if event is not None else ""
            if text and not is_inside and (not found or found[-1]["role"] != "text"):
                found.append({"role": "text", "content": ""})
            if text:
                found[-1]["content"] += text
        return found

    def _thinking(self, node: int) -> dict[str, str]:
        event = self.outcomes.get(node)
        return {"thinking": (event.text or "").strip() if event is not None else ""}

    def meta_of(self, node: int) -> dict[str, Any]:
        """Return the details of a node that has a value: `text`, `usage`, `timings`, and more by kind. Waits for it."""
        event = self.event(node)
        return {
            "text": event.text,
            "usage": event.usage,
            "finish_reason": event.finish_reason,
            "timings": event.timings or {},
            **(event.meta or {}),
            **({} if (thought := ir.thinking_of(self.nodes, self.nodes[node])) is None else self._thinking(thought)),
            **({"attempts": self.attempts_of(node)} if node in self._attempts else {}),
        }


def _last_border(path: list[ir.AnyNode]) -> int | None:
    """Return the last node of a branch behind which text is not tokenised yet."""
    return next((node.id for node in reversed(path) if node.is_border or isinstance(node, ir.Recalled)), None)
