r"""Regular texts to byte automata, by way of an automaton over classes of code points.

A large class (`\w` has 734 ranges) makes a byte automaton with hundreds of states. To determinise byte sequences
directly would take seconds. From the automaton over code points, each state takes one small table lookup.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarTooLarge
from ramet.grammar import deadline, ir
from ramet.grammar.machine.frame import compress_rows
from ramet.grammar.regular.dfas import MAX_STATES, Dfa
from ramet.grammar.regular.languages import compile_chars

_CONTINUATION = np.arange(0x80, 0xC0)


def compile_text(node: ir.Node, *, max_states: int = MAX_STATES, name: str = "") -> ir.Table:
    """Return the byte automaton of a regular node made of text (no bytes that are not UTF-8, no Table, no Reference).

    Raises: GrammarTooLarge naming `name` past `max_states` states over code points, or ten times as many over bytes.
    """
    return utf8_table(text_dfa(node, max_states=max_states, name=name), max_states=10 * max_states, name=name)


def text_dfa(node: ir.Node, *, max_states: int = MAX_STATES, name: str = "") -> Dfa:
    """Do as `compile_text`, over code points. Fast, because it works on few classes of code points."""
    sets: dict[ir.Ranges, None] = {}
    _collect(node, sets)
    starts, ids = _atoms(list(sets))
    by_set = {ranges: _id_ranges(ranges, starts, ids) for ranges in sets}
    small = compile_chars(_renamed(node, by_set), max_states=max_states, name=name)
    classes = [small.classes[np.searchsorted(small.starts, i, side="right") - 1] for i in range(max(ids) + 1)]
    return Dfa(
        ir.MAX_CODE_POINT, starts, [classes[i] for i in ids], small.num_classes, small.transitions, small.accepting
    )


def _collect(node: ir.Node, sets: dict[ir.Ranges, None]) -> None:
    """Add every set of code points that the node distinguishes."""
    match node:
        case ir.Bytes(value):
            for c in value.decode():
                sets[((ord(c), ord(c)),)] = None
        case ir.Chars(ranges):
            sets[ranges] = None
        case ir.Concatenation(parts) | ir.Choice(parts) | ir.Intersect(parts):
            for part in parts:
                _collect(part, sets)
        case ir.Repeat(item, _, _) | ir.Lookahead(item, _) | ir.Terminal(item, _):
            _collect(item, sets)
        case ir.Complement(item):
            sets[ir.ANY_CHAR.ranges] = None
            _collect(item, sets)
        case _:
            raise AssertionError(f"{type(node).__name__} is not made of text")


def _atoms(sets: list[ir.Ranges]) -> tuple[list[int], list[int]]:
    """Return (first code point, atom) of each interval. The code points of an atom are in the same sets."""
    cuts = np.unique([0, *(c for ranges in sets for low, high in ranges for c in (low, high + 1))])
    cuts = cuts[cuts <= ir.MAX_CODE_POINT]
    member = np.zeros((len(sets), len(cuts) + 1), dtype=np.int8)
    for row, ranges in zip(member, sets, strict=True):
        if ranges:
            np.add.at(row, np.searchsorted(cuts, [low for low, _ in ranges]), 1)
            np.add.at(row, np.searchsorted(cuts, [high + 1 for _, high in ranges]), -1)
    signatures = np.cumsum(member, axis=1, dtype=np.int8)[:, :-1]
    _, ids = np.unique(signatures, axis=1, return_inverse=True)
    return cuts.tolist(), ids.reshape(-1).tolist()


def _id_ranges(ranges: ir.Ranges, starts: list[int], ids: list[int]) -> ir.Ranges:
    firsts = np.searchsorted(starts, [low for low, _ in ranges])
    ends = np.searchsorted(starts, [high + 1 for _, high in ranges])
    inside = {ids[i] for a, b in zip(firsts.tolist(), ends.tolist(), strict=True) for i in range(a, b)}
    return ir.normalize_ranges([(i, i) for i in inside])


def _renamed(node: ir.Node, by_set: dict[ir.Ranges, ir.Ranges]) -> ir.Node:
    """Return the node with atoms in place of code points."""
    match node:
        case ir.Bytes(value):
            return ir.Concatenation(tuple(ir.Chars(by_set[((ord(c), ord(c)),)]) for c in value.decode()))
        case ir.Chars(ranges):
            return ir.Chars(by_set[ranges])
        case ir.Concatenation(parts):
            return ir.Concatenation(tuple(_renamed(p, by_set) for p in parts))
        case ir.Choice(parts):
            return ir.Choice(tuple(_renamed(p, by_set) for p in parts))
        case ir.Intersect(parts):
            return ir.Intersect(tuple(_renamed(p, by_set) for p in parts))
        case ir.Repeat(item, low, high):
            return ir.Repeat(_renamed(item, by_set), low, high)
        case ir.Lookahead(item, is_negative):
            return ir.Lookahead(_renamed(item, by_set), is_negative)
        case ir.Complement(item):  # within all texts: surrogates are in none
            any_text = ir.Repeat(ir.Chars(by_set[ir.ANY_CHAR.ranges]))
            return ir.Intersect((any_text, ir.Complement(_renamed(item, by_set))))
        case ir.Terminal(item, name):
            return ir.Terminal(_renamed(item, by_set), name)
    raise AssertionError(node)


def utf8_table(dfa: Dfa, *, max_states: int = 1_000_000, name: str = "") -> ir.Table:
    """Return the deterministic byte automaton of a trim automaton over code points.

    The states of `dfa` keep their numbers, and the states inside a character follow.
    Raises: GrammarTooLarge naming `name` past `max_states`.
    """
    planes = _ClassTree(dfa)
    transitions = np.asarray(dfa.transitions, dtype=np.int32).reshape(len(dfa.transitions), dfa.num_classes)
    transitions = np.hstack([transitions, np.full((len(transitions), 1), -1, dtype=np.int32)])  # class -1: refused
    rows: list[NDArray[np.int32]] = []
    index: dict[bytes, int] = {}
    inner: list[NDArray[np.int32]] = []

    def add(targets: NDArray[np.int32]) -> NDArray[np.int32]:
        """Number the states that read one more byte, of 64 possible ones: targets int32 [n, 64] -> int32 [n]."""
        out = np.full(len(targets), -1, dtype=np.int32)
        for i in np.flatnonzero((targets >= 0).any(axis=1)).tolist():
            key = targets[i].tobytes()
            found = index.get(key)
            if found is None:
                found = index[key] = len(transitions) + len(inner)
                inner.append(targets[i])
                if found >= max_states:
                    raise GrammarTooLarge(f"{name or 'a pattern'} needs more than {max_states:,} automaton states")
            out[i] = found
        return out

    for row in transitions:
        deadline.check(name)
        wide = np.full(256, -1, dtype=np.int32)
        wide[:0x80] = row[planes.one]
        two = add(row[planes.last])
        three = add(np.append(two, np.int32(-1))[planes.middle])
        four = add(np.append(three, np.int32(-1))[planes.first])
        wide[0xC2:0xE0] = np.append(two, np.int32(-1))[planes.lead_two]
        wide[0xE0:0xF0] = np.append(three, np.int32(-1))[planes.lead_three]
        wide[0xF0:0xF5] = np.append(four, np.int32(-1))[planes.lead_four]
        rows.append(wide)
    table = np.full((len(rows) + len(inner), 256), -1, dtype=np.int32)
    table[: len(rows)] = rows
    if inner:
        table[len(rows) :, _CONTINUATION] = inner
    accepting = np.zeros(len(table), dtype=np.bool_)
    accepting[: len(rows)] = dfa.accepting
    return ir.Table(*compress_rows(table), accepting)


class _ClassTree:
    """The tree of UTF-8 bytes that leads to the class of a code point. Equal subtrees are shared; -1 stands for
    refused.

    one: the class of each ASCII code point. last [n, 64]: distinct rows of classes for a last byte. middle [m, 64]:
    rows of numbers of `last`. first [k, 64]: rows of numbers of `middle`. lead_*: the subtree after each lead byte.
    """

    def __init__(self, dfa: Dfa) -> None:
        live = np.asarray([any(row[c] >= 0 for row in dfa.transitions) for c in range(dfa.num_classes)])
        starts, classes = (
            np.asarray(dfa.starts),
            np.where(live, np.arange(dfa.num_classes), -1)[np.asarray(dfa.classes)],
        )

        def class_of(code_points: NDArray[np.int64]) -> NDArray[np.int32]:
            found = classes[np.searchsorted(starts, code_points, side="right") - 1]
            return np.where((code_points < 0xD800) | (code_points > 0xDFFF), found, -1).astype(np.int32)

        self.one = class_of(np.arange(0x80))
        # each of the 17,408 blocks of 64 code points is of one class, unless a border between classes is inside
        firsts = np.arange(0, 0x110000, 64)
        number = class_of(firsts)
        number[:2] = -1  # ASCII is read as one byte
        mixed = np.unique(starts[(starts % 64 != 0) & (starts > 0x7F)] // 64)
        number[mixed] = -1
        whole = np.unique(number[number >= 0])
        number = np.where(number < 0, -1, np.searchsorted(whole, number)).astype(np.int32)
        rows, mixed_number = _distinct(class_of(firsts[mixed][:, None] + np.arange(64)))
        number[mixed] = np.where(mixed_number < 0, -1, len(whole) + mixed_number)
        self.last = np.vstack([np.repeat(whole.astype(np.int32)[:, None], 64, axis=1), rows])
        self.lead_two = number[2:32].copy()  # C2..DF
        number[:32] = -1  # E0: no overlong forms of two-byte characters
        self.middle, number_middle = _distinct(number.reshape(-1, 64))
        self.lead_three = number_middle[:16]
        planes = np.full((5, 64), -1, dtype=np.int32)  # F0..F4: 64 middles each; the first 16 would be overlong
        planes.reshape(-1)[16:272] = number_middle[16:272]
        self.first, self.lead_four = _distinct(planes)


def _distinct(rows: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the distinct rows and the number of each row's copy; -1 for a row that is -1 throughout."""
    keys = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    distinct = rows[first]
    number = inverse.reshape(-1).astype(np.int32)
    is_refused = np.asarray((distinct < 0).all(axis=1))
    number[is_refused[number]] = -1
    return distinct, number
