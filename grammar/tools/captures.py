"""Reads the captures of a finished text: follows the composed grammar through the text, as its automaton did.

    reader = capture_reader('{"sequence": ["n=", {"capture": "n", "of": {"regex": "[0-9]+"}}]}')
    reader.read("n=41")        # [Captured("n", 2, 4)]: the positions are characters

Every way to read the text is followed, side by side; equal parts at equal places are read once. So all recursion is
understood, left recursion included. If a text can be read in several ways, an earlier alternative is preferred, and
each part of a sequence takes as much as it can.

Source: memoised continuations as in Johnson, "Memoization in top-down parsing" (1995).
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal, TypeAlias

from ramet.errors import InvalidGrammar
from ramet.grammar import ir
from ramet.grammar.tools.composed import CaptureForm, Composed, is_leaf, table_of

MAX_WORK = 3_000_000  # bytes and steps for one text


@dataclass(frozen=True, slots=True)
class Captured:
    """A part of the text: its characters [begin, end)."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class _Leaf:
    """A regular part. rows[state][byte]: the next state, -1 if refused."""

    rows: list[list[int]]
    accepting: list[bool]


@dataclass(slots=True, eq=False)
class _Choice:
    """One of the parts. A reference to a rule and a capture (`name`) are choices of one part."""

    parts: list[int]
    name: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Chain:
    """Parts one after the other. Step k reads parts[min(k, ...)]; a text may end once `low` steps are done.

    A repeat has one part. Without `high`, the steps past `low` are not counted.
    """

    parts: list[int]
    low: int
    high: int | None

    def part(self, step: int) -> int | None:
        """Return the part that the step reads, or None if there are no more steps."""
        if self.high is not None and step >= self.high:
            return None
        return self.parts[step if len(self.parts) > 1 else 0]

    def after(self, step: int) -> int:
        return min(step + 1, self.low) if self.high is None else step + 1


_JSON: Final = "JSON value"
_Part: TypeAlias = _Leaf | _Choice | _Chain | Literal["JSON value"]
_State: TypeAlias = tuple[int, int]  # of a chain: step, position


@dataclass(slots=True, eq=False)
class _Entry:
    """One part that begins at one position. `ends`: its ends -> when each was found. Owner: one reading of a text.

    `waiting`: (entry, state of a chain) that goes on at each end. `before`: in a chain, the states that led to a state.
    """

    part: int
    begin: int
    ends: dict[int, int] = field(default_factory=dict)
    waiting: list[tuple[_Entry, _State]] = field(default_factory=list)
    before: dict[_State, list[_State]] = field(default_factory=dict)


class CaptureReader:
    """Reads texts of one grammar. It has no state of its own, so threads may share it."""

    def __init__(self, grammar: Composed) -> None:
        self.captures: dict[str, CaptureForm] = dict(grammar.captures)
        self._parts: list[_Part] = []
        self._rules: dict[str, _Choice] = {}
        self._rule_numbers: dict[str, int] = {}
        for name in grammar.rules.rules:
            self._rules[name] = _Choice([])
            self._rule_numbers[name] = self._add(self._rules[name])
        for name, node in grammar.rules.rules.items():
            self._rules[name].parts.append(self._compile(node))
        self._start = self._rule_numbers[grammar.rules.start]
        self._cyclic = _cyclic(self._parts)

    def _add(self, part: _Part) -> int:
        self._parts.append(part)
        return len(self._parts) - 1

    def _compile(self, node: ir.Node) -> int:
        if is_leaf(node):
            table = table_of(node)
            return self._add(_Leaf(table.transitions.tolist(), table.accepting.tolist()))
        match node:
            case ir.Concatenation(parts):
                found = [self._compile(part) for part in parts]
                return self._add(_Chain(found, len(found), len(found)))
            case ir.Choice(parts):
                return self._add(_Choice([self._compile(part) for part in parts]))
            case ir.Repeat(item, low, high):
                return self._add(_Chain([self._compile(item)], low, high))
            case ir.Named(item, name):
                return self._add(_Choice([self._compile(item)], name))
            case ir.Reference(rule):
                return self._rule_numbers[rule]
            case ir.JsonSchema():
                return self._add(_JSON)
        raise InvalidGrammar(f"{type(node).__name__} cannot hold a capture, a rule or a JSON value")

    def read(self, text: str) -> list[Captured]:
        """Return the captures in the order in which they begin; an outer one comes before those inside of it.

        Raises: ValueError if the text is not one of the grammar's, or has too many readings to follow.
        """
        return _Reading(self._parts, self._cyclic, text).captures(self._start)


