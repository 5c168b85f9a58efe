"""The tables of JSON's scalars and punctuation, before they are put on a machine.

They are the same in all compilations, so they are kept for the life of the process.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from ramet.grammar import deadline, ir
from ramet.grammar.json_schema.algebra.languages import Languages
from ramet.grammar.json_schema.algebra.values import Strings
from ramet.grammar.json_schema.frames.layout import NO_SPACE, Layout, Rows, entries
from ramet.grammar.machine.frame import REFUSE, compress_rows, leave
from ramet.grammar.regular import dfas, strings
from ramet.grammar.regular import numbers as numeric
from ramet.grammar.regular.dfas import Dfa
from ramet.grammar.regular.numbers import Numbers
from ramet.loops import loop

FEW_NUMBERS, MANY_NUMBERS = 8, 4096  # with so many single values, they share a walk
CHUNK = 64  # characters that one table of a counted string holds
OBJECT, ARRAY, STRING, NUMBER, TRUE, FALSE, NULL = range(7)  # kinds of value: the exits of `dispatch_rows`
LITERALS = {TRUE: b"true", FALSE: b"false", NULL: b"null"}
BEFORE_COLON, AFTER_COMMA, AT_VALUE = range(3)  # states of `dispatch_rows`
GO_ON, CLOSE = 0, 1  # exits of the tables between values: a key or an item follows; the object or array ends
VALUE_STARTS = b'{["-0123456789tfn'
ANY_CHARS = Dfa(ir.MAX_CODE_POINT, [0], [0], 1, [[0]], [True])


@cache
def dispatch_rows(layout: Layout, depth: int, kinds: int) -> NDArray[np.int32]:
    """Return the rows that read the beginning of a value, and all of true, false and null. The exits are the kinds.

    The first states are BEFORE_COLON, AFTER_COMMA and AT_VALUE. kinds: bits of the kinds that may stand here.
    """
    value = entries(b"", REFUSE)
    rows = Rows(3)
    for first, kind in ((b"{", OBJECT), (b"[", ARRAY), (b'"', STRING), (b"-0123456789", NUMBER)):
        if (kinds >> kind) & 1:
            value[list(first)] = leave(kind, again=kind == NUMBER)
    for kind, text in LITERALS.items():
        if (kinds >> kind) & 1:
            value[text[0]] = at = rows.new()
            for byte in text[1:-1]:
                following = rows.new()
                rows.read(at, NO_SPACE, entries(bytes((byte,)), following))
                at = following
            rows.read(at, NO_SPACE, entries(text[-1:], leave(kind)))
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
def compressed_rows(
    make: Callable[..., NDArray[np.int32]], arguments: tuple[object, ...]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    return compress_rows(make(*arguments))


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
) -> tuple[strings.Content, tuple[int, ...]]:
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
    content = overlay(base, exits if base is not None else {t: e for t, e in exits.items() if e >= 0})
    strings.trim(content.rows)
    return content, tuple(masks)


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
    may need trimming. Its states are those of a trie, one for each beginning of the strings; then those inside of a
    character that can be written in several ways; then those of `base`.
    """
    if not entries and base is not None:
        return base
    texts = sorted(entries)
    joined = "".join(texts)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.int32)
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    exits = np.array([leave(e) if (e := entries[text]) >= 0 else REFUSE for text in texts], dtype=np.int32)
    parents, read, ends = (np.zeros(size, dtype=np.int64) for size in (len(codes) + 1, len(codes) + 1, len(texts)))
    num_own = num_nodes = lay_trie(codes, sizes, parents, read, ends)
    odd = np.zeros((0, 4), dtype=np.int64)
    if not strings.is_plain(joined):
        nodes = [n for n in range(1, num_nodes) if not strings.is_plain(chr(read[n]))]
        odd, num_own = _odd_edges([(int(parents[n]), chr(read[n]), n) for n in nodes], num_nodes)
    below = _NOTHING if base is None else base
    byte_class = np.zeros(256, dtype=np.uint8)
    beyond = np.zeros(num_own + len(below.rows), dtype=np.int64)
    rows = lay_over(
        parents[:num_nodes], read, ends, exits, odd, num_own,
        below.rows, below.byte_class, below.num_content, below.beyond, byte_class, beyond,
    )  # fmt: skip
    num_content = 0 if base is None else num_own + base.num_content
    return strings.Content(rows, byte_class, num_content, beyond[:num_content])


_NOTHING = strings.Content(
    np.zeros((0, 1), dtype=np.int32), np.zeros(256, dtype=np.uint8), 0, np.zeros(0, dtype=np.int64)
)


