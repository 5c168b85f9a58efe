"""Sets of JSON values as unions of conjunctions, type by type: what a schema means, in a form closed under and, or,
not.

A `Values` holds, for each JSON type, a union of specs; a spec is a conjunction. Subschemas of objects and arrays stay
*expressions* (numbers that `expressions.Expressions` gives out), so recursion costs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ramet.grammar import deadline
from ramet.grammar.regular import numbers as numeric
from ramet.grammar.regular.numbers import Numbers

_T = TypeVar("_T")

TRUE, FALSE = 0, 1  # expressions: anything, nothing
Expr = int
Const = tuple[str, Any]  # a value that was read, see distinct.py
INFINITE = 1 << 60  # a cost that nothing has


class Strings(NamedTuple):
    """A conjunction on strings. `languages`: (number of a language, must it hold). `finite`, if given, is the set
    itself.
    """

    low: int = 0
    high: int | None = None
    languages: frozenset[tuple[int, bool]] = frozenset()
    finite: frozenset[str] | None = None
    excluded: frozenset[str] = frozenset()


ANY_STRINGS = Strings()


class Rule(NamedTuple):
    """For a key that is not declared: all `patterns` (language, expression) that match; `additional` if none does."""

    patterns: tuple[tuple[int, Expr], ...]
    additional: Expr


class Exists(NamedTuple):
    """Some key has a value in `expr`: a key matched by `pattern`, or by none of `others`, and not one of `names`."""

    pattern: int | None
    others: tuple[int, ...]
    names: frozenset[str]
    expr: Expr


@dataclass(frozen=True, slots=True)
class Objects:
    """A conjunction on objects.

    properties: declared key -> expression of its value (all that applies). default and rules: keys not declared.
    low, high: number of keys. dependent: (key, keys that it requires). exists: see Exists.
    named_only: in declared order, keys that no schema names are not written, though they would be valid.
    excluded: numbers of constants (see distinct.py) that are left out.
    """

    properties: tuple[tuple[str, Expr], ...] = ()
    default: Expr = TRUE
    rules: tuple[Rule, ...] = ()
    required: frozenset[str] = frozenset()
    low: int = 0
    high: int | None = None
    dependent: tuple[tuple[str, frozenset[str]], ...] = ()
    exists: tuple[Exists, ...] = ()
    named_only: bool = False
    excluded: frozenset[int] = frozenset()
    table: dict[str, Expr] = field(init=False, compare=False, repr=False)  # `properties` as a dictionary

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", dict(self.properties))

    @property
    def languages(self) -> tuple[int, ...]:
        """Those that the rules tell keys apart by."""
        return tuple(dict.fromkeys(n for rule in self.rules for n, _ in rule.patterns))


ANY_OBJECTS = Objects()


class Contains(NamedTuple):
    """Between `low` and `high` items from index `start` on are in `expr`."""

    start: int
    expr: Expr
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class Arrays:
    """A conjunction on arrays: `prefix` items, then `rest` for all others; not the constants `excluded`. unique: no two
    items are equal; repeats: some two are.
    """

    prefix: tuple[Expr, ...] = ()
    rest: Expr = TRUE
    low: int = 0
    high: int | None = None
    contains: tuple[Contains, ...] = ()
    unique: bool = False
    repeats: bool = False
    excluded: frozenset[int] = frozenset()

    @property
    def is_plain(self) -> bool:
        """Nothing is asked of the items but what each of them is, and how many there are."""
        return not (self.contains or self.unique or self.repeats or self.excluded)


ANY_ARRAYS = Arrays()


class Values(NamedTuple):
    """A set of JSON values. booleans: bit 0 false, bit 1 true."""

    null: bool = False
    booleans: int = 0
    numbers: tuple[Numbers, ...] = ()
    strings: tuple[Strings, ...] = ()
    objects: tuple[Objects, ...] = ()
    arrays: tuple[Arrays, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.null or self.booleans or self.numbers or self.strings or self.objects or self.arrays)

    @property
    def is_one_spec(self) -> bool:
        """One spec of objects or of arrays is all there is: so it has values where the whole set has."""
        return len(self.objects) + len(self.arrays) == 1 and not (
            self.null or self.booleans or self.numbers or self.strings
        )


ANY = Values(True, 3, (numeric.ANY,), (ANY_STRINGS,), (ANY_OBJECTS,), (ANY_ARRAYS,))
NONE = Values()


def unite(parts: Iterable[Values]) -> Values:
    """The union; a spec that allows all of its type absorbs the others."""
    null, booleans = False, 0
    numbers: dict[Numbers, None] = {}
    strings: dict[Strings, None] = {}
    objects: dict[Objects, None] = {}
    arrays: dict[Arrays, None] = {}
    for v in parts:
        null |= v.null
        booleans |= v.booleans
        numbers.update(dict.fromkeys(v.numbers))
        strings.update(dict.fromkeys(v.strings))
        objects.update(dict.fromkeys(v.objects))
        arrays.update(dict.fromkeys(v.arrays))
    return Values(
        null,
        booleans,
        _merge_numbers(numbers),
        _merge_strings(strings),
        (ANY_OBJECTS,) if ANY_OBJECTS in objects else tuple(objects),
        (ANY_ARRAYS,) if ANY_ARRAYS in arrays else tuple(arrays),
    )


def _merge_numbers(found: dict[Numbers, None]) -> tuple[Numbers, ...]:
    if numeric.ANY in found:
        return (numeric.ANY,)
    finite = [n for n in found if n.finite is not None and n.plain is None]
    if len(finite) < 2:
        return tuple(found)
    joined = frozenset(v for n in finite for v in n.finite or ())
    return (*(n for n in found if n.finite is None or n.plain is not None), Numbers(finite=joined))


def _merge_strings(found: dict[Strings, None]) -> tuple[Strings, ...]:
    if ANY_STRINGS in found:
        return (ANY_STRINGS,)
    finite = [s for s in found if s.finite is not None]
    if len(finite) < 2:
        return tuple(found)
    joined = frozenset(v for s in finite for v in s.finite or ())
    return (*(s for s in found if s.finite is None), Strings(finite=joined))


def product(left: tuple[_T, ...], right: tuple[_T, ...], both: Callable[[_T, _T], _T | None]) -> tuple[_T, ...]:
    """All pairs that are not empty, each once. Where a side's spec comes out unchanged it stands for all its pairs."""
    if len(left) == 1 and len(right) == 1:
        c = left[0] if left[0] == right[0] else both(left[0], right[0])
        return () if c is None else (c,)
    deadline.check()
    pairs = [[a if a == b else both(a, b) for b in right] for a in left]
    whole_left = [a in row for a, row in zip(left, pairs, strict=True)]
    whole_right = [any(row[j] == b for row in pairs) for j, b in enumerate(right)]
    found: dict[_T, None] = {}
    for i, row in enumerate(pairs):
        for j, c in enumerate(row):
            if c is None or (whole_left[i] and c != left[i]) or (whole_right[j] and c != right[j]):
                continue
            found[c] = None
    return tuple(found)
