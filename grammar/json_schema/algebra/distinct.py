"""Values that must differ: from excluded values, or from the other items of an array.

There are three questions, for a spec as a whole and for an array or object that is half read:

- Is there a value that is none of these constants? `{"type": "array", "not": {"const": [1, 2]}}` after `[1,`: the next
  item must not be 2 if it is the last one. The constants that the text equals so far are its *rivals*
  (`object_may_differ`, `array_may_differ`).
- What may the next item be, compared with those before it? With `uniqueItems`, it must equal none of them. In the
  negation of `uniqueItems`, some two items must be equal, so sooner or later an item must equal an earlier one
  (`compared`, `can_repeat`).
- Are there enough values left? Three different items cannot all be in `{"enum": [1, 2]}`. And if the second item must
  be 1, the first one must not be 1 (`may_fill`, `spoilers`). To answer this, small sets are written out as lists of
  constants (`all_of`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from math import ceil, lcm

from ramet.grammar import deadline
from ramet.grammar.json_schema.algebra import specs
from ramet.grammar.json_schema.algebra.expressions import Expressions
from ramet.grammar.json_schema.algebra.languages import few_texts, has_few_texts, short_texts
from ramet.grammar.json_schema.algebra.specs import Counts
from ramet.grammar.json_schema.algebra.values import INFINITE, Arrays, Expr, Objects, Strings, Values
from ramet.grammar.regular import numbers as numeric
from ramet.grammar.regular.numbers import Numbers

MANY = 1 << 14  # values; more of them count as infinitely many
_MANY_OBJECTS = 1 << 8  # objects that are made at once, about a millisecond each


# --- is there another value than these?


def object_may_differ(
    e: Expressions, o: Objects, rivals: tuple[int, ...], present: frozenset[str] = frozenset()
) -> bool:
    """Tell whether an object can become one in `o` that is none of `rivals`.

    present: the keys that the object has. Their values satisfy `o`, and are equal in each rival.
    """
    o = specs.with_few_keys(e, o)
    if o.high is None and not o.exists and specs.other_keys_possible(e, o):
        return _has_objects(e, specs.decided(o, present, frozenset()))
    members = e.constants.members
    names = dict.fromkeys([*o.table, *(k for r in rivals for k in members(r))])
    order = [k for k in names if k not in present and not e.is_empty(specs.expr_of_key(e, o, k))]

    def is_possible(chosen: frozenset[str], absent: frozenset[str], extra: int = 0) -> bool:
        spec = specs.decided(o, present, absent)
        low = max(spec.low, len(present | chosen) + extra)
        return _has_objects(e, replace(spec, required=spec.required | chosen, low=low))

    def search(at: int, alike: tuple[int, ...], chosen: frozenset[str], absent: frozenset[str]) -> bool:
        deadline.check()
        if at == len(order):
            alike = tuple(r for r in alike if len(members(r)) == len(present) + len(chosen))
        if not alike:
            return is_possible(chosen, absent)
        if at == len(order):
            return specs.other_keys_possible(e, o) and is_possible(chosen, absent, 1)
        key = order[at]
        with_key = chosen | {key}
        if is_possible(with_key, absent):
            for value, still in e.constants.split(specs.expr_of_key(e, o, key), alike, lambda r: members(r).get(key)):
                if not e.is_empty(value) and search(at + 1, still, with_key, absent):
                    return True
        if key in o.required:
            return False
        return search(at + 1, tuple(r for r in alike if key not in members(r)), chosen, absent | {key})

    return search(0, rivals, frozenset(), frozenset())


def _has_objects(e: Expressions, o: Objects) -> bool:
    return e.cost_of(Values(objects=(o,))) < INFINITE


def array_may_differ(
    e: Expressions, a: Arrays, rivals: tuple[int, ...], index: int = 0, counts: Counts | None = None
) -> bool:
    """Tell whether an array can become one in `a` that is none of `rivals`.

    index: the number of items that it has; each rival begins with these items. counts: of the `contains` so far (see
    specs.py).
    """
    deadline.check()
    items = e.constants.items

    def item_of(rival: int) -> int | None:
        return items(rival)[index] if index < len(items(rival)) else None

    counts = (0,) * len(a.contains) if counts is None else counts
    if specs.may_close(a, index, counts) and not a.repeats and not any(len(items(r)) == index for r in rivals):
        return True
    before = frozenset(items(rivals[0])[:index])  # the items that all rivals have in common
    for choice, after in specs.item_choices(e, a, index, counts):
        for value, rest in compared(e, a, index, after, choice, before):
            for kind, still in e.constants.split(value, rivals, item_of):
                if e.is_empty(kind):
                    continue
                if still:
                    if array_may_differ(e, rest, still, index + 1, after):
                        return True
                elif may_fill(e, rest, index + 1, after, before):
                    return True
    return False


# --- items compared with those before


def compared(
    e: Expressions, a: Arrays, index: int, counts: Counts, value: Expr, seen: frozenset[int]
) -> list[tuple[Expr, Arrays]]:
    """Return the ways to read the item at `index`: pairs of what it must be, and the spec for the items after it.

    value: what the item must be, whatever stands before it. counts: those after the item. seen: the items before it.
    """
    constants = e.constants
    if a.unique:
        return [(constants.without(value, seen | spoilers(e, a, index, counts, seen)), a)]
    if not a.repeats:
        return [(value, a)]
    done = replace(a, repeats=False)
    again = [(e.both(value, constants.expr(n)), done) for n in sorted(seen)]
    new, later = constants.without(value, seen), _later(e, a, index + 1)
    if _may_repeat(e, later, seen):
        return [(new, a), *again]
    return [*((e.both(new, x), a) for x in dict.fromkeys(later)), *again]  # then this is the item that comes again


def can_repeat(e: Expressions, a: Arrays) -> bool:
    """Tell whether an array of this spec can have two equal items."""
    return _may_repeat(e, _later(e, a, 0))


def _may_repeat(e: Expressions, later: list[Expr], seen: Collection[int] = ()) -> bool:
    """Tell whether one of the items to come can equal one of `seen`, or another item to come."""
    known = [e.constants.expr(n) for n in seen]
    return any(not e.is_empty(e.both(x, y)) for i, x in enumerate(later) for y in (*later[:i], *known))


def _later(e: Expressions, a: Arrays, index: int) -> list[Expr]:
    """Return what the items from `index` on may be. If many positions are alike, two of them stand for all."""
    out: list[Expr] = []
    last = max(len(a.prefix), index) + 2
    for i in range(index, last if a.high is None else min(a.high, last)):
        expr = specs.item(a, i)
        if e.is_empty(expr):
            break
        out.append(expr)
    return out


# --- are there enough values?


def may_fill(e: Expressions, a: Arrays, index: int, counts: Counts, used: Collection[int]) -> bool:
    """Tell whether an array that has `index` items can be completed.

    counts: of `contains` so far. used: the items that must not come again, among the first `index` or more.
    """
    if a.contains and specs.items_needed(e, a, index, counts) is None:
        return False
    if not a.unique or a.low <= index:
        return True
    lists = few_choices(e, a, index, a.low - index + len(used))
    taken = set(used)
    if all(x is lists[0] for x in lists):
        return not lists or len(lists) <= len(set(lists[0]) - taken)
    return _may_match(lists, taken)


def few_choices(e: Expressions, a: Arrays, index: int, enough: int) -> list[list[int]]:
    """Return the values of each item that must still come, without the items that have `enough` or more values."""
    lists = []
    enough = min(enough, MANY)
    for expr in a.prefix[index : a.low]:
        found = e.listed(expr, enough)
        if found is not None:
            lists.append(found)
    rest = a.low - max(len(a.prefix), index)
    found = e.listed(a.rest, enough) if rest > 0 else None
    if found is not None:
        lists.extend([found] * min(rest, len(found) + 1))  # with one list more than values, the values run out
    return lists


def _may_match(lists: list[list[int]], taken: set[int]) -> bool:
    """Tell whether one value can be taken from each list, all different and none in `taken` (augmenting paths)."""
    owner: dict[int, int] = {}

    def place(i: int, tried: set[int]) -> bool:
        deadline.check()
        own = [n for n in lists[i] if n not in taken]
        for n in own:
            if n not in owner:
                owner[n] = i
                return True
        for n in own:
            if n not in tried:
                tried.add(n)
                if place(owner[n], tried):
                    owner[n] = i
                    return True
        return False

    return all(place(i, set()) for i in range(len(lists)))


def spoilers(e: Expressions, a: Arrays, index: int, counts: Counts, used: frozenset[int]) -> set[int]:
    """Return the values that the item at `index` must not have, because too few would be left for those after it."""
    if a.low <= index + 1:
        return set()
    candidates = {n for found in few_choices(e, a, index + 1, a.low - index + len(used)) for n in found}
    return {n for n in candidates - used if not may_fill(e, a, index + 1, counts, used | {n})}


def specimens(e: Expressions, expr: Expr, count: int) -> list[int]:
    """Return up to `count` different values of an expression, short ones. If there are fewer, some may be missing."""
    found: dict[int, None] = {}
    a, number = e.values(expr), e.constants.number
    for n in a.numbers:
        for x in numeric.some(n, count - len(found)):
            found[number(("number", x))] = None
    for s in a.strings if len(found) < count else ():
        if s.finite is None:
            low, high = e.languages.bounds(s)
            texts = short_texts(e.languages.base(s._replace(low=0, high=None)), low, high, count + len(s.excluded))
            found |= dict.fromkeys(number(("string", t)) for t in texts if t not in s.excluded)
    for o in a.objects if len(found) < count <= _MANY_OBJECTS else ():
        found |= dict.fromkeys(_different_objects(e, o, count))
    return [*found][:count] if len(found) >= count else e.listed(expr, MANY) or []


def _different_objects(e: Expressions, o: Objects, count: int) -> list[int]:
    """Return up to `count` objects with the keys that must be there, or with one key. They differ in one value."""
    declared = [k for k, expr in o.properties if not e.is_empty(expr)]
    keys = sorted(specs.closure_of_keys(o, o.required)) or declared[:1]
    values = {}
    for key in keys:
        deadline.check()
        values[key] = specimens(e, specs.expr_of_key(e, o, key), count)
        if not values[key]:
            return []
    varied = max(keys, key=lambda k: len(values[k]), default=None)
    if varied is None:
        return []
    rest = {key: found[0] for key, found in values.items()}
    out = [e.constants.number(("object", frozenset({**rest, varied: n}.items()))) for n in values[varied]]
    return [n for n in out if _is_in(e, n, Values(objects=(o,)))]


def free_kinds(e: Expressions, expr: Expr) -> tuple[bool, bool, bool, bool]:
    """Tell for strings, numbers, objects and arrays whether every beginning of a value of this kind can be completed to
    a value that differs from all earlier values. True of a kind that has no values.
    """
    a = e.values(expr)
    return (
        all(s.finite is None and s.high is None and not s.languages for s in a.strings),
        all(replace(n, excluded=frozenset()) == numeric.ANY for n in a.numbers),
        all(
            o.high is None and not o.exists and specs.other_keys_possible(e, specs.with_few_keys(e, o))
            for o in a.objects
        ),
        all(not (r.contains or r.unique) and is_endless(e, r) for r in a.arrays),
    )


def has_free_kind(e: Expressions, expr: Expr) -> bool:
    """Tell whether there is a kind of values of which any beginning can be completed, so that values never run out."""
    a = e.values(expr)
    parts = (a.strings, a.numbers, a.objects, a.arrays)
    return any(part and is_free for part, is_free in zip(parts, free_kinds(e, expr), strict=True))


def all_of(e: Expressions, a: Values, enough: int) -> list[int] | None:
    """Return all values of a set, as numbers of constants; None if there are `enough` of them or more."""
    number = e.constants.number
    out: dict[int, None] = {}
    if a.null:
        out[number(("null", None))] = None
    for bit, value in ((2, True), (1, False)):
        if a.booleans & bit:
            out[number(("bool", value))] = None
    parts: Iterator[list[int] | None] = chain(
        (_listed_numbers(e, n, enough) for n in a.numbers),
        (_listed_strings(e, s, enough) for s in a.strings),
        (_listed_arrays(e, r, enough) for r in a.arrays),
        (_listed_objects(e, o, enough) for o in a.objects),
    )
    for found in parts:
        if found is None:
            return None
        out.update(dict.fromkeys(found))
        if len(out) >= enough:
            return None
    return list(out)


def _listed_numbers(e: Expressions, n: Numbers, enough: int) -> list[int] | None:
    if n.finite is not None:
        values = sorted(n.finite)
    else:
        steps = [m for m, wanted in n.multiples if wanted] + ([Fraction(1)] if n.integer else [])
        if n.low is None or n.high is None or not steps:
            return None
        common = lcm(*(s.denominator for s in steps))
        step = Fraction(lcm(*(int(s * common) for s in steps)), common)
        values, at = [], ceil(n.low / step) * step
        while at <= n.high and len(values) < enough:
            deadline.check()
            if n.contains(at):
                values.append(at)
            at += step
    return None if len(values) >= enough else [e.constants.number(("number", x)) for x in values]


def _listed_strings(e: Expressions, s: Strings, enough: int) -> list[int] | None:
    if s.finite is None:
        low, high = e.languages.bounds(s)
        if not s.languages and high != 0:
            return None
        dfa = e.languages.base(s._replace(low=0, high=None))
        if not has_few_texts(dfa, low, high, enough + len(s.excluded)):
            return None
        texts = [t for t in few_texts(dfa, low, high, enough + len(s.excluded)) if t not in s.excluded]
    else:
        texts = sorted(s.finite)
    return None if len(texts) >= enough else [e.constants.number(("string", t)) for t in texts]


def _listed_objects(e: Expressions, o: Objects, enough: int) -> list[int] | None:
    if not _has_objects(e, o):
        return []
    o = specs.with_few_keys(e, o)
    if (o.high is None or len(specs.closure_of_keys(o, o.required)) < o.high) and specs.other_keys_possible(e, o):
        return None
    partial: list[dict[str, int]] = [{}]
    absent: list[frozenset[str]] = [frozenset()]
    for key, expr in o.properties:
        if e.is_empty(expr):
            continue
        values = e.listed(expr, enough)
        following: list[tuple[dict[str, int], frozenset[str]]] = []
        for members, without in zip(partial, absent, strict=True):
            deadline.check()
            chosen = frozenset(members)
            if _has_objects(e, specs.decided(o, chosen | {key}, without)):
                if values is None:
                    return None
                following.extend(({**members, key: n}, without) for n in values)
            if key not in o.required and _has_objects(e, specs.decided(o, chosen, without | {key})):
                following.append((members, without | {key}))
            if len(following) >= enough + len(o.excluded) and not o.exists:
                return None  # each can be completed
        partial, absent = [m for m, _ in following], [x for _, x in following]
    found = [e.constants.number(("object", frozenset(m.items()))) for m in partial]
    found = [n for n in found if n not in o.excluded and (not o.exists or _is_in(e, n, Values(objects=(o,))))]
    return None if len(found) >= enough else found


def _listed_arrays(e: Expressions, a: Arrays, enough: int) -> list[int] | None:
    if e.cost_of(Values(arrays=(a,))) >= INFINITE:
        return []
    if not a.unique and is_endless(e, a, enough):
        return None
    found: list[int] = []
    level: dict[tuple[tuple[int, ...], tuple[int, ...]], None] = {((), (0,) * len(a.contains)): None}
    index = 0
    while level:
        following: dict[tuple[tuple[int, ...], tuple[int, ...]], None] = {}
        for items, counts in level:
            deadline.check()
            if specs.may_close(a, index, counts):
                found.append(e.constants.number(("array", items)))
            for choice, after in specs.item_choices(e, a, index, counts):
                value = e.constants.without(choice, items) if a.unique else choice
                if e.is_empty(value) or not may_fill(e, a, index + 1, after, items):
                    continue
                values = e.listed(value, enough)
                if values is None:
                    return None
                following.update(
                    dict.fromkeys(((*items, n), after) for n in values if may_fill(e, a, index + 1, after, (*items, n)))
                )
        found = [n for n in dict.fromkeys(found) if n not in a.excluded]
        if max(len(found), len(following) if not a.contains else 0) >= enough + len(a.excluded):
            return None
        level, index = following, index + 1
    return None if len(found) >= enough else found


def is_endless(e: Expressions, a: Arrays, enough: int | None = None) -> bool:
    """Tell whether any number of items may follow; with `enough`, whether that many may."""
    if a.high is not None and (enough is None or a.high - max(a.low, len(a.prefix)) < enough):
        return False
    return not any(map(e.is_empty, (*a.prefix, a.rest)))


def _is_in(e: Expressions, number: int, values: Values) -> bool:
    return not e.values_are_empty(e.intersect(e.values(e.constants.expr(number)), values))
