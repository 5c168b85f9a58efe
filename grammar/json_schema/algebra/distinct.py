"""Items that must differ: constants taken out of what an expression allows, and whether enough values are left.

Constants are what was read, as hashable values: ("string", text), ("number", Fraction), ("bool", b), ("null", None),
("array", numbers of the items), ("object", {(key, number of its value)}). `Constants` numbers them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from math import ceil, lcm
from typing import TYPE_CHECKING, Any

from ramet.grammar import deadline
from ramet.grammar.json_schema.algebra import costs, specs
from ramet.grammar.json_schema.algebra import values as v
from ramet.grammar.json_schema.algebra.languages import few_texts, has_few_texts
from ramet.grammar.json_schema.algebra.values import FALSE, TRUE, Arrays, Const, Expr, Objects, Strings, Values
from ramet.grammar.regular import numbers as numeric
from ramet.grammar.regular.numbers import Numbers

if TYPE_CHECKING:
    from ramet.grammar.json_schema.algebra.expressions import Expressions

MANY = 1 << 14  # values: more are not told apart from infinitely many


class Constants:
    """All constants met, numbered; and the expressions of single ones."""

    def __init__(self, expressions: Expressions) -> None:
        self.expressions = expressions
        self.all: list[Const] = []
        self._index: dict[Const, int] = {}
        self._exprs: dict[int, Expr] = {}
        self._members: dict[int, dict[str, int]] = {}

    def number(self, const: Const) -> int:
        found = self._index.get(const)
        if found is None:
            found = self._index[const] = len(self.all)
            self.all.append(const)
        return found

    def members(self, number: int) -> dict[str, int]:
        """Key -> number of its value, of an object."""
        found = self._members.get(number)
        if found is None:
            found = self._members[number] = dict(self.all[number][1])
        return found

    def items(self, number: int) -> tuple[int, ...]:
        """Numbers of the items of an array."""
        items: tuple[int, ...] = self.all[number][1]
        return items

    def expr(self, number: int) -> Expr:
        """Exactly this value."""
        found = self._exprs.get(number)
        if found is None:
            found = self._exprs[number] = self.expressions.of_values(self._values(number))
        return found

    def _values(self, number: int) -> Values:
        kind, value = self.all[number]
        match kind:
            case "string":
                return Values(strings=(Strings(finite=frozenset((value,))),))
            case "number":
                return Values(numbers=(Numbers(finite=frozenset((value,))),))
            case "bool":
                return Values(booleans=2 if value else 1)
            case "array":
                items = tuple(map(self.expr, value))
                return Values(arrays=(Arrays(items, FALSE, len(items), len(items)),))
            case "object":
                properties = tuple((k, self.expr(n)) for k, n in sorted(value))
                return Values(objects=(Objects(properties, FALSE, required=frozenset(k for k, _ in value)),))
            case _:
                return Values(null=True)

    def all_but(self, numbers: Iterable[int]) -> Values:
        """All values but these."""
        of_kind: dict[str, set[Any]] = {k: set() for k in ("string", "number", "bool", "null", "array", "object")}
        for n in numbers:
            kind, value = self.all[n]
            of_kind[kind].add(n if kind in ("array", "object") else value)
        texts, fractions = frozenset(of_kind["string"]), frozenset(of_kind["number"])
        objects, arrays = frozenset(of_kind["object"]), frozenset(of_kind["array"])
        return Values(
            not of_kind["null"],
            3 & ~sum(2 if b else 1 for b in of_kind["bool"]),
            (Numbers(excluded=fractions) if fractions else numeric.ANY,),
            (Strings(excluded=texts) if texts else v.ANY_STRINGS,),
            (Objects(excluded=objects) if objects else v.ANY_OBJECTS,),
            (Arrays(excluded=arrays) if arrays else v.ANY_ARRAYS,),
        )

    def without(self, expr: Expr, numbers: Collection[int]) -> Expr:
        """The values of an expression but these."""
        if not numbers:
            return expr
        return self.expressions.both(expr, self.expressions.of_values(self.all_but(numbers)))

    def split(
        self, expr: Expr, rivals: tuple[int, ...], part: Callable[[int], int | None]
    ) -> Iterator[tuple[Expr, tuple[int, ...]]]:
        """The ways that a value in `expr` can continue or end the likeness to `rivals`, of each of which `part` is the
        value in this place: (what the value must be, the rivals that are still alike)."""
        alike: dict[int, list[int]] = {}
        for r in rivals:
            p = part(r)
            if p is not None:
                alike.setdefault(p, []).append(r)
        yield self.without(expr, alike.keys()), ()
        for p, still in alike.items():
            yield self.expressions.both(expr, self.expr(p)), tuple(still)


# --- is there another value than these?


def object_may_differ(
    e: Expressions, o: Objects, rivals: tuple[int, ...], present: frozenset[str] = frozenset()
) -> bool:
    """Can an object with the keys `present`, so far like each of `rivals`, become one in `o` that is none of them?"""
    o = with_few_keys(e, o)
    if o.high is None and not o.exists and costs.other_keys_possible(e, o):
        return costs.of_object(e, _decided(o, present, frozenset())) < v.INFINITE
    members = e.constants.members
    names = dict.fromkeys([*o.table, *(k for r in rivals for k in members(r))])
    order = [k for k in names if k not in present and not e.is_empty(specs.expr_of_key(e, o, k))]

    def is_possible(chosen: frozenset[str], absent: frozenset[str], extra: int = 0) -> bool:
        spec = _decided(o, present, absent)
        low = max(spec.low, len(present | chosen) + extra)
        return costs.of_object(e, replace(spec, required=spec.required | chosen, low=low)) < v.INFINITE

    def search(at: int, alike: tuple[int, ...], chosen: frozenset[str], absent: frozenset[str]) -> bool:
        deadline.check()
        if at == len(order):
            alike = tuple(r for r in alike if len(members(r)) == len(present) + len(chosen))
        if not alike:
            return is_possible(chosen, absent)
        if at == len(order):
            return costs.other_keys_possible(e, o) and is_possible(chosen, absent, 1)
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


def without_excluded(e: Expressions, o: Objects) -> Objects:
    """The spec without its `excluded`, all keys of those declared."""
    names = {k: None for n in sorted(o.excluded) for k in sorted(e.constants.members(n))}
    return replace(_declaring(e, o, names), excluded=frozenset())


def with_few_keys(e: Expressions, o: Objects) -> Objects:
    """The same, the keys of languages that have few texts declared."""
    numbers = o.languages
    few = e.languages.few_of_signature
    names = {k: None for s in e.languages.signatures(numbers)[1] for k in few(numbers, s) or ()} if numbers else {}
    return _declaring(e, o, names)


def _declaring(e: Expressions, o: Objects, names: Iterable[str]) -> Objects:
    missing = [k for k in names if k not in o.table]
    if not missing:
        return o
    return replace(o, properties=o.properties + tuple((k, specs.expr_of_key(e, o, k)) for k in missing))


def _decided(o: Objects, present: frozenset[str], absent: frozenset[str]) -> Objects:
    """The spec, for objects that have some keys, whose values are good, and never get others."""
    properties = tuple((k, TRUE if k in present else FALSE if k in absent else x) for k, x in o.properties)
    missing = (present | absent) - o.table.keys()
    properties += tuple((k, TRUE if k in present else FALSE) for k in sorted(missing))
    exists = tuple(x._replace(names=x.names | present) for x in o.exists)
    return replace(o, properties=properties, required=o.required | present, exists=exists, excluded=frozenset())


def array_may_differ(
    e: Expressions, a: Arrays, rivals: tuple[int, ...], index: int = 0, counts: tuple[int, ...] | None = None
) -> bool:
    """Can an array with `index` items, so far like each of `rivals`, become one in `a` that is none of them?"""
    deadline.check()
    items = e.constants.items

    def item_of(rival: int) -> int | None:
        return items(rival)[index] if index < len(items(rival)) else None

    counts = (0,) * len(a.contains) if counts is None else counts
    if specs.may_close(a, index, counts) and not a.repeats and not any(len(items(r)) == index for r in rivals):
        return True
    before = frozenset(items(rivals[0])[:index])  # what all have in common
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
    e: Expressions, a: Arrays, index: int, counts: tuple[int, ...], value: Expr, seen: frozenset[int]
) -> list[tuple[Expr, Arrays]]:
    """What the item at `index`, in `value`, must be, compared with the items before it; and the spec from then on.
    counts: those of `contains` after the item."""
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
    return [*((e.both(new, x), a) for x in dict.fromkeys(later)), *again]  # then it is this item that comes again


def can_repeat(e: Expressions, a: Arrays) -> bool:
    """Can an array have two equal items?"""
    return _may_repeat(e, _later(e, a, 0))


def _may_repeat(e: Expressions, later: list[Expr], seen: Collection[int] = ()) -> bool:
    """Can an item to come equal one of `seen`, or another one to come?"""
    known = [e.constants.expr(n) for n in seen]
    return any(not e.is_empty(e.both(x, y)) for i, x in enumerate(later) for y in (*later[:i], *known))


def _later(e: Expressions, a: Arrays, index: int) -> list[Expr]:
    """What the items from `index` on may be; of many alike, two."""
    out: list[Expr] = []
    last = max(len(a.prefix), index) + 2
    for i in range(index, last if a.high is None else min(a.high, last)):
        expr = specs.item(a, i)
        if e.is_empty(expr):
            break
        out.append(expr)
    return out


# --- are there enough values?


def may_fill(e: Expressions, a: Arrays, index: int, counts: tuple[int, ...], used: Collection[int]) -> bool:
    """Can an array with `index` items, among them `used`, be completed?"""
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
    """The values of each item that must still come, where they are fewer than `enough`."""
    lists = []
    enough = min(enough, MANY)
    for expr in a.prefix[index : a.low]:
        found = listed(e, expr, enough)
        if found is not None:
            lists.append(found)
    rest = a.low - max(len(a.prefix), index)
    found = listed(e, a.rest, enough) if rest > 0 else None
    if found is not None:
        lists.extend([found] * min(rest, len(found) + 1))  # one more than there are values shows that they run out
    return lists


def _may_match(lists: list[list[int]], taken: set[int]) -> bool:
    """Can one value be taken from each list, all different and none of `taken`? (Augmenting paths.)"""
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


def spoilers(e: Expressions, a: Arrays, index: int, counts: tuple[int, ...], used: frozenset[int]) -> set[int]:
    """Values that the item at `index` must not have, for then too few would be left for those after it."""
    if a.low <= index + 1:
        return set()
    candidates = {n for found in few_choices(e, a, index + 1, a.low - index + len(used)) for n in found}
    return {n for n in candidates - used if not may_fill(e, a, index + 1, counts, used | {n})}


def is_free(e: Expressions, expr: Expr) -> bool:
    """True where no text can be stuck because of what came before: whatever is like it so far can go on to differ."""
    a = e.values(expr)
    return (
        all(s.finite is None and s.high is None and not s.languages for s in a.strings)
        and all(replace(n, excluded=frozenset()) == numeric.ANY for n in a.numbers)
        and all(
            o.high is None and not o.exists and costs.other_keys_possible(e, with_few_keys(e, o)) for o in a.objects
        )
        and all(not (r.contains or r.unique) and is_endless(e, r) for r in a.arrays)
    )


def listed(e: Expressions, expr: Expr, enough: int) -> list[int] | None:
    """All values; None where there are `enough` of them, or more."""
    limit, found = e.listed.get(expr, (0, None))
    if found is not None or limit >= enough:
        return found
    if expr in e.listing:
        return None  # it can hold itself, over and over
    e.listing.add(expr)
    try:
        found = _listed(e, e.values(expr), enough)
    finally:
        e.listing.discard(expr)
    e.listed[expr] = enough, found
    return found


def _listed(e: Expressions, a: Values, enough: int) -> list[int] | None:
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
    if costs.of_object(e, o) >= v.INFINITE:
        return []
    o = with_few_keys(e, o)
    if (o.high is None or len(costs.closure_of_keys(o, o.required)) < o.high) and costs.other_keys_possible(e, o):
        return None
    partial: list[dict[str, int]] = [{}]
    absent: list[frozenset[str]] = [frozenset()]
    for key, expr in o.properties:
        if e.is_empty(expr):
            continue
        values = listed(e, expr, enough)
        following: list[tuple[dict[str, int], frozenset[str]]] = []
        for members, without in zip(partial, absent, strict=True):
            deadline.check()
            chosen = frozenset(members)
            if costs.of_object(e, _decided(o, chosen | {key}, without)) < v.INFINITE:
                if values is None:
                    return None
                following.extend(({**members, key: n}, without) for n in values)
            if key not in o.required and costs.of_object(e, _decided(o, chosen, without | {key})) < v.INFINITE:
                following.append((members, without | {key}))
            if len(following) >= enough + len(o.excluded) and not o.exists:
                return None  # each can be completed
        partial, absent = [m for m, _ in following], [x for _, x in following]
    found = [e.constants.number(("object", frozenset(m.items()))) for m in partial]
    found = [n for n in found if n not in o.excluded and (not o.exists or _is_in(e, n, Values(objects=(o,))))]
    return None if len(found) >= enough else found


def _listed_arrays(e: Expressions, a: Arrays, enough: int) -> list[int] | None:
    if costs.of_array(e, a) >= v.INFINITE:
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
                values = listed(e, value, enough)
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
    """May more and more items come, `enough` of them at least?"""
    if a.high is not None and (enough is None or a.high - max(a.low, len(a.prefix)) < enough):
        return False
    return not any(map(e.is_empty, (*a.prefix, a.rest)))


def _is_in(e: Expressions, number: int, values: Values) -> bool:
    return not e.values_are_empty(e.intersect(e.values(e.constants.expr(number)), values))
