"""The tables of JSON's scalars and punctuation, before they are put on a machine.

They are the same in all compilations, so they are kept for the life of the process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from ramet.grammar import deadline, ir
from ramet.grammar.json_schema.algebra.languages import Languages
from ramet.grammar.json_schema.algebra.values import Strings
from ramet.grammar.json_schema.frames.layout import NO_SPACE, Layout, Rows, entries
from ramet.grammar.machine import walker
from ramet.grammar.machine.frame import REFUSE, compress_rows, leave
from ramet.grammar.regular import dfas, strings
from ramet.grammar.regular import numbers as numeric
from ramet.grammar.regular.dfas import Dfa
from ramet.grammar.regular.numbers import Numbers
from ramet.grammar.regular.plain_trie import plain_trie

FEW_NUMBERS, MANY_NUMBERS = 8, 4096  # with so many single values, they share a walk
CHUNK = 64  # characters that one table of a counted string holds
OBJECT, ARRAY, STRING, NUMBER, TRUE, FALSE, NULL = range(7)  # kinds of value: the exits of `dispatch_rows`
LITERALS = {TRUE: b"rue", FALSE: b"alse", NULL: b"ull"}
BEFORE_COLON, AFTER_COMMA, AT_VALUE = range(3)  # states of `dispatch_rows`
GO_ON, CLOSE = 0, 1  # exits of the tables between values: a key or an item follows; the object or array ends
VALUE_STARTS = b'{["-0123456789tfn'
ANY_CHARS = Dfa(ir.MAX_CODE_POINT, [0], [0], 1, [[0]], [True])
_WORD = np.array([b for b in range(0x30, 0x7B) if chr(b).isalnum()])
_PLAIN = np.array([b for b in range(0x20, 0x7F) if b not in b'"\\'])


@cache
def dispatch_rows(layout: Layout, depth: int, kinds: int) -> NDArray[np.int32]:
    """Return the rows that read the beginning of a value. The exits are the kinds of value.

    The first states are BEFORE_COLON, AFTER_COMMA and AT_VALUE. kinds: bits of the kinds that may stand here.
    """
    value = entries(b"", REFUSE)
    for first, kind in (
        (b"{", OBJECT),
        (b"[", ARRAY),
        (b'"', STRING),
        (b"t", TRUE),
        (b"f", FALSE),
        (b"n", NULL),
        (b"-0123456789", NUMBER),
    ):
        if (kinds >> kind) & 1:
            value[list(first)] = leave(kind, again=kind == NUMBER)
    rows = Rows(3)
    rows.read(AT_VALUE, NO_SPACE, value)
    rows.read(AFTER_COMMA, layout.after_comma(depth), value)
    after_colon = rows.new()
    rows.read(after_colon, layout.after_colon, value)
    rows.read(BEFORE_COLON, layout.in_between, entries(b":", after_colon))
    return rows.done()


@cache
def open_object_rows(layout: Layout, depth: int, may_go_on: bool, may_close: bool) -> NDArray[np.int32]:
    """Return the rows that read what follows `{`. depth: of the properties."""
    rows = Rows(1)
    if may_go_on:
        rows.read(0, layout.after_bracket(depth), entries(b'"', leave(GO_ON)))
    if may_close:
        rows.read(0, layout.in_between, entries(b"}", leave(CLOSE)))
    return rows.done()


@cache
def next_key_rows(layout: Layout, depth: int, may_go_on: bool, may_close: bool) -> NDArray[np.int32]:
    """Return the rows that read what follows a property. depth: of the properties."""
    rows = Rows(1)
    if may_close:
        rows.read(0, layout.before_bracket(depth), entries(b"}", leave(CLOSE)))
    if may_go_on:
        after_comma = rows.new()
        rows.read(0, layout.in_between, entries(b",", after_comma))
        rows.read(after_comma, layout.after_comma(depth), entries(b'"', leave(GO_ON)))
    return rows.done()


@cache
def open_array_rows(layout: Layout, depth: int, may_go_on: bool, may_close: bool) -> NDArray[np.int32]:
    """Return the rows that read what follows `[`. depth: of the items."""
    rows = Rows(1)
    if may_go_on:
        rows.read(0, layout.after_bracket(depth), entries(VALUE_STARTS, leave(GO_ON, again=True)))
    if may_close:
        rows.read(0, layout.in_between, entries(b"]", leave(CLOSE)))
    return rows.done()


@cache
def next_item_rows(layout: Layout, depth: int, may_go_on: bool, may_close: bool) -> NDArray[np.int32]:
    """Return the rows that read what follows an item. depth: of the items."""
    rows = Rows(1)
    if may_close:
        rows.read(0, layout.before_bracket(depth), entries(b"]", leave(CLOSE)))
    if may_go_on:
        rows.read(0, layout.in_between, entries(b",", leave(GO_ON)))
    return rows.done()


@cache
def unread_rows(refused: bytes) -> NDArray[np.int32]:
    rows = np.full((1, 256), leave(0), dtype=np.int32)
    rows[0, list(refused)] = REFUSE
    return rows


@cache
def any_key_rows() -> StringRows:
    return StringRows.of(strings.any_string_content(0))


@cache
def literal_rows(text: bytes) -> NDArray[np.int32]:
    rows = np.full((len(text), 256), REFUSE, dtype=np.int32)
    for i, byte in enumerate(text):
        rows[i, byte] = i + 1 if i + 1 < len(text) else leave(0)
    return rows


@cache
def compressed_rows(
    make: Callable[..., NDArray[np.int32]], arguments: tuple[object, ...]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    return compress_rows(make(*arguments))


@dataclass(frozen=True, slots=True, eq=False)
class StringRows:
    """The table of a string's content, before it is put on a machine. For depths and loop see FrameTable."""

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
            # a trie over any string ends with the rows of any string; in other tables, the start may be the loop
            for q in {0, num_content - 1}:
                if beyond[q] == q and (rows[q, safe] == q).all():
                    loop = q
        return StringRows(rows, byte_class, depths, loop)

    @staticmethod
    def of_trie(rows: NDArray[np.int32], byte_class: NDArray[np.uint8], num_content: int) -> StringRows:
        """Do as `compressed`, for the result of `plain_trie`. Over any string, all plain text may follow in every
        state.
        """
        depths = np.zeros((4, len(rows)), dtype=np.int32)
        depths[:, :num_content] = walker.MANY
        return StringRows(rows, byte_class, depths, num_content - 1)


