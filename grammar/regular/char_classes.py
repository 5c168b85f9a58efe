r"""Sets of code points as Python's `re` defines them: \d \w \s, and the characters that are equal when case is ignored.

Sets are `ir.Ranges`. No set holds surrogates, because they have no UTF-8 form.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import cache
from re import _casefix  # type: ignore[attr-defined]  # the extra equivalences that re itself applies

import numpy as np

from ramet.grammar.ir import Ranges, complement_ranges, normalize_ranges

EVERYTHING: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))
NEWLINE: Ranges = ((10, 10),)
NOT_NEWLINE: Ranges = ((0, 9), (11, 0xD7FF), (0xE000, 0x10FFFF))


@cache
def category(letter: str, is_ascii: bool) -> Ranges:
    r"""Return the set of `\d`, `\w` or `\s` (or of `\D`, `\W`, `\S`)."""
    if letter.isupper():
        return complement(category(letter.lower(), is_ascii))
    pattern = re.compile(rf"\{letter}+", re.ASCII if is_ascii else 0)
    out: list[tuple[int, int]] = []
    for text, first in ((_characters(0, 0xD7FF), 0), (_characters(0xE000, 0x10FFFF), 0xE000)):
        out.extend((first + m.start(), first + m.end() - 1) for m in pattern.finditer(text))
    return normalize_ranges(out)


def complement(ranges: Ranges) -> Ranges:
    """Return all code points that are not in `ranges`, except surrogates."""
    return intersect(complement_ranges(ranges), EVERYTHING)


def intersect(a: Ranges, b: Ranges) -> Ranges:
    """Return the code points in both sets."""
    out: list[tuple[int, int]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        low, high = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if low <= high:
            out.append((low, high))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(out)


def ignore_case(ranges: Ranges, is_ascii: bool) -> Ranges:
    """Return `ranges` and all characters that `re.IGNORECASE` treats as equal to one of them."""
    table = _case_table(is_ascii)
    cased = _cased(is_ascii)
    out = list(ranges)
    for low, high in ranges:
        at = bisect_left(cased, low)
        while at < len(cased) and cased[at] <= high:
            out.extend((c, c) for c in table[cased[at]])
            at += 1
    return normalize_ranges(out)


def characters(ranges: Ranges) -> str:
    """Return all characters of some ranges."""
    return "".join(_characters(low, high) for low, high in ranges)


def _characters(low: int, high: int) -> str:
    return np.arange(low, high + 1, dtype="<u4").tobytes().decode("utf-32-le")


@cache
def _cased(is_ascii: bool) -> list[int]:
    return sorted(_case_table(is_ascii))


@cache
def _case_table(is_ascii: bool) -> dict[int, tuple[int, ...]]:
    """Code point -> all code points equal to it when case is ignored, for those that equal more than themselves."""
    if is_ascii:
        pairs = [(c, c + 32) for c in range(ord("A"), ord("Z") + 1)]
        return {c: pair for pair in pairs for c in pair}
    lowered: dict[int, set[int]] = {}
    for first, last in ((0, 0xD7FF), (0xE000, 0x10FFFF)):
        text = _characters(first, last)
        # two letters have no simple lower case: one becomes two characters, the other depends on its position
        lower = text.replace("İ", "i").replace("Σ", "σ").lower()
        codes, lower_codes = (np.frombuffer(t.encode("utf-32-le"), dtype="<u4") for t in (text, lower))
        for at in np.flatnonzero(codes != lower_codes).tolist():
            low = int(lower_codes[at])
            lowered.setdefault(low, {low}).add(first + at)
    for low, others in _casefix._EXTRA_CASES.items():
        lowered.setdefault(low, {low})
        for other in others:
            lowered.setdefault(other, {other})
    out: dict[int, tuple[int, ...]] = {}
    for low, same in lowered.items():
        every = set(same)
        for other in _casefix._EXTRA_CASES.get(low, ()):
            every |= lowered[other]
        for code_point in same:
            out[code_point] = tuple(sorted(every))
    return out
