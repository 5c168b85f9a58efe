"""The algebra of specs of objects and of arrays: and, not, and the conditions of a spec on one key or one item.

A spec is a conjunction (see values.py). The intersection of two specs is one spec. The complement of a spec is a union
of several specs, one for each condition:

    not {"required": ["a"], "maxProperties": 3}     objects without the key "a", and objects with 4 keys or more
    not {"items": {"type": "integer"}}              arrays of which some item is no integer: a `Contains`

All functions take the `Expressions` that the parts of a spec belong to as `e`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from ramet.grammar import deadline
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.expressions import Expressions
from ramet.grammar.json_schema.algebra.values import FALSE, TRUE, Arrays, Contains, Exists, Expr, Objects, Rule

# --- one key of an object


def expr_of_key(e: Expressions, o: Objects, key: str) -> Expr:
    """Return what the value of a key must be. The key may be declared or not."""
    found = o.table.get(key)
    return _undeclared(e, o, lambda n: e.languages.accepts(n, key)) if found is None else found


def expr_of_signature(e: Expressions, o: Objects, matching: frozenset[int]) -> Expr:
    """Return what the value of an undeclared key must be that matches these languages and no others."""
    return _undeclared(e, o, matching.__contains__)


def _undeclared(e: Expressions, o: Objects, matches: Callable[[int], bool]) -> Expr:
    expr = o.default
    for rule in o.rules:
        hit = False
        for number, of_pattern in rule.patterns:
            if matches(number):
                hit = True
                expr = e.both(expr, of_pattern)
        if not hit:
            expr = e.both(expr, rule.additional)
    return expr


def closure_of_keys(o: Objects, keys: frozenset[str]) -> frozenset[str]:
    """Return all keys that an object with these keys must have: those that they require, and so on."""
    if not o.dependent:
        return keys
    needed = set(keys)
    while True:
        more = {r for k, needs in o.dependent if k in needed for r in needs} - needed
        if not more:
            return frozenset(needed)
        needed |= more


def other_keys_possible(e: Expressions, o: Objects) -> bool:
    """Tell whether an object may have a key that is not declared."""
    if o.default == FALSE:
        return False
    numbers = o.languages
    if not numbers:
        return not e.is_empty(o.default)
    for matching in e.languages.signatures(numbers)[1]:
        if not e.is_empty(expr_of_signature(e, o, matching)):
            few = e.languages.few_of_signature(numbers, matching)
            if few is None or not few <= o.table.keys():
                return True
    return False


def in_class(e: Expressions, x: Exists, key: str) -> bool:
    """Tell whether an `Exists` is about a key."""
    if key in x.names:
        return False
    if x.pattern is not None:
        return e.languages.accepts(x.pattern, key)
    return not any(e.languages.accepts(n, key) for n in x.others)


# --- objects


def both_objects(e: Expressions, a: Objects, b: Objects) -> Objects | None:
    """Return the objects in both specs; None if the result is seen to be empty."""
    if a is v.ANY_OBJECTS or b is v.ANY_OBJECTS:
        return b if a is v.ANY_OBJECTS else a
    names = dict.fromkeys([*a.table, *b.table])
    properties = tuple((k, e.both(expr_of_key(e, a, k), expr_of_key(e, b, k))) for k in names)
    high = a.high if b.high is None else b.high if a.high is None else min(a.high, b.high)
    dependent = dict(a.dependent)
    for k, needs in b.dependent:
        dependent[k] = dependent.get(k, frozenset()) | needs
    return tidy_objects(
        e,
        Objects(
            properties,
            e.both(a.default, b.default),
            tuple(dict.fromkeys(a.rules + b.rules)),
            a.required | b.required,
            max(a.low, b.low),
            high,
            tuple(sorted(dependent.items())),
            tuple(dict.fromkeys(a.exists + b.exists)),
            b.says_others if a.says_others is None else a.says_others or bool(b.says_others),
            a.excluded | b.excluded,
        ),
    )


def tidy_objects(e: Expressions, o: Objects) -> Objects | None:
    """Declare all keys that the spec names anywhere; None if the spec is seen to be empty."""
    low = max(o.low, len(o.required))
    if o.high is not None and low > o.high:
        return None
    if o.low and o.rules:  # so that a count of keys knows how many there can be
        o = with_few_keys(e, o)
    named = set(o.required)
    for k, needs in o.dependent:
        named.add(k)
        named |= needs
    missing = sorted(named - o.table.keys())
    properties = o.properties + tuple((k, expr_of_key(e, o, k)) for k in missing)
    table = dict(properties)
    for k in o.required:
        expr = table[k]
        if expr == FALSE or (e.is_conjunction(expr) and e.is_empty(expr)):
            return None
    default, rules = o.default, o.rules
    if default == FALSE:
        rules = ()
    if default == FALSE and any(expr == FALSE for _, expr in properties):
        properties = tuple((k, expr) for k, expr in properties if expr != FALSE or k in named)
    if default == FALSE and low > sum(expr != FALSE for _, expr in properties):
        return None
    low = o.low if o.low > len(o.required) else 0
    return Objects(
        properties, default, rules, o.required, low, o.high, o.dependent, o.exists, o.says_others, o.excluded
    )


def not_objects(e: Expressions, o: Objects) -> list[Objects]:
    """Return all other objects, as a union of specs."""
    out = []
    for k, expr in o.properties:
        if expr != TRUE and k in o.required:
            out.append(Objects(((k, e.negate(expr)),), required=frozenset((k,))))
            out.append(Objects(((k, FALSE),)))
        elif expr != TRUE:
            out.append(Objects(((k, e.negate(expr)),), required=frozenset((k,))))
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
        out.append(Objects(exists=(Exists(None, (), names, e.negate(o.default)),)))
    for rule in o.rules:
        for number, expr in rule.patterns:
            if expr != TRUE:
                out.append(Objects(exists=(Exists(number, (), names, e.negate(expr)),)))
        if rule.additional != TRUE:
            others = tuple(n for n, _ in rule.patterns)
            out.append(Objects(exists=(Exists(None, others, names, e.negate(rule.additional)),)))
    out.extend(_not_exists(e, x) for x in o.exists)
    out.extend(s for n in sorted(o.excluded) for s in e.values(e.constants.expr(n)).objects)
    return out


def _not_exists(e: Expressions, x: Exists) -> Objects:
    free = tuple((k, TRUE) for k in sorted(x.names))
    other = e.negate(x.expr)
    if x.pattern is None and not x.others:
        return Objects(free, other)
    if x.pattern is None:
        return Objects(free, rules=(Rule(tuple((n, TRUE) for n in x.others), other),))
    return Objects(free, rules=(Rule(((x.pattern, other),), TRUE),))


# --- the same objects, with other keys declared


def with_few_keys(e: Expressions, o: Objects) -> Objects:
    """Declare the keys of the spec's languages that have few texts: `^[ab]$` becomes the keys "a" and "b"."""
    numbers = o.languages
    few = e.languages.few_of_signature
    names = {k: None for s in e.languages.signatures(numbers)[1] for k in few(numbers, s) or ()} if numbers else {}
    return _declaring(e, o, names)