class _Reading:
    """One text that is being read. Positions are bytes."""

    def __init__(self, parts: list[_Part], cyclic: frozenset[int], text: str) -> None:
        self.parts = parts
        self.cyclic = cyclic
        self.text = text
        self.data = text.encode()
        self.entries: dict[tuple[int, int], _Entry] = {}
        self.agenda: deque[tuple[_Entry, _State, int]] = deque()  # an entry goes on in a state, after an end
        self.fresh: deque[_Entry] = deque()
        self.num_found = 0
        self.work = 0
        self._characters: list[int] | None = None

    def captures(self, start: int) -> list[Captured]:
        root = self.entry(start, 0)
        while self.fresh or self.agenda:
            self.spend(1)
            if self.fresh:
                self.begin(self.fresh.popleft())
            else:
                self.go_on(*self.agenda.popleft())
        if len(self.data) not in root.ends:
            raise ValueError(f"the text is not one of its grammar: {self.text[:80]!r}")
        return self.chosen(root)

    def spend(self, amount: int) -> None:
        self.work += amount
        if self.work > MAX_WORK:
            raise ValueError(
                f"its text of {len(self.text):,} characters can be read in too many ways; end the parts by texts that "
                "tell them apart"
            )

    def entry(self, part: int, begin: int) -> _Entry:
        found = self.entries.get((part, begin))
        if found is None:
            found = self.entries[part, begin] = _Entry(part, begin)
            self.fresh.append(found)
        return found

    def ask(self, part: int, begin: int, entry: _Entry, state: _State) -> None:
        """Let an entry go on in a state wherever a part that begins here ends."""
        asked = self.entry(part, begin)
        asked.waiting.append((entry, state))
        self.agenda.extend((entry, state, end) for end in asked.ends)

    def ends(self, entry: _Entry, end: int) -> None:
        if end not in entry.ends:
            entry.ends[end] = self.num_found = self.num_found + 1
            self.agenda.extend((waiting, state, end) for waiting, state in entry.waiting)

    def begin(self, entry: _Entry) -> None:
        part = self.parts[entry.part]
        if isinstance(part, _Leaf):
            self.run(part, entry)
        elif isinstance(part, str):
            self.scan(entry)
        elif isinstance(part, _Choice):
            for option in part.parts:
                self.ask(option, entry.begin, entry, (0, entry.begin))
        else:
            self.reach(entry, part, (0, entry.begin))

    def go_on(self, entry: _Entry, state: _State, end: int) -> None:
        part = self.parts[entry.part]
        if not isinstance(part, _Chain):
            self.ends(entry, end)
            return
        step, begin = state
        if end == begin and step >= part.low:
            return  # an empty repetition adds nothing
        reached = part.after(step), end
        if reached in entry.before:
            entry.before[reached].append(state)
        else:
            entry.before[reached] = [state]
            self.reach(entry, part, reached)

    def reach(self, entry: _Entry, part: _Chain, state: _State) -> None:
        step, position = state
        if step >= part.low:
            self.ends(entry, position)
        following = part.part(step)
        if following is not None:
            self.ask(following, position, entry, state)

    def run(self, leaf: _Leaf, entry: _Entry) -> None:
        rows, accepting, state, at = leaf.rows, leaf.accepting, 0, entry.begin
        if not rows:
            return
        if accepting[0]:
            self.ends(entry, at)
        for byte in memoryview(self.data)[at:]:
            state = rows[state][byte]
            if state < 0:
                break
            at += 1
            if accepting[state]:
                self.ends(entry, at)
        self.spend(at - entry.begin)

    def scan(self, entry: _Entry) -> None:
        """Find the end of a JSON value. A number ends where it can't go on."""
        begin = self.characters[entry.begin]
        try:
            end = json.JSONDecoder().raw_decode(self.text, begin)[1]
        except (ValueError, RecursionError):
            return
        self.spend(end - begin)
        self.ends(entry, entry.begin + len(self.text[begin:end].encode()))

    @property
    def characters(self) -> list[int]:
        """Return the number of characters before each byte."""
        if self._characters is None:
            count, found = 0, []
            for byte in self.data:
                found.append(count - 1 if byte & 0xC0 == 0x80 else count)
                count += byte & 0xC0 != 0x80
            self._characters = [*found, count]
        return self._characters

    # --- choosing one way to read the text

    def chosen(self, root: _Entry) -> list[Captured]:
        found: list[Captured] = []
        stack = [(root, len(self.data))]
        while stack:
            entry, end = stack.pop()
            part = self.parts[entry.part]
            if isinstance(part, _Chain):
                stack.extend(reversed(self.links(entry, part, end)))
            elif isinstance(part, _Choice):
                if part.name is not None:
                    found.append(Captured(part.name, self.characters[entry.begin], self.characters[end]))
                options = (self.entries[option, entry.begin] for option in part.parts)
                stack.append((next(one for one in options if self.may_be_in(one, end, entry, end)), end))
        return found

    def may_be_in(self, inner: _Entry, inner_end: int, outer: _Entry, end: int) -> bool:
        """Return whether an entry with this end may be chosen inside of another one.

        On a cycle of parts that read the same text, only what was found before: so no choice comes back to itself.
        """
        if inner_end not in inner.ends:
            return False
        is_same = (inner.begin, inner_end) == (outer.begin, end)
        if not is_same or not {inner.part, outer.part} <= self.cyclic:
            return True
        return inner.ends[inner_end] < outer.ends[end]

    def links(self, entry: _Entry, part: _Chain, end: int) -> list[tuple[_Entry, int]]:
        """Return the entries and ends of the parts of a chain that ends here."""
        onward: dict[_State, list[_State]] = {}
        last = [(step, at) for step, at in [*entry.before, (0, entry.begin)] if at == end and step >= part.low]
        waiting, seen = list(last), {*last}
        while waiting:
            state = waiting.pop()
            for before in entry.before.get(state, ()):
                if not self.may_be_in(self.item(part, before), state[1], entry, end):
                    continue
                onward.setdefault(before, []).append(state)
                if before not in seen:
                    seen.add(before)
                    waiting.append(before)
        found: list[tuple[_Entry, int]] = []
        state = (0, entry.begin)
        while onward.get(state):
            following = max(onward[state], key=lambda one: one[1])
            found.append((self.item(part, state), following[1]))
            state = following
        return found

    def item(self, part: _Chain, state: _State) -> _Entry:
        number = part.part(state[0])
        assert number is not None
        return self.entries[number, state[1]]


