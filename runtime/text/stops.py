"""Where a text ends: stop strings and stop patterns, looked for in a text that comes piece by piece.

A character costs time for the matches that have begun, not for the text so far. Text that may become a match is held
back. Sources: Knuth-Morris-Pratt for a string; for a pattern its deterministic automaton, run from every place where a
match may begin (Thompson's search, with the states of the automaton).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ramet.errors import GrammarError, InvalidRequest
from ramet.grammar import ir
from ramet.grammar.deadline import time_limit
from ramet.grammar.text.regex import constructs, parse_regex

if TYPE_CHECKING:
    from ramet.grammar.regular.dfas import Dfa  # loads numba

MAX_PATTERN_STATES = 256  # the matches that can have begun at a time: they are followed on the engine's thread
_MAX_PARTS = 2_000  # of a pattern with its repetitions written out: so many compile in some ten milliseconds
_MAX_COMPILE_S = 1.0


class _StopString:
    """`name`: what a match is reported as. `length`: of the longest match that has begun and may become complete.

    `read` takes a character, and returns the length of the longest match that ends with it, 0 if there is none.
    """

    __slots__ = ("_failures", "length", "name")

    def __init__(self, name: str, failures: Sequence[int], length: int = 0) -> None:
        self.name, self.length = name, length
        self._failures = failures

    def read(self, character: str) -> int:
        stop, length = self.name, self.length
        while length and stop[length] != character:
            length = self._failures[length - 1]
        if stop[length] == character:
            length += 1
        is_complete = length == len(stop)
        self.length = 0 if is_complete else length  # after a match, nothing more is read
        return length if is_complete else 0

    def copy(self) -> _StopString:
        return _StopString(self.name, self._failures, self.length)


class _StopPattern:
    """As _StopString. `begun`: (state, length) of each match that has begun, the longest first, no state twice."""

    __slots__ = ("_begun", "_dfa", "name")

    def __init__(self, name: str, dfa: Dfa, begun: Sequence[tuple[int, int]] = ()) -> None:
        self.name = name
        self._dfa, self._begun = dfa, begun

    @property
    def length(self) -> int:
        return self._begun[0][1] if self._begun else 0

    def read(self, character: str) -> int:
        dfa, symbol, longest = self._dfa, ord(character), 0
        after: dict[int, int] = {}
        for state, length in (*self._begun, (0, 0)):
            state = dfa.step(state, symbol)
            if state >= 0:
                after.setdefault(state, length + 1)
                if dfa.accepting[state]:
                    longest = max(longest, length + 1)
        self._begun = tuple(after.items())
        return longest

    def copy(self) -> _StopPattern:
        return _StopPattern(self.name, self._dfa, self._begun)


class StopScanner:
    """Looks for stop strings and patterns in a stream of text, and holds back text that may become a match.

    The match that is complete first counts; of several that end at the same character, the longest. The cuts between
    pieces make no difference. After a match no more text is returned. `matched`: the stop string that matched, or the
    pattern. `num_kept`: the number of characters returned so far; after a match, the start of the match.
    """

    __slots__ = ("_held", "_stops", "matched", "num_kept")

    def __init__(self, stops: Iterable[str], patterns: Iterable[str] = ()) -> None:
        """`stops`: strings that are not empty. Raises ValueError for an empty one, and as `check_pattern`."""
        stops = tuple(stops)
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops: list[_StopString | _StopPattern] = [_StopString(stop, _failure_table(stop)) for stop in stops]
        self._stops += [_StopPattern(pattern, _compiled(pattern)) for pattern in patterns]
        self._held = ""
        self.matched: str | None = None
        self.num_kept = 0

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next text. Return the text that is released now, and the stop that matched, if any."""
        if self.matched is not None:
            return "", self.matched
        for position, character in enumerate(text):
            longest = 0
            for stop in self._stops:
                length = stop.read(character)
                if length > longest:
                    longest, self.matched = length, stop.name
            if longest:
                known = self._held + text[: position + 1]
                return self._give(known[: len(known) - longest], ""), self.matched
        known = self._held + text
        border = len(known) - max((stop.length for stop in self._stops), default=0)
        return self._give(known[:border], known[border:]), None

    def ends_with(self, text: str, following: str) -> bool:
        """Return whether a match that begins in `text`, or right after it, would end in it or in `following`.

        Takes neither.
        """
        num_known = self.num_kept + len(self._held) + len(text)
        before = self._stops, self._held, self.num_kept
        self._stops = [stop.copy() for stop in self._stops]
        found = self.push(text)[1] is not None or self.push(following)[1] is not None
        found = found and self.num_kept <= num_known
        self._stops, self._held, self.num_kept = before
        self.matched = None
        return found

    def flush(self, text: str = "") -> str:
        """Take the last text. Return it with the held-back text, up to a match in it; "" after a match."""
        safe, matched = self.push(text)
        return safe if matched is not None else safe + self._give(self._held, "")

    def _give(self, text: str, held: str) -> str:
        self._held = held
        self.num_kept += len(text)
        return text


def check_pattern(pattern: str) -> None:
    """Raise InvalidRequest if a text cannot end where this pattern matches.

    It says why: the pattern does not parse, is too large, matches an empty text, or depends on what stands around the
    match (anchors, lookaheads).
    """
    _compiled(pattern)


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Dfa:
    from ramet.grammar.regular.languages import compile_chars, has_lookahead  # loads numba: only patterns need it

    # The first patterns of a process load compiled code, for which this one does not pay.
    compile_chars(parse_regex("a*?b", is_lexeme=True).item)
    try:
        with time_limit(_MAX_COMPILE_S, "compiling a stop pattern"):
            node = parse_regex(pattern, is_lexeme=True).item
            if has_lookahead(node) or any(token in (r"\b", r"\B") for _, token in constructs(pattern)):
                raise _refused(pattern, "depends on the text around the match; leave out lookaheads, \\b and \\B")
            if _num_parts(node) > _MAX_PARTS:
                raise _refused(pattern, f"has more than {_MAX_PARTS:,} parts with its repetitions written out")
            dfa = compile_chars(node, max_states=MAX_PATTERN_STATES, name=f"the pattern {pattern[:60]!r}")
    except GrammarError as error:
        raise _refused(pattern, f"cannot end a text: {error}") from error
    if dfa.accepting[0]:
        raise _refused(pattern, "matches an empty text, so the answer would end at once")
    return dfa


def _num_parts(node: ir.Node) -> int:
    """Return how many characters and classes a node has, with its repetitions written out."""
    match node:
        case ir.Bytes(value):
            return len(value)
        case ir.Repeat(item, low, high):
            return _num_parts(item) * max(low if high is None else high, 1)
        case ir.Concatenation(parts) | ir.Choice(parts) | ir.Intersect(parts):
            return sum(map(_num_parts, parts))
        case ir.Lookahead(item) | ir.Complement(item) | ir.Terminal(item):
            return _num_parts(item)
        case _:
            return 1


def _refused(pattern: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"stop_regex has {pattern[:60]!r}, which {reason}", param="stop_regex")


def _failure_table(pattern: str) -> list[int]:
    """table[i]: length of the longest proper prefix of pattern[: i + 1] that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[length] != pattern[index]:
            length = table[length - 1]
        if pattern[length] == pattern[index]:
            length += 1
        table[index] = length
    return table