def without_excluded(e: Expressions, o: Objects) -> Objects:
    """Return the spec without excluded constants, but with all their keys declared."""
    names = {k: None for n in sorted(o.excluded) for k in sorted(e.constants.members(n))}
    return replace(_declaring(e, o, names), excluded=frozenset())


def _declaring(e: Expressions, o: Objects, names: Iterable[str]) -> Objects:
    missing = [k for k in names if k not in o.table]
    if not missing:
        return o
    return replace(o, properties=o.properties + tuple((k, expr_of_key(e, o, k)) for k in missing))


def decided(o: Objects, present: frozenset[str], absent: frozenset[str]) -> Objects:
    """Return the spec for objects of which some keys are decided: `present` have valid values, `absent` never come."""
    properties = tuple((k, TRUE if k in present else FALSE if k in absent else x) for k, x in o.properties)
    missing = (present | absent) - o.table.keys()
    properties += tuple((k, TRUE if k in present else FALSE) for k in sorted(missing))
    exists = tuple(x._replace(names=x.names | present) for x in o.exists)
    return replace(o, properties=properties, required=o.required | present, exists=exists, excluded=frozenset())


# --- arrays


def item(a: Arrays, index: int) -> Expr:
    """Return what the item at an index must be."""
    return a.prefix[index] if index < len(a.prefix) else a.rest


