"""One of a list of texts, as a minimal acyclic automaton."""

from __future__ import annotations

from collections.abc import Iterable

from ramet.errors import InvalidGrammar
from ramet.grammar import ir
from ramet.grammar.regular.dfas import table_of_edges


def choices(texts: Iterable[str]) -> ir.Table:
    """Return the automaton of exactly these texts. Equal texts count once.

    Equal endings are shared, so long lists stay small.
    Raises: InvalidGrammar if there is no text, or one is not a str.
    """
    given = list(texts)
    for text in given:
        if not isinstance(text, str):
            raise InvalidGrammar(f"a choice is a str, not {type(text).__name__}: {text!r}")
    if not given:
        raise InvalidGrammar("there is nothing to choose from: the list of choices is empty")
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for text in sorted(set(given)):
        node = 0
        for byte in _utf8(text):
            found = children[node].get(byte)
            if found is None:
                found = children[node][byte] = len(children)
                children.append({})
                ends.append(False)
            node = found
        ends[node] = True
    return table_of_edges(*_share_endings(children, ends), name=f"a list of {len(given):,} choices")


def _share_endings(children: list[dict[int, int]], ends: list[bool]) -> tuple[list[dict[int, int]], list[bool]]:
    """Merge equal subtrees. A child's number is larger than its parent's, so one pass from the last suffices."""
    representative = list(range(len(children)))
    index: dict[tuple[bool, tuple[tuple[int, int], ...]], int] = {}
    for node in reversed(range(len(children))):
        edges = children[node] = {b: representative[t] for b, t in children[node].items()}
        representative[node] = index.setdefault((ends[node], tuple(sorted(edges.items()))), node)
    kept = [n for n in range(len(children)) if representative[n] == n]
    number = {n: i for i, n in enumerate(kept)}
    return [{b: number[t] for b, t in children[n].items()} for n in kept], [ends[n] for n in kept]


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidGrammar(f"the choice {text!r} has a lone surrogate, which UTF-8 cannot write") from error
