"""`unevaluatedProperties` and `unevaluatedItems`: which parts of a value other keywords have looked at.

That depends on which subschemas hold, so a schema is split into alternatives, each with its own answer: for `anyOf`
every set of branches that may hold, for `oneOf` each branch alone, and so on. Only done where one of the two keywords
asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ramet.errors import GrammarTooLarge
from ramet.grammar.json_schema.algebra import specs
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.values import FALSE, TRUE, Arrays, Expr, Objects, Rule, Values
from ramet.grammar.json_schema.schema.document import DRAFT2019, DRAFT2020, SchemaNode, escape

if TYPE_CHECKING:
    from ramet.grammar.json_schema.keywords.keywords import Interpreter

MAX_ALTERNATIVES = 512


@dataclass(frozen=True, slots=True)
class Looked:
    """What was looked at: keys by name and by language, or all; the first `items`, those in `contains`, or all."""

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
Alternative = tuple[Values, Looked]


def is_tracking(node: SchemaNode) -> bool:
    """Does the schema ask what was looked at?"""
    return node.draft >= DRAFT2019 and any(
        node.schema.get(key, True) not in (True, {}) for key in ("unevaluatedProperties", "unevaluatedItems")
    )


def tracked(interpreter: Interpreter, node: SchemaNode) -> list[Alternative]:
    """The schema's values as a union, each part with what was looked at.

    Raises: GrammarTooLarge past MAX_ALTERNATIVES.
    """
    schema = node.schema
    if not isinstance(schema, dict):
        return [(v.ANY if schema else v.NONE, NOTHING)]
    found = [(interpreter.own(node), _own_look(interpreter, node))]
    for key in ("$ref", "$dynamicRef", "$recursiveRef"):
        if key in schema:
            found = _both(interpreter, node, found, tracked(interpreter, interpreter.target(node, key)))
    for i, s in enumerate(schema.get("allOf", ())):
        found = _both(interpreter, node, found, _child(interpreter, node, s, f"/allOf/{i}"))
    if "anyOf" in schema:
        found = _any_of(interpreter, node, found)
    if "oneOf" in schema:
        found = _one_of(interpreter, node, found)
    if "not" in schema:
        refused = interpreter.refused(interpreter.expr(node, schema["not"], "/not"))
        found = _both(interpreter, node, found, [(refused, NOTHING)])
    if "if" in schema:
        found = _conditional(interpreter, node, found)
    for name, s in schema.get("dependentSchemas", {}).items():
        without = v.ANY._replace(objects=(Objects(((name, FALSE),)),))
        within = Values(objects=(Objects(((name, TRUE),), required=frozenset((name,))),))
        then = _child(interpreter, node, s, f"/dependentSchemas/{escape(name)}")
        options = [(without, NOTHING), *_both(interpreter, node, [(within, NOTHING)], then)]
        found = _both(interpreter, node, found, options)
    return [_apply(interpreter, node, a, looked) for a, looked in found]


def _child(interpreter: Interpreter, node: SchemaNode, schema: Any, suffix: str) -> list[Alternative]:
    return tracked(interpreter, interpreter.child(node, schema, suffix))


def _own_look(interpreter: Interpreter, node: SchemaNode) -> Looked:
    schema = node.schema
    languages = frozenset(interpreter.languages.add("pattern", p) for p in schema.get("patternProperties", {}))
    prefix = schema.get("prefixItems", ())
    contains: frozenset[Expr] = frozenset()
    if "contains" in schema and node.draft >= DRAFT2020:
        contains = frozenset((interpreter.expr(node, schema["contains"], "/contains"),))
    items = schema.get("items")
    if isinstance(items, list):
        return Looked(
            frozenset(schema.get("properties", ())), languages, "additionalProperties" in schema,
            len(items), contains, "additionalItems" in schema,
        )  # fmt: skip
    return Looked(
        frozenset(schema.get("properties", ())), languages, "additionalProperties" in schema,
        len(prefix), contains, "items" in schema,
    )  # fmt: skip


def _both(
    interpreter: Interpreter, node: SchemaNode, left: Iterable[Alternative], right: list[Alternative]
) -> list[Alternative]:
    out: dict[Looked, list[Values]] = {}
    count = 0
    for a, look_a in left:
        for b, look_b in right:
            both = interpreter.expressions.intersect(a, b)
            if not interpreter.expressions.values_are_empty(both):
                out.setdefault(look_a | look_b, []).append(both)
                count += 1
                if count > MAX_ALTERNATIVES:
                    raise GrammarTooLarge(f"unevaluated keywords need more than {MAX_ALTERNATIVES} alternatives")
    return [(v.unite(parts), looked) for looked, parts in out.items()]


def _any_of(interpreter: Interpreter, node: SchemaNode, found: list[Alternative]) -> list[Alternative]:
    branches = node.schema["anyOf"]
    none: list[Alternative] = found
    some: list[Alternative] = []
    for i, s in enumerate(branches):
        holds = _child(interpreter, node, s, f"/anyOf/{i}")
        fails = [(interpreter.refused(interpreter.expr(node, s, f"/anyOf/{i}")), NOTHING)]
        some = [
            *_both(interpreter, node, some, holds),
            *_both(interpreter, node, some, fails),
            *_both(interpreter, node, none, holds),
        ]
        none = _both(interpreter, node, none, fails)
    return some


def _one_of(interpreter: Interpreter, node: SchemaNode, found: list[Alternative]) -> list[Alternative]:
    out: list[Alternative] = []
    branches = node.schema["oneOf"]
    refused = [interpreter.refused(interpreter.expr(node, s, f"/oneOf/{i}")) for i, s in enumerate(branches)]
    for i, s in enumerate(branches):
        part = _both(interpreter, node, found, _child(interpreter, node, s, f"/oneOf/{i}"))
        for j, other in enumerate(refused):
            if i != j:
                part = _both(interpreter, node, part, [(other, NOTHING)])
        out.extend(part)
    return out


def _conditional(interpreter: Interpreter, node: SchemaNode, found: list[Alternative]) -> list[Alternative]:
    schema = node.schema
    yes = _both(interpreter, node, found, _child(interpreter, node, schema["if"], "/if"))
    no = _both(interpreter, node, found, [(interpreter.refused(interpreter.expr(node, schema["if"], "/if")), NOTHING)])
    if "then" in schema:
        yes = _both(interpreter, node, yes, _child(interpreter, node, schema["then"], "/then"))
    if "else" in schema:
        no = _both(interpreter, node, no, _child(interpreter, node, schema["else"], "/else"))
    return [*yes, *no]


def _apply(interpreter: Interpreter, node: SchemaNode, a: Values, looked: Looked) -> Alternative:
    """Put the two keywords on what was not looked at; after that, all was."""
    schema, expressions = node.schema, interpreter.expressions
    if "unevaluatedProperties" in schema and node.draft >= DRAFT2019:
        rest = interpreter.expr(node, schema["unevaluatedProperties"], "/unevaluatedProperties")
        if not looked.all_names and rest != TRUE:
            names = tuple((k, TRUE) for k in sorted(looked.names))
            languages = tuple((n, TRUE) for n in sorted(looked.languages))
            # a named key may also match a language; its expression is TRUE either way
            spec = Objects(names, rules=(Rule(languages, rest),)) if languages else Objects(names, rest)
            a = expressions.intersect(a, v.ANY._replace(objects=(spec,)))
        looked = looked | Looked(all_names=True)
    if "unevaluatedItems" in schema and node.draft >= DRAFT2019:
        rest = interpreter.expr(node, schema["unevaluatedItems"], "/unevaluatedItems")
        if not looked.all_items and rest != TRUE:
            for e in sorted(looked.contains):
                rest = expressions.negate(expressions.both(expressions.negate(rest), expressions.negate(e)))
            spec_items = specs.tidy_arrays(expressions, Arrays((TRUE,) * looked.items, rest))
            assert spec_items is not None
            a = expressions.intersect(a, v.ANY._replace(arrays=(spec_items,)))
        looked = looked | Looked(all_items=True)
    return a, looked
