"""Builds the table of many plain ASCII strings as a trie, in one compiled pass: alone, or on top of the table of any
string.

Texts with escapes or other characters are not handled here, but in `tables.overlay`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.machine.frame import REFUSE, compress_rows, leave
from ramet.grammar.regular.strings import QUOTE, Wide, any_string_content
from ramet.loops import loop


@cache
def _any_string_classes() -> tuple[Wide, NDArray[np.uint8]]:
    """Return any_string_content(0) as (rows over byte classes, byte classes)."""
    return compress_rows(any_string_content(0).rows)


def plain_trie(free_exit: int | None, entries: dict[str, int]) -> tuple[Wide, NDArray[np.uint8], int] | None:
    """Do as tables.overlay, over byte classes, for plain ASCII texts; None if some text is not plain ASCII.

    free_exit: the exit of all strings that are no entry; None: no other string is allowed. Returns (rows, byte classes,
    number of states between characters).
    """
    texts = sorted(entries)
    joined = "".join(texts)
    if not joined.isascii() or not joined.isprintable() or '"' in joined or "\\" in joined or "/" in joined:
        return None
    flat = np.frombuffer(joined.encode(), dtype=np.uint8)
    lengths = np.array([len(t) for t in texts], dtype=np.int64)
    labels = np.array([leave(entries[t]) for t in texts], dtype=np.int32)
    used = np.flatnonzero(np.bincount(flat, minlength=1))
    byte_class = np.zeros(256, dtype=np.uint8)
    if free_exit is None:
        byte_class[used] = np.arange(1, len(used) + 1)
        byte_class[QUOTE] = len(used) + 1
        # one row more than the texts can need; shortened below
        rows = np.full((len(flat) + 1, len(used) + 2), REFUSE, dtype=np.int32)
        n = _fill_trie(rows, flat, lengths, byte_class[flat], labels, len(used) + 1, -1)
        return rows[:n], byte_class, 0
    old, old_class = _any_string_classes()
    byte_class[:] = old_class
    width = old.shape[1]
    byte_class[used] = np.arange(width, width + len(used))
    columns = np.concatenate([np.arange(width), old_class[used]])
    rows = np.empty((len(flat) + 1 + len(old), width + len(used)), dtype=np.int32)
    rows[: len(flat) + 1] = old[0, columns]
    n = _fill_trie(rows, flat, lengths, byte_class[flat], labels, int(byte_class[QUOTE]), leave(free_exit))
    below = old[:, columns]
    rows = rows[: n + len(old)]
    rows[n:] = np.where(below >= 0, below + n, below)
    rows[n:][below < -1] = leave(free_exit)
    _link_base(rows, n)
    return rows, byte_class, n + 1


@loop
def _fill_trie(rows, flat, lengths, classes, labels, quote, free):  # type: ignore[no-untyped-def]
    """Lay out the sorted texts as a trie in `rows`; return the number of rows used.

    Entries of `rows` that are >= 0 belong to the other table. They are kept as -1000000 - entry, for `_link_base`.
    """
    width = rows.shape[1]
    if free != -1:
        for i in range(len(flat) + 1):
            for c in range(width):
                if rows[i, c] >= 0:
                    rows[i, c] = -1000000 - rows[i, c]
                elif rows[i, c] < -1:
                    rows[i, c] = free
    used = 1
    at = 0
    for t in range(len(lengths)):
        node = 0
        for k in range(lengths[t]):
            c = classes[at + k]
            to = rows[node, c]
            if to < 0:
                to = used
                used += 1
                rows[node, c] = to
            node = to
        rows[node, quote] = labels[t]
        at += lengths[t]
    return used


@loop
def _link_base(rows, n):  # type: ignore[no-untyped-def]
    """Turn the kept entries of the other table into rows. Its rows now begin at n."""
    for i in range(n):
        for c in range(rows.shape[1]):
            if rows[i, c] <= -1000000:
                rows[i, c] = n + (-1000000 - rows[i, c])
