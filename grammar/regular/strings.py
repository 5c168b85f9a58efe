r"""JSON strings: tables that read the content of a string and its closing quote.

A table is made from a language of code points (dfas.Dfa) and from the ways in which JSON can write a code point: as
itself in UTF-8, as a short escape (`\n`), as `\u` with four hex digits of either case, and as a surrogate pair.
Printable ASCII is only written as itself, except for `"`, `\` and optionally `/`, which take a backslash. A string
without any constraint is different: it may use every escape that JSON knows, also single surrogates.

The entries of tables are those of frame.py. Tables are made "wide", int32 [num_states, 256], and then compressed to
classes of bytes. The closing quote leaves through an exit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from ramet.grammar import ir
from ramet.grammar.machine.frame import REFUSE, compress_rows, leave
from ramet.grammar.machine.walker import safe_depths
from ramet.grammar.regular.dfas import Dfa
from ramet.grammar.regular.languages import utf8_sequences
from ramet.loops import loop

Wide = NDArray[np.int32]

_Way = tuple[tuple[frozenset[int], ...], int]  # (byte sets to read, state after them)


@dataclass(frozen=True, eq=False)
class Content:
    """The table of a string's content. rows: over the classes of byte_class, uint8 [256].

    The first `num_content` states are between characters. beyond[q]: the state after any one character beyond ASCII; -1
    refused, -2 if it depends on the character.
    """

    rows: NDArray[np.int32]
    byte_class: NDArray[np.uint8]
    num_content: int
    beyond: NDArray[np.int64]

    @cached_property
    def depths(self) -> NDArray[np.int32]:
        """See FrameTable."""
        depths = np.zeros((4, len(self.rows)), dtype=np.int32)
        if self.num_content:
            safe, word = (np.flatnonzero(np.bincount(self.byte_class[some])) for some in (_PLAIN, _WORD))
            safe_depths(self.rows, self.num_content, safe, word, self.beyond, depths)
        return depths

    @cached_property
    def loop(self) -> int:
        """See FrameTable."""
        safe = self.byte_class[_PLAIN]
        # a trie over any string ends with the rows of any string; in other tables, the start may be the loop
        for q in (self.num_content - 1, 0) if self.num_content else ():
            if self.beyond[q] == q and (self.rows[q, safe] == q).all():
                return q
        return -1


_WORD = np.array([b for b in range(0x30, 0x7B) if chr(b).isalnum()])
_PLAIN = np.array([b for b in range(0x20, 0x7F) if b not in b'"\\'])


QUOTE, BACKSLASH = 0x22, 0x5C
_HEX = {n: [ord(c) for c in {f"{n:x}", f"{n:X}"}] for n in range(16)}
_SHORT = {"b": 8, "f": 12, "n": 10, "r": 13, "t": 9, '"': 34, "\\": 92, "/": 47}

# rows of the block that reads one code point beyond ASCII and continues in state t
_T1, _T2, _T3, _E0, _ED, _F0, _F4, _X1, _X2, _X3, _XD, _S1, _S2, _S3, _S4, _S5, _S6 = range(17)
_BLOCK_ROWS = 17
_FINAL = 1 << 20
# rows of the block that reads an escape in state q
_ESC, _U, _U0, _U00, _C0, _C1 = range(6)
_ESCAPE_ROWS = 6


def _set_hex(row: Wide, nibbles: range | list[int], value: int) -> None:
    for n in nibbles:
        row[_HEX[n]] = value


@cache
def _block() -> Wide:
    """Return int32 [17, 256]: the entries are rows of the block, or _FINAL."""
    b = np.full((_BLOCK_ROWS, 256), REFUSE, dtype=np.int32)
    b[_T1, 0x80:0xC0] = _FINAL
    b[_T2, 0x80:0xC0] = _T1
    b[_T3, 0x80:0xC0] = _T2
    b[_E0, 0xA0:0xC0] = _T1
    b[_ED, 0x80:0xA0] = _T1
    b[_F0, 0x90:0xC0] = _T2
    b[_F4, 0x80:0x90] = _T2
    _set_hex(b[_X1], range(16), _FINAL)
    _set_hex(b[_X2], range(16), _X1)
    _set_hex(b[_X3], range(16), _X2)
    _set_hex(b[_XD], range(8), _X2)
    _set_hex(b[_XD], range(8, 12), _S1)
    _set_hex(b[_S1], range(16), _S2)
    _set_hex(b[_S2], range(16), _S3)
    b[_S3, BACKSLASH] = _S4
    b[_S4, ord("u")] = _S5
    _set_hex(b[_S5], [13], _S6)
    _set_hex(b[_S6], range(12, 16), _X2)
    return b


def _lead_bytes(rows: Wide, which: NDArray[np.int64], base: NDArray[np.int64]) -> None:
    """Connect `rows[which]` by the lead bytes of UTF-8 to the blocks that begin at `base`."""
    for low, high, row in (
        (0xC2, 0xDF, _T1),
        (0xE0, 0xE0, _E0),
        (0xE1, 0xEC, _T2),
        (0xED, 0xED, _ED),
        (0xEE, 0xEF, _T2),
        (0xF0, 0xF0, _F0),
        (0xF1, 0xF3, _T3),
        (0xF4, 0xF4, _F4),
    ):
        rows[which, low : high + 1] = (base + row)[:, None]


def char_columns(dfa: Dfa) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Return (targets of ASCII [n, 128], the common target of all other code points [n]).

    The second is None if code points beyond ASCII have different targets.
    """
    n = len(dfa.transitions)
    table = np.asarray(dfa.transitions, dtype=np.int64).reshape(n, dfa.num_classes)
    starts = np.asarray(dfa.starts)
    classes = np.asarray(dfa.classes)
    ascii_classes = classes[np.searchsorted(starts, np.arange(128), side="right") - 1]
    ends = np.append(starts[1:], ir.MAX_CODE_POINT + 1) - 1
    beyond = (ends >= 0x80) & ~((starts >= 0xD800) & (ends <= 0xDFFF))
    columns = table[:, np.unique(classes[beyond])]
    uniform = bool((columns == columns[:, :1]).all())
    return table[:, ascii_classes], columns[:, 0] if uniform else None


