"""Passages of a given text, as a suffix automaton: a model can quote only what is in the text.

Source: A. Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985), built online.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Literal

from ramet.errors import InvalidGrammar
from ramet.grammar import ir
from ramet.grammar.regular.dfas import table_of_edges

Unit = Literal["characters", "words"]


def substring_of(text: str, *, unit: Unit = "characters", allow_empty: bool = False) -> ir.Table:
    """Return the automaton of the passages of `text`.

    unit: with "characters", a passage begins and ends between any two characters. With "words", it begins at the
    beginning of a word (a run of characters other than white space) and ends at the end of one. About two states per
    unit.
    Raises: InvalidGrammar if there is no passage.
    """
    if not isinstance(text, str):
        raise InvalidGrammar(f"the text to quote from is a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidGrammar("the text to quote from has a lone surrogate, which UTF-8 cannot write") from error
    if unit == "characters":
        symbols: list[str] = list(text)
    elif unit == "words":
        symbols = re.findall(r"\S+|\s+", text)
        if symbols and symbols[-1].isspace():
            symbols.pop()
    else:
        raise InvalidGrammar(f'unit is {unit!r} but must be "characters" or "words"')
    if not allow_empty and not symbols:
        raise InvalidGrammar("the text to quote from has no " + unit)
    edges = _suffix_automaton(symbols)
    if unit == "words":  # a passage does not begin with the space between words
        edges[0] = {s: t for s, t in edges[0].items() if not s.isspace()}
    is_end = [allow_empty, *([True] * (len(edges) - 1))]
    if unit == "words":
        for row in edges:
            for symbol, state in row.items():
                is_end[state] = not symbol.isspace()
    return _over_bytes(edges, is_end, f"a text of {len(text):,} characters")


def _suffix_automaton(symbols: Sequence[str]) -> list[dict[str, int]]:
    """Return the edges of each state. Each substring leads to one state, and each state is reached by a substring."""
    edges: list[dict[str, int]] = [{}]
    link, length = [-1], [0]
    last = 0
    for symbol in symbols:
        state = len(edges)
        edges.append({})
        length.append(length[last] + 1)
        link.append(0)
        at = last
        while at >= 0 and symbol not in edges[at]:
            edges[at][symbol] = state
            at = link[at]
        if at >= 0:
            following = edges[at][symbol]
            if length[following] == length[at] + 1:
                link[state] = following
            else:
                clone = len(edges)
                edges.append(dict(edges[following]))
                length.append(length[at] + 1)
                link.append(link[following])
                while at >= 0 and edges[at].get(symbol) == following:
                    edges[at][symbol] = clone
                    at = link[at]
                link[following] = link[state] = clone
        last = state
    return edges


def _over_bytes(symbol_edges: list[dict[str, int]], is_end: list[bool], name: str) -> ir.Table:
    """Spell the symbols in bytes.

    A place is (the state reached or None, the symbols being read with the rest of each). Both parts are present only if
    one word is the beginning of another, such as "a" and "an".
    """
    spelled = [[(symbol.encode(), t) for symbol, t in row.items()] for row in symbol_edges]
    index: dict[Hashable, int] = {}
    places: list[tuple[int | None, list[tuple[bytes, int]]]] = []  # the state reached, symbols being read
    edges: list[dict[int, int]] = []

    def place(arrived: int | None, under_way: list[tuple[bytes, int]]) -> int:
        key = (arrived, tuple(under_way))
        found = index.get(key)
        if found is None:
            found = index[key] = len(places)
            places.append((arrived, under_way))
        return found

    place(0, [])
    at = 0
    while at < len(places):
        arrived, under_way = places[at]
        by_byte: dict[int, tuple[list[tuple[bytes, int]], list[int]]] = {}
        for rest, t in [*(spelled[arrived] if arrived is not None else ()), *under_way]:
            longer, ends = by_byte.setdefault(rest[0], ([], []))
            if len(rest) == 1:
                ends.append(t)
            else:
                longer.append((rest[1:], t))
        row: dict[int, int] = {}
        for byte, (longer, ends) in by_byte.items():
            assert len(ends) <= 1, "two symbols with one spelling"
            row[byte] = place(ends[0] if ends else None, sorted(longer))
        edges.append(row)
        at += 1
    accepting = [arrived is not None and is_end[arrived] for arrived, _ in places]
    return table_of_edges(edges, accepting, name)