def both_arrays(e: Expressions, a: Arrays, b: Arrays) -> Arrays | None:
    """Return the arrays in both specs; None if the result is seen to be empty."""
    if a is v.ANY_ARRAYS or b is v.ANY_ARRAYS:
        return b if a is v.ANY_ARRAYS else a
    n = max(len(a.prefix), len(b.prefix))
    high = a.high if b.high is None else b.high if a.high is None else min(a.high, b.high)
    return tidy_arrays(
        e,
        Arrays(
            tuple(e.both(item(a, i), item(b, i)) for i in range(n)),
            e.both(a.rest, b.rest),
            max(a.low, b.low),
            high,
            tuple(dict.fromkeys(a.contains + b.contains)),
            a.unique or b.unique,
            a.repeats or b.repeats,
            a.excluded | b.excluded,
        ),
    )


def tidy_arrays(e: Expressions, a: Arrays) -> Arrays | None:
    """Tighten the limits on the number of items; None if the spec is seen to be empty."""
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
        expr = item(a, i)
        if e.is_conjunction(expr) and e.is_empty(expr):
            return None
    prefix = a.prefix if high is None else a.prefix[:high]
    rest = FALSE if high is not None and len(prefix) >= high else a.rest
    contains = tuple(c for c in a.contains if c.low > 0 or c.high is not None)
    return Arrays(prefix, rest, low, high, contains, a.unique, a.repeats, a.excluded)


def not_arrays(e: Expressions, a: Arrays) -> list[Arrays]:
    """Return all other arrays, as a union of specs."""
    out = []
    for i, expr in enumerate(a.prefix):
        if expr != TRUE:
            out.append(Arrays((*([TRUE] * i), e.negate(expr)), low=i + 1))
    if a.rest == FALSE:
        out.append(Arrays(low=len(a.prefix) + 1))
    elif a.rest != TRUE:
        out.append(Arrays(contains=(Contains(len(a.prefix), e.negate(a.rest), 1, None),)))
    if a.low:
        out.append(Arrays(high=a.low - 1))
    if a.high is not None:
        out.append(Arrays(low=a.high + 1))
    for c in a.contains:
        if c.low:
            out.append(Arrays(contains=(Contains(c.start, c.expr, 0, c.low - 1),)))
        if c.high is not None:
            out.append(Arrays(contains=(Contains(c.start, c.expr, c.high + 1, None),)))
    out.extend(s for n in sorted(a.excluded) for s in e.values(e.constants.expr(n)).arrays)
    if a.unique:
        out.append(Arrays() if e.lenient else Arrays(repeats=True))
    if a.repeats:
        out.append(Arrays(unique=True))
    return [t for t in (tidy_arrays(e, x) for x in out) if t is not None]


# --- an array that is read item by item

Counts = tuple[int, ...]  # for each `contains` of a spec, how many items matched it; counted only while it matters


def last_index(a: Arrays) -> int:
    """Return the index from which on all positions of an array are alike."""
    return max(len(a.prefix), a.low, a.high or 0, *[c.start for c in a.contains])


def item_choices(e: Expressions, a: Arrays, index: int, counts: Counts) -> list[tuple[Expr, Counts]]:
    """Return the ways to read the item at `index`: pairs of what it must be, and the counts after it. Empty past the
    last item.

    An item may match a `contains` or not, and both may lead to a valid array: then there are two ways.
    """
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
            ways = [(e.negate(c.expr), count)]
            if count < c.high:
                ways.append((c.expr, count + 1))
        out = [(e.both(expr, x), (*done, n)) for expr, done in out for x, n in ways]
    return [(expr, done) for expr, done in out if not e.is_empty(expr)]


def may_close(a: Arrays, index: int, counts: Counts) -> bool:
    """Tell whether an array with `index` items may end by the limits of its length and `contains`."""
    if index < a.low or not a.contains:
        return index >= a.low
    return all(c.low <= n for c, n in zip(a.contains, counts, strict=True))


def items_needed(e: Expressions, a: Arrays, index: int, counts: Counts) -> int | None:
    """Return the least number of items that must still come before the array may end; None if it never may.

    Searches breadth first over (index, counts).
    """
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
            for _, after in item_choices(e, a, i, n):
                if may_close(a, i + 1, after):
                    return steps
                following.add((min(i + 1, last), after))
        level = following - seen
    return None
