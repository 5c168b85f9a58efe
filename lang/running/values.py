"""Values that do not exist yet. Putting one into text records a data edge; any other use reads it.

A use that needs the value itself (comparing, measuring, converting with `str()` or `int()`, iterating, attributes)
submits the nodes recorded so far and waits. In an f-string a value becomes a placeholder (placeholders.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ramet.lang.graph.ir import Ref
from ramet.lang.running.output_types import TEXT, OutputType, Shape
from ramet.lang.running.placeholders import has_placeholder
from ramet.lang.running.run import Run, current_run


@dataclass(frozen=True, slots=True)
class ToolUse:
    """One call that a model made (`call_tools`). `result` is a value of the program: read it, or put it into text."""

    name: str
    arguments: dict[str, Any]  # Any: JSON
    result: Any  # a Value while the program runs


class Source(ABC):
    """The origin of a value.

    It is separate from Value because a Value has only the attributes of the value that it represents.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def node(self) -> int:
        """The node whose value it is, or whose value it is a part of."""

    @property
    @abstractmethod
    def is_text(self) -> bool:
        """True if the value is text. Adding text to it then makes text without reading the value."""

    @abstractmethod
    def format(self, spec: str) -> str:
        """Return a placeholder for the value; `spec` as in an f-string."""

    @abstractmethod
    def child(self, name: str) -> Source | None:
        """Return a declared field of the value, or None."""

    @abstractmethod
    def read(self, why: str) -> Any:  # Any: a value of the program's type
        """Return the value itself. Waits for it; raises ProgramError if there is none."""

    @abstractmethod
    async def aread(self) -> Any:
        """`read` for an event loop."""

    @abstractmethod
    def shown(self) -> str:
        """Return the `repr()` of the value."""


class NodeSource(Source):
    """A node of a running program, or a field of its value."""

    __slots__ = ("_output", "_path", "_shape", "name", "node", "run")

    node: int

    def __init__(
        self,
        run: Run,
        node: int,
        name: str | None = None,
        output: OutputType = TEXT,
        path: tuple[str, ...] = (),
        shape: Shape | None = None,
    ) -> None:
        self.run, self.name, self.node, self._output, self._path = run, name, node, output, path
        self._shape = shape if path else output.shape

    @property
    def is_text(self) -> bool:
        if self._path:
            return self._shape is not None and self._shape.schema.get("type") == "string"
        return self._output is TEXT or self._output.wire == "str"

    def of_run(self, run: Run) -> NodeSource:
        """Return the same source in another run of the same graph."""
        return NodeSource(run, self.node, self.name, self._output, self._path, self._shape)

    def child(self, name: str) -> NodeSource | None:
        shape = None if self._shape is None else self._shape.child(name)
        if shape is None:
            return None
        return NodeSource(self.run, self.node, self.name, self._output, (*self._path, name), shape)

    def format(self, spec: str) -> str:
        label = ".".join((self.name or "value", *self._path))
        return self.run.placeholders.add(Ref(self.node, self._path, spec), label)

    def read(self, why: str) -> Any:
        return self._follow(self.run.read(self.node, self._output, why))

    async def aread(self) -> Any:
        return self._follow(await self.run.aread(self.node, self._output))

    def _follow(self, value: Any) -> Any:
        for step in self._path:
            value = value[step] if isinstance(value, dict) else getattr(value, step)
        return value

    def shown(self) -> str:
        if self.run.is_recording:
            return self.format("!r")
        path = "".join(f".{step}" for step in self._path)
        done = self.run.outcomes.get(self.node)
        shown = "not read" if done is None or done.error else repr(done.value)[:60]
        return f"<value {self.name or 'unnamed'}{path} of node {self.node}: {shown}>"


