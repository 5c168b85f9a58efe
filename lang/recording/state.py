"""The state of a program: what a user sees of one branch of its text, and of the branches of one fork.

    s += "text"; s += gen("x"); s += user("..."); with s.assistant(): ...
    a, b = s.fork(2); s.join(a, b); s["x"]; s.text(); s.messages(); s.meta("x")

Appending records, which the branch's recorder does (recorder.py); reading a value waits for it (run.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, overload

from ramet.errors import InvalidProgram, ProgramError, UndefinedVariable
from ramet.lang import explain as explanations
from ramet.lang.graph import ir
from ramet.lang.graph.run_record import RunRecord
from ramet.lang.recording.recorder import Appendable, Recorder, RoleExpr
from ramet.lang.recording.tool_loop import adrive, drive, loop_options, tool_loop
from ramet.lang.running.run import Run
from ramet.lang.running.tools import Tool, as_tools
from ramet.lang.running.values import Value, plain, source_of


class State:
    """One branch. Made by running a program, and by `fork` and `copy`.

    `recorder`: what writes the branch down; programs don't need it.
    """

    __slots__ = ("recorder",)

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    # Appending.

    def __iadd__(self, other: Appendable) -> State:
        self.recorder.append(other)
        return self

    def append(self, item: Appendable, *, prefix: str | None = None) -> None:
        """Append text, a value, a description (`gen`, ...), or several of them.

        `prefix="late"`: this text may stand behind the text that follows it, up to the next generation, selection or
        fork, or the end of its message. Calls that differ in it then share what was behind it.
        """
        if prefix is None:
            self.recorder.append(item)
        else:
            self.recorder.hold_late(item, prefix)

    # Roles.

    def system(self, *content: Appendable) -> RoleBlock:
        """A system message: `s.system("...")`, or `with s.system(): s += ...`."""
        return self._message("system", content)

    def user(self, *content: Appendable) -> RoleBlock:
        """A user message."""
        return self._message("user", content)

    def assistant(self, *content: Appendable) -> RoleBlock:
        """An assistant message."""
        return self._message("assistant", content)

    def tool(self, *content: Appendable) -> RoleBlock:
        """A message with a tool's result."""
        return self._message("tool", content)

    def _message(self, role: str, content: tuple[Appendable, ...]) -> RoleBlock:
        if content:
            self.recorder.append(RoleExpr(role, content))
        return RoleBlock(self, role, is_used=bool(content))

    # Tools.

    def use_tools(self, tools: Sequence[Tool | Callable[..., Any]]) -> None:
        """Tell the model of tools. Before the first message, the chat template shows them in its own way."""
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
        **sampling: Any,  # Any: sampling values, which are checked
    ) -> Value:
        """Let the model call tools and read their results until it answers; returns the answer's text.

        Writes assistant and tool messages. `tools`: those declared before (`use_tools`, `@function(tools=...)`) where
        left out. After `max_steps` rounds of calls the model has to answer. `name`: the variable of the answer;
        `calls`: of the list of ToolUse (name, arguments, result). `choice`: "auto", "required", or the name of a tool
        that must be called first. `parallel`: several calls in one message, which run at once. `on_error`: a tool that
        fails ends the program, or ("report") the model is told. Waits for what the model calls; for the loops of many
        branches at once use `branches.call_tools`.
        """
        options = loop_options(
            self.recorder,
            tools,
            max_steps=max_steps,
            name=name,
            calls=calls,
            choice=choice,
            parallel=parallel,
            on_error=on_error,
            **sampling,
        )
        return drive(self.recorder.run, [tool_loop(self.recorder, options)])[0]

    async def acall_tools(self, tools: Sequence[Tool | Callable[..., Any]] | None = None, **options: Any) -> Value:
        """`call_tools` for `async def` programs. Async tools run on their event loop."""
        found = replace(loop_options(self.recorder, tools, **options), loop=asyncio.get_running_loop())
        return await adrive(self.recorder.run, tool_loop(self.recorder, found))

    # Branches.

    def fork(self, n: int = 1) -> Branches:
        """Split into `n` branches that go on from here; they share everything so far. This state goes on as well."""
        return Branches(self, [State(branch) for branch in self.recorder.fork(n)])

    def copy(self) -> State:
        """One branch that goes on from here; usable in a `with` block, too."""
        return self.fork(1)[0]

    def join(self, *branches: State | Iterable[State], mode: str = "gather") -> None:
        """Bring branches together: every variable that they wrote becomes a list here, in the order of the branches.

        `mode="append"` appends the text of each branch as well.
        """
        states = [one for item in branches for one in ([item] if isinstance(item, State) else item)]
        self.recorder.join([state.recorder for state in states], mode)

    def map(self, items: Iterable[Any], body: Callable[[State, Any], object]) -> Branches:
        """One branch for each item: `body(branch, item)` appends to it."""
        rows = list(items)
        branches = self.fork(len(rows)) if rows else Branches(self, [])
        for branch, row in zip(branches, rows, strict=True):
            body(branch, row)
        return branches

    def best_of(self, n: int, item: Appendable, by: Callable[[State], float]) -> State:
        """Append `item` on `n` branches and go on as the one with the highest `by(branch)`; that branch is returned.

        `by` may return a generated value without reading it: then all branches are judged at once.
        """
        branches = self.fork(n)
        branches += item
        self.recorder.run.submit()
        scores = plain([by(branch) for branch in branches])  # those that are generated run together
        best: State = branches[scores.index(max(scores))]
        self.recorder.adopt(best.recorder)
        return best

    def vote(self, n: int, item: Appendable, name: str | None = None) -> Any:
        """Append `item` on `n` branches and go on as the first whose variable `name` has the most frequent value.

        Returns that value. Without a name: the one variable that `item` writes.
        """
        branches = self.fork(n)
        branches += item
        if name is None:
            written = list(branches[0].recorder.written_since(self.recorder))
            if len(written) != 1:
                raise InvalidProgram(f"vote needs the name of the variable that counts; written: {written or 'none'}")
            name = written[0]
        values = [plain(value) for value in branches[name]]
        winner = max(values, key=values.count)  # the first of the most frequent ones
        self.recorder.adopt(branches[values.index(winner)].recorder)
        return winner

    def first_of(self, *items: Appendable) -> int:
        """Append each item on a branch of its own, go on as the first that is done, and cancel the others.

        Returns its index. A branch that fails is passed over; where all fail, its error is raised.
        """
        branches = self.recorder.fork(len(items))
        for branch, item in zip(branches, items, strict=True):
            branch.append(item)
            branch.record_late()
        index = self.recorder.run.first_done([branch.tip for branch in branches if branch.tip is not None])
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
        """The value of a variable; while the program runs one that is read when it is needed."""
        variables, program = self.recorder.variables, self.recorder.program
        if name not in variables:
            known = ", ".join(variables) or "none yet"
            raise UndefinedVariable(f"{program}: no variable {name!r}; known: {known}", program=program)
        return self._resolved(variables[name])

    def _resolved(self, value: Any) -> Any:
        run = self.recorder.run
        return value if run.is_recording else plain(value, run)

    def __setitem__(self, name: str, value: Any) -> None:
        self.recorder.variables[name] = value

    def __contains__(self, name: object) -> bool:
        return name in self.recorder.variables

    def set_var(self, name: str, value: Any) -> None:
        """Set a variable; the model doesn't see it."""
        self[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a variable, or `default` where there is none of that name."""
        return self._resolved(self.recorder.variables.get(name, default))

    @property
    def variables(self) -> dict[str, Any]:
        """All variables of this branch by name."""
        return {name: self._resolved(value) for name, value in self.recorder.variables.items()}

    # Reading.

    @property
    def result(self) -> Any:  # Any: whatever the program's function returned
        """What the program's function returned, its values read."""
        return None if self.recorder.place else self._resolved(self.recorder.run.returned)

    def text(self) -> str:
        """All text of this branch as the model saw and wrote it, the chat template's marks included. Waits for it."""
        self.recorder.record_late()
        return self.recorder.run.text_of(self.recorder.tip)

    def messages(self) -> list[dict[str, str]]:
        """The messages of this branch, `role` and `content`; text outside of roles has the role `text`. Waits."""
        self.recorder.record_late()
        return self.recorder.run.messages_of(self.recorder.tip)

    def meta(self, name: str) -> dict[str, Any]:
        """What is known of a variable's generation: `usage`, `finish_reason`, `timings`. Waits for it.

        Of a selection also `choices` and `probs`; of one with checks `attempts`, the texts that were refused.
        """
        value, run, program = self.recorder.variables.get(name), self.recorder.run, self.recorder.program
        if isinstance(value, list):
            return {"branches": [run.meta_of(source_of(one).node) for one in value if isinstance(one, Value)]}
        if not isinstance(value, Value):
            raise UndefinedVariable(f"{program}: {name!r} was not generated", program=program)
        return run.meta_of(source_of(value).node)

    @property
    def usage(self) -> ir.Usage:
        """Tokens of the whole run so far."""
        return self.recorder.run.usage()

    @property
    def record(self) -> RunRecord:
        """The graph of the whole run, what happened to each node, and where recording stopped for a value."""
        return self.recorder.run.report()

    def explain(self) -> explanations.Explanation:
        """Measured tokens and times of the run by node, and the lines that forced a stage. Waits for the run to end."""
        return explanations.explain_run(self._ended().report())

    def why_miss(self, var: str | None = None) -> list[explanations.Miss]:
        """For every generation: where its prompt left what was cached, and the line that wrote that. Waits."""
        run = self._ended()
        return explanations.why_miss_run(run.report(), run.backend, run.options.cache_salt, var)

    def graph(self) -> explanations.Drawing:
        """A picture of the run with what was measured: `.mermaid()`, `.svg()`, `.html()`, `.save("run.svg")`."""
        run = self._ended()
        return explanations.draw_run(run.report(), run.backend)

    def _ended(self) -> Run:
        self.recorder.run.wait_all(quietly=True)
        return self.recorder.run

    def error(self) -> ProgramError | None:
        """The first error of the run, or None. Waits for the run to end."""
        self.recorder.run.wait_all()
        return self.recorder.run.first_error()

    def wait(self) -> State:
        """Wait until everything is done or failed."""
        self.recorder.run.wait_all()
        return self

    def __await__(self) -> Any:
        async def wait() -> State:
            await self.recorder.run.await_all()
            return self

        return wait().__await__()

    def cancel(self) -> None:
        """Stop this branch: what it was generating, and all that needs it. On the program's own state: everything."""
        self.recorder.cancel()

    def __repr__(self) -> str:
        recorder = self.recorder
        where = f"branch {recorder.place}" if recorder.place else "state"
        return f"<{where} of {recorder.program}, variables: {', '.join(recorder.variables) or 'none'}>"


class RoleBlock:
    """A message as a block, `with s.user(): ...`: everything appended in it is the message's content."""

    __slots__ = ("_is_used", "_role", "_state")

    def __init__(self, state: State, role: str, *, is_used: bool) -> None:
        self._state, self._role, self._is_used = state, role, is_used

    def __enter__(self) -> State:
        if self._is_used:
            raise InvalidProgram(f"s.{self._role}(...) with content is a whole message, not a block")
        self._state.recorder.open_message(self._role)
        return self._state

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._state.recorder.close_message(error)


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
        """What `branches[i] += ...` needs; a branch can't be replaced by another one."""
        if self._states[key] is not state:
            raise InvalidProgram("a branch can't be replaced; append to it")

    def __iadd__(self, item: Appendable | Callable[[int], Appendable]) -> Branches:
        """Append the same to every branch; of a list its own item to each; of a function what it returns for each."""
        if callable(item):
            items: Sequence[Appendable] = [item(index) for index in range(len(self))]
        elif isinstance(item, list | tuple):
            if len(item) != len(self):
                raise InvalidProgram(f"{len(item)} items are appended to {len(self)} branches; give one for each")
            items = item
        else:
            items = [item] * len(self)
        for state, one in zip(self._states, items, strict=True):
            state.append(one)
        return self

    def call_tools(self, tools: Sequence[Tool | Callable[..., Any]] | None = None, **options: Any) -> list[Value]:
        """State.call_tools on every branch at once: while one waits for a tool, the others go on. The answers."""
        shared = None if tools is None else as_tools(tools)
        recorders = [state.recorder for state in self._states]
        found = [loop_options(recorder, shared, **options) for recorder in recorders]
        loops = [tool_loop(recorder, one) for recorder, one in zip(recorders, found, strict=True)]
        return drive(self._parent.recorder.run, loops)

    def join(self, mode: str = "gather") -> None:
        """Join all branches into the state that was forked; see State.join. Without branches (of a map): nothing."""
        if self._states:
            self._parent.join(self._states, mode=mode)
