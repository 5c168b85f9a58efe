"""JSON values on the machine: frames for values, strings, numbers and literals.

Several expressions are followed at once over the same value, each as a *tag*; when the value ends, the set of tags that it
satisfies (a bit mask, never 0) is handed to the context, which goes on with those alternatives that it still allows. So
`anyOf` and its kin are deterministic: one configuration, whatever the number of alternatives.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ramet.grammar import ir, numeric, regular, strings, walker
from ramet.grammar.automaton import (
    CONCRETE,
    DEAD,
    REFUSE,
    Machine,
    Table,
    compress_rows,
    leave,
    path_to_exit,
    target,
)
from ramet.grammar.json_schema import values as v
from ramet.grammar.json_schema.expressions import INFINITE, Expressions, Languages
from ramet.grammar.json_schema.values import Expr, Strings, Values
from ramet.grammar.numeric import Numbers
from ramet.grammar.regular import Dfa

CHUNK = 64  # characters that one table of a counted string holds
_OBJECT, _ARRAY, _STRING, _NUMBER, _TRUE, _FALSE, _NULL = range(7)
_LITERALS = {_TRUE: b"rue", _FALSE: b"alse", _NULL: b"ull"}
_VALUE_STARTS = b'{["-0123456789tfn'


class Context(Protocol):
    """What follows a value. `number` identifies it. remembers: it must be told which scalar the value was."""

    number: int
    remembers: bool
    is_anonymous: bool  # remembers, but does not know some earlier value

    def resume(self, mask: int, value: object | None) -> int:
        """Return the target after a value that satisfies the tags in `mask`.

        value: ("string", text), ("number", Fraction), ("bool", b), ("null", None); None where it is not known or none of these.
        """

    def rest(self, tag: int) -> int:
        """About the bytes that must follow a value that satisfies this tag, to the end of the text."""


@cache
def dispatch_rows(spaced: bool) -> NDArray[np.int32]:
    """States: 0 before the colon, 1 where one space may stand, 2 at the value's first byte. Exits: by kind of value."""
    rows = np.full((3, 256), REFUSE, dtype=np.int32)
    rows[0, ord(":")] = 1
    for state in (1, 2):
        for byte, kind in (
            (b"{", _OBJECT),
            (b"[", _ARRAY),
            (b'"', _STRING),
            (b"t", _TRUE),
            (b"f", _FALSE),
            (b"n", _NULL),
        ):
            rows[state, byte[0]] = leave(kind)
        for byte in b"-0123456789":
            rows[state, byte] = leave(_NUMBER, again=True)
    if spaced:
        rows[1, ord(" ")] = 2
    return rows


@cache
def literal_rows(text: bytes) -> NDArray[np.int32]:
    rows = np.full((len(text), 256), REFUSE, dtype=np.int32)
    for i, byte in enumerate(text):
        rows[i, byte] = i + 1 if i + 1 < len(text) else leave(0)
    return rows


