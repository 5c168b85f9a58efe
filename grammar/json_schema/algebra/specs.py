"""Algebra of object and array specs: and, not, and what a key or an item must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ramet.grammar import deadline
from ramet.grammar.json_schema.algebra import costs, distinct
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.values import (
    FALSE,
    INFINITE,
    TRUE,
    Arrays,
    Contains,
    Exists,
    Expr,
    Objects,
    Rule,
)

if TYPE_CHECKING:
    from ramet.grammar.json_schema.algebra.expressions import Expressions


def expr_of_key(expressions: Expressions, o: Objects, key: str) -> Expr:
    """Expression of the value of a key, declared or not."""
    found = o.table.get(key)
    return _undeclared(expressions, o, lambda n: expressions.languages.accepts(n, key)) if found is None else found


def _undeclared(expressions: Expressions, o: Objects, matches: Callable[[int], bool]) -> Expr:
    expr = o.default
    for rule in o.rules:
        hit = False
        for number, e in rule.patterns:
            if matches(number):
                hit = True
                expr = expressions.both(expr, e)
        if not hit:
            expr = expressions.both(expr, rule.additional)
    return expr


def expr_of_signature(expressions: Expressions, o: Objects, matching: frozenset[int]) -> Expr:
    """Expression of the value of an undeclared key that matches exactly these languages."""
    return _undeclared(expressions, o, matching.__contains__)


def both_objects(expressions: Expressions, a: Objects, b: Objects) -> Objects | None:
    """The objects in both; None where it is seen that there is none."""
    if a is v.ANY_OBJECTS or b is v.ANY_OBJECTS:
        return b if a is v.ANY_OBJECTS else a
    names = dict.fromkeys([*a.table, *b.table])
    properties = tuple(
        (k, expressions.both(expr_of_key(expressions, a, k), expr_of_key(expressions, b, k))) for k in names
    )
    high = a.high if b.high is None else b.high if a.high is None else min(a.high, b.high)
    dependent = dict(a.dependent)
    for k, needs in b.dependent:
        dependent[k] = dependent.get(k, frozenset()) | needs
    return tidy_objects(
        expressions,
        Objects(
            properties,
            expressions.both(a.default, b.default),
            tuple(dict.fromkeys(a.rules + b.rules)),
            a.required | b.required,
            max(a.low, b.low),
            high,
            tuple(sorted(dependent.items())),
            tuple(dict.fromkeys(a.exists + b.exists)),
            a.named_only or b.named_only,
            a.excluded | b.excluded,
        ),
    )


def tidy_objects(expressions: Expressions, o: Objects) -> Objects | None:
    """Declare all keys that are named anywhere; None where it is seen that there is no such object."""
    low = max(o.low, len(o.required))
    if o.high is not None and low > o.high:
        return None
    if o.low and o.rules:  # so that what counts keys knows where they run out
        o = distinct.with_few_keys(expressions, o)
    named = set(o.required)
    for k, needs in o.dependent:
        named.add(k)
        named |= needs
    missing = sorted(named - o.table.keys())
    properties = o.properties + tuple((k, expr_of_key(expressions, o, k)) for k in missing)
    table = dict(properties)
    for k in o.required:
        e = table[k]
        if e == FALSE or (len(expressions.contents[e]) > 1 and expressions.is_empty(e)):
            return None
    default, rules = o.default, o.rules
    if default == FALSE:
        rules = ()
    if default == FALSE and any(e == FALSE for _, e in properties):
        properties = tuple((k, e) for k, e in properties if e != FALSE or k in named)
    if default == FALSE and low > sum(e != FALSE for _, e in properties):
        return None
    low = o.low if o.low > len(o.required) else 0
    return Objects(properties, default, rules, o.required, low, o.high, o.dependent, o.exists, o.named_only, o.excluded)


def not_objects(expressions: Expressions, o: Objects) -> list[Objects]:
    """All other objects, as a union."""
    out = []
    for k, e in o.properties:
        if e != TRUE and k in o.required:
            out.append(Objects(((k, expressions.negate(e)),), required=frozenset((k,))))
            out.append(Objects(((k, FALSE),)))
        elif e != TRUE:
            out.append(Objects(((k, expressions.negate(e)),), required=frozenset((k,))))
        elif k in o.required:
            out.append(Objects(((k, FALSE),)))
    if o.low:
        out.append(Objects(high=o.low - 1))
    if o.high is not None:
        out.append(Objects(low=o.high + 1))
    for k, needs in o.dependent:
        out.extend(Objects(((k, TRUE), (r, FALSE)), required=frozenset((k,))) for r in sorted(needs) if r != k)
    names = frozenset(o.table)
    if o.default != TRUE:
        out.append(Objects(exists=(Exists(None, (), names, expressions.negate(o.default)),)))
    for rule in o.rules:
        for number, e in rule.patterns:
            if e != TRUE:
                out.append(Objects(exists=(Exists(number, (), names, expressions.negate(e)),)))
        if rule.additional != TRUE:
            others = tuple(n for n, _ in rule.patterns)
            out.append(Objects(exists=(Exists(None, others, names, expressions.negate(rule.additional)),)))
    out.extend(_not_exists(expressions, x) for x in o.exists)
    constants = expressions.constants
    out.extend(s for n in sorted(o.excluded) for s in expressions.values(constants.expr(n)).objects)
    return out


def _not_exists(expressions: Expressions, x: Exists) -> Objects:
    free = tuple((k, TRUE) for k in sorted(x.names))
    other = expressions.negate(x.expr)
    if x.pattern is None and not x.others:
        return Objects(free, other)
    if x.pattern is None:
        return Objects(free, rules=(Rule(tuple((n, TRUE) for n in x.others), other),))
    return Objects(free, rules=(Rule(((x.pattern, other),), TRUE),))


def objects_of(expressions: Expressions, expr: Expr) -> tuple[Objects, ...]:
    """The specs of the objects in an expression that is not empty, but for specs without values."""
    a = expressions.values(expr)
    return a.objects if a.is_one_spec else tuple(o for o in a.objects if costs.of_object(expressions, o) < INFINITE)


def arrays_of(expressions: Expressions, expr: Expr) -> tuple[Arrays, ...]:
    """As `objects_of`, for arrays."""
    a = expressions.values(expr)
    return a.arrays if a.is_one_spec else tuple(r for r in a.arrays if costs.of_array(expressions, r) < INFINITE)


def item(a: Arrays, index: int) -> Expr:
    """Expression of the item at an index."""
    return a.prefix[index] if index < len(a.prefix) else a.rest


def both_arrays(expressions: Expressions, a: Arrays, b: Arrays) -> Arrays | None:
    """The arrays in both; None where it is seen that there is none."""
    if a is v.ANY_ARRAYS or b is v.ANY_ARRAYS:
        return b if a is v.ANY_ARRAYS else a
    n = max(len(a.prefix), len(b.prefix))
    high = a.high if b.high is None else b.high if a.high is None else min(a.high, b.high)
    return tidy_arrays(
        expressions,
        Arrays(
            tuple(expressions.both(item(a, i), item(b, i)) for i in range(n)),
            expressions.both(a.rest, b.rest),
            max(a.low, b.low),
            high,
            tuple(dict.fromkeys(a.contains + b.contains)),
            a.unique or b.unique,
            a.repeats or b.repeats,
            a.excluded | b.excluded,
        ),
    )


def tidy_arrays(expressions: Expressions, a: Arrays) -> Arrays | None:
    """Tighten the bounds; None where it is seen that there is no such array."""
    high = a.high
    if a.rest == FALSE:
        high = len(a.prefix) if high is None else min(high, len(a.prefix))
    if FALSE in a.prefix:
        at = a.prefix.index(FALSE)
        high = at if high is None else min(high, at)
    low = max(a.low, 2) if a.repeats else a.low
    if (high is not None and low > high) or (a.unique and a.repeats):
        return None
    for i in range(min(low, len(a.prefix) + 1)):
        e = item(a, i)
        if len(expressions.contents[e]) > 1 and expressions.is_empty(e):
            return None
    prefix = a.prefix if high is None else a.prefix[:high]
    rest = FALSE if high is not None and len(prefix) >= high else a.rest
    contains = tuple(c for c in a.contains if c.low > 0 or c.high is not None)
    return Arrays(prefix, rest, low, high, contains, a.unique, a.repeats, a.excluded)


def not_arrays(expressions: Expressions, a: Arrays) -> list[Arrays]:
    """All other arrays, as a union."""
    out = []
    for i, e in enumerate(a.prefix):
        if e != TRUE:
            out.append(Arrays((*([TRUE] * i), expressions.negate(e)), low=i + 1))
    if a.rest == FALSE:
        out.append(Arrays(low=len(a.prefix) + 1))
    elif a.rest != TRUE:
        out.append(Arrays(contains=(Contains(len(a.prefix), expressions.negate(a.rest), 1, None),)))
    if a.low:
        out.append(Arrays(high=a.low - 1))
    if a.high is not None:
        out.append(Arrays(low=a.high + 1))
    for c in a.contains:
        if c.low:
            out.append(Arrays(contains=(Contains(c.start, c.expr, 0, c.low - 1),)))
        if c.high is not None:
            out.append(Arrays(contains=(Contains(c.start, c.expr, c.high + 1, None),)))
    constants = expressions.constants
    out.extend(s for n in sorted(a.excluded) for s in expressions.values(constants.expr(n)).arrays)
    if a.unique:
        out.append(Arrays() if expressions.lenient else Arrays(repeats=True))
    if a.repeats:
        out.append(Arrays(unique=True))
    return [t for t in (tidy_arrays(expressions, x) for x in out) if t is not None]


Counts = tuple[int, ...]  # for each `contains` of a spec, the matching items so far, no further than matters


def last_index(a: Arrays) -> int:
    """From this index on all positions of an array are alike."""
    return max(len(a.prefix), a.low, a.high or 0, *[c.start for c in a.contains])


def item_choices(expressions: Expressions, a: Arrays, index: int, counts: Counts) -> list[tuple[Expr, Counts]]:
    """The ways to read one more item: what it must be, and the counts after it. Empty past the last item."""
    if a.high is not None and index >= a.high:
        return []
    value = item(a, index)
    out: list[tuple[Expr, Counts]] = [(value, ())]
    for c, count in zip(a.contains, counts, strict=True):
        if index < c.start or (c.high is None and count >= c.low):
            ways = [(TRUE, count)]
        elif c.high is None:
            ways = [(c.expr, count + 1), (TRUE, count)]
        else:
            ways = [(expressions.negate(c.expr), count)]
            if count < c.high:
                ways.append((c.expr, count + 1))
        out = [(expressions.both(v, e), (*done, n)) for v, done in out for e, n in ways]
    return [(v, done) for v, done in out if not expressions.is_empty(v)]


def may_close(a: Arrays, index: int, counts: Counts) -> bool:
    if index < a.low or not a.contains:
        return index >= a.low
    return all(c.low <= n for c, n in zip(a.contains, counts, strict=True))


def items_needed(expressions: Expressions, a: Arrays, index: int, counts: Counts) -> int | None:
    """The fewest further items after which the array may end; None where it never may. Breadth first over counts."""
    if may_close(a, index, counts):
        return 0
    last = last_index(a)
    level, seen, steps = {(min(index, last), counts)}, set[tuple[int, Counts]](), 0
    while level:
        steps += 1
        deadline.check()
        seen |= level
        following = set()
        for i, n in level:
            deadline.check()
            for _, after in item_choices(expressions, a, i, n):
                if may_close(a, i + 1, after):
                    return steps
                following.add((min(i + 1, last), after))
        level = following - seen
    return None