@cache
def free_string() -> StringRows:
    return StringRows.of(strings.free_string_rows())


@cache
def counted_string(closable: bool, last: bool) -> StringRows:
    return StringRows.of(strings.counted_rows(CHUNK, closable, last))


def renumbered(specs: tuple[tuple[Strings, ...], ...], number: dict[int, int]) -> tuple[tuple[Strings, ...], ...]:
    """Return the specs with new numbers for their languages."""
    if not number:
        return specs
    return tuple(
        tuple(s._replace(languages=frozenset((number[n], wanted) for n, wanted in s.languages)) for s in tag)
        for tag in specs
    )


@lru_cache(maxsize=1024)
def string_rows(
    specs: tuple[tuple[Strings, ...], ...], sources: tuple[tuple[str, str], ...], max_states: int
) -> tuple[StringRows, tuple[int, ...]]:
    """Return (rows, mask of tags of each exit). sources: (kind, source) of the languages; specs name them by index."""
    bases = tuple(tuple(s._replace(excluded=frozenset()) for s in tag if s.finite is None) for tag in specs)
    base, of_base = _base_rows(bases, sources, max_states) if any(bases) else (None, ())
    languages = Languages(max_states)
    specs = renumbered(specs, {i: languages.add(*source) for i, source in enumerate(sources)})
    entries: dict[str, int] = {}
    for tag in specs:
        for s in tag:
            entries.update(dict.fromkeys(s.finite or (), 0))
            entries.update(dict.fromkeys(s.excluded, 0))
    for text in entries:
        entries[text] = sum(1 << i for i, tag in enumerate(specs) if any(languages.contains(s, text) for s in tag))
    masks = list(of_base)

    def exit_of(mask: int) -> int:
        if not mask:
            return -1
        if mask not in masks:
            masks.append(mask)
        return masks.index(mask)

    exits = {text: exit_of(mask) for text, mask in entries.items()}
    if base is None:
        plain = plain_trie(None, {t: e for t, e in exits.items() if e >= 0})
        if plain is not None:
            return StringRows.of_trie(*plain), tuple(masks)
    content = overlay(base, exits)
    strings.trim(content.rows)
    return StringRows.of(content), tuple(masks)


