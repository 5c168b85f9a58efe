"""Operations on values in texts: `f"{s['x'].strip().title()}"` needs no value in Python, as the runtime applies them.

An operation is a step of a path (ir.Ref), beside the fields and indices. It is a method of str, an index, a slice, or
arithmetic, with Python's meaning and errors. Sizes are limited, because a server applies the operations of strangers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import msgspec

MAX_CHARACTERS = 10_000_000  # of a text that an operation may make
MAX_BITS = 100_000  # of an integer
MAX_STEPS = 64  # of a path

Scalar: TypeAlias = str | int | float | bool | None
Name: TypeAlias = Literal[
    "strip",
    "lstrip",
    "rstrip",
    "lower",
    "upper",
    "title",
    "capitalize",
    "casefold",
    "swapcase",
    "replace",
    "removeprefix",
    "removesuffix",
    "ljust",
    "rjust",
    "center",
    "zfill",
    "split",
    "rsplit",
    "splitlines",
    "partition",
    "rpartition",
    "count",
    "item",
    "slice",
    "+",
    "-",
    "*",
    "/",
    "//",
    "%",
    "r+",
    "r-",
    "r*",
    "r/",
    "r//",
    "r%",
]

_SAME = ("strip", "lstrip", "rstrip", "lower", "upper", "title", "capitalize", "casefold", "swapcase", "replace")
_WIDTHS = ("ljust", "rjust", "center", "zfill")
METHODS: Mapping[str, type] = MappingProxyType(  # of str, with the type of their results
    {
        **dict.fromkeys((*_SAME, *_WIDTHS, "removeprefix", "removesuffix"), str),
        **dict.fromkeys(("split", "rsplit", "splitlines"), list),
        **dict.fromkeys(("partition", "rpartition"), tuple),
        "count": int,
    }
)
ARITHMETIC: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        "+": operator.add,
        "-": operator.sub,
        "*": operator.mul,
        "/": operator.truediv,
        "//": operator.floordiv,
        "%": operator.mod,
    }
)


class Operation(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One operation. `args`: of the method; the index of an item; begin, end and step of a slice; the other number.

    `r-` and the like have the value on their right side: `10 - s["n"]`.
    """

    name: Name
    args: tuple[Scalar, ...] = ()

    def apply(self, value: Any) -> Any:  # Any: a value of any type
        """Return the result. Raises what Python raises, and ValueError if it would be too large."""
        if self.name == "item":
            return value[self.args[0]]
        if self.name == "slice":
            return value[slice(*self.args)]
        if self.name in METHODS:
            if not isinstance(value, str):
                raise TypeError(f"{self.name}() is of text, but the value is {value!r}")
            self._check_size(value)
            return getattr(value, self.name)(*self.args)
        other = self.args[0]
        if not (is_number(value) and is_number(other)):
            raise TypeError(f"{self.name} is of numbers, but the values are {value!r} and {other!r}")
        symbol, (a, b) = self.name.lstrip("r"), ((other, value) if self.name[0] == "r" else (value, other))
        if symbol == "*" and sum(n.bit_length() for n in (a, b) if isinstance(n, int)) > MAX_BITS:
            raise ValueError(f"the product would have more than {MAX_BITS:,} bits")
        return ARITHMETIC[symbol](a, b)

    def kind(self, of: type) -> type:
        """Return the type of the result, given the value's type. Lists and tuples are of texts."""
        if self.name in METHODS:
            return METHODS[self.name]
        if self.name in ("item", "slice"):
            return of if self.name == "slice" else str
        return float if float in (of, type(self.args[0])) or self.name.lstrip("r") == "/" else int

    def _check_size(self, text: str) -> None:
        size = len(text)
        if self.name in _WIDTHS:
            size = max(size, self.args[0]) if self.args and isinstance(self.args[0], int) else size
        elif self.name == "replace" and len(self.args) > 1:
            old, new = self.args[:2]
            if isinstance(old, str) and isinstance(new, str):
                size += text.count(old) * max(0, len(new) - len(old))
        if size > MAX_CHARACTERS:
            raise ValueError(f"{self.name}() would make {size:,} characters; at most {MAX_CHARACTERS:,} are possible")

    def __str__(self) -> str:
        if self.name in METHODS:
            return f".{self.name}({', '.join(map(repr, self.args))})"
        if self.name == "item":
            return f"[{self.args[0]!r}]"
        if self.name == "slice":
            return f"[{':'.join('' if one is None else str(one) for one in self.args)}]"
        return f" {self.name} {self.args[0]!r}"


Step: TypeAlias = str | int | Operation


def follow(value: Any, path: Sequence[Step]) -> Any:  # Any: JSON, or an object with the fields
    """Return the part of a value to which a path leads. Raises what Python raises."""
    for step in path:
        if isinstance(step, Operation):
            value = step.apply(value)
        elif isinstance(step, int) or isinstance(value, Mapping | list):
            value = value[step]
        else:
            value = getattr(value, step)
    return value


def path_text(path: Sequence[Step]) -> str:
    """Return a path as it is written in Python."""
    return "".join(
        str(step) if isinstance(step, Operation) else f"[{step}]" if isinstance(step, int) else f".{step}"
        for step in path
    )


def by_key(kind: type | None, key: object) -> Operation | None:
    """Return the operation of an index or a slice of a value of this type. None: the value has to be read."""
    if kind not in (str, list, tuple):
        return None
    if isinstance(key, slice):
        parts = (key.start, key.stop, key.step)
        return Operation("slice", parts) if all(part is None or _is_int(part) for part in parts) else None
    return Operation("item", (key,)) if isinstance(key, int) and _is_int(key) else None


def by_symbol(kind: type | None, symbol: str, other: object) -> Operation | None:
    """Return the operation of arithmetic between a value of this type and a number, or None."""
    if kind not in (int, float) or symbol.lstrip("r") not in ARITHMETIC:
        return None
    is_plain = _is_int(other) or (type(other) is float and math.isfinite(other))
    return msgspec.convert({"name": symbol, "args": (other,)}, Operation) if is_plain else None


def by_method(kind: type | None, name: str, args: tuple[object, ...]) -> Operation | None:
    """Return the operation of a method's call on a value of this type, or None."""
    is_plain = all(arg is None or _is_int(arg) or type(arg) is bool or _is_text(arg) for arg in args)
    if kind is not str or name not in METHODS or not is_plain:
        return None
    return msgspec.convert({"name": name, "args": args}, Operation)


def _is_text(value: object) -> bool:
    """Return whether a value is a text that JSON's readers take."""
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: object) -> bool:
    """Return whether a value is an integer that JSON's readers take."""
    return type(value) is int and -(2**63) <= value < 2**63


def path_problem(path: Sequence[Step]) -> str | None:
    """Return the problem of a path, or None."""
    if len(path) > MAX_STEPS:
        return f"uses a value by {len(path)} steps; at most {MAX_STEPS} are possible"
    for step in path:
        if not isinstance(step, Operation) or step.name in METHODS:
            continue
        if len(step.args) != (3 if step.name == "slice" else 1):
            return f"has an operation {step.name!r} with {len(step.args)} arguments"
    return None