@cache
def _compressed(make: Callable[..., NDArray[np.int32]], arguments: tuple[object, ...]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    return compress_rows(make(*arguments))


@dataclass(frozen=True, slots=True, eq=False)
class StringRows:
    """The table of a string's content before it is on a machine; see Table for depths and loop."""

    rows: NDArray[np.int32]
    byte_class: NDArray[np.uint8]
    depths: NDArray[np.int32]
    loop: int

    @staticmethod
    def of(content: strings.Content) -> StringRows:
        return StringRows.compressed(*compress_rows(content.rows), content.num_content, content.beyond)

    @staticmethod
    def compressed(
        rows: NDArray[np.int32], byte_class: NDArray[np.uint8], num_content: int, beyond: NDArray[np.int64]
    ) -> StringRows:
        depths = np.zeros((4, len(rows)), dtype=np.int32)
        loop = -1
        if num_content:
            safe = np.unique(byte_class[_PLAIN]).astype(np.int64)
            word = np.unique(byte_class[_WORD]).astype(np.int64)
            walker.safe_depths(rows, num_content, safe, word, beyond, depths)
            # a trie over any string ends with the rows of any string; elsewhere the start may be the loop
            for q in {0, num_content - 1}:
                if beyond[q] == q and (rows[q, safe] == q).all():
                    loop = q
        return StringRows(rows, byte_class, depths, loop)


    @staticmethod
    def of_trie(rows: NDArray[np.int32], byte_class: NDArray[np.uint8], num_content: int) -> StringRows:
        """As `compressed`, for what strings.plain_trie gives: over any string all plain text may follow everywhere."""
        depths = np.zeros((4, len(rows)), dtype=np.int32)
        depths[:, :num_content] = walker.MANY
        return StringRows(rows, byte_class, depths, num_content - 1)


@cache
def _free_string() -> StringRows:
    return StringRows.of(strings.free_string_rows())


@cache
def _counted_string(closable: bool, last: bool) -> StringRows:
    return StringRows.of(strings.counted_rows(CHUNK, closable, last))


@lru_cache(maxsize=1024)
def _string_rows(
    specs: tuple[tuple[Strings, ...], ...], sources: tuple[tuple[int, str, str], ...], max_states: int
) -> tuple[StringRows, tuple[int, ...]]:
    """(rows, mask of tags of each exit). sources: (number, kind, source) of the languages that the specs name."""
    languages = Languages(max_states)
    number = {n: languages.add(kind, source) for n, kind, source in sources}
    specs = tuple(
        tuple(s._replace(languages=frozenset((number[n], wanted) for n, wanted in s.languages)) for s in tag) for tag in specs
    )
    entries: dict[str, int] = {}
    for tag in specs:
        for s in tag:
            entries.update(dict.fromkeys(s.finite or (), 0))
            entries.update(dict.fromkeys(s.excluded, 0))
    for text in entries:
        entries[text] = sum(1 << i for i, tag in enumerate(specs) if any(languages.contains(s, text) for s in tag))
    bases = [[s._replace(excluded=frozenset()) for s in tag if s.finite is None] for tag in specs]
    masks: list[int] = []

    def exit_of(mask: int) -> int:
        if not mask:
            return -1
        if mask not in masks:
            masks.append(mask)
        return masks.index(mask)

    base = None
    if any(bases):
        dfa = _tagged([regular.union([languages.base(s) for s in b]) if b else None for b in bases])
        base = strings.json_string_rows(dfa, [exit_of(int(a)) for a in dfa.accepting])
    exits = {text: exit_of(mask) for text, mask in entries.items()}
    if base is None:
        plain = strings.plain_trie(None, {t: e for t, e in exits.items() if e >= 0})
        if plain is not None:
            return StringRows.of_trie(*plain), tuple(masks)
    content = overlay(base, exits)
    strings.trim(content.rows)
    return StringRows.of(content), tuple(masks)


@lru_cache(maxsize=1024)
def _number_rows(
    specs: tuple[tuple[Numbers, ...], ...],
) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int32], tuple[int, ...]]:
    """(rows, byte classes, exit where the number may end, mask of tags of each exit)."""
    dfa = _tagged([regular.union([numeric.automaton(n) for n in tag]) if tag else None for tag in specs])
    masks = sorted({int(a) for a in dfa.accepting if a})
    ends = np.array([masks.index(int(a)) if a else -1 for a in dfa.accepting], dtype=np.int32)
    wide = regular.byte_table(dfa)
    for state in np.flatnonzero(ends >= 0).tolist():
        row = wide[state]
        row[row < 0] = leave(int(ends[state]), again=True)
    return *compress_rows(wide), ends, tuple(masks)


def _tagged(parts: list[Dfa | None]) -> Dfa:
    """One automaton whose `accepting` is the mask of the parts that accept."""
    present = [(i, d) for i, d in enumerate(parts) if d is not None]

    def mask(accepts: tuple[bool, ...]) -> int:
        return sum(1 << i for (i, _), a in zip(present, accepts, strict=True) if a)

    if len(present) == 1:
        i, d = present[0]
        return Dfa(d.max_symbol, d.starts, d.classes, d.num_classes, d.transitions, [int(bool(a)) << i for a in d.accepting])
    return regular.product([d for _, d in present], mask)