def _odd_edges(reads: list[tuple[int, str, int]], num_states: int) -> tuple[NDArray[np.int64], int]:
    """Return the edges by which characters are read that can be written in several ways, or in several bytes.

    reads: (state, character, state after it). Returns (edges, int64 [n, 4]: from, byte, to, the state after the whole
    character; the number of states with those inside of characters, which follow the `num_states`).
    """
    inside: dict[tuple[int, int], int] = {}
    edges: dict[tuple[int, int], tuple[int, int]] = {}
    for before, char, after in reads:
        for way in strings.char_sequences(char):
            at = before
            for step in way[:-1]:
                key = (at, min(step))
                if key not in inside:
                    inside[key] = num_states
                    num_states += 1
                edges.update({(at, byte): (inside[key], after) for byte in step if (at, byte) not in edges})
                at = inside[key]
            edges.update({(at, byte): (after, after) for byte in way[-1]})
    return np.array([(a, byte, to, after) for (a, byte), (to, after) in edges.items()], dtype=np.int64), num_states


@loop
def lay_trie(codes, sizes, parents, read, ends):  # type: ignore[no-untyped-def]
    """Lay out sorted texts as a trie; return the number of its nodes.

    codes: of all texts, one after the other. Fills the node before each node, which has a smaller number, and the code
    that leads to it; and the node where each text ends.
    """
    path = np.zeros(len(codes) + 1, dtype=np.int64)
    used = 1
    at = before = 0
    for t in range(len(sizes)):
        size = 0
        if t:
            shorter = min(sizes[t - 1], sizes[t])
            while size < shorter and codes[before + size] == codes[at + size]:
                size += 1
        for i in range(size, sizes[t]):
            parents[used] = path[i]
            read[used] = codes[at + i]
            path[i + 1] = used
            used += 1
        ends[t] = path[sizes[t]]
        before = at
        at += sizes[t]
    return used


@loop
def lay_over(  # type: ignore[no-untyped-def]
    parents, read, ends, exits, odd, num_own, old, old_class, num_content, old_beyond, byte_class, beyond
):
    """Return the rows of a trie over another table, `old`; fill its byte classes, and `beyond` (see Content).

    odd: edges as `_odd_edges` returns them, ordered by their nodes; the other nodes are reached by one byte.
    """
    quote = 0x22
    is_odd = np.zeros(len(parents), dtype=np.bool_)
    is_used = np.zeros(256, dtype=np.bool_)
    is_used[quote] = True
    for i in range(len(odd)):
        is_odd[odd[i, 3]] = True
        is_used[odd[i, 1]] = True
    for n in range(1, len(parents)):
        if not is_odd[n]:
            is_used[read[n]] = True
    # each byte on an edge is a class of its own
    number = np.full(256 + old.shape[1], -1, dtype=np.int64)
    columns = np.zeros(256, dtype=np.int64)
    width = 0
    for b in range(256):
        kind = old.shape[1] + b if is_used[b] else np.int64(old_class[b])
        if number[kind] < 0:
            number[kind] = width
            columns[width] = old_class[b]
            width += 1
        byte_class[b] = number[kind]
    # the row of `old` that each own row extends, -1 if there is none
    extended = np.full(num_own, -1, dtype=np.int64)
    if len(old):
        extended[0] = 0
        k = 0
        for n in range(1, len(parents)):
            if not is_odd[n]:
                row = extended[parents[n]]
                if row >= 0:
                    extended[n] = max(old[row, old_class[read[n]]], -1)
            while k < len(odd) and odd[k, 3] == n:
                row = extended[odd[k, 0]]
                if row >= 0 and extended[odd[k, 2]] < 0:
                    extended[odd[k, 2]] = max(old[row, old_class[odd[k, 1]]], -1)
                k += 1
    rows = np.full((num_own + len(old), width), -1, dtype=np.int32)
    for s in range(len(rows)):
        row = extended[s] if s < num_own else s - num_own
        if row >= 0:
            for c in range(width):
                entry = old[row, columns[c]]
                rows[s, c] = entry + num_own if entry >= 0 else entry
        if row < 0 or row >= num_content:  # between the bytes of a character: not known
            beyond[s] = -2
        else:
            beyond[s] = old_beyond[row] + num_own if old_beyond[row] >= 0 else old_beyond[row]
    for n in range(1, len(parents)):
        if not is_odd[n]:
            rows[parents[n], byte_class[read[n]]] = n
    for i in range(len(odd)):
        rows[odd[i, 0], byte_class[odd[i, 1]]] = odd[i, 2]
        # a state with its own edge beyond ASCII leads to another state after some characters, but never to a refusal
        if odd[i, 1] >= 0x80 and beyond[odd[i, 0]] < 0:
            beyond[odd[i, 0]] = -2
    for t in range(len(ends)):
        rows[ends[t], byte_class[quote]] = exits[t]
    return rows
