"""`unevaluatedProperties` and `unevaluatedItems`: schemas for the parts of a value that no other keyword looked at.

The subschemas that hold decide which parts were looked at (the specification says: evaluated). So if one of the two
keywords is present, a schema is split into alternatives, and each of them has one answer. With

    {"properties": {"a": {}}, "anyOf": [{"properties": {"b": {"type": "null"}}}, {"properties": {"c": {}}}]}

an object that satisfies both branches had "a", "b" and "c" looked at. If only the first one holds, it is "a" and "b",
and if only the second one holds, "a" and "c". The functions here are the columns `looks`, `track` and `close` of the
table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ramet.errors import GrammarTooLarge
from ramet.grammar.json_schema.algebra import specs
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.values import TRUE, Arrays, Objects, Rule
from ramet.grammar.json_schema.keywords import narrowing
from ramet.grammar.json_schema.keywords.interpreter import NOTHING, Alternative, Interpreter, Looked
from ramet.grammar.json_schema.schema.document import DRAFT2020, SchemaNode

MAX_ALTERNATIVES = 512


# --- what a keyword looks at by itself


def look_at_names(i: Interpreter, node: SchemaNode, name: str) -> Looked:
    return Looked(names=frozenset(node.schema[name]))


def look_at_languages(i: Interpreter, node: SchemaNode, name: str) -> Looked:
    return Looked(languages=frozenset(i.languages.add("pattern", p) for p in node.schema[name]))


def look_at_all_names(i: Interpreter, node: SchemaNode, name: str) -> Looked:
    return Looked(all_names=True)


def look_at_prefix(i: Interpreter, node: SchemaNode, name: str) -> Looked:
    return Looked(items=len(node.schema[name]))


def look_at_items(i: Interpreter, node: SchemaNode, name: str) -> Looked:
    value = node.schema[name]
    return Looked(items=len(value)) if isinstance(value, list) else Looked(all_items=True)


def look_at_additional_items(i: Interpreter, node: SchemaNode, name: str) -> Looked:
    return Looked(all_items=narrowing.has_old_prefix(node))


def look_at_contained(i: Interpreter, node: SchemaNode, name: str) -> Looked:
    if node.draft < DRAFT2020:
        return NOTHING
    return Looked(contains=frozenset((i.expr(node, node.schema[name], "/contains"),)))


# --- alternatives


def _child(i: Interpreter, node: SchemaNode, schema: Any, suffix: str) -> list[Alternative]:
    return i.tracked(i.child(node, schema, suffix))


def _fails(i: Interpreter, node: SchemaNode, schema: Any, suffix: str) -> list[Alternative]:
    """Return the values that a subschema refuses. It has looked at nothing in them."""
    return [(i.refused(i.expr(node, schema, suffix)), NOTHING)]


def _both(i: Interpreter, left: Iterable[Alternative], right: list[Alternative]) -> list[Alternative]:
    """Return the values in both. A part was looked at if either side has looked at it."""
    out: dict[Looked, list[v.Values]] = {}
    count = 0
    for a, look_a in left:
        for b, look_b in right:
            both = i.expressions.intersect(a, b)
            if not i.expressions.values_are_empty(both):
                out.setdefault(look_a | look_b, []).append(both)
                count += 1
                if count > MAX_ALTERNATIVES:
                    raise GrammarTooLarge(f"unevaluated keywords need more than {MAX_ALTERNATIVES} alternatives")
    return [(v.unite(parts), looked) for looked, parts in out.items()]


def track_referred(i: Interpreter, node: SchemaNode, name: str, found: list[Alternative]) -> list[Alternative]:
    follow = i.table.rows[name].target
    assert follow is not None
    return _both(i, found, i.tracked(follow(node)))


def track_all_of(i: Interpreter, node: SchemaNode, name: str, found: list[Alternative]) -> list[Alternative]:
    for at, s in enumerate(node.schema[name]):
        found = _both(i, found, _child(i, node, s, f"/{name}/{at}"))
    return found


def track_any_of(i: Interpreter, node: SchemaNode, name: str, found: list[Alternative]) -> list[Alternative]:
    """Return an alternative for every set of branches that may hold together."""
    none, some = found, list[Alternative]()
    for at, s in enumerate(node.schema[name]):
        holds = _child(i, node, s, f"/{name}/{at}")
        fails = _fails(i, node, s, f"/{name}/{at}")
        some = [*_both(i, some, holds), *_both(i, some, fails), *_both(i, none, holds)]
        none = _both(i, none, fails)
    return some


def track_one_of(i: Interpreter, node: SchemaNode, name: str, found: list[Alternative]) -> list[Alternative]:
    """Return an alternative for each branch alone."""
    branches = node.schema[name]
    fails = [_fails(i, node, s, f"/{name}/{at}") for at, s in enumerate(branches)]
    out: list[Alternative] = []
    for at, s in enumerate(branches):
        part = _both(i, found, _child(i, node, s, f"/{name}/{at}"))
        for other in (*fails[:at], *fails[at + 1 :]):
            part = _both(i, part, other)
        out.extend(part)
    return out


def track_not(i: Interpreter, node: SchemaNode, name: str, found: list[Alternative]) -> list[Alternative]:
    return _both(i, found, _fails(i, node, node.schema[name], f"/{name}"))


def track_if(i: Interpreter, node: SchemaNode, name: str, found: list[Alternative]) -> list[Alternative]:
    schema = node.schema
    yes = _both(i, found, _child(i, node, schema["if"], "/if"))
    no = _both(i, found, _fails(i, node, schema["if"], "/if"))
    if "then" in schema:
        yes = _both(i, yes, _child(i, node, schema["then"], "/then"))
    if "else" in schema:
        no = _both(i, no, _child(i, node, schema["else"], "/else"))
    return [*yes, *no]


def track_dependent(i: Interpreter, node: SchemaNode, name: str, found: list[Alternative]) -> list[Alternative]:
    for key, s, suffix in narrowing.dependent(node, name):
        then = _child(i, node, s, suffix)
        present = _both(i, [(narrowing.with_key(key), NOTHING)], then)
        found = _both(i, found, [(narrowing.without_key(key), NOTHING), *present])
    return found


# --- the two keywords


def close_objects(i: Interpreter, node: SchemaNode, name: str, found: Alternative) -> Alternative:
    """Apply the schema to all keys that were not looked at. After that, all keys were looked at."""
    a, looked = found
    rest = i.expr(node, node.schema[name], f"/{name}")
    if not looked.all_names and (rest != TRUE or i.closes_objects):
        names = tuple((k, TRUE) for k in sorted(looked.names))
        languages = tuple((n, TRUE) for n in sorted(looked.languages))
        # a named key may also match a language; its expression is TRUE either way
        spec = Objects(names, rules=(Rule(languages, rest),)) if languages else Objects(names, rest)
        if i.closes_objects:
            spec = replace(spec, says_others=True)
        a = i.expressions.intersect(a, v.ANY._replace(objects=(spec,)))
    return a, looked | Looked(all_names=True)


def close_arrays(i: Interpreter, node: SchemaNode, name: str, found: Alternative) -> Alternative:
    """Apply the schema to all items that were not looked at. After that, all items were looked at."""
    a, looked = found
    e = i.expressions
    rest = i.expr(node, node.schema[name], f"/{name}")
    if not looked.all_items and rest != TRUE:
        for contained in sorted(looked.contains):
            rest = e.negate(e.both(e.negate(rest), e.negate(contained)))
        spec = specs.tidy_arrays(e, Arrays((TRUE,) * looked.items, rest))
        assert spec is not None
        a = e.intersect(a, v.ANY._replace(arrays=(spec,)))
    return a, looked | Looked(all_items=True)
