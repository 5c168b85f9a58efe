"""Expressions: conjunctions of schemas, negations and value sets, interned; their values; which of them are empty.

An expression is a number: 0 is anything, 1 is nothing. Its values are computed when first needed, so a schema's unused
parts cost nothing. Emptiness is the least fixed point of "has a finite value", so a schema that needs itself is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ramet.errors import GrammarTooLarge, InvalidSchema
from ramet.grammar import deadline
from ramet.grammar.json_schema.algebra import costs, distinct, specs
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.languages import Languages
from ramet.grammar.json_schema.algebra.values import FALSE, INFINITE, TRUE, Arrays, Expr, Objects, Strings, Values
from ramet.grammar.json_schema.schema.document import SchemaNode
from ramet.grammar.regular import numbers as numeric

MAX_SPECS = 1000


class _NotYet(Exception):
    """A question about a schema whose own meaning is just being worked out."""


class Expressions:
    """Owner of all expressions of one compilation. `interpret` gives the values of a schema node, `interpret_not` all
    others.
    """

    def __init__(
        self,
        languages: Languages,
        interpret: Callable[[SchemaNode], Values],
        interpret_not: Callable[[SchemaNode], Values],
        *,
        lenient: bool = False,
    ) -> None:
        self.languages = languages
        self.interpret = interpret
        self.interpret_not = interpret_not
        self.lenient = lenient  # what cannot be described is taken as anything
        self._atoms: list[tuple[str, object]] = []
        self._atom_index: dict[tuple[str, object], int] = {}
        self.contents: list[tuple[int, ...]] = [(), (-1,)]
        self._index: dict[tuple[int, ...], Expr] = {(): TRUE, (-1,): FALSE}
        self._of_node: dict[SchemaNode, Expr] = {}
        self._kinds: dict[Expr, int] = {}
        self._conjunctions: dict[tuple[Expr, Expr], Expr] = {}
        self._values: dict[Expr, Values] = {TRUE: v.ANY, FALSE: v.NONE}
        self._atom_values: dict[int, Values] = {}
        self._open: list[int] = []
        self._costs: dict[Expr, int] = {TRUE: 1, FALSE: INFINITE}
        self._in_progress: set[Expr] = set()
        self._asked_at = 0  # atoms opened before this depth were opened by whoever asks about emptiness
        self._tainted = False
        self._scalar: dict[Expr, bool] = {TRUE: False, FALSE: True}
        self._plainest: dict[Expr, Expr] = {}
        self._same_values: dict[Values, Expr] = {}
        self.constants = distinct.Constants(self)
        self.listed: dict[Expr, tuple[int, list[int] | None]] = {}  # owned by distinct.listed
        self.listing: set[Expr] = set()

    # --- making

    def _atom(self, kind: str, content: object) -> Expr:
        key = (kind, content)
        found = self._atom_index.get(key)
        if found is None:
            found = self._atom_index[key] = len(self._atoms)
            self._atoms.append(key)
        return self._of((found,))

    def _of(self, atoms: tuple[int, ...]) -> Expr:
        found = self._index.get(atoms)
        if found is None:
            found = self._index[atoms] = len(self.contents)
            self.contents.append(atoms)
        return found

    def of_schema(self, node: SchemaNode) -> Expr:
        found = self._of_node.get(node)
        if found is None:
            found = self._of_node[node] = self._of_schema(node)
        return found

    def _of_schema(self, node: SchemaNode) -> Expr:
        if node.schema is True or node.schema == {}:
            return TRUE
        if node.schema is False:
            return FALSE
        return self._atom("schema", node)

    def of_values(self, values: Values) -> Expr:
        if values == v.ANY:
            return TRUE
        return FALSE if values.is_empty else self._atom("values", values)

    def negate(self, expr: Expr) -> Expr:
        if expr <= FALSE:
            return FALSE - expr
        atoms = self.contents[expr]
        if len(atoms) == 1 and self._atoms[atoms[0]][0] == "not":
            return self._atoms[atoms[0]][1]  # type: ignore[return-value]
        return self._atom("not", expr)

    def both(self, a: Expr, b: Expr) -> Expr:
        """The conjunction."""
        if a == b or b == TRUE:
            return a
        if a == TRUE:
            return b
        if FALSE in (a, b):
            return FALSE
        key = (a, b) if a < b else (b, a)
        found = self._conjunctions.get(key)
        if found is None:
            found = self._of(tuple(sorted({*self.contents[a], *self.contents[b]})))
            if found not in (a, b) and (self.is_scalar(a) or self.is_scalar(b)):
                found = self._simpler(a, b, found)
            self._conjunctions[key] = found
        return found

    def _simpler(self, a: Expr, b: Expr, whole: Expr) -> Expr:
        """The conjunction `whole` of a and b, one of them scalar, in a form that shows when it is empty or no news."""
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
        """One of the expressions with the same values, the same for all of them; itself where that is not plain."""
        found = self._plainest.get(expr)
        if found is None:
            found = expr if not self.is_scalar(expr) else self._same_values.setdefault(self.values(expr), expr)
            self._plainest[expr] = found
        return found

    def is_scalar(self, expr: Expr) -> bool:
        """True where the values are known to be plain, so that comparing them now is cheap and cannot recurse."""
        found = self._scalar.get(expr)
        if found is None:
            found = all(self._is_scalar_atom(a) for a in self.contents[expr])
            self._scalar[expr] = found
        return found

    def _is_scalar_atom(self, atom: int) -> bool:
        kind, content = self._atoms[atom]
        if kind == "not":
            return self.is_scalar(content)  # type: ignore[arg-type]
        if kind == "values":
            assert isinstance(content, Values)
            return all(s is v.ANY_OBJECTS for s in content.objects) and all(s is v.ANY_ARRAYS for s in content.arrays)
        schema = content.schema  # type: ignore[attr-defined]
        if not isinstance(schema, dict) or _NESTING & schema.keys():
            return False
        if "const" in schema:
            return not isinstance(schema["const"], dict | list)
        if isinstance(schema.get("enum"), list):
            return not any(isinstance(x, dict | list) for x in schema["enum"])
        return isinstance(schema.get("type"), str) and schema["type"] not in ("object", "array")

    # --- values

    def values(self, expr: Expr) -> Values:
        """The set of values.

        Raises: InvalidSchema where a schema's meaning depends on itself without any nesting (a cycle of references).
        """
        found = self._values.get(expr)
        if found is None:
            found = v.ANY
            for atom in self.contents[expr]:
                found = self.intersect(found, self._values_of_atom(atom))
            self._values[expr] = found
        return found

    def _values_of_atom(self, atom: int) -> Values:
        found = self._atom_values.get(atom)
        if found is None:
            kind, content = self._atoms[atom]
            if atom in self._open:
                if self._open.index(atom) < self._asked_at:
                    raise _NotYet
                node = next(
                    self._atoms[a][1] for a in self._open[self._open.index(atom) :] if self._atoms[a][0] == "schema"
                )
                pointer = node.pointer  # type: ignore[attr-defined]
                raise InvalidSchema(f"{pointer or '/'}: the schema refers to itself without an end", pointer)
            if len(self._open) > 150:
                raise GrammarTooLarge("schemas refer to each other more than 150 levels deep")
            self._open.append(atom)
            try:
                if kind == "schema":
                    found = self.interpret(content)  # type: ignore[arg-type]
                elif kind == "not":
                    found = self._values_of_not(content)  # type: ignore[arg-type]
                else:
                    found = content  # type: ignore[assignment]
            except GrammarTooLarge as error:
                if kind == "schema" and error.pointer is None:  # the innermost schema that was being read
                    place = str(content.pointer)  # type: ignore[attr-defined]
                    error.args = (f"{place or '/'}: {error.args[0]}",)
                    error.pointer = place
                raise
            finally:
                self._open.pop()
            assert isinstance(found, Values)
            self._atom_values[atom] = found
        return found

    def _values_of_not(self, expr: Expr) -> Values:
        """Not a conjunction: not the first, or not the second, ..."""
        parts = []
        for atom in self.contents[expr]:
            kind, content = self._atoms[atom]
            if kind == "schema":
                parts.append(self.interpret_not(content))  # type: ignore[arg-type]
            elif kind == "not":
                parts.append(self.values(content))  # type: ignore[arg-type]
            else:
                parts.append(self.complement(content))  # type: ignore[arg-type]
        return v.unite(parts)

    def kinds(self, expr: Expr) -> int:
        """Bits of the kinds of value there are: 0 object, 1 array, 2 string, 3 number, 4 true, 5 false, 6 null."""
        found = self._kinds.get(expr)
        if found is None:
            a = self.values(expr)
            found = bool(a.objects) | bool(a.arrays) << 1 | bool(a.strings) << 2 | bool(a.numbers) << 3
            found |= (a.booleans >> 1 & 1) << 4 | (a.booleans & 1) << 5 | a.null << 6
            self._kinds[expr] = found
        return found

    # --- algebra

    def intersect(self, a: Values, b: Values) -> Values:
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
            v.product(a.objects, b.objects, partial(specs.both_objects, self)) if a.objects and b.objects else (),
            v.product(a.arrays, b.arrays, partial(specs.both_arrays, self)) if a.arrays and b.arrays else (),
        )

    @property
    def pointer(self) -> str:
        """Where the schema stands that is just being read."""
        for atom in reversed(self._open):
            if self._atoms[atom][0] == "schema":
                return str(self._atoms[atom][1].pointer)  # type: ignore[attr-defined]
        return ""

    def _check_size(self, a: Values, b: Values) -> None:
        size = max(len(a.objects) * len(b.objects), len(a.arrays) * len(b.arrays), len(a.strings) * len(b.strings))
        if size > MAX_SPECS:
            raise GrammarTooLarge(f"combining alternatives needs more than {MAX_SPECS:,} cases")

    def complement(self, a: Values) -> Values:
        """All other values."""
        numbers: tuple[numeric.Numbers, ...] = (numeric.ANY,)
        for n in a.numbers:
            numbers = v.product(numbers, tuple(numeric.complement(n)), numeric.intersect)
        strings: tuple[Strings, ...] = (v.ANY_STRINGS,)
        for s in a.strings:
            others = tuple(o for o in _not_strings(s) if not self.languages.is_empty(o))
            strings = v.product(strings, others, self.both_strings)
        objects: tuple[Objects, ...] = (v.ANY_OBJECTS,)
        for o in a.objects:
            other = tuple(specs.not_objects(self, o))
            self._check_size(Values(objects=objects), Values(objects=other))
            objects = v.product(objects, other, partial(specs.both_objects, self))
        arrays: tuple[Arrays, ...] = (v.ANY_ARRAYS,)
        for r in a.arrays:
            rest = tuple(specs.not_arrays(self, r))
            self._check_size(Values(arrays=arrays), Values(arrays=rest))
            arrays = v.product(arrays, rest, partial(specs.both_arrays, self))
        return Values(not a.null, 3 & ~a.booleans, numbers, strings, objects, arrays)

    def both_strings(self, a: Strings, b: Strings) -> Strings | None:
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
        """True where no value is in the set. Asked while schemas are being read, False may mean: not known yet."""
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
        """True where a schema's keywords show at once that it has values; so that its values need not be worked out."""
        atoms = self.contents[expr]
        if len(atoms) != 1 or self._atoms[atoms[0]][0] != "schema":
            return False
        schema = self._atoms[atoms[0]][1].schema  # type: ignore[attr-defined]
        return isinstance(schema, dict) and not _MAY_EMPTY & schema.keys()

    def values_are_empty(self, a: Values) -> bool:
        """As `is_empty`, for values."""
        asked_at, self._asked_at = self._asked_at, len(self._open)
        try:
            return a.is_empty or costs.of_values(self, a) >= INFINITE
        except _NotYet:
            return False
        finally:
            self._asked_at = asked_at

    def cost(self, expr: Expr) -> int:
        """About the bytes of the shortest value; INFINITE where there is none."""
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
            found = costs.of_values(self, self.values(expr))
        finally:
            self._in_progress.discard(expr)
            self._asked_at = asked_at
        # an answer "empty" that rests on a question still open holds only for the outermost question
        if found < INFINITE or not self._tainted or not self._in_progress:
            self._costs[expr] = found
        self._tainted = outer or (self._tainted and found >= INFINITE)
        return found


# keywords that can leave a schema without any value, alone or together
_MAY_EMPTY = {
    "enum", "const", "required", "allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "$recursiveRef",
    "extends", "disallow", "dependentSchemas", "dependencies", "pattern", "minLength", "maximum", "exclusiveMaximum",
    "multipleOf", "divisibleBy", "minItems", "contains", "minProperties", "unevaluatedProperties", "unevaluatedItems",
}  # fmt: skip
_NESTING = {
    "$ref", "allOf", "anyOf", "oneOf", "not", "if", "$dynamicRef", "$recursiveRef", "properties", "items", "required",
    "additionalProperties", "patternProperties", "dependencies", "dependentSchemas", "contains", "prefixItems",
}  # fmt: skip


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
