"""Values that do not exist yet. Putting one into text records a data edge; anything else reads it.

`f"Dear {s['name']}"` must give a Python string at once, so formatting a value inserts a *placeholder*: a short run of
private-use characters that stands for the value until the text is appended to a state. Everything that needs the value
itself (comparing, measuring, converting with `str()` or `int()`, iterating, its attributes) submits what is recorded so
far and waits.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Generator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from ramet.errors import InvalidProgram
from ramet.lang.graph.ir import Ref
from ramet.lang.recording.types import TEXT, OutputType, Shape

if TYPE_CHECKING:
    from ramet.lang.recording.run import Run

T = TypeVar("T")

# One placeholder: START, eight digits to the base 256 (four of the run's key, four of the index), a label for whoever
# sees it where it should not be (printed, in a file's name), END. The characters but for the label are of Unicode's
# Supplementary Private Use Area-A, which text does not use; the key makes a chance match impossible.
_START, _END, _ZERO = "\U000f0000", "\U000f0001", 0xF0100
PLACEHOLDER = re.compile(f"{_START}([\U000f0100-\U000f01ff]{{8}})[^{_END}]*{_END}")
_CUT = re.compile(f"{_START}([\U000f0100-\U000f01ff]{{2,4}})")  # its beginning, with a part of the key

current_run: ContextVar[Run | None] = ContextVar("ramet_current_run", default=None)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """One call that a model made (`call_tools`). `result` is a value of the program: read it, or put it into text."""

    name: str
    arguments: dict[str, Any]  # Any: JSON
    result: Any  # a Value while the program runs


class Placeholders:
    """The placeholders of one run. `key` tells them from other runs'."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(4)
        self._items: dict[int, object] = {}
        self._indices = count()  # a program may put values into text on several threads

    def add(self, item: object, label: str) -> str:
        index = next(self._indices)
        self._items[index] = item
        digits = self.key + index.to_bytes(4, "big")
        return _START + "".join(chr(_ZERO + byte) for byte in digits) + f"‹{label}›" + _END

    def split(self, text: str, foreign: Callable[[bytes, int], object]) -> list[object]:
        """Cut text into strings and the items that its placeholders stand for; `foreign`: those of another run."""
        if _START not in text:
            return [text] if text else []
        found: list[object] = []
        for i, piece in enumerate(PLACEHOLDER.split(text)):
            if i % 2 == 0:
                if piece:
                    found.append(self._whole(piece))
                continue
            digits = bytes(ord(char) - _ZERO for char in piece)
            index = int.from_bytes(digits[4:], "big")
            found.append(self._items[index] if digits[:4] == self.key else foreign(digits[:4], index))
        return found

    def _whole(self, text: str) -> str:
        """Text without placeholders. Raises InvalidProgram where one of this run's was cut."""
        for digits in _CUT.findall(text) if _START in text else ():
            if self.key.startswith(bytes(ord(char) - _ZERO for char in digits)):
                raise InvalidProgram(
                    "a text was cut within a generated value that stands in it; read the value first: str(s[...])"
                )
        return text

    def get(self, index: int) -> object:
        return self._items[index]


def placeholder_for(item: object) -> str:
    """A placeholder of the run whose program is being executed. Raises RuntimeError outside of a program."""
    run = current_run.get()
    if run is None:
        raise RuntimeError(f"{item!r} can only be put into text inside of a running program")
    return run.placeholders.add(item, type(item).__name__.lower())


class Value:
    """The value of a node of a running program, or of a field of it.

    `await value`, `value.value` and `str(value)` read it (blocking, but for `await`); f-strings do not.
    """

    __slots__ = ("_name", "_node", "_output", "_path", "_run", "_shape")

    def __init__(
        self,
        run: Run,
        node: int,
        name: str | None = None,
        output: OutputType = TEXT,
        path: tuple[str, ...] = (),
        shape: Shape | None = None,
    ) -> None:
        self._run, self._node, self._name, self._output, self._path = run, node, name, output, path
        self._shape = shape if path else output.shape

    # Data edges.

    def __format__(self, spec: str) -> str:
        label = ".".join((self._name or "value", *self._path))
        return self._run.placeholders.add(Ref(self._node, self._path, spec), label)

    def __add__(self, other: Any) -> Any:  # Any: whatever the value's type gives
        return f"{self}{other}" if self._is_text and isinstance(other, str | Value) else self._read("+") + other

    def __radd__(self, other: Any) -> Any:
        return f"{other}{self}" if self._is_text and isinstance(other, str) else other + self._read("+")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        child = self._child(name)
        return child if child is not None else getattr(self._read(f".{name}"), name)

    def __getitem__(self, key: Any) -> Any:
        child = self._child(key) if isinstance(key, str) else None
        return child if child is not None else self._read(f"[{key!r}]")[key]

    def _child(self, name: str) -> Value | None:
        shape = None if self._shape is None else self._shape.child(name)
        if shape is None:
            return None
        return Value(self._run, self._node, self._name, self._output, (*self._path, name), shape)

    @property
    def _is_text(self) -> bool:
        if self._path:
            return self._shape is not None and self._shape.schema.get("type") == "string"
        return self._output is TEXT or self._output.wire == "str"

    # Reading.

    @property
    def value(self) -> Any:
        """The value itself. Waits for it; raises ProgramError where there is none."""
        return self._read(".value")

    def _read(self, why: str) -> Any:  # Any: a value of the program's type
        return self._follow(self._run.read(self._node, self._output, why))

    def _follow(self, value: Any) -> Any:
        for step in self._path:
            value = value[step] if isinstance(value, dict) else getattr(value, step)
        return value

    def __await__(self) -> Generator[Any, None, Any]:
        async def wait() -> Any:
            return self._follow(await self._run.aread(self._node, self._output))

        return wait().__await__()

    def __repr__(self) -> str:
        """While the program runs a placeholder, too: so a list of values in an f-string is a list of their values."""
        if self._run.is_recording:
            return self.__format__("!r")
        path = "".join(f".{step}" for step in self._path)
        done = self._run.result_of(self._node)
        shown = "not read" if done is None or done.error else repr(done.value)[:60]
        return f"<value {self._name or 'unnamed'}{path} of node {self._node}: {shown}>"

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


def plain(item: Any, run: Run | None = None) -> Any:  # Any: values inside lists, tuples, dicts and texts, of any kind
    """Read every value in `item`: values themselves, in lists, tuples and dicts, and as placeholders in text.

    `run`: whose placeholders; None: the running program's.
    """
    if isinstance(item, Value):
        return item.value
    if isinstance(item, str) and _START in item:
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
