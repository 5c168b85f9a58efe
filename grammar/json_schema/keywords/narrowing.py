"""The effect of each keyword: functions that narrow a set of values, for the rows of the table.

A function for `narrow` gets one spec. It returns the spec with the keyword's condition added, or None if nothing is
left. `on_numbers` and its siblings turn it into a function of a whole set, in which values of other types always pass.
A function for `combine` gets the whole set. All functions get the interpreter, the schema object, and the name of the
keyword in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ramet.errors import InvalidSchema
from ramet.grammar.json_schema.algebra import specs
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.values import FALSE, TRUE, Arrays, Contains, Expr, Objects, Rule, Strings, Values
from ramet.grammar.json_schema.keywords.interpreter import Interpreter, Narrow
from ramet.grammar.json_schema.schema import formats, pattern
from ramet.grammar.json_schema.schema.document import DRAFT4, SchemaNode, escape
from ramet.grammar.regular import dfas
from ramet.grammar.regular.numbers import Numbers, fraction

_KINDS = {
    "null": Values(null=True),
    "boolean": Values(booleans=3),
    "number": Values(numbers=v.ANY.numbers),
    "integer": Values(numbers=(Numbers(integer=True),)),
    "string": Values(strings=v.ANY.strings),
    "object": Values(objects=v.ANY.objects),
    "array": Values(arrays=v.ANY.arrays),
    "any": v.ANY,  # draft 3
}
_PLAIN_INTEGERS = Values(numbers=(Numbers(integer=True, plain=True),))
TYPES = tuple(name for name in _KINDS if name != "any")


def mapping(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the value of a keyword if it is an object, else an empty object."""
    found = schema.get(name)
    return found if isinstance(found, dict) else {}


# --- any value