def json_string_rows(dfa: Dfa, labels: list[int]) -> Content:
    """Return the table of a language of code points.

    labels[q]: the exit of the closing quote in state q, -1 for none. States 0..n-1 are those of the automaton, and 0 is
    the start. The states between the bytes of one code point follow. If the automaton is trim, every state leads to an
    exit. If the language is empty, the table refuses every byte.
    """
    ascii_targets, beyond = char_columns(dfa)
    n = len(ascii_targets)
    if beyond is None:
        wide = _general_rows(dfa, labels, ascii_targets)
        return Content(*compress_rows(wide), n, np.full(n, -2, dtype=np.int64))
    targets = np.unique(beyond[beyond >= 0])
    first_block = n * (1 + _ESCAPE_ROWS)
    rows = np.full((first_block + len(targets) * _BLOCK_ROWS, 256), REFUSE, dtype=np.int32)
    _own_rows(rows, n, ascii_targets, labels)
    block = _block()
    for i, t in enumerate(targets.tolist()):
        at = first_block + i * _BLOCK_ROWS
        rows[at : at + _BLOCK_ROWS] = np.where(block == _FINAL, t, np.where(block >= 0, block + at, REFUSE))
    which = np.flatnonzero(beyond >= 0)
    base = first_block + np.searchsorted(targets, beyond[which]) * _BLOCK_ROWS
    _lead_bytes(rows, which, base)
    escape = (n + which * _ESCAPE_ROWS)[:, None]
    for level, nibbles, to in (
        (_U, [*range(1, 13), 14, 15], _X3),
        (_U, [13], _XD),
        (_U0, range(1, 16), _X2),
        (_U00, range(8, 16), _X1),
    ):
        rows[escape + level, [byte for nibble in nibbles for byte in _HEX[nibble]]] = base[:, None] + to
    trim(rows)
    return Content(*compress_rows(rows), n, np.where(rows[:n, 0xC3] >= 0, beyond, -1))


def _own_rows(rows: Wide, n: int, ascii_targets: NDArray[np.int64], labels: list[int]) -> None:
    """Fill the ASCII part of the rows of states and their escapes."""
    rows[:n, 0x20:0x80] = ascii_targets[:, 0x20:]
    rows[:n, QUOTE] = [leave(x) if x >= 0 else REFUSE for x in labels]
    rows[:n, BACKSLASH] = n + np.arange(n) * _ESCAPE_ROWS
    escape = n + np.arange(n) * _ESCAPE_ROWS
    for c, code in _SHORT.items():
        rows[escape + _ESC, ord(c)] = ascii_targets[:, code]
    rows[escape + _ESC, ord("u")] = escape + _U
    rows[escape + _U, ord("0")] = escape + _U0
    rows[escape + _U0, ord("0")] = escape + _U00
    rows[escape + _U00, ord("0")] = escape + _C0
    rows[escape + _U00, ord("1")] = escape + _C1
    for nibble in range(16):
        for byte in _HEX[nibble]:
            rows[escape + _C0, byte] = ascii_targets[:, nibble]
            rows[escape + _C1, byte] = ascii_targets[:, 16 + nibble]