class Json:
    """Everything that the frames of one compiled schema share."""

    def __init__(self, machine: Machine, expressions: Expressions, *, spaced: bool, ordered: bool) -> None:
        self.machine = machine
        self.expressions = expressions
        self.spaced = spaced
        self.ordered = ordered
        self._tables: dict[object, tuple[Table, tuple[int, ...]]] = {}
        self.dispatch = self.constant_table(dispatch_rows, (spaced,), 7)
        self.contexts = 0
        # interned by content; typed loosely because the modules of objects and arrays build on this one
        self.property_contexts: dict[object, Any] = {}
        self.object_nodes: dict[object, Any] = {}
        self.array_nodes: dict[object, Any] = {}
        self.spaces: dict[object, Any] = {}

    def constant_table(self, make: Callable[..., NDArray[np.int32]], arguments: tuple[object, ...], num_exits: int) -> Table:
        """The table whose wide rows are make(*arguments), which do not depend on the schema."""
        found = self._tables.get((make, arguments))
        if found is None:
            rows, byte_class = _compressed(make, arguments)
            found = self._tables[make, arguments] = self.machine.table(rows, byte_class, num_exits, None), ()
        return found[0]

    def new_number(self) -> int:
        self.contexts += 1
        return self.contexts

    def table(self, wide: NDArray[np.int32], num_exits: int, end_exits: NDArray[np.int32] | None = None) -> Table:
        rows, byte_class = compress_rows(wide)
        return self.machine.table(rows, byte_class, num_exits, end_exits)

    def string_frame(self, rows: StringRows, num_exits: int) -> Table:
        """Put the table of a string's content on the machine."""
        return self.machine.table(rows.rows, rows.byte_class, num_exits, None, rows.depths, rows.loop)

    def value(self, exprs: tuple[Expr, ...], context: Context, local: int) -> int:
        """Target at a value: local 0 before its colon, 1 where a space may stand, 2 at its first byte."""
        key = ("value", exprs, context.number)
        return target(self.machine.intern(key, lambda: ValueFrame(self, exprs, context)), local)

    # --- tables of scalars

    def string_table(self, specs: tuple[tuple[Strings, ...], ...]) -> tuple[Table, tuple[int, ...]]:
        """Table of the strings of each tag, and the mask of tags of each exit."""
        found = self._tables.get(specs)
        if found is None:
            if specs == ((v.ANY_STRINGS,),):
                rows, masks = _free_string(), (1,)
            else:
                languages = self.expressions.languages
                used = tuple({n for tag in specs for s in tag for n, _ in s.languages})
                rows, masks = _string_rows(
                    specs, tuple((n, *languages.sources[n]) for n in sorted(used)), languages.max_states
                )
            found = self._tables[specs] = self.string_frame(rows, max(len(masks), 1)), masks
        return found

    def number_table(self, specs: tuple[tuple[Numbers, ...], ...]) -> tuple[Table, tuple[int, ...]]:
        found = self._tables.get(specs)
        if found is None:
            rows, byte_class, ends, masks = _number_rows(specs)
            found = self._tables[specs] = self.machine.table(rows, byte_class, max(len(masks), 1), ends), masks
        return found

    def counted(self, low: int, high: int | None, context: Context) -> int:
        """Target inside a string that takes low..high more characters and nothing else is asked of."""
        if low > 0:
            n = min(low, CHUNK)
            key: tuple[object, ...] = ("count", "must", low - n, None if high is None else high - n, context.number)
            rest = (low - n, None if high is None else high - n)
            make = self._chunk(False, False)
        elif high is None:
            return self.string((_ANY_STRINGS,), context)
        elif high > CHUNK:
            n, rest = CHUNK, (0, high - CHUNK)
            key = ("count", "may", *rest, context.number)
            make = self._chunk(True, False)
        else:
            n, rest = high, (0, 0)
            key = ("count", "last", context.number)
            make = self._chunk(True, True)
        kind = RememberingCount if context.remembers else CountFrame
        return target(self.machine.intern(key, lambda: kind(self, make, rest, context)), CHUNK - n)

    def _chunk(self, closable: bool, last: bool) -> Table:
        key = ("chunk", closable, last)
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = self.string_frame(_counted_string(closable, last), 2), ()
        return found[0]

    def string(self, specs: tuple[tuple[Strings, ...], ...], context: Context) -> int:
        if len(specs) == 1 and len(specs[0]) == 1:
            s = specs[0][0]
            if s is not v.ANY_STRINGS and s != v.ANY_STRINGS and not (s.languages or s.excluded) and s.finite is None:
                return self.counted(s.low, s.high, context)
        kind = RememberingString if context.remembers else StringFrame
        return target(self.machine.intern(("string", specs, context.number), lambda: kind(self, specs, context)))


