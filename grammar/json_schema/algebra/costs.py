"""The cost of a set: about the length of its shortest value in bytes, or INFINITE if the set has no value.

So a cost tells whether a set is empty, and which way is the shortest when a text must be completed. Here a set is taken
apart into its specs. The costs of their parts come from `Expressions.cost`, which remembers them and handles schemas
that contain themselves.

{"type": "string", "minLength": 2} costs about 4: its shortest values have two characters and two quotes.
"""

from __future__ import annotations

from dataclasses import replace

from ramet.errors import UnsupportedSchema
from ramet.grammar.json_schema.algebra import distinct, specs
from ramet.grammar.json_schema.algebra.expressions import Expressions
from ramet.grammar.json_schema.algebra.values import FALSE, INFINITE, TRUE, Arrays, Exists, Expr, Objects, Rule, Values


def of_values(e: Expressions, a: Values) -> int:
    """Return the cost of the shortest value of all kinds."""
    if a.null or a.booleans or a.numbers:
        return 4
    if a.strings:
        return min(2 + (s.low if s.finite is None else min(map(len, s.finite))) for s in a.strings)
    best = INFINITE
    for r in a.arrays:
        best = min(best, of_array(e, r))
    for o in a.objects:
        best = min(best, of_object(e, o))
    return best


def of_object(e: Expressions, o: Objects) -> int:
    """Return the cost of the shortest object of one spec."""
    total = 2
    needed = specs.closure_of_keys(o, o.required)
    if o.high is not None and max(o.low, len(needed)) > o.high:
        return INFINITE
    for k in needed:
        c = e.cost(specs.expr_of_key(e, o, k))
        if c >= INFINITE:
            return INFINITE
        total += len(k) + 4 + c
    if o.low > len(needed):
        if not specs.other_keys_possible(e, o):
            able = {k for k, value in o.properties if k in needed or not e.is_empty(value)}
            usable = sum(1 for k in able if specs.closure_of_keys(o, frozenset((k,))) <= able)
            if usable < o.low:
                return INFINITE
        total += 8 * (o.low - len(needed))
    for x in o.exists:
        if not _may_exist(e, o, x):
            return INFINITE
        total += 8
    if o.excluded and not distinct.object_may_differ(e, replace(o, excluded=frozenset()), tuple(o.excluded)):
        return INFINITE
    return total


def _may_exist(e: Expressions, o: Objects, x: Exists) -> bool:
    for k, value in o.properties:
        if specs.in_class(e, x, k) and not e.is_empty(e.both(value, x.expr)):
            return True
    matching = {x.pattern} if x.pattern is not None else set()
    others = [n for rule in o.rules for n, _ in rule.patterns if n not in matching and n not in x.others]
    # the key matches its pattern; other patterns may also match it: try none of them, then each one
    for extra in (None, *others):
        found = frozenset(matching if extra is None else {*matching, extra})
        if not e.is_empty(e.both(specs.expr_of_signature(e, o, found), x.expr)):
            return True
    return False


def of_array(e: Expressions, a: Arrays) -> int:
    """Return the cost of the shortest array of one spec.

    Raises: UnsupportedSchema if equal items and `contains` may conflict.
    """
    if a.repeats and not distinct.can_repeat(e, a):
        return INFINITE
    if a.repeats and a.contains and (a.high is not None or any(c.high is not None for c in a.contains)):
        problem = "with a limited number of items, equal items are not described beside `contains`"
        raise UnsupportedSchema([(e.pointer, "uniqueItems", problem)])
    if a.contains:
        needed = specs.items_needed(e, a, 0, (0,) * len(a.contains))
        if needed is None:
            return INFINITE
        total = 2 + of_witness(e, a) * needed
    else:
        total = 2
        for i in range(min(a.low, len(a.prefix) + 1)):
            c = e.cost(specs.item(a, i))
            if c >= INFINITE:
                return INFINITE
            total += (c + 1) * (1 if i < len(a.prefix) else a.low - len(a.prefix))
    if a.unique and not distinct.may_fill(e, a, 0, (0,) * len(a.contains), ()):
        return INFINITE
    if a.excluded and not distinct.array_may_differ(e, replace(a, excluded=frozenset()), tuple(a.excluded)):
        return INFINITE
    return total


def of_witness(e: Expressions, a: Arrays) -> int:
    """Return a cost for an item that some `contains` needs: higher than the cost of any such item.

    So writing another item first never looks cheaper to a text that must end soon. An item that another `contains`
    forbids is not counted.
    """
    found = 0
    for c in a.contains:
        if c.low:
            found = max(found, min(e.cost(e.both(a.rest, c.expr)), e.cost(c.expr) + 1000))
    index = specs.last_index(a) if a.high is None else max(min(specs.last_index(a), a.high - 1), 0)
    for value, counts in specs.item_choices(e, a, index, (0,) * len(a.contains)):
        if any(c.low and n for c, n in zip(a.contains, counts, strict=True)):
            cost = e.cost(value)
            found = max(found, cost if cost < INFINITE else 0)
    return 10 + min(2 * found, 1 << 40)


def objects_of(e: Expressions, expr: Expr) -> tuple[Objects, ...]:
    """Return the specs of the objects in an expression, without those that have no values. It must not be empty."""
    a = e.values(expr)
    return a.objects if a.is_one_spec else tuple(o for o in a.objects if of_object(e, o) < INFINITE)


def closed(e: Expressions, o: Objects) -> Objects:
    """Return the objects of a spec without those whose keys no schema names, where the schemas say nothing of others.

    A key that matches a pattern of `patternProperties` is named. If no object would be left, the spec stays open.
    """
    if o.says_others is not False or o.exists:
        return o
    languages = dict.fromkeys(n for rule in o.rules if rule.additional != FALSE for n, _ in rule.patterns)
    if languages:
        narrowed = replace(o, rules=(*o.rules, Rule(tuple((n, TRUE) for n in languages), FALSE)), says_others=True)
    else:
        narrowed = replace(o, default=FALSE, rules=(), says_others=True)
    return narrowed if of_object(e, narrowed) < INFINITE else o


def arrays_of(e: Expressions, expr: Expr) -> tuple[Arrays, ...]:
    """Return the specs of the arrays in an expression, as `objects_of` does for objects."""
    a = e.values(expr)
    return a.arrays if a.is_one_spec else tuple(r for r in a.arrays if of_array(e, r) < INFINITE)
