"""What values cost: about the bytes of the shortest one, INFINITE where a set has none, one kind of value at a time.

`Expressions.cost` asks these for an expression, and remembers; they ask it for the parts. Not here: the fixed point.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ramet.errors import UnsupportedSchema
from ramet.grammar.json_schema.algebra import distinct, specs
from ramet.grammar.json_schema.algebra.values import FALSE, INFINITE, Arrays, Exists, Objects, Values

if TYPE_CHECKING:
    from ramet.grammar.json_schema.algebra.expressions import Expressions


def of_values(e: Expressions, a: Values) -> int:
    """About the bytes of the shortest value of all kinds."""
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
    """About the bytes of the shortest object of one spec."""
    total = 2
    needed = closure_of_keys(o, o.required)
    if o.high is not None and max(o.low, len(needed)) > o.high:
        return INFINITE
    for k in needed:
        c = e.cost(specs.expr_of_key(e, o, k))
        if c >= INFINITE:
            return INFINITE
        total += len(k) + 4 + c
    if o.low > len(needed):
        if not other_keys_possible(e, o):
            able = {k for k, value in o.properties if k in needed or not e.is_empty(value)}
            usable = sum(1 for k in able if closure_of_keys(o, frozenset((k,))) <= able)
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


def other_keys_possible(e: Expressions, o: Objects) -> bool:
    """Can a key that is not declared have a value?"""
    if o.default == FALSE:
        return False
    numbers = o.languages
    if not numbers:
        return not e.is_empty(o.default)
    for matching in e.languages.signatures(numbers)[1]:
        if not e.is_empty(specs.expr_of_signature(e, o, matching)):
            few = e.languages.few_of_signature(numbers, matching)
            if few is None or not few <= o.table.keys():
                return True
    return False


def _may_exist(e: Expressions, o: Objects, x: Exists) -> bool:
    for k, value in o.properties:
        if in_class(e, x, k) and not e.is_empty(e.both(value, x.expr)):
            return True
    matching = {x.pattern} if x.pattern is not None else set()
    others = [n for rule in o.rules for n, _ in rule.patterns if n not in matching and n not in x.others]
    # the key matches what it must; other patterns may or may not match it: try none, then each one
    for extra in (None, *others):
        found = frozenset(matching if extra is None else {*matching, extra})
        if not e.is_empty(e.both(specs.expr_of_signature(e, o, found), x.expr)):
            return True
    return False


def in_class(e: Expressions, x: Exists, key: str) -> bool:
    """Whether a key is one of those of which one must have a value of `x`."""
    if key in x.names:
        return False
    if x.pattern is not None:
        return e.languages.accepts(x.pattern, key)
    return not any(e.languages.accepts(n, key) for n in x.others)


def closure_of_keys(o: Objects, keys: frozenset[str]) -> frozenset[str]:
    """All keys that must stand in an object that has these."""
    if not o.dependent:
        return keys
    needed = set(keys)
    while True:
        more = {r for k, needs in o.dependent if k in needed for r in needs} - needed
        if not more:
            return frozenset(needed)
        needed |= more


def of_array(e: Expressions, a: Arrays) -> int:
    """About the bytes of the shortest array of one spec.

    Raises: UnsupportedSchema where equal items and `contains` may get into each other's way.
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
    """More than the bytes of an item that some `contains` asks for: so that to write one always looks better than
    to write another item first. Such an item is also none of which there must not be more."""
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