_ANY_STRINGS = (v.ANY_STRINGS,)
_WORD = np.array([b for b in range(0x30, 0x7B) if chr(b).isalnum()])
_PLAIN = np.array([b for b in range(0x20, 0x7F) if b not in b'"\\'])


class ValueFrame:
    """The first byte of a value decides its kind."""

    def __init__(self, json: Json, exprs: tuple[Expr, ...], context: Context) -> None:
        self.json = json
        self.table = json.dispatch
        self.exprs = exprs
        self.context = context
        self.is_known = False

    def values(self) -> list[Values]:
        return [self.json.expressions.values(e) for e in self.exprs]

    def resolve(self, exit_index: int) -> int:
        expressions = self.json.expressions
        if not self.is_known:
            # kinds of value that cannot stand here: a walk meets them all, so they are noted at once
            self.is_known = True
            possible = 0
            for e in self.exprs:
                possible |= expressions.kinds(e)
            machine = self.json.machine
            at = machine.interned[("value", self.exprs, self.context.number)]
            machine.mark_dead(at, [k for k in range(7) if not (possible >> k) & 1 and k != exit_index])
            if not (possible >> exit_index) & 1:
                return DEAD
        values = self.values()
        if exit_index == _STRING:
            specs = tuple(a.strings for a in values)
            return self.json.string(specs, self.context) if any(specs) else DEAD
        if exit_index == _NUMBER:
            return self.number(tuple(a.numbers for a in values))
        if exit_index == _OBJECT:
            from ramet.grammar.json_schema.objects import open_object

            return open_object(self.json, [a.objects for a in values], self.context)
        if exit_index == _ARRAY:
            from ramet.grammar.json_schema.arrays import open_array

            return open_array(self.json, [a.arrays for a in values], self.context)
        mask = sum(1 << i for i, a in enumerate(values) if _allows(a, exit_index))
        if not mask:
            return DEAD
        key = ("literal", exit_index, mask, self.context.number)
        machine = self.json.machine
        return target(machine.intern(key, lambda: LiteralFrame(self.json, exit_index, mask, self.context)))

    def number(self, specs: tuple[tuple[Numbers, ...], ...]) -> int:
        if not any(specs):
            return DEAD
        kind = RememberingNumber if self.context.remembers else NumberFrame
        key = ("number", specs, self.context.number)
        return target(self.json.machine.intern(key, lambda: kind(self.json, specs, self.context)))

    def closing_exit(self, local: int) -> int:
        """The kind of value that is shortest to finish, with all that follows."""
        expressions, machine = self.json.expressions, self.json.machine
        at = machine.interned[("value", self.exprs, self.context.number)]
        ways = []
        for tag, a in enumerate(self.values()):
            costs = {
                _NULL: 4 if a.null else INFINITE,
                _TRUE: 4 if a.booleans & 2 else INFINITE,
                _FALSE: 5 if a.booleans & 1 else INFINITE,
                _NUMBER: 3 if a.numbers else INFINITE,
                _STRING: expressions.cost_of_values(Values(strings=a.strings)) if a.strings else INFINITE,
                _ARRAY: min((expressions.cost_of_array(r) for r in a.arrays), default=INFINITE),
                _OBJECT: min((expressions.cost_of_object(o) for o in a.objects), default=INFINITE),
            }
            rest = self.context.rest(tag)
            ways.extend((cost + rest, kind) for kind, cost in costs.items() if cost < INFINITE)
        return next(kind for _, kind in sorted(ways) if machine.exit_target(at, kind) >= 0)


def _allows(a: Values, kind: int) -> bool:
    return a.null if kind == _NULL else bool(a.booleans & (2 if kind == _TRUE else 1))