class Value:
    """A value of a running program, which may not exist yet.

    `await value`, `value.value` and `str(value)` read it (all except `await` block); f-strings do not.
    """

    __slots__ = ("_source",)

    def __init__(self, source: Source) -> None:
        self._source = source

    # Data edges.

    def __format__(self, spec: str) -> str:
        return self._source.format(spec)

    def __add__(self, other: Any) -> Any:  # Any: depends on the value's type
        return f"{self}{other}" if self._source.is_text and isinstance(other, str | Value) else self._read("+") + other

    def __radd__(self, other: Any) -> Any:
        return f"{other}{self}" if self._source.is_text and isinstance(other, str) else other + self._read("+")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        child = self._source.child(name)
        return Value(child) if child is not None else getattr(self._read(f".{name}"), name)

    def __getitem__(self, key: Any) -> Any:
        child = self._source.child(key) if isinstance(key, str) else None
        return Value(child) if child is not None else self._read(f"[{key!r}]")[key]

    # Reading.

    @property
    def value(self) -> Any:
        """Return the value itself. Waits for it; raises ProgramError if there is none."""
        return self._read(".value")

    def _read(self, why: str) -> Any:  # Any: a value of the program's type
        return self._source.read(why)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._source.aread().__await__()

    def __repr__(self) -> str:
        """Return a placeholder while the program runs, so that a list of values in an f-string shows their values."""
        return self._source.shown()

    def __str__(self) -> str:
        return str(self._read("str()"))

    def __bool__(self) -> bool:
        return bool(self._read("if, not, bool()"))

    def __len__(self) -> int:
        return len(self._read("len()"))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._read("iteration"))

    def __contains__(self, item: object) -> bool:
        return item in self._read("in")

    def __hash__(self) -> int:
        return hash(self._read("hash()"))

    def __eq__(self, other: object) -> bool:
        return bool(self._read("==") == plain(other))

    def __ne__(self, other: object) -> bool:
        return bool(self._read("!=") != plain(other))

    def __lt__(self, other: Any) -> Any:
        return self._read("<") < plain(other)

    def __le__(self, other: Any) -> Any:
        return self._read("<=") <= plain(other)

    def __gt__(self, other: Any) -> Any:
        return self._read(">") > plain(other)

    def __ge__(self, other: Any) -> Any:
        return self._read(">=") >= plain(other)

    def __int__(self) -> int:
        return int(self._read("int()"))

    def __float__(self) -> float:
        return float(self._read("float()"))

    def __index__(self) -> int:
        return int(self._read("an index").__index__())

    def __abs__(self) -> Any:
        return abs(self._read("abs()"))

    def __neg__(self) -> Any:
        return -self._read("-")

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._read("round()"), digits)

    def __sub__(self, other: Any) -> Any:
        return self._read("-") - plain(other)

    def __rsub__(self, other: Any) -> Any:
        return other - self._read("-")

    def __mul__(self, other: Any) -> Any:
        return self._read("*") * plain(other)

    def __rmul__(self, other: Any) -> Any:
        return other * self._read("*")

    def __truediv__(self, other: Any) -> Any:
        return self._read("/") / plain(other)

    def __rtruediv__(self, other: Any) -> Any:
        return other / self._read("/")

    def __pow__(self, other: Any) -> Any:
        return self._read("**") ** plain(other)

    def __rpow__(self, other: Any) -> Any:
        return other ** self._read("**")

    def __divmod__(self, other: Any) -> Any:
        return divmod(self._read("divmod()"), plain(other))

    def __rfloordiv__(self, other: Any) -> Any:
        return other // self._read("//")

    def __floordiv__(self, other: Any) -> Any:
        return self._read("//") // plain(other)

    def __mod__(self, other: Any) -> Any:
        return self._read("%") % plain(other)

    def __rmod__(self, other: Any) -> Any:
        return other % self._read("%")


def source_of(value: Value) -> Source:
    """Return the source of a value. A function, because a Value has only the attributes of the value it represents."""
    return value._source


def placeholder_for(item: object) -> str:
    """Return a placeholder of the run whose program is being executed. Raises RuntimeError outside of a program."""
    run = current_run.get()
    if run is None:
        raise RuntimeError(f"{item!r} can only be put into text inside of a running program")
    return run.placeholders.add(item, type(item).__name__.lower())


def plain(item: Any, run: Run | None = None) -> Any:  # Any: values inside lists, tuples, dicts and texts, of any kind
    """Read every value in `item`: a value, values in lists, tuples and dicts, and placeholders in text.

    `run`: the run of the placeholders; None: the run of the running program.
    """
    if isinstance(item, Value):
        return item.value
    if isinstance(item, str) and has_placeholder(item):
        run = run or current_run.get()
        return item if run is None else run.read_text(item)
    if isinstance(item, list):
        return [plain(one, run) for one in item]
    if isinstance(item, tuple) and type(item) is tuple:
        return tuple(plain(one, run) for one in item)
    if isinstance(item, dict):
        return {key: plain(one, run) for key, one in item.items()}
    if isinstance(item, ToolUse):
        return replace(item, result=plain(item.result, run))
    return item
