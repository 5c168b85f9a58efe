"""Single JSON values with numbers: the values that an array or object must not repeat, or must not become.

A constant is a JSON value as a hashable pair, whose first part is the kind. The items of an array and the values of an
object are numbers of other constants. So equal values have equal pairs, whatever the order of keys and the spelling of
numbers:

    1.0             ("number", Fraction(1))            for example number 0
    true            ("bool", True)                     for example number 1
    [1, true]       ("array", (0, 1))
    {"a": 1}        ("object", frozenset({("a", 0)}))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.values import FALSE, Arrays, Const, Expr, Objects, Strings, Values
from ramet.grammar.regular import numbers as numeric
from ramet.grammar.regular.numbers import Numbers


class Constants:
    """All constants of one compilation by number, and the expressions of single constants.

    of_values, both: functions that make expressions (see Expressions).
    """

    def __init__(self, of_values: Callable[[Values], Expr], both: Callable[[Expr, Expr], Expr]) -> None:
        self._of_values = of_values
        self._both = both
        self._all: list[Const] = []
        self._index: dict[Const, int] = {}
        self._exprs: dict[int, Expr] = {}
        self._members: dict[int, dict[str, int]] = {}

    def number(self, const: Const) -> int:
        """Return the number of a constant. A new constant gets a new number."""
        found = self._index.get(const)
        if found is None:
            found = self._index[const] = len(self._all)
            self._all.append(const)
        return found

    def members(self, number: int) -> dict[str, int]:
        """Return the members of an object: each key with the number of its value."""
        found = self._members.get(number)
        if found is None:
            found = self._members[number] = dict(self._all[number][1])
        return found

    def items(self, number: int) -> tuple[int, ...]:
        """Return the numbers of the items of an array."""
        items: tuple[int, ...] = self._all[number][1]
        return items

    def scalar_text(self, number: int) -> str | None:
        """Return the text of a scalar; None for an array or object, whose text depends on the layout."""
        kind, value = self._all[number]
        if kind in ("array", "object"):
            return None
        return numeric.decimal_text(value) if kind == "number" else json.dumps(value, ensure_ascii=False)

    def expr(self, number: int) -> Expr:
        """Return the expression of exactly this value."""
        found = self._exprs.get(number)
        if found is None:
            found = self._exprs[number] = self._of_values(self._values(number))
        return found

    def _values(self, number: int) -> Values:
        kind, value = self._all[number]
        match kind:
            case "string":
                return Values(strings=(Strings(finite=frozenset((value,))),))
            case "number":
                return Values(numbers=(Numbers(finite=frozenset((value,))),))
            case "bool":
                return Values(booleans=2 if value else 1)
            case "array":
                items = tuple(map(self.expr, value))
                return Values(arrays=(Arrays(items, FALSE, len(items), len(items)),))
            case "object":
                properties = tuple((k, self.expr(n)) for k, n in sorted(value))
                return Values(objects=(Objects(properties, FALSE, required=frozenset(k for k, _ in value)),))
            case _:
                return Values(null=True)

    def all_but(self, numbers: Iterable[int]) -> Values:
        """Return all values except these."""
        of_kind: dict[str, set[Any]] = {k: set() for k in ("string", "number", "bool", "null", "array", "object")}
        for n in numbers:
            kind, value = self._all[n]
            of_kind[kind].add(n if kind in ("array", "object") else value)
        texts, fractions = frozenset(of_kind["string"]), frozenset(of_kind["number"])
        objects, arrays = frozenset(of_kind["object"]), frozenset(of_kind["array"])
        return Values(
            not of_kind["null"],
            3 & ~sum(2 if b else 1 for b in of_kind["bool"]),
            (Numbers(excluded=fractions) if fractions else numeric.ANY,),
            (Strings(excluded=texts) if texts else v.ANY_STRINGS,),
            (Objects(excluded=objects) if objects else v.ANY_OBJECTS,),
            (Arrays(excluded=arrays) if arrays else v.ANY_ARRAYS,),
        )

    def without(self, expr: Expr, numbers: Collection[int]) -> Expr:
        """Return the values of an expression except these."""
        return self._both(expr, self._of_values(self.all_but(numbers))) if numbers else expr

    def split(
        self, expr: Expr, rivals: tuple[int, ...], part: Callable[[int], int | None]
    ) -> Iterator[tuple[Expr, tuple[int, ...]]]:
        """Yield the ways in which one item of an array, or one value of an object, compares with those of `rivals`.

        So far, the whole equals each rival. `part` returns the number of a rival's value in this place.
        Yields pairs: an expression of the value here, and the rivals that the whole still equals if it has that value.
        With the rivals [1, 2] and [1, 3] and an integer as the second item: (any integer but 2 and 3, no rival), (2,
        the first), (3, the second).
        """
        alike: dict[int, list[int]] = {}
        for r in rivals:
            p = part(r)
            if p is not None:
                alike.setdefault(p, []).append(r)
        yield self.without(expr, alike.keys()), ()
        for p, still in alike.items():
            yield self._both(expr, self.expr(p)), tuple(still)