class LiteralFrame:
    """The rest of true, false or null."""

    def __init__(self, json: Json, kind: int, mask: int, context: Context) -> None:
        self.table = json.constant_table(literal_rows, (_LITERALS[kind],), 1)
        self.value = {_TRUE: ("bool", True), _FALSE: ("bool", False), _NULL: ("null", None)}[kind]
        self.mask = mask
        self.context = context

    def resolve(self, exit_index: int) -> int:
        return self.context.resume(self.mask, self.value)

    def closing_exit(self, local: int) -> int:
        return 0


def rest_of(context: Context, mask: int) -> int:
    """The least that follows any of these tags."""
    return min(context.rest(tag) for tag in range(mask.bit_length()) if (mask >> tag) & 1)


class _Scalar:
    """Common to strings and numbers: exits are masks of tags."""

    table: Table
    masks: tuple[int, ...]
    context: Context
    text = b""

    def resolve(self, exit_index: int) -> int:
        if self.context.is_anonymous:
            return CONCRETE
        return self.context.resume(self.masks[exit_index], None)

    def closing_exit(self, local: int) -> int:
        ways = []
        for exit_index, mask in enumerate(self.masks):
            way = path_to_exit(self.table, exit_index, local)
            if way is not None:
                ways.append((len(way) + rest_of(self.context, mask), exit_index))
        return min(ways)[1]


class StringFrame(_Scalar):
    def __init__(self, json: Json, specs: tuple[tuple[Strings, ...], ...], context: Context) -> None:
        self.json = json
        self.table, self.masks = json.string_table(specs)
        self.key: tuple[object, ...] = ("string", specs, context.number)
        self.context = context


class NumberFrame(_Scalar):
    def __init__(self, json: Json, specs: tuple[tuple[Numbers, ...], ...], context: Context) -> None:
        self.json = json
        self.table, self.masks = json.number_table(specs)
        self.key: tuple[object, ...] = ("number", specs, context.number)
        self.context = context


class CountFrame(_Scalar):
    """A part of a string's characters; exit 1 goes on with the next part."""

    def __init__(self, json: Json, table: Table, rest: tuple[int, int | None], context: Context) -> None:
        self.json = json
        self.table = table
        self.masks = (1,)
        self.rest = rest
        self.context = context
        self.key: tuple[object, ...] = ("count", id(table), rest, context.number)

    def resolve(self, exit_index: int) -> int:
        if exit_index == 1:
            return self.json.counted(*self.rest, self.context)
        return super().resolve(exit_index)

    def characters_left(self, local: int) -> int | None:
        """How many characters may still come, exactly (without a bound: very many); None inside a character."""
        if local > CHUNK:
            return None
        return CHUNK - local + (1 << 20 if self.rest[1] is None else self.rest[1])

    def closing_exit(self, local: int) -> int:
        return 0 if path_to_exit(self.table, 0, local) is not None else 1


class _Remembering:
    """Adds the text that was read, for contexts that remember."""

    json: Json
    key: tuple[object, ...]
    context: Context
    masks: tuple[int, ...]
    text: bytes = b""

    def remember(self, text: bytes) -> int:
        if not text:
            return self.json.machine.interned[self.key]
        def make():  # type: ignore[no-untyped-def]
            copy = object.__new__(type(self))
            copy.__dict__.update(self.__dict__)
            copy.text = text
            return copy

        machine = self.json.machine
        found = machine.intern((*self.key, text), make)
        machine.same_mask[found] = machine.interned[self.key]
        return found

    def resolve_text(self, exit_index: int, text: bytes) -> int:
        return self.context.resume(self.masks[exit_index], self.read(text))

    def read(self, text: bytes) -> object:
        return ("string", json.loads(b'"' + text + b'"'))


class RememberingString(_Remembering, StringFrame):
    pass


class RememberingNumber(_Remembering, NumberFrame):
    def read(self, text: bytes) -> object:
        from ramet.grammar.json_schema.keywords import fraction

        return ("number", fraction(json.loads(text)))


