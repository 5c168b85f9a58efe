"""The state of a program: the user's interface to one branch of its text, and to the branches of one fork.

    s += "text"; s += gen("x"); s += user("..."); with s.assistant(): ...
    a, b = s.fork(2); s.join(a, b); s["x"]; s.text(); s.messages(); s.meta("x")

Appending records nodes, through the branch's recorder (recorder.py). Reading a value waits for it (run.py).
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

from ramet.errors import CheckFailed, InvalidProgram, ProgramError, UndefinedVariable
from ramet.lang import explain as explanations
from ramet.lang.backends.default import choose_backend
from ramet.lang.graph import ir
from ramet.lang.graph.run_record import RunRecord
from ramet.lang.recording.continuing import loaded, saved
from ramet.lang.recording.generations import Gen, SelectExpr
from ramet.lang.recording.primitives import gen
from ramet.lang.recording.recorder import Appendable, Chain, Recorder
from ramet.lang.recording.tool_loop import adrive, drive, tool_loop
from ramet.lang.running.output_types import Kind
from ramet.lang.running.run import Run
from ramet.lang.running.tools import Tool, as_tools
from ramet.lang.running.values import V, Value, plain, source_of

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    R = TypeVar("R", default=Any)  # what the program's function returns
else:  # defaults came with Python 3.13
    from typing import TypeVar

    R = TypeVar("R")
T = TypeVar("T")


class State(Generic[R]):
    """One branch. Running a program creates the first; `fork` and `copy` create others.

    `recorder`: records the branch; programs don't need it.
    """

    __slots__ = ("recorder",)

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    # Appending.

    def __iadd__(self, other: Appendable) -> State[R]:
        self.recorder.append(other)
        return self

    def __add__(self, other: Appendable) -> State[R]:
        raise TypeError(f"a state plus a {type(other).__name__} appends nothing; write s += ..., or s.append(...)")

    @overload
    def append(self, item: Gen[V], *, prefix: None = None) -> Value[V]: ...
    @overload
    def append(self, item: SelectExpr, *, prefix: None = None) -> Value[str]: ...
    @overload
    def append(self, item: Appendable, *, prefix: str | None = None) -> Value | None: ...
    def append(self, item: Appendable, *, prefix: str | None = None) -> Value | None:
        """Append text, a value, a description (`gen`, ...), or several of them.

        Returns the value of a `gen` or a `select`, also of one without a name: `n = s.append(gen("n", int))`.

        `prefix="late"`: this text may be moved past the text that follows it, up to the next generation, selection or
        fork, or the end of its message. Calls that differ in this text then share the text that followed it.
        """
        if prefix is not None:
            self.recorder.hold_late(item, prefix)
        elif isinstance(item, Gen | SelectExpr):
            return Value(item.record(self.recorder))
        else:
            self.recorder.append(item)
        return None

    # Going on after the end of the program.

    def say(self, text: Appendable, name: str = "answer", type: Kind | None = None, **options: Any) -> Any:
        """Append a user message and an answer of the model, and return the answer. `options`: as `gen` takes them."""
        self.recorder.append(Chain((text,), "user"))
        self.recorder.append(Chain((gen(name, type, **options),), "assistant"))
        return self[name]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this branch to a file: its text, its variables as JSON, and its tokens, if it is open. Waits for it."""
        Path(path).write_bytes(saved(self.recorder))

    @staticmethod
    def load(path: str | os.PathLike[str], backend: object | None = None) -> State:
        """Return the branch of a file, open to go on. The cache of the same model may have its prefix."""
        return State(loaded(Path(path).read_bytes(), choose_backend(backend)))

    def close(self) -> None:
        """End an open run (Function.start, load). It goes on in another one if something is appended."""
        if self.recorder.run.is_recording:
            self.recorder.run.finish()

    # Roles.

    def system(self, *content: Appendable) -> RoleBlock:
        """Append a system message: `s.system("...")`, or `with s.system(): s += ...`."""
        return self._message("system", content)

    def user(self, *content: Appendable) -> RoleBlock:
        """Append a user message."""
        return self._message("user", content)

    def assistant(self, *content: Appendable) -> RoleBlock:
        """Append an assistant message."""
        return self._message("assistant", content)

    def tool(self, *content: Appendable) -> RoleBlock:
        """Append a message with a tool's result."""
        return self._message("tool", content)

    def _message(self, role: str, content: tuple[Appendable, ...]) -> RoleBlock:
        if content:
            self.recorder.append(Chain(content, role))
        return RoleBlock(self, role, is_used=bool(content))

    # Tools.

    def use_tools(self, tools: Sequence[Tool | Callable[..., Any]]) -> None:
        """Declare tools to the model. Before the first message, the chat template shows them in its own way."""
        self.recorder.use_tools(as_tools(tools))

    def call_tools(
        self,
        tools: Sequence[Tool | Callable[..., Any]] | None = None,
        *,
        max_steps: int = 8,
        name: str = "answer",
        calls: str = "calls",
        choice: str = "auto",
        parallel: bool = True,
        on_error: Literal["raise", "report"] = "raise",
        model: str = "",
        **sampling: Any,  # Any: sampling values, which are checked
    ) -> Value:
        """Let the model call tools and read their results until it answers; returns the answer's text.

        Writes assistant and tool messages. `tools` None: those declared before (`use_tools`, `@function(tools=...)`).
        After `max_steps` rounds of calls the model must answer. `name`: the variable of the answer. `calls`: the
        variable of the list of ToolUse (name, arguments, result). `choice`: "auto", "required", or the name of a tool
        that must be called first. `parallel`: allow several calls in one message, which run at once. `on_error`: a
        tool's failure ends the program ("raise"), or the model reads the error ("report"). `model`: as in `gen`. Waits
        for the model's calls;
        use `branches.call_tools` for the loops of many branches at once.
        """
        loop = tool_loop(
            self.recorder,
            tools,
            max_steps=max_steps,
            name=name,
            calls=calls,
            choice=choice,
            parallel=parallel,
            on_error=on_error,
            model=model,
            **sampling,
        )
        return drive(self.recorder.run, loop)

    async def acall_tools(self, tools: Sequence[Tool | Callable[..., Any]] | None = None, **options: Any) -> Value:
        """`call_tools` for `async def` programs. Async tools run on their event loop."""
        loop = tool_loop(self.recorder, tools, loop=asyncio.get_running_loop(), **options)
        return await adrive(self.recorder.run, loop)

    # Branches.

    def fork(self, n: int = 1) -> Branches:
        """Split into `n` branches that continue from here and share everything so far. This state continues as well."""
        return Branches(self, [State(branch) for branch in self.recorder.fork(n)])

    def spawn(self) -> State:
        """Return a branch of this run that shares nothing: for a program beside this one, `ask(s.spawn(), "...")`.

        Its requests run together with the others' of the run, in the same graph; `ask.run("...")` would be waited for.
        """
        return State(self.recorder.spawn())

    def copy(self) -> State:
        """Return one branch that continues from here. It can also be used in a `with` block."""
        return self.fork(1)[0]

    def join(self, *branches: State | Iterable[State], mode: str = "gather") -> None:
        """Join branches: every variable that they wrote becomes a list here, in the order of the branches.

        `mode="append"` also appends the text of each branch.
        """
        states = [one for item in branches for one in ([item] if isinstance(item, State) else item)]
        self.recorder.join([state.recorder for state in states], mode)

    def map(self, items: Iterable[Any], body: Callable[[State, Any], object]) -> Branches:
        """Fork one branch for each item, and call `body(branch, item)`, which appends to it.

        A body that reads a value waits alone: the others go on (Branches.each). A generated list of texts, integers or
        booleans is followed while the model writes it: a branch starts as soon as its item is there.
        """
        followed = source_of(items).items("map") if isinstance(items, Value) else None
        if followed is not None:
            return self._map_followed(followed, body)
        rows = list(items)
        branches = self.fork(len(rows)) if rows else Branches(self, [])
        self.recorder.run.together(body, branches, rows)
        return branches

    def _map_followed(self, items: Iterable[Any], body: Callable[[State, Any], object]) -> Branches:
        states: list[State] = []

        def begun() -> Iterator[State]:
            for branch, item in self.recorder.fork_for(items):
                states.append(State(branch))
                values.append(item)
                yield states[-1]

        values: list[Any] = []
        self.recorder.run.together(lambda state: body(state, values[state.recorder.place[-1]]), begun())
        return Branches(self, states)

    def best_of(self, n: int, item: Appendable, by: Callable[[State], float]) -> State:
        """Append `item` on `n` branches, continue as the one with the highest `by(branch)`, and return that branch.

        `by` may return a generated value without reading it; then all branches are judged at once.
        """
        branches = self.fork(n)
        branches += item
        self.recorder.run.submit()
        scores = [by(branch) for branch in branches]  # generated ones run together

        def highest() -> tuple[int, Any]:
            found = plain(scores)
            return found.index(max(found)), max(found)

        best: State = branches[self.recorder.run.pick(scores, highest)[0]]
        self.recorder.adopt(best.recorder)
        return best

    def vote(self, n: int, item: Appendable, name: str | None = None) -> Any:
        """Append `item` on `n` branches, and continue as the first whose variable `name` has the most frequent value.

        Returns that value. `name` None: the only variable that `item` writes.
        """
        branches = self.fork(n)
        branches += item
        if name is None:
            names = list(branches[0].recorder.written_since(self.recorder))
            if len(names) != 1:
                raise InvalidProgram(f"vote needs the name of the variable that counts; written: {names or 'none'}")
            name = names[0]
        written = branches[name]

        def most_frequent() -> tuple[int, Any]:
            found = [plain(value) for value in written]
            winner = max(found, key=found.count)  # the first of the most frequent ones
            return found.index(winner), winner

        index, winner = self.recorder.run.pick(written, most_frequent)
        self.recorder.adopt(branches[index].recorder)
        return winner

    def first_of(self, *items: Appendable) -> int:
        """Append each item on its own branch, continue as the first branch that is done, and cancel the others.

        Returns its index. Failed branches are skipped; if all fail, the first one's error is raised. Checks in Python
        (`where`) of all items are waited for.
        """
        branches = self.recorder.fork(len(items), is_race=True)

        def write(branch: Recorder, item: Appendable) -> CheckFailed | None:
            try:
                branch.append(item)
                branch.record_late()
            except CheckFailed as error:  # of a check in Python; other nodes fail while the race is waited for
                return error
            return None

        run = self.recorder.run
        failures = run.together(write, branches, items)
        left = [i for i, failure in enumerate(failures) if failure is None]
        if not left and failures[0] is not None:
            raise failures[0]
        index = left[run.first_done([tip for i in left if (tip := branches[i].tip) is not None])]
        for other, branch in enumerate(branches):
            if other != index:
                branch.cancel()
        self.recorder.adopt(branches[index])
        return index

    def __enter__(self) -> State:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    # Variables.

    def var_scope(self, name: str) -> AbstractContextManager[None]:
        """Keep all text that is appended in the block as variable `name`."""
        return self.recorder.capture(name)

    def __getitem__(self, name: str) -> Any:  # Any: of the type that `gen` was asked for
        """Return the value of a variable. While the program runs, it is a Value, which is read when it is needed."""
        variables, program = self.recorder.variables, self.recorder.program
        if name not in variables:
            known = ", ".join(variables) or "none yet"
            if any(node.label is not None and ir.variable(node.label) == name for node in self.recorder.run.nodes):
                known += f"; {name!r} was written on another branch: join it first, s.join(branch)"
            raise UndefinedVariable(f"{program}: no variable {name!r}; known: {known}", program=program)
        return self._resolved(variables[name])

    def _resolved(self, value: Any) -> Any:
        run = self.recorder.run
        return value if run.is_recording and not run.is_continued else plain(value, run)

    def __setitem__(self, name: str, value: Any) -> None:
        self.recorder.variables[name] = value

    def __contains__(self, name: object) -> bool:
        return name in self.recorder.variables

    def set_var(self, name: str, value: Any) -> None:
        """Set a variable. The model doesn't see it."""
        self[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a variable, or `default` if there is none of that name."""
        return self._resolved(self.recorder.variables.get(name, default))

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of this branch, by name."""
        return {name: self._resolved(value) for name, value in self.recorder.variables.items()}

    # Reading.

    @property
    def result(self) -> R:
        """The result of the program's function, with its values read."""
        self.recorder.run.check_function()
        found: Any = None if self.recorder.place else self._resolved(self.recorder.run.returned)
        return found  # type: ignore[no-any-return]  # what the function returned

    def text(self) -> str:
        """Return all text of this branch as the model read and wrote it, with the chat template's marks. Waits."""
        self.recorder.record_late()
        return self.recorder.run.text_of(self.recorder.tip)

    def messages(self) -> list[dict[str, str]]:
        """Return this branch's messages, `role` and `content`. Text outside of roles has the role `text`. Waits."""
        self.recorder.record_late()
        return self.recorder.run.messages_of(self.recorder.tip)

    def meta(self, name: str) -> dict[str, Any]:
        """Return details of a variable's generation: `usage`, `finish_reason`, `timings`. Waits for it.

        A selection also has `choices` and `probs`. A generation with checks has `attempts`, the refused texts.
        """
        value, program = self.recorder.variables.get(name), self.recorder.program
        values = value if isinstance(value, list) else [value]
        sources = [source_of(one) for one in values if isinstance(one, Value)]
        details = [source.run.meta_of(source.node) for source in sources if source.node is not None]
        if isinstance(value, list):
            return {"branches": details}
        if not details:
            raise UndefinedVariable(f"{program}: {name!r} was not generated", program=program)
        return details[0]

    @property
    def usage(self) -> ir.Usage:
        """Token counts of the whole run so far."""
        return self.recorder.run.usage()

    @property
    def record(self) -> RunRecord:
        """Return the graph of the whole run, the events of its nodes, and the lines where recording stopped."""
        return self.recorder.run.report()

    def _repr_html_(self) -> str:
        """Return what a notebook shows: this branch's turns and variables, of what is there now."""
        run = self.recorder.run
        events = run.report().events
        is_over = not run.is_recording and run.is_done() and run.first_error() is None
        return explanations.run_html(
            self.recorder.program, run.path(self.recorder.tip), events, self.variables if is_over else {}
        )

    def where(self) -> list[str]:
        """Return what a running program waits for, as sentences: for programs that hang, from another thread."""
        return self.recorder.run.where()

    def explain(self) -> explanations.Explanation:
        """Return measured tokens and times by node, and the lines that forced a stage. Waits for the run to end."""
        return explanations.explain_run(self._ended().report())

    def why_miss(self, var: str | None = None) -> list[explanations.Miss]:
        """Return, for each generation, where its prompt left the cached ones, and the line that wrote that. Waits."""
        run = self._ended()
        return explanations.why_miss_run(run.report(), run.backend, run.options.cache_salt, var)

    def graph(self) -> explanations.Drawing:
        """Return a drawing of the run with its measurements: `.mermaid()`, `.svg()`, `.html()`, `.save("run.svg")`."""
        run = self._ended()
        return explanations.draw_run(run.report(), run.backend)

    def _ended(self) -> Run:
        self.recorder.run.wait_all(quietly=True)
        return self.recorder.run

    def error(self) -> ProgramError | None:
        """The first error of the run, or None. Waits for the run to end."""
        self.recorder.run.wait_all()
        return self.recorder.run.first_error()

    def wait(self) -> State[R]:
        """Wait until everything is done or failed."""
        self.recorder.run.wait_all()
        return self

    def __await__(self) -> Any:
        async def wait() -> State:
            await self.recorder.run.await_all()
            return self

        return wait().__await__()

    def cancel(self) -> None:
        """Stop the nodes of this branch and all that need them. On the program's own state, stop everything."""
        self.recorder.cancel()

    def __repr__(self) -> str:
        recorder = self.recorder
        where = f"branch {recorder.place}" if recorder.place else "state"
        return f"<{where} of {recorder.program}, variables: {', '.join(recorder.variables) or 'none'}>"


class RoleBlock:
    """A message as a block, `with s.user(): ...`. Everything appended in the block is the message's content."""

    __slots__ = ("_is_used", "_role", "_state")

    def __init__(self, state: State, role: str, *, is_used: bool) -> None:
        self._state, self._role, self._is_used = state, role, is_used

    def __enter__(self) -> State:
        if self._is_used:
            raise InvalidProgram(f"s.{self._role}(...) with content is a whole message, not a block")
        self._is_used = True
        self._state.recorder.open_message(self._role)
        return self._state

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._state.recorder.close_message(error)

    def __repr__(self) -> str:
        done = ", which is appended already" if self._is_used else " without content"
        return f"<s.{self._role}(...){done}>"

    def __del__(self) -> None:
        if not self._is_used:
            warnings.warn(
                f"s.{self._role}() without content appends nothing; give it content, or write the message in a block: "
                f"with s.{self._role}(): ...",
                stacklevel=2,
            )


class Branches(Sequence[State]):
    """The branches of a fork, in order. `branches["x"]` is the list of their values of `x`."""

    __slots__ = ("_parent", "_states")

    def __init__(self, parent: State, states: list[State]) -> None:
        self._parent = parent
        self._states = states

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[State]:
        return iter(self._states)

    @overload
    def __getitem__(self, key: int) -> State: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[State]: ...
    @overload
    def __getitem__(self, key: str) -> list[Any]: ...  # Any: values of the program's types
    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            return [state[key] for state in self._states]
        return self._states[key]

    def __setitem__(self, key: int, state: State) -> None:
        """Support `branches[i] += ...`. A branch can't be replaced by another one."""
        if self._states[key] is not state:
            raise InvalidProgram("a branch can't be replaced; append to it")

    def __iadd__(self, item: Appendable | Callable[[int], Appendable]) -> Branches:
        """Append to every branch: the same item, the branch's item of a list, or a function's result for its index."""
        if callable(item):
            items: Sequence[Appendable] = [item(index) for index in range(len(self))]
        elif isinstance(item, list | tuple):
            if len(item) != len(self):
                raise InvalidProgram(f"{len(item)} items are appended to {len(self)} branches; give one for each")
            items = item
        else:
            items = [item] * len(self)
        self._parent.recorder.run.together(State.append, self._states, items)
        return self

    def each(self, body: Callable[[State], T]) -> list[T]:
        """Call `body(branch)` for every branch, and return the results in order.

        A body that reads a value waits alone, while the bodies of the other branches go on; in a `for` loop over the
        branches, the whole loop would wait. Bodies run on this thread, one at a time, and take turns where they wait.
        """
        return self._parent.recorder.run.together(body, self._states)

    def call_tools(self, tools: Sequence[Tool | Callable[..., Any]] | None = None, **options: Any) -> list[Value]:
        """Run State.call_tools on every branch at once, and return the answers. No branch waits for another's tool."""
        shared = None if tools is None else as_tools(tools)
        return self.each(lambda branch: branch.call_tools(shared, **options))

    def join(self, mode: str = "gather") -> None:
        """Join all branches into the state that was forked; see State.join. Without branches, do nothing."""
        if self._states:
            self._parent.join(self._states, mode=mode)
