"""Regular languages on the code points of strings: patterns, formats, lengths.

Their automata are made once per process.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from ramet.grammar import deadline, ir
from ramet.grammar.json_schema.algebra.values import Strings
from ramet.grammar.json_schema.schema import formats, pattern
from ramet.grammar.regular import dfas
from ramet.grammar.regular import languages as regular
from ramet.grammar.regular.dfas import Dfa

FEW = 64
_SURROGATE = re.compile("[\ud800-\udfff]")


class Languages:
    """Regular languages on strings, by number. Automata are made when needed, and all compilations share them."""

    def __init__(self, max_states: int) -> None:
        self.max_states = max_states
        self.sources: list[tuple[str, str]] = []  # (kind, source): see `language_node`
        self._index: dict[tuple[str, str], int] = {}
        self._dfas: dict[int, Dfa] = {}
        self._conjunctions: dict[object, Dfa] = {}
        self._few: dict[tuple[tuple[int, ...], frozenset[int]], tuple[frozenset[str] | None]] = {}
        self._signatures: dict[tuple[int, ...], tuple[Dfa, list[frozenset[int]]]] = {}

    def add(self, kind: str, source: str) -> int:
        """Return the number of a language.

        Raises: InvalidRegex if its source does not parse.
        """
        found = self._index.get((kind, source))
        if found is None:
            language_node(kind, source)
            found = self._index[kind, source] = len(self.sources)
            self.sources.append((kind, source))
        return found

    def add_automaton(self, name: str, dfa: Dfa) -> int:
        """Return the number of a language that is given only by its automaton over code points."""
        key = (name, repr(dfa.key()))
        found = self._index.get(key)
        if found is None:
            found = self._index[key] = len(self.sources)
            self.sources.append(key)
            self._dfas[found] = dfa
        return found

    def name(self, number: int) -> str:
        kind, source = self.sources[number]
        return f"{kind} {source[:100]!r}"

    def dfa(self, number: int) -> Dfa:
        found = self._dfas.get(number)
        if found is None:
            found = self._dfas[number] = automaton(*self.sources[number], self.max_states)
        return found

    def signatures(self, numbers: tuple[int, ...]) -> tuple[Dfa, list[frozenset[int]]]:
        """Return which of these languages a text can match at once: (automaton whose label is 1 + index, the sets)."""
        found = self._signatures.get(numbers)
        if found is None:
            sets: dict[frozenset[int], int] = {}

            def label(accepts: tuple[bool, ...]) -> int:
                matching = frozenset(n for n, a in zip(numbers, accepts, strict=True) if a)
                return 1 + sets.setdefault(matching, len(sets))

            dfa = dfas.product([self.dfa(n) for n in numbers], label, max_states=self.max_states)
            found = self._signatures[numbers] = dfa, list(sets)
        return found

    def few_of_signature(self, numbers: tuple[int, ...], matching: frozenset[int]) -> frozenset[str] | None:
        """Return the texts that match exactly these of the languages; None if they are FEW or more."""
        found = self._few.get((numbers, matching))
        if found is None:
            dfa, sets = self.signatures(numbers)
            label = 1 + sets.index(matching)
            dfa = replace(dfa, accepting=[a == label for a in dfa.accepting])
            is_few = has_few_texts(dfa, 0, None, FEW)
            found = self._few[numbers, matching] = (frozenset(few_texts(dfa, 0, None, FEW)) if is_few else None,)
        return found[0]

    def accepts(self, number: int, text: str) -> bool:
        return self.dfa(number).accepts(map(ord, text))

    def contains(self, spec: Strings, text: str) -> bool:
        if spec.finite is not None:
            return text in spec.finite
        low, high = self.bounds(spec)
        if len(text) < low or (high is not None and len(text) > high) or text in spec.excluded:
            return False
        return all(self.accepts(n, text) == wanted for n, wanted in spec.languages)

    def base(self, spec: Strings) -> Dfa:
        """Return the automaton of a spec's lengths and languages, without `excluded`."""
        key = (spec.low, spec.high, spec.languages)
        found = self._conjunctions.get(key)
        if found is None:
            found = None
            name = " and ".join(self.name(n) for n, _ in spec.languages) or "a string's length"
            parts = [
                self.dfa(n) if wanted else _writable(dfas.complement(self.dfa(n)))
                for n, wanted in sorted(spec.languages)
            ]
            parts.sort(key=lambda d: len(d.transitions))
            if spec.low or spec.high is not None or not parts:
                parts.append(length_automaton(spec.low, spec.high))
            for part in parts:  # one by one, so that each result in between is minimal
                found = part if found is None else dfas.intersect([found, part], max_states=self.max_states, name=name)
            assert found is not None
            self._conjunctions[key] = found
        return found

    def bounds(self, spec: Strings) -> tuple[int, int | None]:
        """Return the least and the largest number of characters of a text, by the spec and by its formats."""
        high = spec.high
        for number, wanted in spec.languages:
            kind, source = self.sources[number]
            limit = formats.MAX_LENGTHS.get(source) if kind == "format" and wanted else None
            if limit is not None and (high is None or high > limit):
                high = limit
        return spec.low, high

    def whole(self, spec: Strings) -> Dfa:
        """Return the automaton of a spec, with the spec's own lengths, but without the limits of its formats
        (`bounds`).
        """
        if spec.finite is not None:
            return _finite(spec.finite)
        base = self.base(spec)
        if not spec.excluded:
            return base
        return dfas.intersect([base, dfas.complement(_finite(spec.excluded))], max_states=self.max_states)

    def describe(self, specs: Iterable[Iterable[Strings]]) -> str:
        """Return the languages that specs name, for messages."""
        found = dict.fromkeys(n for group in specs for s in group for n, _ in sorted(s.languages))
        return " and ".join(self.name(n) for n in found) or "a string's length"

    def is_empty(self, spec: Strings) -> bool:
        """Tell whether no string is in the set."""
        if spec.finite is not None:
            return not spec.finite
        low, high = self.bounds(spec)
        if high is not None and low > high:
            return True
        if not spec.languages:
            return high == 0 and "" in spec.excluded
        if len(spec.languages) == 1 and spec.low == 0 and spec.high is None and not spec.excluded:
            ((number, wanted),) = spec.languages
            if wanted and number not in self._dfas and _is_plain(*self.sources[number]):
                return False
        base = self.base(spec._replace(low=0, high=None))
        if not _has_length(base, low, high):
            return True
        if not spec.excluded:
            return False
        return all(t in spec.excluded for t in few_texts(base, low, high, len(spec.excluded) + 1))


