"""Branches of one fork: append to all of them, read from all of them, join them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

from ramet.errors import InvalidProgram
from ramet.lang.graph import ir
from ramet.lang.recording.late_prefix import flush_late
from ramet.lang.recording.primitives import Appendable
from ramet.lang.recording.state import State
from ramet.lang.recording.tool_loop import drive, loop_options, tool_loop
from ramet.lang.recording.tools import Tool, as_tools
from ramet.lang.recording.values import Value, plain


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
        found = [loop_options(state, shared, **options) for state in self._states]
        return drive([(state, tool_loop(state, one)) for state, one in zip(self._states, found, strict=True)])

    def join(self, mode: str = "gather") -> None:
        """Join all branches into the state that was forked; see State.join. Without branches (of a map): nothing."""
        if self._states:
            join(self._parent, self._states, mode)


def join(parent: State, states: Sequence[State], mode: str) -> None:
    """See State.join."""
    if mode not in ("gather", "append"):
        raise InvalidProgram(f'join mode is {mode!r}, but must be "gather" or "append"')
    if not states:
        raise InvalidProgram("join needs at least one branch")
    if any(state._run is not parent._run for state in states):
        raise InvalidProgram("join takes branches of the same program")
    for state in states:
        flush_late(state)
    names = [name for state in states for name, value in state._variables.items() if _is_new(parent, name, value)]
    for name in dict.fromkeys(names):
        values = [
            state._variables[name]
            for state in states
            if name in state._variables and _is_new(parent, name, state._variables[name])
        ]
        parent._variables[name] = values
    tips = tuple(dict.fromkeys(state._tip for state in states if state._tip is not None))
    parent._add(ir.Join, branches=tips)
    if mode == "append":
        for state in states:
            start = state._own_nodes()[0] if state._key else None
            node = parent._run.record(ir.Capture, state._tip, start=start)
            parent.append(Value(parent._run, node.id))


def _is_new(parent: State, name: str, value: object) -> bool:
    return name not in parent._variables or parent._variables[name] is not value


def adopt(parent: State, branch: State) -> None:
    """Go on as if everything on `branch` had been written on `parent`, which must not have moved since the fork."""
    if branch._run is not parent._run or parent._tip not in branch._fork_parents():
        raise InvalidProgram("a state can only go on as one of its own branches, and only from where it was forked")
    flush_late(branch)
    parent._tip = branch._tip
    parent._variables = dict(branch._variables)
    parent._counts = dict(branch._counts)
    parent._role = branch._role
    parent._tools = branch._tools


def map_items(parent: State, items: Iterable[Any], body: Callable[[State, Any], object]) -> Branches:
    """See State.map."""
    rows = list(items)
    if not rows:
        return Branches(parent, [])
    branches = parent.fork(len(rows))
    for branch, row in zip(branches, rows, strict=True):
        body(branch, row)
    return branches


def best_of(parent: State, n: int, item: Appendable, by: Callable[[State], float]) -> State:
    """See State.best_of."""
    branches = parent.fork(n)
    branches += item
    parent._run.submit()
    scores = plain([by(branch) for branch in branches])  # those that are generated run together
    best: State = branches[scores.index(max(scores))]
    adopt(parent, best)
    return best


def vote(parent: State, n: int, item: Appendable, name: str | None) -> Any:
    """See State.vote."""
    branches = parent.fork(n)
    branches += item
    if name is None:
        written = [one for one, value in branches[0]._variables.items() if _is_new(parent, one, value)]
        if len(written) != 1:
            raise InvalidProgram(f"vote needs the name of the variable that counts; written: {written or 'none'}")
        name = written[0]
    values = [plain(value) for value in branches[name]]
    winner = max(values, key=values.count)  # the first of the most frequent ones
    adopt(parent, branches[values.index(winner)])
    return winner


def first_of(parent: State, items: Sequence[Appendable]) -> int:
    """See State.first_of."""
    branches = parent.fork(len(items))
    for branch, item in zip(branches, items, strict=True):
        branch.append(item)
        flush_late(branch)
    index = parent._run.first_done([branch._tip for branch in branches if branch._tip is not None])
    for other, branch in enumerate(branches):
        if other != index:
            branch.cancel()
    adopt(parent, branches[index])
    return index