def _general_rows(dfa: Dfa, labels: list[int], ascii_targets: NDArray[np.int64]) -> Wide:
    """Do as json_string_rows, for automata in which code points beyond ASCII have different targets."""
    n = len(labels)
    own = np.full((n * (1 + _ESCAPE_ROWS), 256), REFUSE, dtype=np.int32)
    _own_rows(own, n, ascii_targets, labels)
    intervals = _intervals_beyond(dfa)
    spans = [(low, high) for low, high, _ in intervals]
    targets = np.array(dfa.transitions, dtype=np.int64).reshape(n, -1)[:, [cls for _, _, cls in intervals]]
    distinct, which = np.unique(targets, axis=0, return_inverse=True)
    extra: list[Wide] = []
    known: dict[bytes, int] = {}  # equal rows are one
    for i, row in enumerate(distinct.tolist()):
        ranges: dict[int, list[tuple[int, int]]] = {}
        for span, t in zip(spans, row, strict=True):
            if t >= 0:
                ranges.setdefault(t, []).append(span)
        reader = _reader(tuple(ir.normalize_ranges(r) for r in ranges.values()))
        place = np.array([REFUSE, *ranges, *[REFUSE] * len(reader)], dtype=np.int32)
        for j in range(_ENTRIES, len(reader)):
            filled = place[reader[j]]
            key = filled.tobytes()
            if key not in known:
                known[key] = len(own) + len(extra)
                extra.append(filled)
            place[1 + len(ranges) + j] = known[key]
        states = np.flatnonzero(which.reshape(-1) == i)
        for entry, rows in enumerate((states, *(n + states * _ESCAPE_ROWS + level for level in (_U, _U0, _U00)))):
            filled = place[reader[entry]]
            bytes_read = np.flatnonzero(filled != REFUSE)
            own[rows[:, None], bytes_read] = filled[bytes_read]
    return trim(np.vstack([own, *extra]))


_ENTRIES = 4  # entry rows of a reader: at a character, and after `\\u`, `\\u0` and `\\u00`


@lru_cache(maxsize=256)
def _reader(groups: tuple[ir.Ranges, ...]) -> Wide:
    r"""Return the rows that read one code point beyond ASCII, in every way to write it.

    Entries: 0 refused; 1 + its group; or 1 + len(groups) + the next row. The entry rows come first, and every other row
    comes after the rows that it leads to. The caller connects the entry rows after `\u` to each other.
    """
    rows: list[Wide] = [np.zeros(256, dtype=np.int32) for _ in range(_ENTRIES)]
    index: dict[frozenset[_Way], int] = {}

    def state_of(suffixes: frozenset[_Way]) -> int:
        """Return the entry that leads to the row for these sequences of byte sets."""
        done = [t for s, t in suffixes if not s]
        if done:
            return done[0]
        if suffixes not in index:
            row = np.zeros(256, dtype=np.int32)
            for byte, rest in _by_byte(suffixes).items():
                row[byte] = state_of(frozenset(rest))
            index[suffixes] = 1 + len(groups) + len(rows)
            rows.append(row)
        return index[suffixes]

    raw: set[_Way] = set()
    after_u: set[_Way] = set()
    for group, ranges in enumerate(groups, 1):
        raw.update((s, group) for s in _raw_sequences(ranges))
        after_u.update((s, group) for s in _escape_sequences(ranges))
    for byte, rest in _by_byte(raw).items():
        rows[0][byte] = state_of(frozenset(rest))
    here = after_u
    for entry in range(1, _ENTRIES):
        following = _by_byte(here)
        for byte, rest in following.items():
            if byte != ord("0") or entry == _ENTRIES - 1:
                rows[entry][byte] = state_of(frozenset(rest))
        here = following.get(ord("0"), set())
    return np.stack(rows)


def _by_byte(ways: Iterable[_Way]) -> dict[int, set[_Way]]:
    """Return what may follow each first byte."""
    out: dict[int, set[_Way]] = {}
    for sequence, t in ways:
        for byte in sequence[0]:
            out.setdefault(byte, set()).add((sequence[1:], t))
    return out


