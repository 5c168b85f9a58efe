"""Expressions: sets of JSON values with numbers. A set is worked out when its values are first needed.

An expression is a conjunction of *atoms*. An atom is a schema (the values that it accepts), the negation of an
expression, or a `Values`. Equal conjunctions have the same number. 0 is the set of all values, 1 is the empty set:

    {"properties": {"a": {"allOf": [A, {"not": B}]}}}     the value of "a" is one expression with the atom of the schema
                                                          {"allOf": ...}; once its values are asked for, it is read as
                                                          the intersection of A and the complement of B

So a part of a schema that no text reaches costs nothing, and a schema may contain itself. But a schema that requires
itself has no values, because they would be infinite: `{"type": "object", "required": ["a"], "properties": {"a":
{"$ref": "#"}}}`. So a set counts as empty until a finite value of it is found (the least fixed point).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, NoReturn

from ramet.errors import GrammarTooLarge, InvalidSchema
from ramet.grammar import deadline
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.constants import Constants
from ramet.grammar.json_schema.algebra.languages import Languages
from ramet.grammar.json_schema.algebra.values import FALSE, INFINITE, TRUE, Arrays, Expr, Objects, Strings, Values
from ramet.grammar.json_schema.schema.document import SchemaNode
from ramet.grammar.regular import numbers as numeric

MAX_SPECS = 1000


class Operations(NamedTuple):
    """The functions that expressions are given: what a schema means, and questions about specs.

    To answer these, the functions ask the expressions about the parts of a spec. interpret, interpret_not: the values
    that a schema object accepts, and those that it refuses. is_scalar: whether `interpret` is cheap, by the keywords:
    it then reads no other schema and compares no objects or arrays. surely_has_values: whether the keywords show at
    once that the schema accepts some value.
    """

    interpret: Callable[[SchemaNode], Values]
    interpret_not: Callable[[SchemaNode], Values]
    is_scalar: Callable[[SchemaNode], bool]
    surely_has_values: Callable[[SchemaNode], bool]
    both_objects: Callable[[Expressions, Objects, Objects], Objects | None]
    both_arrays: Callable[[Expressions, Arrays, Arrays], Arrays | None]
    not_objects: Callable[[Expressions, Objects], list[Objects]]
    not_arrays: Callable[[Expressions, Arrays], list[Arrays]]
    cost: Callable[[Expressions, Values], int]
    all_of: Callable[[Expressions, Values, int], list[int] | None]


class _Not(NamedTuple):
    """An atom: all values that are not in the expression."""

    expr: Expr


_Atom = SchemaNode | _Not | Values


class _NotYet(Exception):
    """Raised by a question about a schema whose own meaning is still being worked out."""


class Expressions:
    """All expressions of one compilation, and the answers about them.

    lenient: a set that cannot be described is replaced by the set of all values.
    """

    def __init__(self, languages: Languages, operations: Operations, *, lenient: bool = False) -> None:
        self.languages = languages
        self.lenient = lenient
        self.constants = Constants(self.of_values, self.both)
        self._operations = operations
        self._both_objects = partial(operations.both_objects, self)
        self._both_arrays = partial(operations.both_arrays, self)
        self._atoms: list[_Atom] = []
        self._atom_index: dict[_Atom, int] = {}
        self._contents: list[tuple[int, ...]] = [(), (-1,)]  # for each expression, its atoms
        self._index: dict[tuple[int, ...], Expr] = {(): TRUE, (-1,): FALSE}
        self._of_node: dict[SchemaNode, Expr] = {}
        self._kinds: dict[Expr, int] = {}
        self._conjunctions: dict[tuple[Expr, Expr], Expr] = {}
        self._values: dict[Expr, Values] = {TRUE: v.ANY, FALSE: v.NONE}
        self._atom_values: dict[int, Values] = {}
        self._open: list[int] = []  # atoms whose values are being worked out, the innermost last
        self._costs: dict[Expr, int] = {TRUE: 1, FALSE: INFINITE}
        self._in_progress: set[Expr] = set()
        self._asked_at = 0  # atoms opened before this depth belong to the caller that asks about emptiness
        self._tainted = False  # the cost being worked out depends on an unfinished cost
        self._scalar: dict[Expr, bool] = {TRUE: False, FALSE: True}
        self._plainest: dict[Expr, Expr] = {}
        self._same_values: dict[Values, Expr] = {}
        self._listed: dict[Expr, tuple[int, list[int] | None]] = {}
        self._listing: set[Expr] = set()

    # --- making

    def _of_atom(self, atom: _Atom) -> Expr:
        found = self._atom_index.get(atom)
        if found is None:
            found = self._atom_index[atom] = len(self._atoms)
            self._atoms.append(atom)
        return self._of((found,))

    def _of(self, atoms: tuple[int, ...]) -> Expr:
        found = self._index.get(atoms)
        if found is None:
            found = self._index[atoms] = len(self._contents)
            self._contents.append(atoms)
        return found

    def of_schema(self, node: SchemaNode) -> Expr:
        """Return the expression of the values that a schema accepts."""
        found = self._of_node.get(node)
        if found is None:
            found = self._of_node[node] = self._of_schema(node)
        return found

    def _of_schema(self, node: SchemaNode) -> Expr:
        if node.schema is True or node.schema == {}:
            return TRUE
        if node.schema is False:
            return FALSE
        return self._of_atom(node)

    def of_values(self, values: Values) -> Expr:
        """Return the expression of a known set."""
        if values == v.ANY:
            return TRUE
        return FALSE if values.is_empty else self._of_atom(values)

    def negate(self, expr: Expr) -> Expr:
        """Return the expression of all other values."""
        if expr <= FALSE:
            return FALSE - expr
        atoms = self._contents[expr]
        if len(atoms) == 1:
            atom = self._atoms[atoms[0]]
            if isinstance(atom, _Not):
                return atom.expr
        return self._of_atom(_Not(expr))

    def is_conjunction(self, expr: Expr) -> bool:
        """Tell whether an expression has several atoms. It may then be empty although none of its atoms is."""
        return len(self._contents[expr]) > 1

    def both(self, a: Expr, b: Expr) -> Expr:
        """Return the expression of the values in both."""
        if a == b or b == TRUE:
            return a
        if a == TRUE:
            return b
        if FALSE in (a, b):
            return FALSE
        key = (a, b) if a < b else (b, a)
        found = self._conjunctions.get(key)
        if found is None:
            found = self._of(tuple(sorted({*self._contents[a], *self._contents[b]})))
            if found not in (a, b) and (self.is_scalar(a) or self.is_scalar(b)):
                found = self._simpler(a, b, found)
            self._conjunctions[key] = found
        return found

    def _simpler(self, a: Expr, b: Expr, whole: Expr) -> Expr:
        """Return the conjunction `whole` of a and b, or a simpler expression of the same set. One of them is scalar."""
        asked_at, self._asked_at = self._asked_at, len(self._open)
        try:
            found = self.intersect(self.values(a), self.values(b))
            if found.is_empty:
                return FALSE
            for e in (a, b):
                if self.is_scalar(e) and found == self.values(e):
                    return e
        except _NotYet:
            return whole
        finally:
            self._asked_at = asked_at
        return self.of_values(found) if self.is_scalar(a) and self.is_scalar(b) else whole

    def plainest(self, expr: Expr) -> Expr:
        """Return the same expression for all expressions with the same values, if that is cheap to see; else `expr`
        itself.
        """
        found = self._plainest.get(expr)
        if found is None:
            found = expr if not self.is_scalar(expr) else self._same_values.setdefault(self.values(expr), expr)
            self._plainest[expr] = found
        return found

    def is_scalar(self, expr: Expr) -> bool:
        """Tell whether no object and no array is compared in the expression. Its values can then be worked out at any
        time.
        """
        found = self._scalar.get(expr)
        if found is None:
            found = all(self._is_scalar_atom(a) for a in self._contents[expr])
            self._scalar[expr] = found
        return found

    def _is_scalar_atom(self, index: int) -> bool:
        atom = self._atoms[index]
        if isinstance(atom, SchemaNode):
            return self._operations.is_scalar(atom)
        if isinstance(atom, _Not):
            return self.is_scalar(atom.expr)
        return all(s is v.ANY_OBJECTS for s in atom.objects) and all(s is v.ANY_ARRAYS for s in atom.arrays)

    # --- values

    def values(self, expr: Expr) -> Values:
        """Return the set of values.

        Raises: InvalidSchema if a schema's meaning depends on itself without any nesting (a cycle of references).
        """
        found = self._values.get(expr)
        if found is None:
            found = v.ANY
            for atom in self._contents[expr]:
                found = self.intersect(found, self._values_of_atom(atom))
            self._values[expr] = found
        return found

    def _values_of_atom(self, index: int) -> Values:
        found = self._atom_values.get(index)
        if found is None:
            if index in self._open:
                self._refuse_cycle(self._open.index(index))
            if len(self._open) > 150:
                raise GrammarTooLarge("schemas refer to each other more than 150 levels deep")
            atom = self._atoms[index]
            self._open.append(index)
            try:
                if isinstance(atom, SchemaNode):
                    found = self._operations.interpret(atom)
                else:
                    found = self._values_of_not(atom.expr) if isinstance(atom, _Not) else atom
            except GrammarTooLarge as error:
                if isinstance(atom, SchemaNode) and error.pointer is None:  # the innermost schema that was being read
                    error.args = (f"{atom.pointer or '/'}: {error.args[0]}",)
                    error.pointer = atom.pointer
                raise
            finally:
                self._open.pop()
            self._atom_values[index] = found
        return found

    def _refuse_cycle(self, depth: int) -> NoReturn:
        """Raise for the open atom at `depth`, whose values are needed to work out themselves."""
        if depth < self._asked_at:
            raise _NotYet
        cycle = [self._atoms[i] for i in self._open[depth:]]
        negated = [self._atoms[i] for a in cycle if isinstance(a, _Not) for i in self._contents[a.expr]]
        pointer = next((a.pointer for a in (*cycle, *negated) if isinstance(a, SchemaNode)), "")
        raise InvalidSchema(f"{pointer or '/'}: the schema refers to itself without an end", pointer)

    def _values_of_not(self, expr: Expr) -> Values:
        """Return the complement of a conjunction: not the first atom, or not the second, and so on."""
        parts = []
        for index in self._contents[expr]:
            atom = self._atoms[index]
            if isinstance(atom, SchemaNode):
                parts.append(self._operations.interpret_not(atom))
            else:
                parts.append(self.values(atom.expr) if isinstance(atom, _Not) else self.complement(atom))
        return v.unite(parts)

    def kinds(self, expr: Expr) -> int:
        """Return the kinds of value as bits: 0 object, 1 array, 2 string, 3 number, 4 true, 5 false, 6 null."""
        found = self._kinds.get(expr)
        if found is None:
            a = self.values(expr)
            found = bool(a.objects) | bool(a.arrays) << 1 | bool(a.strings) << 2 | bool(a.numbers) << 3
            found |= (a.booleans >> 1 & 1) << 4 | (a.booleans & 1) << 5 | a.null << 6
            self._kinds[expr] = found
        return found

    # --- algebra

    def intersect(self, a: Values, b: Values) -> Values:
        """Return the values in both sets."""
        if a is v.ANY or a == b:
            return b
        if b is v.ANY:
            return a
        self._check_size(a, b)
        deadline.check()
        return Values(
            a.null and b.null,
            a.booleans & b.booleans,
            v.product(a.numbers, b.numbers, numeric.intersect) if a.numbers and b.numbers else (),
            v.product(a.strings, b.strings, self.both_strings) if a.strings and b.strings else (),
            v.product(a.objects, b.objects, self._both_objects) if a.objects and b.objects else (),
            v.product(a.arrays, b.arrays, self._both_arrays) if a.arrays and b.arrays else (),
        )

    @property
    def pointer(self) -> str:
        """The JSON pointer of the schema that is being read, the innermost one."""
        atoms = (self._atoms[i] for i in reversed(self._open))
        return next((a.pointer for a in atoms if isinstance(a, SchemaNode)), "")

    def _check_size(self, a: Values, b: Values) -> None:
        size = max(len(a.objects) * len(b.objects), len(a.arrays) * len(b.arrays), len(a.strings) * len(b.strings))
        if size > MAX_SPECS:
            raise GrammarTooLarge(f"combining alternatives needs more than {MAX_SPECS:,} cases")

    def complement(self, a: Values) -> Values:
        """Return all other values."""
        numbers: tuple[numeric.Numbers, ...] = (numeric.ANY,)
        for n in a.numbers:
            numbers = v.product(numbers, tuple(numeric.complement(n)), numeric.intersect)
        strings: tuple[Strings, ...] = (v.ANY_STRINGS,)
        for s in a.strings:
            others = tuple(o for o in _not_strings(s) if not self.languages.is_empty(o))
            strings = v.product(strings, others, self.both_strings)
        objects: tuple[Objects, ...] = (v.ANY_OBJECTS,)
        for o in a.objects:
            other = tuple(self._operations.not_objects(self, o))
            self._check_size(Values(objects=objects), Values(objects=other))
            objects = v.product(objects, other, self._both_objects)
        arrays: tuple[Arrays, ...] = (v.ANY_ARRAYS,)
        for r in a.arrays:
            rest = tuple(self._operations.not_arrays(self, r))
            self._check_size(Values(arrays=arrays), Values(arrays=rest))
            arrays = v.product(arrays, rest, self._both_arrays)
        return Values(not a.null, 3 & ~a.booleans, numbers, strings, objects, arrays)

    def both_strings(self, a: Strings, b: Strings) -> Strings | None:
        """Return the strings in both specs; None where there is none."""
        if a is v.ANY_STRINGS or b is v.ANY_STRINGS:
            return b if a is v.ANY_STRINGS else a
        if a.finite is not None or b.finite is not None:
            if a.finite is None:
                a, b = b, a
            assert a.finite is not None
            kept = frozenset(t for t in a.finite if self.languages.contains(b, t))
            return Strings(finite=kept) if kept else None
        high = a.high if b.high is None else b.high if a.high is None else min(a.high, b.high)
        if any((n, not wanted) in b.languages for n, wanted in a.languages):
            return None
        out = Strings(max(a.low, b.low), high, a.languages | b.languages, None, a.excluded | b.excluded)
        return None if self.languages.is_empty(out) else out

    # --- emptiness

    def is_empty(self, expr: Expr) -> bool:
        """Tell whether no value is in the set. While schemas are being read, False may also mean that it is not known
        yet.
        """
        found = self._costs.get(expr)
        if found is None:
            if self._is_plain(expr):
                return False
            try:
                found = self.cost(expr)
            except _NotYet:
                return False
        return found >= INFINITE

    def _is_plain(self, expr: Expr) -> bool:
        """Tell whether an expression is one schema that surely has values, so that they need not be worked out."""
        atoms = self._contents[expr]
        if len(atoms) != 1:
            return False
        atom = self._atoms[atoms[0]]
        return isinstance(atom, SchemaNode) and self._operations.surely_has_values(atom)

    def values_are_empty(self, a: Values) -> bool:
        """Do as `is_empty`, for a set given by its values."""
        asked_at, self._asked_at = self._asked_at, len(self._open)
        try:
            return a.is_empty or self.cost_of(a) >= INFINITE
        except _NotYet:
            return False
        finally:
            self._asked_at = asked_at

    def cost_of(self, a: Values) -> int:
        """Estimate the bytes of the shortest value of a set; INFINITE if it has none."""
        return self._operations.cost(self, a)

    def cost(self, expr: Expr) -> int:
        """Do as `cost_of`, for an expression, and keep the answer."""
        found = self._costs.get(expr)
        if found is not None:
            return found
        if expr in self._in_progress:
            self._tainted = True
            return INFINITE
        if len(self._in_progress) > 200:
            raise GrammarTooLarge("required properties are nested more than 200 levels deep")
        outer, self._tainted = self._tainted, False
        asked_at, self._asked_at = self._asked_at, len(self._open)
        self._in_progress.add(expr)
        try:
            found = self.cost_of(self.values(expr))
        finally:
            self._in_progress.discard(expr)
            self._asked_at = asked_at
        # an answer "empty" that depends on an open question holds only for the outermost question
        if found < INFINITE or not self._tainted or not self._in_progress:
            self._costs[expr] = found
        self._tainted = outer or (self._tainted and found >= INFINITE)
        return found

    # --- all values of a small set

    def listed(self, expr: Expr, enough: int) -> list[int] | None:
        """Return all values, as numbers of constants; None if there are `enough` of them or more."""
        limit, found = self._listed.get(expr, (0, None))
        if found is not None or limit >= enough:
            return found
        if expr in self._listing:
            return None  # a value that can contain itself: there are infinitely many
        self._listing.add(expr)
        try:
            found = self._operations.all_of(self, self.values(expr), enough)
        finally:
            self._listing.discard(expr)
        self._listed[expr] = enough, found
        return found


def _not_strings(s: Strings) -> list[Strings]:
    if s.finite is not None:
        return [Strings(excluded=s.finite)]
    out = []
    if s.low:
        out.append(Strings(high=s.low - 1))
    if s.high is not None:
        out.append(Strings(low=s.high + 1))
    out.extend(Strings(languages=frozenset(((n, not wanted),))) for n, wanted in s.languages)
    if s.excluded:
        out.append(Strings(finite=s.excluded))
    return out