@lru_cache(maxsize=2048)
def language_node(kind: str, source: str) -> ir.Node:
    """Return the texts in which a "pattern" is found, or the texts of a "format"."""
    return formats.format_node(source) if kind == "format" else pattern.search(source)


@lru_cache(maxsize=2048)
def automaton(kind: str, source: str, max_states: int) -> Dfa:
    """Return the automaton of a language over code points. The result is kept."""
    name = f"{kind} {source[:100]!r}"
    return _writable(regular.compile_chars(language_node(kind, source), max_states=max_states, name=name))


def _writable(dfa: Dfa) -> Dfa:
    """Return the automaton without texts that have single surrogates, which UTF-8 cannot write."""
    inside, outside = set[int](), set[int]()
    for i, start in enumerate(dfa.starts):
        end = dfa.starts[i + 1] - 1 if i + 1 < len(dfa.starts) else ir.MAX_CODE_POINT
        if start <= 0xDFFF and end >= 0xD800:
            inside.add(dfa.classes[i])
        if start < 0xD800 or end > 0xDFFF:
            outside.add(dfa.classes[i])
    return dfa if inside <= outside else dfas.intersect([dfa, regular.compile_chars(ir.ANY_TEXT)])


@lru_cache(maxsize=2048)
def _is_plain(kind: str, source: str) -> bool:
    return _surely_not_empty(language_node(kind, source))


def _surely_not_empty(node: ir.Node) -> bool:
    """Tell whether the syntax alone shows that some text matches (no lookaheads, no empty classes)."""
    match node:
        case ir.Chars(ranges):
            return any(low < 0xD800 or high > 0xDFFF for low, high in ranges)
        case ir.Concatenation(parts):
            return all(_surely_not_empty(p) for p in parts)
        case ir.Choice(options):
            return bool(options) and all(_surely_not_empty(o) for o in options)
        case ir.Repeat(item, low, _):
            return low == 0 or _surely_not_empty(item)
        case ir.Bytes():
            return True
        case _:
            return False


def _has_length(dfa: Dfa, low: int, high: int | None) -> bool:
    """Tell whether there is a text of low..high characters. Steps over the states that texts of each length reach."""
    states = {0} if dfa.transitions else set[int]()
    last = low + len(dfa.transitions) if high is None else high
    for length in range(last + 1):
        if length >= low and any(dfa.accepting[s] for s in states):
            return True
        following = {t for s in states for t in dfa.transitions[s] if t >= 0}
        if length >= low and following <= states and length > low + len(dfa.transitions):
            return False
        deadline.check()
        states = following
        if not states:
            return False
    return False