def _intervals_beyond(dfa: Dfa) -> list[tuple[int, int, int]]:
    out = []
    for i, start in enumerate(dfa.starts):
        end = dfa.starts[i + 1] - 1 if i + 1 < len(dfa.starts) else ir.MAX_CODE_POINT
        for low, high in ((0x80, 0xD7FF), (0xE000, ir.MAX_CODE_POINT)):
            if max(start, low) <= min(end, high):
                out.append((max(start, low), min(end, high), dfa.classes[i]))
    return out


def _raw_sequences(ranges: ir.Ranges) -> list[tuple[frozenset[int], ...]]:
    return [tuple(frozenset(range(a, b + 1)) for a, b in s) for s in utf8_sequences(ranges)]


def _escape_sequences(ranges: ir.Ranges) -> list[tuple[frozenset[int], ...]]:
    r"""Return the sequences that may follow `\u` for these code points, all of them beyond ASCII."""
    out: list[tuple[frozenset[int], ...]] = []
    middle = (frozenset((BACKSLASH,)), frozenset((ord("u"),)))
    for low, high in ranges:
        if low <= 0xFFFF:
            out.extend(_hex_sequences(low, min(high, 0xFFFF), 4))
        if high > 0xFFFF:
            a, b = max(low, 0x10000) - 0x10000, high - 0x10000
            while a <= b:
                top = a >> 10
                if a & 0x3FF == 0 and b - a >= 0x3FF:
                    last = (b + 1) // 0x400 - 1
                    for h in _hex_sequences(0xD800 + top, 0xD800 + last, 4):
                        out.extend((*h, *middle, *low_half) for low_half in _hex_sequences(0xDC00, 0xDFFF, 4))
                    a = (last + 1) << 10
                else:
                    stop = min(b, (top << 10) | 0x3FF)
                    for h in _hex_sequences(0xD800 + top, 0xD800 + top, 4):
                        lows = _hex_sequences(0xDC00 + (a & 0x3FF), 0xDC00 + (stop & 0x3FF), 4)
                        out.extend((*h, *middle, *low_half) for low_half in lows)
                    a = stop + 1
    return out


def _hex_sequences(low: int, high: int, digits: int) -> list[tuple[frozenset[int], ...]]:
    """Return sequences of sets of hex digits that write exactly the numbers low..high."""
    if digits == 0:
        return [()]
    shift = 4 * (digits - 1)
    full = (1 << shift) - 1
    first, last = low >> shift, high >> shift
    if first == last:
        return [(frozenset(_HEX[first]), *rest) for rest in _hex_sequences(low & full, high & full, digits - 1)]
    out: list[tuple[frozenset[int], ...]] = []
    if low & full:
        out.extend((frozenset(_HEX[first]), *r) for r in _hex_sequences(low & full, full, digits - 1))
        first += 1
    tail: list[tuple[frozenset[int], ...]] = []
    if high & full != full:
        tail = [(frozenset(_HEX[last]), *r) for r in _hex_sequences(0, high & full, digits - 1)]
        last -= 1
    if first <= last:
        middle = frozenset(b for n in range(first, last + 1) for b in _HEX[n])
        out.append((middle, *([frozenset(b for n in range(16) for b in _HEX[n])] * (digits - 1))))
    return out + tail


def is_plain(text: str) -> bool:
    """Tell whether each character of a text is written in one way, as one byte."""
    return text.isascii() and text.isprintable() and '"' not in text and "\\" not in text and "/" not in text


def char_sequences(char: str) -> list[tuple[frozenset[int], ...]]:
    """Return the ways to write one code point inside a JSON string, as sequences of byte sets."""
    code = ord(char)
    if char in '"\\':
        return [(frozenset((BACKSLASH,)), frozenset((code,)))]
    out: list[tuple[frozenset[int], ...]] = []
    if code >= 0x20 and not 0xD800 <= code <= 0xDFFF:
        out.append(tuple(frozenset((b,)) for b in char.encode()))
    if code == 0x2F:
        out.append((frozenset((BACKSLASH,)), frozenset((code,))))
    if code < 0x20:
        out.extend((frozenset((BACKSLASH,)), frozenset((ord(c),))) for c, v in _SHORT.items() if v == code)
    if code < 0x20 or code >= 0x80:
        prefix = (frozenset((BACKSLASH,)), frozenset((ord("u"),)))
        if code < 0x80 or 0xD800 <= code <= 0xDFFF:
            out.extend((*prefix, *s) for s in _hex_sequences(code, code, 4))
        else:
            out.extend((*prefix, *s) for s in _escape_sequences(((code, code),)))
    return out