@lru_cache(maxsize=256)
def _base_rows(
    bases: tuple[tuple[Strings, ...], ...], sources: tuple[tuple[str, str], ...], max_states: int
) -> tuple[strings.Content, tuple[int, ...]]:
    """Return the rows of strings without single texts, and the mask of tags of each exit."""
    languages = Languages(max_states)
    bases = renumbered(bases, {i: languages.add(*source) for i, source in enumerate(sources)})
    dfa, known = _tagged([dfas.union([languages.base(s) for s in b]) if b else None for b in bases])
    exits: dict[int, int] = {}
    ends = [exits.setdefault(known[a], len(exits)) if known[a] else -1 for a in dfa.accepting]
    content = strings.json_string_rows(dfa, ends)
    strings.trim(content.rows)
    return content, tuple(exits)


@lru_cache(maxsize=1024)
def number_rows(
    specs: tuple[tuple[Numbers, ...], ...], following: bytes | None = None
) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int32], tuple[int, ...]]:
    """Return (rows, byte classes, exit of each state where the number may end, mask of tags of each exit).

    following: the bytes that may follow the number. None: any byte.
    """
    values = {v for tag in specs for n in tag for v in (*(n.finite or ()), *n.excluded)}
    if FEW_NUMBERS < len(values) <= MANY_NUMBERS and all(n.plain is None for tag in specs for n in tag):
        wide, ends, masks = _many_numbers(specs, values)
        _leave_at(wide, ends, following)
        strings.trim(wide)
        return *compress_rows(wide), ends, masks
    dfa, known = _tagged([dfas.union([numeric.automaton(n) for n in tag]) if tag else None for tag in specs])
    masks = tuple(known[1:])
    ends = np.array(dfa.accepting, dtype=np.int32) - 1
    wide = dfas.byte_table(dfa)
    _leave_at(wide, ends, following)
    return *compress_rows(wide), ends, masks


@cache
def digit_rows(
    all_symbols: str, symbols: str, may_end: bool, following: bytes | None
) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
    """Return (rows, end exits) of one place in a number: exit 0 ends it, exit 1 + i reads all_symbols[i]."""
    rows = np.full((1, 256), REFUSE, dtype=np.int32)
    for symbol in symbols:
        rows[0, ord(symbol)] = leave(1 + all_symbols.index(symbol))
    ends = np.zeros(1, dtype=np.int32) if may_end else None
    if ends is not None:
        _leave_at(rows, ends, following)
    return rows, ends


def _leave_at(wide: NDArray[np.int32], ends: NDArray[np.int32], following: bytes | None) -> None:
    """Let each byte that may follow the number and does not continue it leave, in the states where it may end."""
    may_follow = np.ones(256, dtype=np.bool_)
    if following is not None:
        may_follow[:] = False
        may_follow[list(following)] = True
    for state in np.flatnonzero(ends >= 0).tolist():
        row = wide[state]
        row[(row == REFUSE) & may_follow] = leave(int(ends[state]), again=True)


