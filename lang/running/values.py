"""Values that do not exist yet. Putting one into text records a data edge; any other use reads it.

A use that needs the value itself (comparing, measuring, converting with `str()` or `int()`, iterating, attributes)
submits the nodes recorded so far and waits. In an f-string a value becomes a placeholder (placeholders.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic

from ramet.lang.graph.ir import Ref
from ramet.lang.graph.operations import (
    ARITHMETIC,
    MAX_STEPS,
    METHODS,
    Operation,
    Step,
    by_key,
    by_method,
    by_symbol,
    follow,
    path_text,
)
from ramet.lang.running.output_types import TEXT, OutputType, Shape
from ramet.lang.running.placeholders import has_placeholder
from ramet.lang.running.run import Run, current_run

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    V = TypeVar("V", default=Any)  # the type of what a value is; a function that is given no type returns Any
else:  # defaults came with Python 3.13
    from typing import TypeVar

    V = TypeVar("V")


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
    def run(self) -> Run:
        """The run whose value it is."""

    @property
    @abstractmethod
    def node(self) -> int | None:
        """The node whose value it is, or whose value it is a part of. None for a text made of several."""

    @property
    @abstractmethod
    def is_text(self) -> bool:
        """True if the value is text. Adding text to it then makes text without reading the value."""

    @property
    def kind(self) -> type | None:
        """The type of the value, if it is known before the value."""
        return None

    @abstractmethod
    def format(self, spec: str) -> str:
        """Return a placeholder for the value; `spec` as in an f-string."""

    def items(self, why: str) -> Iterator[Any] | None:
        """Return the items of a list, each as soon as it is written; None: the whole value has to be read."""
        return None

    @abstractmethod
    def child(self, name: str | int) -> Source | None:
        """Return a declared field of the value, or an item of a declared list; None if it is not declared."""

    @abstractmethod
    def result_of(self, operation: Operation) -> Source | None:
        """Return the result of an operation on the value, or None if the value has to be read for it."""

    @abstractmethod
    def read(self, why: str) -> Any:  # Any: a value of the program's type
        """Return the value itself. Waits for it; raises ProgramError if there is none."""

    @abstractmethod
    async def aread(self) -> Any:
        """`read` for an event loop."""

    @abstractmethod
    def in_run(self, run: Run, arguments: Mapping[str, Any]) -> Any:  # Any: a Value, or an argument's value
        """Return the same value in another run of the same graph, which has these arguments."""

    @abstractmethod
    def shown(self) -> str:
        """Return the `repr()` of the value."""


class NodeSource(Source):
    """A node of a running program, or a field of its value."""

    __slots__ = ("_kind", "_output", "_path", "_shape", "name", "node", "run")

    node: int
    run: Run

    def __init__(
        self,
        run: Run,
        node: int,
        name: str | None = None,
        output: OutputType = TEXT,
        path: tuple[Step, ...] = (),
        shape: Shape | None = None,
        kind: type | None = None,
    ) -> None:
        """`path`: to the part of the value that is meant. `kind`: the type of an operation's result at its end."""
        self.run, self.name, self.node, self._output, self._path = run, name, node, output, path
        self._shape = shape if path else output.shape
        self._kind = kind

    @property
    def is_text(self) -> bool:
        if self._path:
            is_field = self._shape is not None and self._shape.schema.get("type") == "string"
            return is_field or self._kind is str
        return self._output is TEXT or self._output.wire == "str"

    @property
    def kind(self) -> type | None:
        if not self._path:
            return self._output.kind
        return self._kind if self._shape is None else self._shape.kind

    def in_run(self, run: Run, arguments: Mapping[str, Any]) -> Value:
        return Value(NodeSource(run, self.node, self.name, self._output, self._path, self._shape, self._kind))

    def child(self, name: str | int) -> NodeSource | None:
        shape = None if self._shape is None else self._shape.child(name)
        if shape is None:
            return None
        return NodeSource(self.run, self.node, self.name, self._output, (*self._path, name), shape)

    def result_of(self, operation: Operation) -> NodeSource | None:
        kind = self.kind
        is_same = self._path or self._output.wire == ("str" if kind is str else getattr(kind, "__name__", ""))
        if kind is None or not is_same or len(self._path) >= MAX_STEPS:
            return None  # the graph may have another form of the value: a Literal's text, say
        path = (*self._path, operation)
        return NodeSource(self.run, self.node, self.name, self._output, path, None, operation.kind(kind))

    def format(self, spec: str) -> str:
        label = (self.name or "value") + path_text(self._path)
        return self.run.placeholders.add(Ref(self.node, self._path, spec), label)

    def items(self, why: str) -> Iterator[Any] | None:
        fields, rest = self._fields()
        item = None if self._shape is None else self._shape.child(0)
        if not self._is_json(fields) or item is None or item.kind is None or rest:
            return None
        return self._items(fields, why) if self.run.can_follow(self.node) else None

    def _items(self, fields: list[str], why: str) -> Iterator[Any]:
        count = 0
        for written in self.run.written(self.node, why):
            for item in written.next_items(fields):
                count += 1
                yield item
        yield from follow(self.run.read(self.node, self._output, why), self._path)[count:]

    def read(self, why: str) -> Any:
        fields, rest = self._fields()
        if fields and self._is_json(fields) and self.run.can_follow(self.node):
            for written in self.run.written(self.node, why):
                found = written.field(fields)
                if found is not None:
                    return follow(found[0], rest)
        return follow(self.run.read(self.node, self._output, why), self._path)

    def _is_json(self, fields: list[str]) -> bool:
        """Return whether a field of the value in Python is the one in its JSON."""
        if self._output.is_json or not self._output.has_plain_fields:
            return self._output.is_json
        shape = self._output.shape
        for name in fields:
            shape = None if shape is None else shape.child(name)
        item = None if shape is None else shape.child(0)
        return shape is not None and (shape.kind is not None or (item is not None and item.kind is not None))

    def _fields(self) -> tuple[list[str], tuple[Step, ...]]:
        """Return the names of fields that the path begins with, and its rest."""
        fields = list[str]()
        for step in self._path:
            if not isinstance(step, str):
                break
            fields.append(step)
        return fields, self._path[len(fields) :]

    async def aread(self) -> Any:
        return follow(await self.run.aread(self.node, self._output), self._path)

    def shown(self) -> str:
        if self.run.is_recording:
            return self.format("!r")
        path = path_text(self._path)
        done = self.run.outcomes.get(self.node)
        shown = "not read" if done is None or done.error else repr(done.value)[:60]
        return f"<value {self.name or 'unnamed'}{path} of node {self.node}: {shown}>"


