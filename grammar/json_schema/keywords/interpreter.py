"""The meaning of a schema object: the set of all values, narrowed by one keyword after the other.

    {"type": "array", "minItems": 2}      all values -> all arrays -> arrays of two items or more

Every keyword is a row of the table in table.py, a `Keyword`. The `Interpreter` itself knows few keywords by name:
`$ref`, which hides all others in drafts up to 7, and the keywords whose values alone show that a schema is scalar.
Keywords of all drafts are read in every schema, unless their row limits the drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from ramet.errors import InvalidSchema
from ramet.grammar.json_schema.algebra import costs, distinct, specs
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.expressions import Expressions, Operations
from ramet.grammar.json_schema.algebra.languages import Languages
from ramet.grammar.json_schema.algebra.values import FALSE, TRUE, Expr, Strings, Values
from ramet.grammar.json_schema.schema.document import DRAFT4, DRAFT7, DRAFT2020, Registry, SchemaNode, Subschemas
from ramet.grammar.json_schema.schema.pattern import UnsupportedPattern
from ramet.grammar.regular import numbers as numeric

_Spec = TypeVar("_Spec")


@dataclass(frozen=True, slots=True)
class Looked:
    """The parts of a value that keywords have evaluated. `unevaluatedProperties` and `unevaluatedItems` apply to all
    others.

    Of an object: the keys `names`, those in `languages` (by number), or all keys. Of an array: the first `items` items,
    those in an expression of `contains`, or all items.
    """

    names: frozenset[str] = frozenset()
    languages: frozenset[int] = frozenset()
    all_names: bool = False
    items: int = 0
    contains: frozenset[Expr] = frozenset()
    all_items: bool = False

    def __or__(self, other: Looked) -> Looked:
        return Looked(
            self.names | other.names,
            self.languages | other.languages,
            self.all_names or other.all_names,
            max(self.items, other.items),
            self.contains | other.contains,
            self.all_items or other.all_items,
        )


NOTHING = Looked()
Alternative = tuple[Values, Looked]  # some of the values of a schema, all with the same parts evaluated


class Form(NamedTuple):
    """The form that the value of a keyword must have. `name` completes the sentence "must be ..."."""

    name: str
    is_good: Callable[[Any], bool]  # Any: JSON


# Arguments: the interpreter, the schema object, the name of the keyword in it, and what was found so far
Narrow = Callable[["Interpreter", SchemaNode, str, Values], Values]
Refuse = Callable[["Interpreter", SchemaNode, str], Iterable[Values]]
Track = Callable[["Interpreter", SchemaNode, str, list[Alternative]], list[Alternative]]
Look = Callable[["Interpreter", SchemaNode, str], Looked]
Close = Callable[["Interpreter", SchemaNode, str, Alternative], Alternative]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyword:
    """All that is known about a keyword.

    role: it says which values are valid (assertion); it names, describes or holds schemas (structure); or it says
    something about values, but all are valid (annotation). form: the form of its value; None if any value will do, or
    if reading the value finds the errors.
    first_draft, last_draft: the drafts that know it. subschemas: how its value holds schemas, if it does. may_empty: it
    can leave a schema without any value, alone or with other keywords. strict_rank: its place among the keywords that
    strict mode refuses, the first of which is reported; 0 if it is permitted.

    narrow: removes the values that the keyword forbids; looks at the value itself. read_together: `narrow` is called
    once for all keywords that have it in their rows, and reads them together. combine: removes values by means of other
    schemas; called after all `narrow`. refuse: the values that `combine` removes, in parts; by default worked out from
    what it leaves. track: as `combine`, if evaluated parts matter; by default it evaluates none. target: the schema
    that the keyword refers to. looks: the parts of a value that it evaluates by itself. close: applies the schema in
    its value to all parts that nothing has evaluated.
    """

    role: Literal["assertion", "structure", "annotation"] = "assertion"
    form: Form | None = None
    first_draft: int = DRAFT4
    last_draft: int = DRAFT2020
    subschemas: Subschemas | None = None
    may_empty: bool = False
    strict_rank: int = 0
    narrow: Narrow | None = None
    read_together: bool = False
    combine: Narrow | None = None
    refuse: Refuse | None = None
    track: Track | None = None
    target: Callable[[SchemaNode], SchemaNode] | None = None
    looks: Look | None = None
    close: Close | None = None

    def is_known(self, draft: int) -> bool:
        """Tell whether the keyword means something in a draft."""
        return self.first_draft <= draft <= self.last_draft


class KeywordTable:
    """The rows of all keywords, by name, and lists made from them.

    order: the order of the assertions. forms: of the keywords that have one. subschemas: how a keyword's value holds
    schemas; applied: the same for assertions alone. references: the keywords that refer to a schema. reading_others:
    the keywords that hold schemas or refer to one. may_empty, closing: the keywords with `may_empty`, and with `close`.
    """

    def __init__(self, rows: Mapping[str, Keyword]) -> None:
        self.rows = rows
        assertions = {name: k for name, k in rows.items() if k.role == "assertion"}
        self.order = {name: at for at, name in enumerate(assertions)}
        self.forms = {name: k.form for name, k in rows.items() if k.form is not None}
        self.subschemas = {name: k.subschemas for name, k in rows.items() if k.subschemas is not None}
        self.applied = {name: kind for name, kind in self.subschemas.items() if name in assertions}
        self.references = {name: k for name, k in rows.items() if k.target is not None}
        self.reading_others = frozenset((*self.references, *self.applied))
        self.may_empty = frozenset(name for name, k in rows.items() if k.may_empty)
        self.closing = frozenset(name for name, k in rows.items() if k.close is not None)


class Interpreter:
    """Reads schema objects as sets of values.

    closes_objects: specs know whether a schema said anything of other keys (see Objects.says_others). lenient: keywords
    that cannot be enforced are left out instead of refused.
    """

    def __init__(
        self, table: KeywordTable, max_states: int, *, closes_objects: bool = False, lenient: bool = False
    ) -> None:
        self.table = table
        self.closes_objects = closes_objects
        self.lenient = lenient
        self.languages = Languages(max_states)
        operations = Operations(
            self.interpret,
            self.interpret_not,
            self._is_scalar,
            self._surely_has_values,
            specs.both_objects,
            specs.both_arrays,
            specs.not_objects,
            specs.not_arrays,
            costs.of_values,
            distinct.all_of,
        )
        self.expressions = Expressions(self.languages, operations, lenient=lenient)

    # --- schemas and their parts

    def open(self, schema: Any, extra: Mapping[str, Any]) -> SchemaNode:  # Any: JSON
        """Return the node of a whole schema. extra: other documents that it may refer to, by URI.

        Raises: InvalidSchema.
        """
        if not isinstance(schema, dict | bool):
            raise InvalidSchema("a schema must be an object or a boolean", "")
        return Registry(schema, extra, self.table.subschemas).root

    def child(self, node: SchemaNode, schema: Any, suffix: str) -> SchemaNode:
        """Return the node of a subschema. suffix: the JSON pointer from the one to the other."""
        return node.registry.child(node, schema, suffix)

    def expr(self, node: SchemaNode, schema: Any, suffix: str) -> Expr:
        """Return the expression of a subschema."""
        if schema is True or schema is False:
            return TRUE if schema else FALSE
        found = node.children.get(id(schema))
        return self.expressions.of_schema(self.child(node, schema, suffix) if found is None else found)

    def exprs(self, node: SchemaNode, name: str) -> list[Expr]:
        """Return the expressions of a keyword's list of schemas."""
        return [self.expr(node, s, f"/{name}/{i}") for i, s in enumerate(node.schema[name])]

    def values(self, node: SchemaNode, schema: Any, suffix: str) -> Values:
        """Return the values of a subschema."""
        return self.expressions.values(self.expr(node, schema, suffix))

    def refused(self, expr: Expr) -> Values:
        """Return all values that are not in an expression."""
        return self.expressions.values(self.expressions.negate(expr))

    def is_enforced(self, source: str) -> bool:
        """Tell whether a pattern is enforced; False only if it cannot be and reading is lenient.

        Raises: UnsupportedPattern if it cannot be enforced and reading is not lenient.
        """
        try:
            self.languages.add("pattern", source)
        except UnsupportedPattern:
            if not self.lenient:
                raise
            return False
        return True

    # --- what a schema object means

    def standing(self, node: SchemaNode) -> list[tuple[str, Keyword]]:
        """Return the assertions of a schema object that count in its draft, in the order of the table."""
        schema, draft, rows, order = node.schema, node.draft, self.table.rows, self.table.order
        if hides_others(node):
            return [("$ref", rows["$ref"])]
        names = [name for name in schema if name in order]
        if len(names) > 1:
            names.sort(key=order.__getitem__)
        return [(name, k) for name in names if (k := rows[name]).first_draft <= draft <= k.last_draft]

    def interpret(self, node: SchemaNode) -> Values:
        """Return the values that a schema object accepts."""
        standing = self.standing(node)
        if self._is_tracking(node, standing):
            return v.unite(a for a, _ in self.tracked(node))
        found = self._own(node, standing)
        for name, keyword in standing:
            if keyword.combine is not None:
                found = keyword.combine(self, node, name, found)
        return found

    def interpret_not(self, node: SchemaNode) -> Values:
        """Return the values that a schema object refuses: those that some keyword refuses."""
        standing = self.standing(node)
        if self._is_tracking(node, standing):
            return self.expressions.complement(self.expressions.values(self.expressions.of_schema(node)))
        own = self._own(node, standing)
        parts = [] if own == v.ANY else [self.expressions.complement(own)]
        for name, keyword in standing:
            if keyword.refuse is not None:
                parts.extend(keyword.refuse(self, node, name))
            elif keyword.combine is not None:
                left = keyword.combine(self, node, name, v.ANY)
                parts.extend([] if left is v.ANY else [self.expressions.complement(left)])
        return v.unite(parts)

    def _own(self, node: SchemaNode, standing: list[tuple[str, Keyword]]) -> Values:
        """Return the values accepted by the keywords that look at the value itself."""
        found, last = v.ANY, None
        for name, keyword in standing:
            narrow = keyword.narrow
            if narrow is not None and not (keyword.read_together and narrow is last):
                found, last = narrow(self, node, name, found), narrow
        return self._tidy(found)

    def _tidy(self, a: Values) -> Values:
        """Return the same values without the specs that are seen to be empty, and each spec in its usual form."""
        if a is v.ANY:
            return a
        e = self.expressions
        return Values(
            a.null,
            a.booleans,
            a.numbers and _present([_tidy_numbers(n) for n in a.numbers]),
            a.strings and _present([self._tidy_strings(s) for s in a.strings]),
            a.objects and _present([o if o is v.ANY_OBJECTS else specs.tidy_objects(e, o) for o in a.objects]),
            a.arrays and _present([r if r is v.ANY_ARRAYS else specs.tidy_arrays(e, r) for r in a.arrays]),
        )

    def _tidy_strings(self, s: Strings) -> Strings | None:
        if s == v.ANY_STRINGS:
            return v.ANY_STRINGS
        return None if self.languages.is_empty(s) else s

    def _is_scalar(self, node: SchemaNode) -> bool:
        schema = node.schema
        if not isinstance(schema, dict) or not self.table.reading_others.isdisjoint(schema):
            return False
        if "const" in schema:
            return not isinstance(schema["const"], dict | list)
        if isinstance(schema.get("enum"), list):
            return not any(isinstance(x, dict | list) for x in schema["enum"])
        return isinstance(schema.get("type"), str) and schema["type"] not in ("object", "array")

    def _surely_has_values(self, node: SchemaNode) -> bool:
        return isinstance(node.schema, dict) and self.table.may_empty.isdisjoint(node.schema)

    # --- which parts of a value were evaluated

    def _is_tracking(self, node: SchemaNode, standing: list[tuple[str, Keyword]]) -> bool:
        """Tell whether the schema object asks which parts were evaluated."""
        if self.table.closing.isdisjoint(node.schema):
            return False
        without_effect: tuple[object, ...] = () if self.closes_objects else (True, {})
        return any(k.close is not None and node.schema[name] not in without_effect for name, k in standing)

    def tracked(self, node: SchemaNode) -> list[Alternative]:
        """Return a schema's values as a union of alternatives, each with its evaluated parts.

        Raises: GrammarTooLarge if there are too many alternatives.
        """
        if not isinstance(node.schema, dict):
            return [(v.ANY if node.schema else v.NONE, NOTHING)]
        standing = self.standing(node)
        looked = NOTHING
        for name, keyword in standing:
            if keyword.looks is not None:
                looked = looked | keyword.looks(self, node, name)
        found = [(self._own(node, standing), looked)]
        for name, keyword in standing:
            if keyword.track is not None:
                found = keyword.track(self, node, name, found)
            elif keyword.combine is not None:
                found = [(keyword.combine(self, node, name, a), looked) for a, looked in found]
        for name, keyword in standing:
            if keyword.close is not None:
                found = [keyword.close(self, node, name, a) for a in found]
        return found


def hides_others(node: SchemaNode) -> bool:
    """Tell whether a schema object is a reference that hides all keywords beside it."""
    return node.draft <= DRAFT7 and "$ref" in node.schema


def _present(specs: list[_Spec | None]) -> tuple[_Spec, ...]:
    return tuple([s for s in specs if s is not None])


def _tidy_numbers(n: numeric.Numbers) -> numeric.Numbers | None:
    is_free = n.low is None and n.high is None and not n.multiples
    return n if is_free else numeric.simplify(n)