def _many_numbers(
    specs: tuple[tuple[Numbers, ...], ...], values: set[Fraction]
) -> tuple[NDArray[np.int32], NDArray[np.int32], tuple[int, ...]]:
    """Do as number_rows, for specs that name many single `values`.

    One walk over their digits distinguishes them, beside one automaton of all other numbers. Returns (rows, exits where
    the number may end, masks of tags).
    """
    bases = [[n for n in tag if n.finite is None] for tag in specs]
    parts = [[numeric.unexcluded(n) if n.excluded else numeric.automaton(n) for n in b] for b in bases]
    dfa, known = _tagged([dfas.union(p) if p else None for p in parts]) if any(parts) else (None, [0])
    exits: dict[int, int] = {}

    def exit_of(mask: int) -> int:
        return exits.setdefault(mask, len(exits)) if mask else -1

    masks = {x: sum(1 << i for i, tag in enumerate(specs) if any(n.contains(x) for n in tag)) for x in values}
    written = [(numeric.decimal_text(x), masks[x]) for x in sorted(values)]
    if 0 in values:
        written.append(("-0", masks[Fraction(0)]))
    # a state: (indices of texts, and how many characters of them are read, with zeros after the text; state of `dfa`,
    # -1 for none)
    first = (tuple((i, 0) for i in range(len(written))), -1 if dfa is None else 0)
    index, queue = {first: 0}, [first]
    other = np.full((0, 256), REFUSE, dtype=np.int32) if dfa is None else dfas.byte_table(dfa)
    edges: list[tuple[int, int, int]] = []
    ends: list[int] = []
    for number, (reading, state) in enumerate(queue):
        deadline.check()
        following: dict[str, list[tuple[int, int]]] = {}
        mask = known[dfa.accepting[state]] if dfa is not None and state >= 0 else 0
        for i, at in reading:
            text = written[i][0]
            has_point = "." in text
            if at < len(text):
                following.setdefault(text[at], []).append((i, at + 1))
            elif has_point or at > len(text):
                following.setdefault("0", []).append((i, at if has_point else len(text) + 2))
            else:
                following.setdefault(".", []).append((i, len(text) + 1))
            if at == len(text) or at == len(text) + 2:
                mask = written[i][1]
        ends.append(exit_of(mask))
        for char, places in following.items():
            after = (tuple(places), -1 if state < 0 else int(other[state, ord(char)]))
            if after not in index:
                index[after] = len(queue)
                queue.append(after)
            edges.append((number, ord(char), index[after]))
    moved = np.where(other >= 0, other + len(queue), other)
    states = np.array([state for _, state in queue])
    own = np.full((len(queue), 256), REFUSE, dtype=np.int32)
    if dfa is not None:
        own[states >= 0] = moved[states[states >= 0]]
        ends.extend(exit_of(known[a]) for a in dfa.accepting)
    table = np.array(edges, dtype=np.int64).reshape(-1, 3)
    own[table[:, 0], table[:, 1]] = table[:, 2]
    wide = np.concatenate([own, moved]).astype(np.int32)
    return wide, np.array(ends, dtype=np.int32), tuple(exits)


def _tagged(parts: list[Dfa | None]) -> tuple[Dfa, list[int]]:
    """Return one automaton that accepts with the number of a mask of tags, and the list of these masks, 0 first."""
    present = [(i, d) for i, d in enumerate(parts) if d is not None]
    masks = {0: 0}

    def label(accepts: tuple[bool, ...]) -> int:
        mask = sum(1 << i for (i, _), a in zip(present, accepts, strict=True) if a)
        return masks.setdefault(mask, len(masks))

    if len(present) == 1:
        _, d = present[0]
        accepting = [label((bool(a),)) for a in d.accepting]
        return Dfa(d.max_symbol, d.starts, d.classes, d.num_classes, d.transitions, accepting), list(masks)
    return dfas.product([d for _, d in present], label), list(masks)


def overlay(base: strings.Content | None, entries: dict[str, int]) -> strings.Content:
    """Return a string table in which single strings have exits of their own. All other strings have those of `base`.

    entries: the exit of each single string, -1: refused. base: start 0; None: no other string is allowed. The result
    may need trimming.
    """
    if not entries and base is not None:
        return base
    own: list[int] = [0 if base is not None else -1]  # for each new row, the row of `base` that it extends (-1: none)
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
        # a row with its own target beyond ASCII leads to another state after some characters, but never to a refusal
        other = np.unique(table[(table[:, 1] >= 0x80), 0])
        beyond[other] = np.where(beyond[other] >= 0, beyond[other], -2)
    return strings.Content(rows.astype(np.int32, copy=False), num_content, beyond)


def _descend(
    char: str, node: int, base: NDArray[np.int32] | None, own: list[int], children: list[dict[int, int]]
) -> int:
    """Follow one code point from a trie node, in all ways to write it. They all end in one node."""
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
    # the last byte of each way leads to the same node: reuse it if another string made it, else make it
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