def _cyclic(parts: list[_Part]) -> frozenset[int]:
    """Return a set with all parts that may hold themselves as a part that reads the same text."""
    empty = {i for i, part in enumerate(parts) if isinstance(part, _Leaf) and part.accepting and part.accepting[0]}
    changed = True
    while changed:
        fresh = {
            i
            for i, part in enumerate(parts)
            if (isinstance(part, _Choice) and not empty.isdisjoint(part.parts))
            or (isinstance(part, _Chain) and (part.low == 0 or empty.issuperset(part.parts)))
        } - empty
        empty |= fresh
        changed = bool(fresh)
    inside = {
        i: set(part.parts)
        if isinstance(part, _Choice) or len(part.parts) == 1
        else {one for k, one in enumerate(part.parts) if empty.issuperset(part.parts[:k] + part.parts[k + 1 :])}
        for i, part in enumerate(parts)
        if isinstance(part, _Choice | _Chain)
    }
    while True:
        kept = {i: held for i, some in inside.items() if (held := some & inside.keys())}
        if kept == inside:
            return frozenset(kept)
        inside = kept


@lru_cache(maxsize=64)
def capture_reader(source: str) -> CaptureReader:
    """Return the reader of a composed grammar, as JSON text. Raises as compiling the grammar does."""
    return CaptureReader(Composed.of(json.loads(source)))