def few_texts(dfa: Dfa, low: int, high: int | None, limit: int) -> Iterable[str]:
    """Return texts of the language with low..high characters, shortest first, up to `limit`.

    These are enough to see whether a finite set covers the language. Of the beginnings that lead to one state, `limit`
    are enough for as many texts.
    """
    useful = _useful_states(dfa)
    level: list[tuple[int, str]] = [(0, "")]
    found = length = 0
    while level and found < limit and (high is None or length <= high):
        following: list[tuple[int, str]] = []
        num_of: Counter[int] = Counter()  # beginnings in `following`, by the state that they lead to
        deadline.check()
        for state, text in level:
            if dfa.accepting[state] and length >= low:
                found += 1
                yield text
                if found >= limit:
                    return
            for i, start in enumerate(dfa.starts):
                to = dfa.transitions[state][dfa.classes[i]]
                end = dfa.starts[i + 1] if i + 1 < len(dfa.starts) else ir.MAX_CODE_POINT + 1
                if to in useful:
                    chars = range(start, min(end, start + limit - num_of[to]))
                    following.extend((to, text + chr(c)) for c in chars)
                    num_of[to] += len(chars)
        level = following
        length += 1


def short_texts(dfa: Dfa, low: int, high: int | None, count: int) -> list[str]:
    """Return up to `count` texts with low..high characters, about the shortest, of letters and digits if possible."""
    useful = _useful_states(dfa)
    firsts = [max(start, 32) for start in dfa.starts]
    chars = [*dict.fromkeys([*map(ord, "abcdefghijklmnopqrstuvwxyz0123456789"), *firsts])]
    classes = [dfa.classes[bisect.bisect_right(dfa.starts, c) - 1] for c in chars]
    level = [(0, "")] if 0 in useful else []
    found: list[str] = []
    length = 0
    while level and len(found) < count and (high is None or length <= high):
        deadline.check()
        if length >= low:
            found += [text for state, text in level if dfa.accepting[state]]
        following: list[tuple[int, str]] = []
        for state, text in level:
            row = dfa.transitions[state]
            following += [
                (row[c], text + chr(char)) for char, c in zip(chars, classes, strict=True) if row[c] in useful
            ]
            if len(following) >= count:
                break
        level = following
        length += 1
    return found[:count]


def has_few_texts(dfa: Dfa, low: int, high: int | None, enough: int) -> bool:
    """Tell whether there are fewer than `enough` texts of low..high characters. Counts the ways to each state by
    length.
    """
    sizes = [0] * dfa.num_classes
    for i, start in enumerate(dfa.starts):
        sizes[dfa.classes[i]] += (dfa.starts[i + 1] if i + 1 < len(dfa.starts) else ir.MAX_CODE_POINT + 1) - start
    useful = _useful_states(dfa)
    ways = {0: 1} if 0 in useful else {}
    total = length = 0
    while ways and (high is None or length <= high):
        deadline.check()
        if high is None and length > low + len(dfa.transitions):
            return False  # a cycle: infinitely many texts
        if length >= low:
            total += sum(n for state, n in ways.items() if dfa.accepting[state])
            if total >= enough:
                return False
        following: dict[int, int] = {}
        for state, n in ways.items():
            for c, to in enumerate(dfa.transitions[state]):
                if to in useful:
                    following[to] = min(following.get(to, 0) + n * sizes[c], enough)
        ways, length = following, length + 1
    return True


def _useful_states(dfa: Dfa) -> set[int]:
    """Return the states from which a text can be completed."""
    before: dict[int, list[int]] = {}
    for state, row in enumerate(dfa.transitions):
        for to in row:
            before.setdefault(to, []).append(state)
    found = {s for s, accepts in enumerate(dfa.accepting) if accepts}
    stack = list(found)
    while stack:
        for s in before.get(stack.pop(), ()):
            if s not in found:
                found.add(s)
                stack.append(s)
    return found


def _finite(texts: frozenset[str]) -> Dfa:
    """Return the automaton of these texts, without those that have single surrogates, which UTF-8 cannot write."""
    return regular.compile_chars(ir.one_of(sorted(t for t in texts if not _SURROGATE.search(t))))


def length_automaton(low: int, high: int | None) -> Dfa:
    """Return the automaton of strings of low..high code points."""
    n = (low if high is None else high) + 1
    rows = [[i + 1] for i in range(n - 1)] + [[n - 1 if high is None else -1]]
    return Dfa(ir.MAX_CODE_POINT, [0], [0], 1, rows, [i >= low for i in range(n)])
