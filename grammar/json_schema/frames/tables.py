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
    if not entries:
        assert base is not None
        return base
    texts = sorted(entries)
    flat = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    codes, symbols = np.unique(flat, return_inverse=True)
    parents, read = np.zeros((2, len(flat) + 1), dtype=np.int64)
    ends = np.zeros(len(texts), dtype=np.int64)
    num_nodes = grow_trie(symbols.reshape(-1), np.array([len(t) for t in texts]), parents, read, ends)
    # the edges: (state, byte, state after it); each state is reached by an earlier edge than those that leave it
    is_plain = np.array([strings.is_plain(int(c)) for c in codes], dtype=np.bool_)[read[1:num_nodes]]
    plain = 1 + np.flatnonzero(is_plain)
    edges = np.stack([parents[plain], codes[read[plain]].astype(np.int64), plain], 1)
    num_own = num_nodes
    odd = 1 + np.flatnonzero(~is_plain)
    if len(odd):
        more, num_own = _odd_edges([(int(parents[n]), chr(codes[read[n]]), int(n)) for n in odd], num_nodes)
        # by the node that they lead to
        order = np.argsort(np.concatenate([plain, more[:, 3]]), kind="stable")
        edges = np.concatenate([edges, more[:, :3]])[order]
    used = np.unique(np.append(edges[:, 1], strings.QUOTE))
    if base is None:
        old, below = np.full((0, 1), REFUSE, dtype=np.int32), np.zeros(256, dtype=np.int64)
    else:
        old, below = base.rows, base.byte_class.astype(np.int64)
    finer = below.copy()  # each byte on an edge is a class of its own
    finer[used] = old.shape[1] + np.arange(len(used))
    _, first, inverse = np.unique(finer, return_index=True, return_inverse=True)
    byte_class, columns = inverse.reshape(-1).astype(np.uint8), below[first]
    # for each own state, the state of `base` that it extends, -1 if there is none
    extended = np.full(num_own, -1, dtype=np.int64)
    extended[0] = 0 if base is not None else -1
    follow_edges(edges[:, 0], below[edges[:, 1]], edges[:, 2], old, extended)
    moved = np.ascontiguousarray(np.where(old >= 0, old + num_own, old)[:, columns])
    refusing = np.full((1, len(columns)), REFUSE, dtype=np.int32)
    rows = np.concatenate([np.concatenate([moved, refusing])[extended], moved])  # -1: the last row, which refuses
    rows[edges[:, 0], byte_class[edges[:, 1]]] = edges[:, 2]
    exits = [entries[text] for text in texts]
    rows[ends, byte_class[strings.QUOTE]] = [leave(e) if e >= 0 else REFUSE for e in exits]
    if base is None:
        return strings.Content(rows, byte_class, 0, np.zeros(0, dtype=np.int64))
    before = np.where(base.beyond >= 0, base.beyond + num_own, base.beyond)
    inside = (extended < 0) | (extended >= base.num_content)  # between the bytes of a character: not known
    beyond = np.concatenate([np.where(inside, -2, before[np.where(inside, 0, extended)]), before])
    # a state with its own edge beyond ASCII leads to another state after some characters, but never to a refusal
    other = np.unique(edges[edges[:, 1] >= 0x80, 0])
    beyond[other] = np.where(beyond[other] >= 0, beyond[other], -2)
    return strings.Content(rows, byte_class, num_own + base.num_content, beyond)


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
def grow_trie(symbols, lengths, parents, read, ends):  # type: ignore[no-untyped-def]
    """Lay out sorted texts as a trie; return the number of its nodes.

    symbols: of all texts, one after the other. Fills the node before each node, which has a smaller number, and the
    symbol that leads to it; and the node where each text ends.
    """
    path = np.zeros(len(symbols) + 1, dtype=np.int64)
    used = 1
    at = before = 0
    for t in range(len(lengths)):
        size = 0
        if t:
            shorter = min(lengths[t - 1], lengths[t])
            while size < shorter and symbols[before + size] == symbols[at + size]:
                size += 1
        for i in range(size, lengths[t]):
            parents[used] = path[i]
            read[used] = symbols[at + i]
            path[i + 1] = used
            used += 1
        ends[t] = path[lengths[t]]
        before = at
        at += lengths[t]
    return used


@loop
def follow_edges(sources, classes, targets, rows, reached):  # type: ignore[no-untyped-def]
    """Fill the row that each state reaches by its edges, in order; -1 stays where there is none."""
    for i in range(len(sources)):
        row = reached[sources[i]]
        if row >= 0 and reached[targets[i]] < 0:
            reached[targets[i]] = max(rows[row, classes[i]], -1)