def of_type(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    types = node.schema["type"]
    if isinstance(types, str):
        return i.expressions.intersect(found, _of_kind(node, types))
    types = _types(node)
    if _has_schemas(node, types):
        return found
    parts = [_of_kind(node, t) for t in types]
    return i.expressions.intersect(found, v.unite(parts))


def of_type_with_schemas(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    """Draft 3: a type may be a schema."""
    if node.draft != DRAFT4:
        return found
    types = _types(node)
    if not _has_schemas(node, types):
        return found
    parts = [i.values(node, t, "/type") if isinstance(t, dict) else _of_kind(node, t) for t in types]
    return i.expressions.intersect(found, v.unite(parts))


def _types(node: SchemaNode) -> list[Any]:
    types = node.schema["type"]
    return types if isinstance(types, list) else [types]


def _has_schemas(node: SchemaNode, types: list[Any]) -> bool:
    return node.draft == DRAFT4 and any(isinstance(t, dict) for t in types)


def _of_kind(node: SchemaNode, name: Any) -> Values:
    if name == "integer" and node.draft == DRAFT4:  # 1.0 is no integer
        return _PLAIN_INTEGERS
    found = _KINDS.get(name) if isinstance(name, str) else None
    if found is None:
        raise InvalidSchema(f"{node.pointer or '/'}/type: {name!r} is not a JSON type", node.pointer + "/type")
    return found


def enum(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    return i.expressions.intersect(found, v.unite(_constant(i, x) for x in node.schema[name]))


def const(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    return i.expressions.intersect(found, _constant(i, node.schema[name]))


def _constant(i: Interpreter, value: Any) -> Values:
    """Return exactly this value. The keys of an object keep their order, which the declared order follows."""
    if value is None:
        return Values(null=True)
    if isinstance(value, bool):
        return Values(booleans=2 if value else 1)
    if isinstance(value, int | float):
        return Values(numbers=(Numbers(finite=frozenset((fraction(value),))),))
    if isinstance(value, str):
        return Values(strings=(Strings(finite=frozenset((value,))),))
    if isinstance(value, list):
        items = tuple(i.expressions.of_values(_constant(i, x)) for x in value)
        return Values(arrays=(Arrays(items, FALSE, len(items), len(items)),))
    properties = tuple((k, i.expressions.of_values(_constant(i, x))) for k, x in value.items())
    return Values(objects=(Objects(properties, FALSE, required=frozenset(value)),))


# --- numbers


def on_numbers(narrow: Callable[[Interpreter, SchemaNode, str, Numbers], Numbers]) -> Narrow:
    def of_values(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
        if not found.numbers:
            return found
        narrowed = tuple([narrow(i, node, name, n) for n in found.numbers])
        return Values(found.null, found.booleans, narrowed, found.strings, found.objects, found.arrays)

    return of_values


@on_numbers
def minimum(i: Interpreter, node: SchemaNode, name: str, n: Numbers) -> Numbers:
    is_open = node.schema.get("exclusiveMinimum") is True
    return replace(n, low=fraction(node.schema[name]), low_open=is_open)


@on_numbers
def maximum(i: Interpreter, node: SchemaNode, name: str, n: Numbers) -> Numbers:
    is_open = node.schema.get("exclusiveMaximum") is True
    return replace(n, high=fraction(node.schema[name]), high_open=is_open)


@on_numbers
def exclusive_minimum(i: Interpreter, node: SchemaNode, name: str, n: Numbers) -> Numbers:
    if isinstance(node.schema[name], bool):  # draft 4: it is about `minimum`
        return n
    edge = fraction(node.schema[name])
    return replace(n, low=edge, low_open=True) if n.low is None or edge >= n.low else n


@on_numbers
def exclusive_maximum(i: Interpreter, node: SchemaNode, name: str, n: Numbers) -> Numbers:
    if isinstance(node.schema[name], bool):
        return n
    edge = fraction(node.schema[name])
    return replace(n, high=edge, high_open=True) if n.high is None or edge <= n.high else n


@on_numbers
def multiple_of(i: Interpreter, node: SchemaNode, name: str, n: Numbers) -> Numbers:
    return replace(n, multiples=n.multiples | {(fraction(node.schema[name]), True)})


# --- strings


def on_strings(narrow: Callable[[Interpreter, SchemaNode, str, Strings], Strings]) -> Narrow:
    def of_values(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
        if not found.strings:
            return found
        narrowed = tuple([narrow(i, node, name, s) for s in found.strings])
        return Values(found.null, found.booleans, found.numbers, narrowed, found.objects, found.arrays)

    return of_values


@on_strings
def min_length(i: Interpreter, node: SchemaNode, name: str, s: Strings) -> Strings:
    return _with_length(s, int(node.schema[name]), None)


@on_strings
def max_length(i: Interpreter, node: SchemaNode, name: str, s: Strings) -> Strings:
    return _with_length(s, 0, int(node.schema[name]))


def _with_length(s: Strings, low: int, high: int | None) -> Strings:
    return s._replace(low=max(s.low, low), high=_least(s.high, high))


def _least(a: int | None, b: int | None) -> int | None:
    """Return the smaller of two limits. None stands for no limit."""
    return a if b is None else b if a is None else min(a, b)


@on_strings
def pattern_of(i: Interpreter, node: SchemaNode, name: str, s: Strings) -> Strings:
    if not i.is_enforced(node.schema[name]):
        return s
    source, *counts = pattern.without_count(node.schema[name])
    for low, high in counts:
        s = _with_length(s, low, high)
    return s._replace(languages=s.languages | {(i.languages.add("pattern", source), True)})


@on_strings
def format_of(i: Interpreter, node: SchemaNode, name: str, s: Strings) -> Strings:
    value = node.schema[name]
    if not (isinstance(value, str) and value in formats.KNOWN):
        return s
    return s._replace(languages=s.languages | {(i.languages.add("format", value), True)})


# --- objects


def on_objects(narrow: Callable[[Interpreter, SchemaNode, str, Objects], Objects | None]) -> Narrow:
    def of_values(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
        if not found.objects:
            return found
        narrowed = tuple([n for o in found.objects if (n := narrow(i, node, name, o)) is not None])
        return Values(found.null, found.booleans, found.numbers, found.strings, narrowed, found.arrays)

    return of_values


@on_objects
def members(i: Interpreter, node: SchemaNode, name: str, o: Objects) -> Objects:
    """Read `properties`, `patternProperties`, `additionalProperties` and `required` together."""
    schema = node.schema
    patterns = _patterns(i, node)
    declared, required = [], set[str]()
    for key, s in mapping(schema, "properties").items():
        known = node.children.get(id(s))
        e = i.expr(node, s, f"/properties/{escape(key)}") if known is None else i.expressions.of_schema(known)
        for number, other in patterns:
            if i.languages.accepts(number, key):
                e = i.expressions.both(e, other)
        declared.append((key, e))
        if isinstance(s, dict) and s.get("required") is True:  # draft 3: `required` stands in the property
            required.add(key)
    if isinstance(schema.get("required"), list):
        required.update(schema["required"])
    rest = i.expr(node, schema.get("additionalProperties", True), "/additionalProperties")
    if len(patterns) < len(mapping(schema, "patternProperties")):
        rest = TRUE  # if a pattern is left out, any key might match it
    return Objects(
        tuple(declared),
        TRUE if patterns else rest,
        (Rule(patterns, rest),) if patterns else (),
        frozenset(required),
        o.low,
        o.high,
        o.dependent,
        o.exists,
        says_others(schema) if i.closes_objects else None,
        o.excluded,
    )


def says_others(schema: Mapping[str, Any]) -> bool | None:
    """Return Objects.says_others of a schema."""
    if "additionalProperties" in schema or "unevaluatedProperties" in schema:
        return True
    return False if "properties" in schema else None


def _patterns(i: Interpreter, node: SchemaNode) -> tuple[tuple[int, Expr], ...]:
    found = mapping(node.schema, "patternProperties").items()
    return tuple(
        (i.languages.add("pattern", p), i.expr(node, s, f"/patternProperties/{escape(p)}"))
        for p, s in found
        if i.is_enforced(p)
    )


@on_objects
def min_properties(i: Interpreter, node: SchemaNode, name: str, o: Objects) -> Objects:
    return replace(o, low=int(node.schema[name]))


@on_objects
def max_properties(i: Interpreter, node: SchemaNode, name: str, o: Objects) -> Objects:
    return replace(o, high=int(node.schema[name]))


@on_objects
def dependent_required(i: Interpreter, node: SchemaNode, name: str, o: Objects) -> Objects:
    found = dict(o.dependent)
    for key, needs in mapping(node.schema, name).items():
        if isinstance(needs, str):  # draft 3
            needs = [needs]
        if isinstance(needs, list) and needs:
            found[key] = found.get(key, frozenset()) | frozenset(needs)
    return replace(o, dependent=tuple(sorted(found.items())))


@on_objects
def property_names(i: Interpreter, node: SchemaNode, name: str, o: Objects) -> Objects | None:
    tidy = specs.tidy_objects(i.expressions, o)
    if tidy is None:
        return None
    strings = i.values(node, node.schema[name], "/propertyNames").strings
    if strings == v.ANY.strings:
        return o
    if all(s.finite is not None for s in strings):
        named = Objects(tuple((k, TRUE) for s in strings for k in sorted(s.finite or ())), FALSE)
    else:
        dfa = dfas.union([i.languages.whole(s) for s in strings])
        named = Objects(rules=(Rule(((i.languages.add_automaton(name, dfa), TRUE),), FALSE),))
    return specs.both_objects(i.expressions, tidy, named)


# --- arrays


def on_arrays(narrow: Callable[[Interpreter, SchemaNode, str, Arrays], Arrays]) -> Narrow:
    def of_values(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
        if not found.arrays:
            return found
        narrowed = tuple([narrow(i, node, name, a) for a in found.arrays])
        return Values(found.null, found.booleans, found.numbers, found.strings, found.objects, narrowed)

    return of_values


def has_old_prefix(node: SchemaNode) -> bool:
    """Tell whether `items` is a list. In drafts up to 2019-09 this stands for `prefixItems`."""
    return "prefixItems" not in node.schema and isinstance(node.schema.get("items"), list)


@on_arrays
def prefix_items(i: Interpreter, node: SchemaNode, name: str, a: Arrays) -> Arrays:
    return replace(a, prefix=tuple(i.exprs(node, name)))


@on_arrays
def items(i: Interpreter, node: SchemaNode, name: str, a: Arrays) -> Arrays:
    if has_old_prefix(node):
        return replace(a, prefix=tuple(i.exprs(node, name)))
    value = node.schema[name]
    return a if isinstance(value, list) else replace(a, rest=i.expr(node, value, "/items"))


@on_arrays
def additional_items(i: Interpreter, node: SchemaNode, name: str, a: Arrays) -> Arrays:
    return replace(a, rest=i.expr(node, node.schema[name], "/additionalItems")) if has_old_prefix(node) else a


@on_arrays
def min_items(i: Interpreter, node: SchemaNode, name: str, a: Arrays) -> Arrays:
    return replace(a, low=int(node.schema[name]))


@on_arrays
def max_items(i: Interpreter, node: SchemaNode, name: str, a: Arrays) -> Arrays:
    return replace(a, high=int(node.schema[name]))


@on_arrays
def unique_items(i: Interpreter, node: SchemaNode, name: str, a: Arrays) -> Arrays:
    return replace(a, unique=True) if node.schema[name] and a.high not in (0, 1) else a


@on_arrays
def contains(i: Interpreter, node: SchemaNode, name: str, a: Arrays) -> Arrays:
    return replace(a, contains=(Contains(0, i.expr(node, node.schema[name], "/contains"), 1, None),))


@on_arrays
def min_contains(i: Interpreter, node: SchemaNode, name: str, a: Arrays) -> Arrays:
    return replace(a, contains=tuple(c._replace(low=int(node.schema[name])) for c in a.contains))


@on_arrays
def max_contains(i: Interpreter, node: SchemaNode, name: str, a: Arrays) -> Arrays:
    return replace(a, contains=tuple(c._replace(high=int(node.schema[name])) for c in a.contains))


# --- other schemas


def target(i: Interpreter, node: SchemaNode, name: str) -> Expr:
    """Return the expression of the schema that a keyword refers to."""
    follow = i.table.rows[name].target
    assert follow is not None
    return i.expressions.of_schema(follow(node))


def referred(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    return i.expressions.intersect(found, i.expressions.values(target(i, node, name)))


def not_referred(i: Interpreter, node: SchemaNode, name: str) -> Iterable[Values]:
    yield i.refused(target(i, node, name))


def all_of(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    for s, suffix in _listed(node, name):
        found = i.expressions.intersect(found, i.values(node, s, suffix))
    return found


def not_all_of(i: Interpreter, node: SchemaNode, name: str) -> Iterable[Values]:
    for s, suffix in _listed(node, name):
        yield i.refused(i.expr(node, s, suffix))


def _listed(node: SchemaNode, name: str) -> list[tuple[Any, str]]:
    """Return the schemas of a keyword that takes a list, or (draft 3) one schema; each with its pointer."""
    value = node.schema[name]
    return [(s, f"/{name}/{at}") for at, s in enumerate(value if isinstance(value, list) else [value])]


def any_of(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    return i.expressions.intersect(found, v.unite(i.values(node, s, suffix) for s, suffix in _listed(node, name)))


def not_any_of(i: Interpreter, node: SchemaNode, name: str) -> Iterable[Values]:
    yield _none_of(i, i.exprs(node, name))


def _none_of(i: Interpreter, branches: list[Expr]) -> Values:
    found = v.ANY
    for e in branches:
        found = i.expressions.intersect(found, i.refused(e))
    return found


def one_of(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    """Keep the values in one branch and in no other. Disjoint branches need no complement."""
    branches = i.exprs(node, name)
    both, out = i.expressions.intersect, []
    parts = [both(found, i.expressions.values(e)) for e in branches]
    overlaps = {(at, j): _may_meet(i, a, parts[j]) for at, a in enumerate(parts) for j in range(at)}
    for at, a in enumerate(parts):
        rest = a
        for j, e in enumerate(branches):
            if at != j and overlaps[max(at, j), min(at, j)]:
                rest = both(rest, i.refused(e))
        out.append(rest)
    return v.unite(out)


def _may_meet(i: Interpreter, a: Values, b: Values) -> bool:
    common = i.expressions.intersect(a, b)
    if common.null or common.booleans or common.numbers or common.strings:
        return True
    return not i.expressions.values_are_empty(common)


def not_one_of(i: Interpreter, node: SchemaNode, name: str) -> Iterable[Values]:
    """Return the values in no branch, or in two."""
    branches = i.exprs(node, name)
    yield _none_of(i, branches)
    values = [i.expressions.values(e) for e in branches]
    for at, a in enumerate(values):
        for b in values[:at]:
            common = i.expressions.intersect(a, b)
            if not i.expressions.values_are_empty(common):
                yield common


def not_(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    return i.expressions.intersect(found, i.refused(i.expr(node, node.schema[name], "/not")))


def not_not(i: Interpreter, node: SchemaNode, name: str) -> Iterable[Values]:
    yield i.values(node, node.schema[name], "/not")


def disallow(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    """Draft 3: the negation of `type`."""
    for kind, suffix in _listed(node, name):
        other = {"type": kind} if isinstance(kind, str) else kind
        found = i.expressions.intersect(found, i.refused(i.expr(node, other, suffix)))
    return found


def if_(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    schema, both = node.schema, i.expressions.intersect
    if "then" not in schema and "else" not in schema:
        return found
    condition = i.expr(node, schema["if"], "/if")
    yes, no = both(found, i.expressions.values(condition)), both(found, i.refused(condition))
    if "then" in schema:
        yes = both(yes, i.values(node, schema["then"], "/then"))
    if "else" in schema:
        no = both(no, i.values(node, schema["else"], "/else"))
    return v.unite((yes, no))


def not_if(i: Interpreter, node: SchemaNode, name: str) -> Iterable[Values]:
    schema, both = node.schema, i.expressions.intersect
    if "then" in schema:
        holds = i.values(node, schema["if"], "/if")
        yield both(holds, i.refused(i.expr(node, schema["then"], "/then")))
    if "else" in schema:
        fails = i.refused(i.expr(node, schema["if"], "/if"))
        yield both(fails, i.refused(i.expr(node, schema["else"], "/else")))


def dependent_schemas(i: Interpreter, node: SchemaNode, name: str, found: Values) -> Values:
    both = i.expressions.intersect
    for key, s, suffix in dependent(node, name):
        then = i.values(node, s, suffix)
        found = v.unite((both(found, without_key(key)), both(both(found, with_key(key)), then)))
    return found


def not_dependent_schemas(i: Interpreter, node: SchemaNode, name: str) -> Iterable[Values]:
    for key, s, suffix in dependent(node, name):
        yield i.expressions.intersect(with_key(key), i.refused(i.expr(node, s, suffix)))


def dependent(node: SchemaNode, name: str) -> list[tuple[str, Any, str]]:
    """Return the keys whose presence asks for a schema: (key, schema, its pointer)."""
    found = mapping(node.schema, name).items()
    return [(key, s, f"/{name}/{escape(key)}") for key, s in found if isinstance(s, dict | bool)]


def with_key(key: str) -> Values:
    """Return the objects that have a key."""
    return Values(objects=(Objects(((key, TRUE),), required=frozenset((key,))),))


def without_key(key: str) -> Values:
    """Return all values except the objects that have a key."""
    return v.ANY._replace(objects=(Objects(((key, FALSE),)),))
