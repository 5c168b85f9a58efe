"""The state of a program: one branch of its text. Appending records; reading a value waits for it.

    s += "text"; s += gen("x"); s += user("..."); with s.assistant(): ...
    a, b = s.fork(2); s.join(a, b); s["x"]; s.text(); s.messages(); s.meta("x")

A state is a few fields and a dictionary: tens of thousands may live at once. Not here: running (run.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from ramet.errors import InvalidProgram, ProgramError, UndefinedVariable
from ramet.lang.explain.drawing import Drawing, draw_run
from ramet.lang.explain.explanation import Explanation
from ramet.lang.explain.measured import explain_run
from ramet.lang.explain.why_miss import Miss, why_miss_run
from ramet.lang.graph import ir
from ramet.lang.recording.generations import generate, select
from ramet.lang.recording.late_prefix import LateText, flush_late, hold_late
from ramet.lang.recording.primitives import Appendable, Chain, Expr, Gen, RoleExpr, SelectExpr
from ramet.lang.recording.role_block import RoleBlock
from ramet.lang.recording.tool_loop import adrive, drive, loop_options, tool_loop, use_tools
from ramet.lang.recording.tools import Tool, as_tools
from ramet.lang.recording.values import Value, plain

if TYPE_CHECKING:
    from ramet.lang.graph.run_record import RunRecord
    from ramet.lang.recording.branches import Branches
    from ramet.lang.recording.run import Run


class State:
    """One branch. Made by running a program, and by `fork` and `copy`."""

    __slots__ = (
        "_counts",
        "_key",
        "_late",
        "_num_forks",
        "_num_generated",
        "_returned",
        "_role",
        "_run",
        "_sampling",
        "_tip",
        "_tools",
        "_variables",
    )

    def __init__(self, run: Run, tip: int | None = None, key: tuple[int, ...] = ()) -> None:
        self._run = run
        self._tip = tip
        self._key = key  # this branch's place in the program: (which fork, which branch of it), ...
        self._variables: dict[str, Any] = {}  # name -> Value, or whatever set_var was given
        self._counts: dict[str, int] = {}  # name -> how often it was written on this branch
        self._role: str | None = None
        self._late: list[LateText] = []  # what waits for the next generation
        self._sampling = run.sampling  # defaults of its generations
        self._tools: tuple[Tool, ...] = ()  # declared on this branch
        self._num_forks = 0
        self._num_generated = 0
        self._returned: Any = None  # what the program's function returned, its values not read

    # Appending.

    def __iadd__(self, other: Appendable) -> State:
        self.append(other)
        return self

    def append(self, item: Appendable, *, prefix: str | None = None) -> None:
        """Append text, a value, a description (`gen`, ...), or several of them.

        `prefix="late"`: this text may stand behind the text that follows it, up to the next generation, selection or
        fork, or the end of its message. Calls that differ in it then share what was behind it.
        """
        if prefix is not None:
            hold_late(self, item, prefix)
        elif isinstance(item, str):
            self._append_text(item)
        elif isinstance(item, Value):
            self._append_text(format(item))
        elif isinstance(item, Gen):
            generate(self, item)
        elif isinstance(item, SelectExpr):
            select(self, item)
        elif isinstance(item, RoleExpr):
            with self._in_role(item.role):
                for part in item.content:
                    self.append(part)
        elif isinstance(item, Chain):
            for part in item.parts:
                self.append(part)
        elif isinstance(item, Sequence):
            for part in item:
                self.append(part)
        else:
            raise TypeError(
                f"can't append {item!r} to a program's state; append text (an f-string, say), gen(...), select(...), "
                "a role, or a generated value"
            )

    def _append_text(self, text: str) -> None:
        parts: list[ir.Part] = []
        for item in self._run.placeholders.split(text, self._run.foreign):
            if isinstance(item, Expr):
                self._text(parts)
                parts = []
                self.append(item)
            else:
                assert isinstance(item, str | ir.Ref)
                parts.append(item)
        self._text(parts)

    def _text(self, parts: list[ir.Part]) -> None:
        if parts:
            self._add(ir.Text, parts=tuple(parts))
            for late in self._late:
                late.num_jumped += 1

    def _add(self, kind: Callable[..., ir.AnyNode], **fields: Any) -> int:  # Any: the node's own fields
        if not self._run.is_recording:
            raise InvalidProgram("the program has ended; nothing can be appended to its state", program=self._program)
        if self._late and kind is not ir.Text:
            flush_late(self)
        self._tip = self._run.record(kind, self._tip, **fields).id
        return self._tip

    def _template(self, text: str | Value) -> ir.Template:
        parts = self._run.placeholders.split(format(text), self._run.foreign)
        if any(isinstance(part, Expr) for part in parts):
            raise InvalidProgram(f"a choice can't hold another description: {text!r}", program=self._program)
        return tuple(parts)  # type: ignore[arg-type]  # only Exprs and Parts are put in

    def _unique(self, name: str | None) -> str | None:
        """The node's name: a variable written again is `name#2` in the graph; reading gives the latest."""
        if name is None:
            return None
        if not isinstance(name, str) or not name or "#" in name:
            raise InvalidProgram(
                f"a variable is named {name!r}; use a text that isn't empty and has no '#'", program=self._program
            )
        count = self._counts[name] = self._counts.get(name, 0) + 1
        return name if count == 1 else f"{name}#{count}"

    # Roles.

    def system(self, *content: Appendable) -> RoleBlock:
        """A system message: `s.system("...")`, or `with s.system(): s += ...`."""
        return self._role_block("system", content)

    def user(self, *content: Appendable) -> RoleBlock:
        """A user message."""
        return self._role_block("user", content)

    def assistant(self, *content: Appendable) -> RoleBlock:
        """An assistant message."""
        return self._role_block("assistant", content)

    def tool(self, *content: Appendable) -> RoleBlock:
        """A message with a tool's result."""
        return self._role_block("tool", content)

    def _role_block(self, role: str, content: tuple[Appendable, ...]) -> RoleBlock:
        if content:
            self.append(RoleExpr(role, content))
        return RoleBlock(self, role, is_used=bool(content))

    @contextmanager
    def _in_role(self, role: str) -> Iterator[None]:
        with RoleBlock(self, role, is_used=False):
            yield

    def _open_role(self, role: str) -> None:
        if self._role is not None:
            if self._role_is_inherited():
                self._close_role()  # a branch that was forked inside of a message, and now begins the next one
            else:
                article = "an" if self._role == "assistant" else "a"
                raise InvalidProgram(
                    f"the {role} message begins inside of {article} {self._role} message; end that one first",
                    program=self._program,
                )
        self._add(ir.Role, role=role, is_open=True)
        self._role = role

    def _role_is_inherited(self) -> bool:
        tip = self._tip
        while tip is not None:
            node = self._run.nodes[tip]
            if isinstance(node, ir.Role):
                return False
            if isinstance(node, ir.Fork):
                return True
            tip = node.parent
        return False

    def _close_role(self) -> None:
        if self._role is not None:
            self._add(ir.Role, role=self._role, is_open=False)
            self._role = None

    # Tools.

    def use_tools(self, tools: Sequence[Tool | Callable[..., Any]]) -> None:
        """Tell the model of tools. Before the first message, the chat template shows them in its own way."""
        use_tools(self, as_tools(tools))

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
            self,
            tools,
            max_steps=max_steps,
            name=name,
            calls=calls,
            choice=choice,
            parallel=parallel,
            on_error=on_error,
            **sampling,
        )
        return drive([(self, tool_loop(self, options))])[0]

    async def acall_tools(self, tools: Sequence[Tool | Callable[..., Any]] | None = None, **options: Any) -> Value:
        """`call_tools` for `async def` programs. Async tools run on their event loop."""
        found = loop_options(self, tools, **options)
        return await adrive(self, tool_loop(self, replace(found, loop=asyncio.get_running_loop())))

    # Branches.

    def fork(self, n: int = 1) -> Branches:
        """Split into `n` branches that go on from here; they share everything so far. This state goes on as well."""
        from ramet.lang.recording.branches import Branches

        if not isinstance(n, int) or n < 1:
            raise InvalidProgram(f"fork({n!r}): a fork needs at least one branch", program=self._program)
        if not self._run.is_recording:
            raise InvalidProgram("the program has ended; its state can't be forked", program=self._program)
        flush_late(self)
        self._num_forks += 1
        with self._run.lock:
            group = len(self._run.nodes)
            tips = [self._run.record(ir.Fork, self._tip, group=group, index=i, width=n).id for i in range(n)]
        branches = []
        for index, tip in enumerate(tips):
            branch = State(self._run, tip, (*self._key, self._num_forks, index))
            branch._variables = dict(self._variables)
            branch._counts = dict(self._counts)
            branch._role = self._role
            branch._sampling = self._sampling
            branch._tools = self._tools
            branches.append(branch)
        return Branches(self, branches)

    def copy(self) -> State:
        """One branch that goes on from here; usable in a `with` block, too."""
        return self.fork(1)[0]

    def join(self, *branches: State | Iterable[State], mode: str = "gather") -> None:
        """Bring branches together: every variable that they wrote becomes a list here, in the order of the branches.

        `mode="append"` appends the text of each branch as well.
        """
        from ramet.lang.recording.branches import join

        states = [one for item in branches for one in ([item] if isinstance(item, State) else item)]
        join(self, states, mode)

    def map(self, items: Iterable[Any], body: Callable[[State, Any], object]) -> Branches:
        """One branch for each item: `body(branch, item)` appends to it."""
        from ramet.lang.recording.branches import map_items

        return map_items(self, items, body)

    def best_of(self, n: int, item: Appendable, by: Callable[[State], float]) -> State:
        """Append `item` on `n` branches and go on as the one with the highest `by(branch)`; that branch is returned.

        `by` may return a generated value without reading it: then all branches are judged at once.
        """
        from ramet.lang.recording.branches import best_of

        return best_of(self, n, item, by)

    def vote(self, n: int, item: Appendable, name: str | None = None) -> Any:
        """Append `item` on `n` branches and go on as the first whose variable `name` has the most frequent value.

        Returns that value. Without a name: the one variable that `item` writes.
        """
        from ramet.lang.recording.branches import vote

        return vote(self, n, item, name)

    def first_of(self, *items: Appendable) -> int:
        """Append each item on a branch of its own, go on as the first that is done, and cancel the others.

        Returns its index. A branch that fails is passed over; where all fail, its error is raised.
        """
        from ramet.lang.recording.branches import first_of

        return first_of(self, items)

    def _fork_parents(self) -> list[int | None]:
        """The nodes at which this branch, and those it was forked from, were forked."""
        return [node.parent for node in self._run.path(self._tip) if isinstance(node, ir.Fork)]

    def __enter__(self) -> State:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    # Variables.

    @contextmanager
    def var_scope(self, name: str) -> Iterator[None]:
        """Keep all text that is appended in the block as variable `name`."""
        flush_late(self)
        start = self._tip
        yield
        node = self._add(ir.Capture, name=self._unique(name), start=start)
        self._variables[name] = Value(self._run, node, name)

    def __getitem__(self, name: str) -> Any:  # Any: of the type that `gen` was asked for
        """The value of a variable; while the program runs one that is read when it is needed."""
        if name not in self._variables:
            known = ", ".join(self._variables) or "none yet"
            raise UndefinedVariable(f"{self._program}: no variable {name!r}; known: {known}", program=self._program)
        return self._resolved(self._variables[name])

    def _resolved(self, value: Any) -> Any:
        return value if self._run.is_recording else plain(value, self._run)

    def __setitem__(self, name: str, value: Any) -> None:
        self._variables[name] = value

    def __contains__(self, name: object) -> bool:
        return name in self._variables

    def set_var(self, name: str, value: Any) -> None:
        """Set a variable; the model doesn't see it."""
        self[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a variable, or `default` where there is none of that name."""
        return self._resolved(self._variables.get(name, default))

    @property
    def variables(self) -> dict[str, Any]:
        """All variables of this branch by name."""
        return {name: self._resolved(value) for name, value in self._variables.items()}

    # Reading.

    @property
    def result(self) -> Any:  # Any: whatever the program's function returned
        """What the program's function returned, its values read."""
        return self._resolved(self._returned)

    def text(self) -> str:
        """All text of this branch as the model saw and wrote it, the chat template's marks included. Waits for it."""
        flush_late(self)
        return self._run.text_of(self._tip)

    def messages(self) -> list[dict[str, str]]:
        """The messages of this branch, `role` and `content`; text outside of roles has the role `text`. Waits."""
        flush_late(self)
        self._run.text_of(self._tip)
        found: list[dict[str, str]] = []
        is_inside = False
        for node in self._run.path(self._tip):
            if isinstance(node, ir.Role):
                is_inside = node.is_open
                if is_inside:
                    found.append({"role": node.role, "content": ""})
                continue
            event = self._run.result_of(node.id)
            text = event.text if event is not None else ""
            if text and not is_inside and (not found or found[-1]["role"] != "text"):
                found.append({"role": "text", "content": ""})
            if text:
                found[-1]["content"] += text
        return found

    def meta(self, name: str) -> dict[str, Any]:
        """What is known of a variable's generation: `usage`, `finish_reason`, `timings`. Waits for it.

        Of a selection also `choices` and `probs`; of one with checks `attempts`, the texts that were refused.
        """
        value = self._variables.get(name)
        if isinstance(value, list):
            return {"branches": [self._meta_of(one) for one in value if isinstance(one, Value)]}
        if not isinstance(value, Value):
            raise UndefinedVariable(f"{self._program}: {name!r} was not generated", program=self._program)
        return self._meta_of(value)

    def _meta_of(self, value: Value) -> dict[str, Any]:
        event = self._run.event(value._node)
        return {
            "text": event.text,
            "usage": event.usage,
            "finish_reason": event.finish_reason,
            "timings": event.timings or {},
            **({"attempts": attempts} if (attempts := self._run.attempts.get(value._node)) is not None else {}),
            **(event.meta or {}),
        }

    @property
    def usage(self) -> ir.Usage:
        """Tokens of the whole run so far."""
        return self._run.usage()

    @property
    def record(self) -> RunRecord:
        """The graph of the whole run, what happened to each node, and where recording stopped for a value."""
        return self._run.report()

    def explain(self) -> Explanation:
        """Measured tokens and times of the run by node, and the lines that forced a stage. Waits for the run to end."""
        self._run.wait_all(quietly=True)
        return explain_run(self.record)

    def why_miss(self, var: str | None = None) -> list[Miss]:
        """For every generation: where its prompt left what was cached, and the line that wrote that. Waits."""
        self._run.wait_all(quietly=True)
        return why_miss_run(self.record, self._run.backend, self._run.options.cache_salt, var)

    def graph(self) -> Drawing:
        """A picture of the run with what was measured: `.mermaid()`, `.svg()`, `.html()`, `.save("run.svg")`."""
        self._run.wait_all(quietly=True)
        return draw_run(self.record, self._run.backend)

    def error(self) -> ProgramError | None:
        """The first error of the run, or None. Waits for the run to end."""
        self._run.wait_all()
        return self._run.first_error()

    def wait(self) -> State:
        """Wait until everything is done or failed."""
        self._run.wait_all()
        return self

    def __await__(self) -> Any:
        async def wait() -> State:
            await self._run.await_all()
            return self

        return wait().__await__()

    def cancel(self) -> None:
        """Stop this branch: what it was generating, and all that needs it. On the program's own state: everything."""
        self._run.cancel(None if not self._key else self._own_nodes())

    def _own_nodes(self) -> list[int]:
        found, tip = [], self._tip
        while tip is not None:
            found.append(tip)
            node = self._run.nodes[tip]
            if isinstance(node, ir.Fork):
                break
            tip = node.parent
        return found[::-1]

    @property
    def _program(self) -> str:
        return self._run.options.program

    def __repr__(self) -> str:
        where = f"branch {self._key}" if self._key else "state"
        return f"<{where} of {self._program}, variables: {', '.join(self._variables) or 'none'}>"
