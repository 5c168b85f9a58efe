"""Sets of JSON values: the meaning of a schema.

A set is a `Values`. It has a list of *specs* for each JSON type, and a value is in the set if it is in one of the specs
of its type. A spec is a conjunction: all its conditions must hold. The union, the intersection and the complement of
such sets have the same form.

    {"type": "string", "minLength": 2}          Values(strings=(Strings(low=2),))
    {"type": ["null", "boolean"]}               Values(null=True, booleans=3)
    {"enum": [1, "a"]}                          Values(numbers=(Numbers(finite={1}),), strings=(Strings(finite={"a"}),))
    {"minItems": 1}                             ANY, but with arrays=(Arrays(low=1),)
    {"anyOf": [{"minItems": 3}, {"maxItems": 1}], "type": "array"}
                                                Values(arrays=(Arrays(low=3), Arrays(high=1)))

The sets of the values inside an object or array are not written out. They are *expressions*: numbers of sets, given out
by `Expressions` (expressions.py). So a schema may contain itself. If the number of this schema is 2:

    {"type": "array", "items": {"$ref": "#"}}   Values(arrays=(Arrays(rest=2),))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ramet.grammar import deadline
from ramet.grammar.regular import numbers as numeric
from ramet.grammar.regular.numbers import Numbers

_T = TypeVar("_T")

Expr = int
TRUE, FALSE = 0, 1  # the expressions of all values and of none
Const = tuple[str, Any]  # one JSON value, see constants.py
INFINITE = 1 << 60  # the cost of a set without values, see costs.py


class Strings(NamedTuple):
    """Strings of `low` to `high` characters.

    languages: pairs of a language's number, and whether the string must or must not be in it; see languages.py.
    excluded: strings that are left out. finite: if given, exactly these strings, and all other fields have their
    defaults.
    """

    low: int = 0
    high: int | None = None
    languages: frozenset[tuple[int, bool]] = frozenset()
    finite: frozenset[str] | None = None
    excluded: frozenset[str] = frozenset()


ANY_STRINGS = Strings()


class Rule(NamedTuple):
    """`patternProperties` with `additionalProperties`, for keys that are not declared.

    patterns: pairs of a language and an expression. The value of a key is in the expression of each language that holds
    the key. If no language holds the key, its value is in `additional`.
    """

    patterns: tuple[tuple[int, Expr], ...]
    additional: Expr


class Exists(NamedTuple):
    """A condition that comes from negation, such as `not {"additionalProperties": A}`: some key has a value in `expr`.

    The key is none of `names`. With a `pattern`, the key is in that language; without, it is in none of the languages
    `others`.
    """

    pattern: int | None
    others: tuple[int, ...]
    names: frozenset[str]
    expr: Expr


@dataclass(frozen=True, slots=True)
class Objects:
    """Objects that satisfy all of these conditions.

    properties: the declared keys, each with the expression of its value. No rule applies to them in addition. default,
    rules: what the values of all other keys must be; `default` and every rule must hold.
    required: keys that must be present. low, high: the number of keys. dependent: (key, keys that it requires). exists:
    see Exists. excluded: objects that are left out, as numbers of constants (see constants.py).
    says_others: whether a schema said what other keys must be. False: it only said what the declared keys must be, so
    that `closed` leaves other keys out. None: it spoke of no keys.
    """

    properties: tuple[tuple[str, Expr], ...] = ()
    default: Expr = TRUE
    rules: tuple[Rule, ...] = ()
    required: frozenset[str] = frozenset()
    low: int = 0
    high: int | None = None
    dependent: tuple[tuple[str, frozenset[str]], ...] = ()
    exists: tuple[Exists, ...] = ()
    says_others: bool | None = None
    excluded: frozenset[int] = frozenset()
    table: dict[str, Expr] = field(init=False, compare=False, repr=False)  # `properties` as a dictionary
    hashed: int = field(init=False, compare=False, repr=False)  # specs of hundreds of keys are keys of dictionaries

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", dict(self.properties))
        parts = (self.properties, self.default, self.rules, self.required, self.low, self.high, self.dependent)
        object.__setattr__(self, "hashed", hash((*parts, self.exists, self.says_others, self.excluded)))

    def __hash__(self) -> int:
        return self.hashed

    @property
    def languages(self) -> tuple[int, ...]:
        """Return the languages by which the rules distinguish keys."""
        return tuple(dict.fromkeys(n for rule in self.rules for n, _ in rule.patterns))


ANY_OBJECTS = Objects()


class Contains(NamedTuple):
    """At least `low` and at most `high` of the items from index `start` on are in `expr`."""

    start: int
    expr: Expr
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class Arrays:
    """Arrays that satisfy all of these conditions.

    prefix: what the first items must be, one by one. rest: what each item after them must be. low, high: the number of
    items. contains: see Contains. unique: no two items are equal. repeats: some two items are equal. excluded: arrays
    that are left out, as numbers of constants (see constants.py).
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
        """Tell whether items can be read one by one: only the value of each item and the number of items matter."""
        return not (self.contains or self.unique or self.repeats or self.excluded)


ANY_ARRAYS = Arrays()


class Values(NamedTuple):
    """A set of JSON values: for each type, the values in one of the specs. booleans: bit 0 is false, bit 1 is true."""

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
        """Tell whether the set is exactly one spec of objects or of arrays. It is then empty if the set is empty."""
        return len(self.objects) + len(self.arrays) == 1 and not (
            self.null or self.booleans or self.numbers or self.strings
        )


ANY = Values(True, 3, (numeric.ANY,), (ANY_STRINGS,), (ANY_OBJECTS,), (ANY_ARRAYS,))
NONE = Values()


def unite(parts: Iterable[Values]) -> Values:
    """Return the union. A spec that allows all values of its type absorbs the others."""
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
    """Return the intersection of two unions of specs of one type: the intersections of all pairs that are not empty.

    both: the intersection of two specs; None if it is empty. If a pair gives back one of its specs unchanged, that
    result stands for all pairs of the spec, because the other intersections are parts of it.
    """
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
