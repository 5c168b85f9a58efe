"""Checks of a generated value: `gen(..., where=length(1, 20))`. These checks are data and travel with the graph.

A check looks at the JSON value. It sees the items of a list, and the compact JSON of any other value that is not text.
Checks combine: `length(1, 20) & ~contains("\\n") | is_in("none")`.

Not here: which checks become masks (narrowing.py); checks in Python (any callable), which run in the program's process
after each try.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import msgspec

from ramet.errors import InvalidRequest

MAX_DEPTH = 50


class Check(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One check.

    `values`: the JSON values of `in`, or the texts of `starts_with`, `ends_with` and `contains`; one of them must fit.
    `at_least`, `at_most`: the limits of `between` and `length`. A length is counted in `unit`, or in a list's items.
    `of`: the checks that `all`, `any` and `not` (of one check) combine.
    """

    kind: Literal["length", "in", "starts_with", "ends_with", "contains", "between", "all", "any", "not"]
    values: tuple[Any, ...] = ()  # Any: JSON
    at_least: float | None = None
    at_most: float | None = None
    unit: Literal["characters", "words", "lines"] = "characters"
    of: tuple[Check, ...] = ()

    def __and__(self, other: Check) -> Check:
        """Require both checks."""
        return Check("all", of=(self, other)) if isinstance(other, Check) else NotImplemented

    def __or__(self, other: Check) -> Check:
        """Require one of the two checks, or both."""
        return Check("any", of=(self, other)) if isinstance(other, Check) else NotImplemented

    def __invert__(self) -> Check:
        """Require a value that the check refuses."""
        return Check("not", of=(self,))

    def __bool__(self) -> bool:
        raise TypeError("a check has no truth value; combine checks with &, | and ~ instead of and, or and not")

    def problem(self, value: Any) -> str | None:  # Any: JSON
        """Return the problem of a value, or None."""
        if self.of:
            return self._combined(value)
        if self.kind == "in":
            is_in = any(_is_same(value, one) for one in self.values)
            return None if is_in else f"it is {_shown(value)}, but must be one of {_listed(self.values)}"
        if self.kind in ("length", "between"):
            return self._out_of_range(value)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        found = {"starts_with": text.startswith, "ends_with": text.endswith, "contains": text.__contains__}[self.kind]
        if any(found(one) for one in self.values):
            return None
        what = {"starts_with": "start with", "ends_with": "end with", "contains": "contain"}[self.kind]
        return f"it is {_shown(text)}, but must {what} {_listed(self.values)}"

    def _combined(self, value: Any) -> str | None:
        problems = [check.problem(value) for check in self.of]
        found = [problem for problem in problems if problem is not None]
        if self.kind == "not":
            return None if found else f"it is {_shown(value)}, but must not have: {self.of[0]}"
        if self.kind == "any":
            return None if len(found) < len(problems) else ", or ".join(found)
        return found[0] if found else None

    def _out_of_range(self, value: Any) -> str | None:
        size: Any = value
        what = "it"
        if self.kind == "length":
            what = "its length"
            size = len(value) if isinstance(value, list | dict) else _length(value, self.unit)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            return f"it is {_shown(value)}, but must be a number"
        if (self.at_least is None or size >= self.at_least) and (self.at_most is None or size <= self.at_most):
            return None
        return f"{what} is {size:,}, but must be {self._range()}"

    def _range(self) -> str:
        low, high = (None if n is None else f"{n:,g}" for n in (self.at_least, self.at_most))
        unit = f" {self.unit}" if self.kind == "length" else ""
        if low is None or high is None:
            return f"at most {high}{unit}" if low is None else f"at least {low}{unit}"
        return f"{low}{unit}" if low == high else f"between {low} and {high}{unit}"

    def __str__(self) -> str:
        if self.kind == "not":
            return f"not ({self.of[0]})"
        if self.of:
            return (" and " if self.kind == "all" else " or ").join(f"({check})" for check in self.of)
        if self.kind in ("length", "between"):
            return f"{'length ' if self.kind == 'length' else ''}{self._range()}"
        return f"{self.kind.replace('_', ' ')} {_listed(self.values)}"


def length(
    at_least: int | None = None,
    at_most: int | None = None,
    *,
    unit: Literal["characters", "words", "lines"] = "characters",
) -> Check:
    """Require a text with this number of characters (words, lines), or a list with this number of items."""
    return _checked(Check("length", at_least=at_least, at_most=at_most, unit=unit))


def between(at_least: float | None = None, at_most: float | None = None) -> Check:
    """Require a number within these limits, both included."""
    return _checked(Check("between", at_least=at_least, at_most=at_most))


def is_in(*values: Any) -> Check:  # Any: JSON
    """Require one of these values. Values are compared by their JSON form."""
    try:
        values = tuple(msgspec.json.decode(msgspec.json.encode(values)))
    except (TypeError, msgspec.MsgspecError) as error:
        raise InvalidRequest(
            f"is_in compares with {values!r}, which has no JSON form: {error}", param="where"
        ) from error
    return _checked(Check("in", values))


def starts_with(*texts: str) -> Check:
    """Require a text that starts with one of these."""
    return _checked(Check("starts_with", texts))


def ends_with(*texts: str) -> Check:
    """Require a text that ends with one of these."""
    return _checked(Check("ends_with", texts))


def contains(*texts: str) -> Check:
    """Require a text that contains one of these."""
    return _checked(Check("contains", texts))


def check_problem(check: Check) -> str | None:
    """Return the problem of the check itself, or None."""
    if check.kind in ("all", "any", "not"):
        if not check.of or (check.kind == "not" and len(check.of) != 1):
            return f"{check.kind} combines {len(check.of)} checks"
        if _depth(check) > MAX_DEPTH:
            return f"checks are combined more than {MAX_DEPTH} deep"
        return next((problem for one in check.of if (problem := check_problem(one))), None)
    if check.of:
        return f"{check.kind} combines no other checks"
    if check.kind in ("length", "between"):
        limits = [limit for limit in (check.at_least, check.at_most) if limit is not None]
        if not limits:
            return f"{check.kind} has no limit; give at_least or at_most"
        if not all(_is_number(limit) for limit in limits):
            return f"{check.kind} has limits {limits!r}, which must be numbers"
        return f"{check.kind} allows nothing: {limits[0]} to {limits[-1]}" if limits[0] > limits[-1] else None
    if not check.values:
        return f"{check.kind} has nothing to compare with"
    if check.kind != "in" and not all(isinstance(text, str) and text for text in check.values):
        return f"{check.kind} compares with {check.values!r}, which must be texts, and not empty"
    try:
        msgspec.json.encode(check.values)
    except (TypeError, msgspec.MsgspecError) as error:
        return f"{check.kind} compares with {check.values!r}, which has no JSON form: {error}"
    return None


def _checked(check: Check) -> Check:
    problem = check_problem(check)
    if problem is not None:
        raise InvalidRequest(problem, param="where")
    return check


def _depth(check: Check) -> int:
    return 1 + max(map(_depth, check.of), default=0)


def _is_same(a: Any, b: Any) -> bool:
    """Return whether two JSON values are the same: true is not the number 1."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _length(value: Any, unit: str) -> int:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if unit == "characters":
        return len(text)
    return len(text.split()) if unit == "words" else len(text.splitlines())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(values: tuple[object, ...]) -> str:
    shown = [_shown(value) for value in values[:8]]
    return " or ".join(shown) + (f" or {len(values) - 8} more" if len(values) > 8 else "")