class RememberingCount(_Remembering, CountFrame):
    """Counted strings in memory contexts keep their text over the parts."""

    def resolve_text(self, exit_index: int, text: bytes) -> int:
        if exit_index == 1:
            following = self.json.counted(*self.rest, self.context)
            frame = self.json.machine.frames[following >> 32]
            return target(frame.remember(text), following & 0xFFFFFFFF)  # type: ignore[attr-defined]
        return super().resolve_text(exit_index, text)


def overlay(base: strings.Content | None, entries: dict[str, int]) -> strings.Content:
    """A string table in which single strings have exits of their own (-1: refused), all others those of `base`.

    base: start 0; None: no other string. The result may need trimming.
    """
    if not entries and base is not None:
        return base
    own: list[int] = [0 if base is not None else -1]  # for each new row, the row of `base` it extends (-1: none)
    edges: list[tuple[int, int, int]] = []  # (new row, byte, entry)
    children: list[dict[int, int]] = [{}]
    old = None if base is None else base.rows
    for text, exit_index in entries.items():
        node = 0
        for char in text:
            node = _descend(char, node, old, own, children)
        edges.append((node, strings.QUOTE, leave(exit_index) if exit_index >= 0 else REFUSE))
    n = len(own)
    extended = np.array(own)
    if base is None or old is None:
        rows = np.full((n, 256), REFUSE, dtype=np.int32)
        num_content, beyond = 0, np.zeros(0, dtype=np.int64)
    else:
        # layout: new rows [0, n), then those of base [n, n + len(base))
        moved = np.where(old >= 0, old + n, old)
        rows = np.concatenate([np.where((extended >= 0)[:, None], moved[np.maximum(extended, 0)], REFUSE), moved])
        num_content = n + base.num_content
        before = np.where(base.beyond >= 0, base.beyond + n, base.beyond)
        inside = (extended < 0) | (extended >= base.num_content)  # between the bytes of a character: not known
        beyond = np.concatenate([np.where(inside, -2, before[np.where(inside, 0, extended)]), before])
    sources = [(i, b, c) for i, kids in enumerate(children) for b, c in kids.items()]
    sources.extend(edges)
    table = np.array(sources, dtype=np.int64).reshape(-1, 3)
    rows[table[:, 0], table[:, 1]] = table[:, 2]
    if base is not None:
        # a row with a way of its own beyond ASCII leads elsewhere after some characters, though never to a refusal
        other = np.unique(table[(table[:, 1] >= 0x80), 0])
        beyond[other] = np.where(beyond[other] >= 0, beyond[other], -2)
    return strings.Content(rows.astype(np.int32, copy=False), num_content, beyond)


def _descend(
    char: str, node: int, base: NDArray[np.int32] | None, own: list[int], children: list[dict[int, int]]
) -> int:
    """Follow one code point from a trie node, by all ways to write it; they meet again in one node."""
    if char.isascii() and char >= " " and char not in '"\\/\x7f':
        byte = ord(char)
        found = children[node].get(byte)
        if found is None:
            found = len(own)
            under = own[node]
            own.append(int(base[under, byte]) if base is not None and under >= 0 else -1)
            children.append({})
            children[node][byte] = found
        return found
    end: int | None = None
    ways = strings.char_sequences(char)
    # the last byte of each way leads to the same node: find it if another string made it, else make it
    for way in ways:
        at: int | None = node
        for step in way:
            at = None if at is None else children[at].get(min(step))
        if at is not None:
            end = at
            break
    for way in ways:
        at = node
        for position, step in enumerate(way):
            is_last = position + 1 == len(way)
            following = children[at].get(min(step))
            if following is None:
                if is_last and end is not None:
                    following = end
                else:
                    following = len(own)
                    under = own[at]
                    to = int(base[under, min(step)]) if base is not None and under >= 0 else -1
                    own.append(to)
                    children.append({})
                    if is_last:
                        end = following
                for byte in step:
                    children[at][byte] = following
            at = following
    assert end is not None
    return end


__all__ = ["ANY_CHARS", "CHUNK", "Context", "Json", "ValueFrame", "overlay"]

ANY_CHARS = Dfa(ir.MAX_CODE_POINT, [0], [0], 1, [[0]], [True])