@cache
def free_string_rows() -> Content:
    """Return the table of any JSON string, with all escapes. The closing quote leaves through exit 0.

    Rows: 0 the content, between characters; 1 after a backslash; 2-5 four hex digits; 6-12 the tails of UTF-8.
    """
    rows = np.full((13, 256), REFUSE, dtype=np.int32)
    rows[0, 0x20:0x80] = 0
    rows[0, QUOTE] = leave(0)
    rows[0, BACKSLASH] = 1
    for c in _SHORT:
        rows[1, ord(c)] = 0
    rows[1, ord("u")] = 2
    for i in range(4):
        _set_hex(rows[2 + i], range(16), 3 + i if i < 3 else 0)
    block = _block()[: _F4 + 1]
    rows[6:13] = np.where(block == _FINAL, 0, np.where(block >= 0, block + 6, REFUSE))
    _lead_bytes(rows, np.array([0]), np.array([6]))
    return Content(*compress_rows(rows), 1, np.array([0]))


@lru_cache(maxsize=256)
def counted_rows(num_chars: int, closable: bool, last: bool) -> Content:
    """Return the table of strings of up to `num_chars` more characters. State i has read i of them.

    closable: the quote (exit 0) may come after any number of characters; else only after `num_chars`, and only with
    `last`.
    last: nothing may follow state num_chars; else the last character leaves through exit 1.
    """
    n = num_chars + 1
    chain = [[i + 1] for i in range(num_chars)] + [[-1]]
    dfa = Dfa(ir.MAX_CODE_POINT, [0], [0], 1, chain, [True] * n)
    labels = [0 if closable else -1] * n
    if last:
        return json_string_rows(dfa, labels if closable else [*([-1] * num_chars), 0])
    labels[num_chars] = 0  # keeps the rows that lead there alive; replaced by the exit below
    content = json_string_rows(dfa, labels)
    rows = content.rows.copy()
    rows[rows == num_chars] = leave(1)
    # the last character leaves through exit 1: this table does not know what follows
    beyond = np.where(content.beyond == num_chars, -2, content.beyond)
    return Content(rows, content.byte_class, n, beyond)


@loop
def _alive_rows(rows, alive):  # type: ignore[no-untyped-def]
    n, width = rows.shape
    changed = True
    while changed:
        changed = False
        for i in range(n - 1, -1, -1):
            if alive[i]:
                continue
            for c in range(width):
                t = rows[i, c]
                if t < -1 or (t >= 0 and alive[t]):
                    alive[i] = True
                    changed = True
                    break
    for i in range(n):
        for c in range(width):
            t = rows[i, c]
            if t >= 0 and not alive[t]:
                rows[i, c] = -1


def trim(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Refuse, in place, every entry that leads to a state from which no exit is reached."""
    alive = np.zeros(len(rows), dtype=np.bool_)
    _alive_rows(rows, alive)
    return rows


@loop
def _drop(rows, gone):  # type: ignore[no-untyped-def]
    n, width = rows.shape
    for i in range(n):
        for c in range(width):
            if rows[i, c] < -1:
                for g in gone:
                    if rows[i, c] == g:
                        rows[i, c] = -1
                        break


def drop_exits(rows: NDArray[np.int32], gone: NDArray[np.int32]) -> None:
    """Refuse, in place, these exits and all entries that lead only to them."""
    if len(gone):
        _drop(rows, gone)
        trim(rows)


@cache
def any_string_content() -> Content:
    """Return the table of any string, written as constrained strings are. The quote leaves through exit 0."""
    return json_string_rows(Dfa(ir.MAX_CODE_POINT, [0], [0], 1, [[0]], [True]), [0])


@lru_cache(maxsize=4096)
def ways_to_write(text: str) -> list[bytes]:
    """Return all ways to write a short text inside a constrained string.

    If there are more than 4,096, return only two: the text in UTF-8, and the text in ASCII.
    """
    out = [b""]
    for char in text:
        ways = [w for s in char_sequences(char) for w in _spell(s)]
        out = [a + w for a in out for w in ways]
        if len(out) > 4096:
            return [
                json.dumps(text, ensure_ascii=False)[1:-1].encode("utf-8", "surrogatepass"),
                json.dumps(text)[1:-1].encode(),
            ]
    return out


def _spell(sequence: tuple[frozenset[int], ...]) -> list[bytes]:
    out = [b""]
    for step in sequence:
        out = [a + bytes((b,)) for a in out for b in sorted(step)]
    return out
