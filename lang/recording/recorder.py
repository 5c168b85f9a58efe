"""The recorder of one branch: records everything that a program appends to the branch as nodes of the run's graph.

`Recorder` is the interface for all code that appends. Users see State (state.py), which delegates to it. `Expr` is a
description that can be appended (`gen(...)`, a message); it records itself on a recorder.

A branch is a few fields and a dictionary, because tens of thousands may live at once. Not here: running (run.py),
generations (generations.py), tool calls (tool_loop.py).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from ramet.errors import InvalidProgram, RametError
from ramet.lang.graph import ir
from ramet.lang.running.run import Run
from ramet.lang.running.source_lines import caller_line
from ramet.lang.running.tools import Tool, declared
from ramet.lang.running.values import NodeSource, Readable, Value, placeholder_for

T = TypeVar("T")


class Expr(ABC):
    """A description that can be appended to a state. Exprs and texts can be added: `"A: " + gen("a") + "."`."""

    __slots__ = ()

    @abstractmethod
    def record(self, recorder: Recorder) -> object:
        """Record this at the end of a branch."""

    def __add__(self, other: Appendable) -> Expr:
        return Chain((self, other)) if isinstance(other, Expr | str | Value | list) else NotImplemented

    def __radd__(self, other: Appendable) -> Expr:
        return Chain((other, self)) if isinstance(other, Expr | str | Value | list) else NotImplemented

    def __format__(self, spec: str) -> str:
        if spec:
            raise ValueError(f"a {type(self).__name__.lower()} takes no format specification: {spec!r}")
        return placeholder_for(self)


Appendable: TypeAlias = "Expr | str | Value | list[Expr | str | Value]"


@dataclass(frozen=True, slots=True)
class Chain(Expr):
    """Several parts, appended in order. With a `role`, they are one whole message."""

    parts: tuple[Appendable, ...]
    role: str | None = None

    def record(self, recorder: Recorder) -> None:
        with nullcontext() if self.role is None else recorder.message(self.role):
            for part in self.parts:
                recorder.append(part)


class Recorder:
    """Records one branch. Owner: the branch's State.

    `tip`: its last node. `place`: the forks that led to it, as (index of the fork, index of the branch), ...; () is the
    program's own branch. `variables`: name -> Value, or whatever the program set. `counts`: name -> how often it was
    written on this branch. `role`: the role of the open message. `sampling`: the defaults of its generations. `tools`:
    the tools that it declared. `num_generated`: its generations so far.
    """

    __slots__ = (
        "_late",
        "_num_forks",
        "_num_texts",
        "counts",
        "num_generated",
        "place",
        "role",
        "run",
        "sampling",
        "tip",
        "tools",
        "variables",
    )

    def __init__(
        self,
        run: Run,
        tip: int | None = None,
        *,
        place: tuple[int, ...] = (),
        variables: Mapping[str, Any] = MappingProxyType({}),
        counts: Mapping[str, int] = MappingProxyType({}),
        role: str | None = None,
        tools: tuple[Tool, ...] = (),
        sampling: ir.Sampling = ir.Sampling(),  # noqa: B008 - frozen
        num_generated: int = 0,
    ) -> None:
        self.run = run
        self.tip = tip
        self.place = place
        self.variables = dict(variables)
        self.counts = dict(counts)
        self.role = role
        self.tools = tools
        self.sampling = sampling
        self._late: tuple[tuple[ir.Template, str, int], ...] = ()  # text, its line, the number of texts before it
        self._num_texts = 0
        self._num_forks = 0
        self.num_generated = num_generated

    @property
    def program(self) -> str:
        """The name of the program."""
        return self.run.options.program

    # Writing.

    def append(self, item: Appendable) -> None:
        """Append text, a value, a description (`gen`, ...), or several of them."""
        if isinstance(item, str | Value):
            self._append_text(format(item))
        elif isinstance(item, Expr):
            item.record(self)
        elif isinstance(item, list):
            for part in item:
                self.append(part)
        elif isinstance(item, tuple):
            raise TypeError(
                f"can't append a tuple of {len(item)} parts to a program's state; add the parts with +, and look for a "
                "comma too many"
            )
        else:
            raise TypeError(
                f"can't append {item!r} to a program's state; append text (an f-string, say), gen(...), select(...), "
                "a role, or a generated value"
            )

    def _append_text(self, text: str) -> None:
        parts: list[ir.Part] = []
        for item in self._split(text):
            if isinstance(item, Expr):
                self.add_text(parts)
                parts = []
                item.record(self)
            else:
                parts.append(item)
        self.add_text(parts)

    def _split(self, text: str) -> list[ir.Part | Expr]:
        return self.run.placeholders.split(text, self.run.foreign)  # type: ignore[return-value]  # these are put in

    def add_text(self, parts: Sequence[ir.Part]) -> None:
        """Append a text of these parts. Without parts, append nothing."""
        if parts:
            self.add(ir.Text, parts=tuple(parts))
            self._num_texts += 1

    def check_open(self) -> None:
        """Let a branch whose program has ended go on, in a run of its own. Raises its error, and InvalidProgram."""
        if not self.run.is_recording:
            graph = self.run.transcript(self.tip)
            self.run, self.tip = self.run.successor(graph), len(graph.nodes) - 1 if graph.nodes else None

    def go_back(self, tip: int | None) -> None:
        """Continue after node `tip` of this branch, as if nothing had been written since."""
        self.tip = tip

    def add(self, kind: Callable[..., ir.AnyNode], **fields: Any) -> int:  # Any: the node's own fields
        """Append a node of this kind, and return its id. Raises InvalidProgram if the program has ended."""
        self.check_open()
        if self._late and kind is not ir.Text:
            self.record_late()
        self.tip = self.run.record(kind, self.tip, **fields)
        return self.tip

    def template(self, text: str | Value) -> ir.Template:
        """Return a choice in the graph's form. Raises InvalidProgram if it contains a description."""
        parts: list[ir.Part] = []
        for part in self._split(format(text)):
            if isinstance(part, Expr):
                raise InvalidProgram(f"a choice can't hold another description: {text!r}", program=self.program)
            parts.append(part)
        return tuple(parts)

    # Late texts. Each is held back, and recorded right before the next node that reads the branch. So the order of a
    # branch's text depends only on what is appended to it, not on where the program waits for a value.

    def hold_late(self, item: Appendable, prefix: str) -> None:
        """Append text that may be moved past the text that follows it. Raises InvalidProgram for anything but text."""
        if prefix != "late":
            raise InvalidProgram(f'prefix is {prefix!r}, but must be "late"', program=self.program)
        if not isinstance(item, str | Value):
            raise InvalidProgram(f"only text can stand late, not {item!r}", program=self.program)
        self.check_open()
        parts: list[ir.Part] = []
        for part in self._split(format(item)):
            if isinstance(part, Expr):
                raise InvalidProgram("only text can stand late; append the generation by itself", program=self.program)
            parts.append(part)
        if parts:
            if not self._late:
                self.run.before_end(self.record_late)
            self._late = (*self._late, (tuple(parts), caller_line(), self._num_texts))

    def record_late(self) -> None:
        """Record the held-back text here."""
        late, self._late = self._late, ()
        for parts, line, num_before in late:
            self.add(ir.Text, parts=parts, moved=self._num_texts - num_before, line=line)

    # Messages.

    @contextmanager
    def message(self, role: str) -> Iterator[None]:
        """Make everything that is appended in the block one message."""
        self.open_message(role)
        try:
            yield
        except BaseException as error:
            self.close_message(error)
            raise
        self.close_message()

    def open_message(self, role: str) -> None:
        """Open a message. Raises InvalidProgram inside of another one."""
        if self.role is not None:
            if self._role_is_inherited():
                self.close_message()  # the branch was forked inside of a message, and now opens the next one
            else:
                article = "an" if self.role == "assistant" else "a"
                raise InvalidProgram(
                    f"the {role} message begins inside of {article} {self.role} message; end that one first",
                    program=self.program,
                )
        self.add(ir.Role, role=role, is_open=True)
        self.role = role

    def close_message(self, error: BaseException | None = None) -> None:
        """Close the open message, if any. `error`: the program's error that left the block; it may be caught later."""
        if self.role is None or not (error is None or isinstance(error, Exception)):
            return
        try:
            self.add(ir.Role, role=self.role, is_open=False)
        except RametError:
            if error is None:
                raise  # else the run may be over, and the error in the block must be raised
        else:
            self.role = None

    def _role_is_inherited(self) -> bool:
        tip = self.tip
        while tip is not None:
            node = self.run.nodes[tip]
            if isinstance(node, ir.Role):
                return False
            if isinstance(node, ir.Fork):
                return True
            tip = node.parent
        return False

    def use_tools(self, tools: tuple[Tool, ...], line: str | None = None) -> None:
        """Declare tools to the model. Do nothing if the branch has exactly these tools already."""
        if self.tools == tools:
            return
        if self.role is not None:
            raise InvalidProgram(
                f"tools are declared inside of a {self.role} message; declare them between messages, best before all",
                program=self.program,
            )
        for tool in tools:
            if not self.run.tools.add(tool):
                raise InvalidProgram(f"the program has another tool of the name {tool.name!r}", program=self.program)
        self.add(ir.Tools, tools=declared(tools), line=line)
        self.tools = tools

    # Variables.

    def node_name(self, name: str | None) -> str | None:
        """Return the name of a node that writes a variable; the second one is `name#2`. Reading gives the latest."""
        if name is None:
            return None
        if isinstance(name, Readable) or not isinstance(name, str) or not name or "#" in name:
            raise InvalidProgram(
                f"a variable is named {name!r}; use a text that isn't empty and has no '#'", program=self.program
            )
        count = self.counts[name] = self.counts.get(name, 0) + 1
        return name if count == 1 else f"{name}#{count}"

    @contextmanager
    def capture(self, name: str) -> Iterator[None]:
        """Keep the text appended in the block as variable `name`."""
        self.record_late()
        start = self.tip
        yield
        node = self.add(ir.Capture, name=self.node_name(name), start=start)
        self.variables[name] = Value(NodeSource(self.run, node, name))

    @contextmanager
    def default_sampling(self, sampling: ir.Sampling) -> Iterator[None]:
        """Use these values in the block for the fields that generations leave open."""
        before = self.sampling
        self.sampling = sampling.filled(before)
        try:
            yield
        finally:
            self.sampling = before

    def seed_of_place(self) -> int | None:
        """Return the seed of the next generation. It depends on the run's seed and the place, not on the stages.

        Returns None if the run has no seed.
        """
        self.num_generated += 1
        if self.run.seed is None:
            return None
        place = f"{self.run.seed}:{self.place}:{self.num_generated}".encode()
        return int.from_bytes(hashlib.blake2b(place, digest_size=4).digest(), "big")

    # Branches.

    def fork(self, width: int, *, is_race: bool = False) -> list[Recorder]:
        """Split into branches that continue from here. This one continues as well. `is_race`: see ir.Fork."""
        if not isinstance(width, int) or width < 1:
            raise InvalidProgram(f"fork({width!r}): a fork needs at least one branch", program=self.program)
        self.check_open()
        self.record_late()
        self._num_forks += 1
        tips = self.run.record_fork(self.tip, width, is_race=is_race)
        return [self._branch(tip, index) for index, tip in enumerate(tips)]

    def spawn(self) -> Recorder:
        """Return a branch of this run that begins with no text."""
        self.check_open()
        self._num_forks += 1
        return Recorder(self.run, place=(*self.place, self._num_forks, 0), sampling=self.sampling)

    def fork_for(self, items: Iterable[T]) -> Iterator[tuple[Recorder, T]]:
        """Split off a branch for each item, when the item comes. Like a fork, but its width is not known before."""
        self.check_open()
        self.record_late()
        tip, number = self.tip, self._num_forks + 1
        for index, item in enumerate(items):
            self._num_forks = max(self._num_forks, number)  # no items: no fork
            yield self._branch(self.run.record_fork(tip, 1)[0], index, number), item

    def _branch(self, tip: int, index: int, number: int | None = None) -> Recorder:
        """Return branch `index` of a fork, whose number on this branch is the last one by default."""
        return Recorder(
            self.run,
            tip,
            place=(*self.place, number or self._num_forks, index),
            variables=self.variables,
            counts=self.counts,
            role=self.role,
            tools=self.tools,
            sampling=self.sampling,
        )

    def join(self, branches: Sequence[Recorder], mode: str) -> None:
        """Make every variable of the branches a list here. With `mode="append"`, also append their texts."""
        if mode not in ("gather", "append"):
            raise InvalidProgram(f'join mode is {mode!r}, but must be "gather" or "append"')
        if not branches:
            raise InvalidProgram("join needs at least one branch")
        if any(branch.run is not self.run for branch in branches):
            raise InvalidProgram("join takes branches of the same program")
        lists: dict[str, list[Any]] = {}
        for branch in branches:
            branch.record_late()
            for name, value in branch.written_since(self).items():
                lists.setdefault(name, []).append(value)
        self.variables.update(lists)
        self.add(ir.Join, branches=tuple(dict.fromkeys(one.tip for one in branches if one.tip is not None)))
        if mode == "append":
            for branch in branches:
                start = branch.own_nodes()[0] if branch.place else None
                self.add_text((ir.Ref(self.run.record(ir.Capture, branch.tip, start=start)),))

    def written_since(self, other: Recorder) -> dict[str, Any]:
        """Return the variables written here since this branch was forked from `other`."""
        before = other.variables
        return {
            name: value for name, value in self.variables.items() if name not in before or before[name] is not value
        }

    def adopt(self, branch: Recorder) -> None:
        """Continue as if everything on `branch` had been written here. Nothing was written here since the fork."""
        forks = [node.parent for node in branch.run.path(branch.tip) if isinstance(node, ir.Fork)]
        if branch.run is not self.run or self.tip not in forks:
            raise InvalidProgram("a state can only go on as one of its own branches, and only from where it was forked")
        branch.record_late()
        self.tip = branch.tip
        self.variables = dict(branch.variables)
        self.counts = dict(branch.counts)
        self.role = branch.role
        self.tools = branch.tools

    def own_nodes(self) -> list[int]:
        """Return the nodes of this branch since it was forked, its Fork first."""
        found, tip = [], self.tip
        while tip is not None:
            found.append(tip)
            node = self.run.nodes[tip]
            if isinstance(node, ir.Fork):
                break
            tip = node.parent
        return found[::-1]

    def cancel(self) -> None:
        """Stop the nodes of this branch and all that need them. On the program's own branch, stop everything."""
        self.run.cancel(self.own_nodes() if self.place else None)