class TextSource(Source):
    """Text in which values stand: `s["x"] + "."`."""

    __slots__ = ("_text", "run")

    run: Run
    node = None
    is_text = True
    kind = str

    def __init__(self, run: Run, text: str) -> None:
        self.run, self._text = run, str.__str__(text)

    def format(self, spec: str) -> str:
        return format(self.read("a width or precision"), spec) if spec else self._text

    def child(self, name: str | int) -> None:
        return None

    def result_of(self, operation: Operation) -> None:
        return None

    def read(self, why: str) -> str:
        return self.run.read_text(self._text)

    async def aread(self) -> str:
        for item in self.run.placeholders.split(self._text, self.run.foreign):
            if isinstance(item, Ref):
                await self.run.aread_quietly(item.node, "await")
        return self.read("await")

    def in_run(self, run: Run, arguments: Mapping[str, Any]) -> Value:
        return Value(TextSource(run, self._text))

    def shown(self) -> str:
        return repr(self._text)


class Readable:
    """What represents a value, and reads it for every use in Python but text. Base of Value and ValueText."""

    __slots__ = ()

    def _read(self, why: str) -> Any:  # Any: a value of the program's type
        """Return the value itself. Waits for it; raises ProgramError if there is none."""
        raise NotImplementedError  # not an ABC: its isinstance() would ask each value for its type

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

    def _computed(self, symbol: str, other: Any) -> Any:
        """Return the result of arithmetic; `r-` and the like have the value on their right side."""
        a, b = self._read(symbol.lstrip("r")), plain(other)
        compute = ARITHMETIC[symbol.lstrip("r")]
        return compute(b, a) if symbol[0] == "r" else compute(a, b)

    def __sub__(self, other: Any) -> Any:
        return self._computed("-", other)

    def __rsub__(self, other: Any) -> Any:
        return self._computed("r-", other)

    def __mul__(self, other: Any) -> Any:
        return self._computed("*", other)

    def __rmul__(self, other: Any) -> Any:
        return self._computed("r*", other)

    def __truediv__(self, other: Any) -> Any:
        return self._computed("/", other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._computed("r/", other)

    def __floordiv__(self, other: Any) -> Any:
        return self._computed("//", other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._computed("r//", other)

    def __mod__(self, other: Any) -> Any:
        return self._computed("%", other)

    def __rmod__(self, other: Any) -> Any:
        return self._computed("r%", other)

    def __pow__(self, other: Any) -> Any:
        return self._read("**") ** plain(other)

    def __rpow__(self, other: Any) -> Any:
        return other ** self._read("**")

    def __divmod__(self, other: Any) -> Any:
        return divmod(self._read("divmod()"), plain(other))


class Value(Readable, Generic[V]):
    """A value of a running program, which may not exist yet. Type checkers know V, the type of what it is.

    `await value`, `value.value` and `str(value)` read it (all except `await` block); f-strings do not.
    """

    __slots__ = ("_source",)

    def __init__(self, source: Source) -> None:
        self._source = source

    @property  # type: ignore[misc]  # so that isinstance() finds the type that the value has after the run
    def __class__(self) -> type:
        return self._source.kind or Value

    # Data edges.

    def __format__(self, spec: str) -> str:
        return ValueText(self._source, spec)

    def __add__(self, other: Any) -> Any:  # Any: depends on the value's type
        if not self._source.is_text:
            return self._computed("+", other)
        if not isinstance(other, str | Value):
            return NotImplemented  # a description can be added to text
        return Value(TextSource(self._source.run, f"{self}{other}"))

    def __radd__(self, other: Any) -> Any:
        if self._source.is_text and isinstance(other, str):
            return Value(TextSource(self._source.run, f"{other}{self}"))
        return self._computed("r+", other)

    def __iter__(self) -> Iterator[Any]:
        items = self._source.items("iteration")
        return super().__iter__() if items is None else items

    def _computed(self, symbol: str, other: Any) -> Any:
        operation = by_symbol(self._source.kind, symbol, other)
        found = self._result(operation)  # not `or`, which would read it
        return super()._computed(symbol, other) if found is None else found

    def _result(self, operation: Operation | None) -> Value | None:
        """Return the result of an operation that needs no value in Python, or None."""
        source = None if operation is None else self._source.result_of(operation)
        return None if source is None else Value(source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        child = self._source.child(name)
        if child is not None:
            return Value(child)
        if self._source.kind is str and name in METHODS:
            return partial(self._called, name)
        return getattr(self._read(f".{name}"), name)

    def _called(self, name: str, *args: Any, **kwargs: Any) -> Any:
        found = None if kwargs else self._result(by_method(self._source.kind, name, args))
        return getattr(self._read(f".{name}()"), name)(*plain(args), **plain(kwargs)) if found is None else found

    def __getitem__(self, key: Any) -> Any:
        child = self._source.child(key) if type(key) in (str, int) else None
        if child is not None:
            return Value(child)
        found = self._result(by_key(self._source.kind, key))
        return self._read(f"[{key!r}]")[key] if found is None else found

    # Reading.

    @property
    def value(self) -> V:
        """Return the value itself. Waits for it; raises ProgramError if there is none."""
        found: V = self._read(".value")
        return found

    def _read(self, why: str) -> Any:
        return self._source.read(why)

    def __await__(self) -> Generator[Any, None, V]:
        return self._source.aread().__await__()

    def __repr__(self) -> str:
        """Return a placeholder while the program runs, so that a list of values in an f-string shows their values."""
        return self._source.shown()

    __hash__ = Readable.__hash__


# Functions written in C (re.findall, json.loads, open) take real texts only, and say the name of what they got.
Value.__name__ = "Value that is not read yet: use str()"


class ValueText(Readable, str):
    """The string of `f"{value}"`: a placeholder when it becomes a part of other text, the value for any other use.

    Python makes a plain string of `f"{value}."`, which can't read the value: `value + "."` can.
    """

    _source: Source

    def __new__(cls, source: Source, spec: str) -> ValueText:
        made = str.__new__(cls, source.format(spec))
        made._source = source
        return made

    def _read(self, why: str) -> str:
        return self._source.run.read_text(str.__str__(self))

    def __getattribute__(self, name: str) -> Any:  # Any: a method of str, or an own attribute
        if name.startswith("_") or not hasattr(str, name):
            return object.__getattribute__(self, name)
        return getattr(self._read(f".{name}()"), name)

    def __format__(self, spec: str) -> str:
        return format(self._read("a width or precision"), spec) if spec else str.__str__(self)

    def __add__(self, other: Any) -> Any:
        return Value(TextSource(self._source.run, str.__str__(self))) + other

    def __radd__(self, other: Any) -> Any:
        return other + Value(TextSource(self._source.run, str.__str__(self)))

    def __getitem__(self, key: Any) -> str:
        return self._read(f"[{key!r}]")[key]

    def __repr__(self) -> str:
        return str.__repr__(self)

    __hash__ = Readable.__hash__


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
