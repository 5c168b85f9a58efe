"""Regular languages: from IR nodes to deterministic automata, over code points or over bytes.

A node is compiled in continuation style ("this, and then that") to an alternating automaton whose only conjunctions
come from lookaheads; it is made deterministic by sets of conjunctions of positions. Without lookaheads these are the
usual subsets. Automata are minimal and trim: every state leads to an accepting one.

Not here: escapes of JSON strings (strings.py), recursion (pushdown.py).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarTooLarge, InvalidGrammar
from ramet.grammar import deadline, ir
from ramet.grammar.partition import equivalence

BYTE_MAX = 255
MAX_STATES = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class Dfa:
    """A deterministic automaton over the symbols 0..`max_symbol`; state 0 is the start.

    `starts`: ascending first symbols of intervals that cover the alphabet. `classes[i]`: the symbol class of interval
    i. `transitions[state][class]`: the next state, -1 where refused. Minimal and trim, unless built by hand.
    `accepting` may
    hold labels instead of truth: 0 refuses, others tell kinds of acceptance apart (see `product`).
    """

    max_symbol: int
    starts: list[int]
    classes: list[int]
    num_classes: int
    transitions: list[list[int]]
    accepting: list[int]
    _key: list[tuple[object, ...]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not any(self.accepting)

    def step(self, state: int, symbol: int) -> int:
        """Return the next state, -1 where refused."""
        return self.transitions[state][self.classes[bisect.bisect_right(self.starts, symbol) - 1]]

    def accepts(self, symbols: Iterable[int]) -> bool:
        state = 0
        for symbol in symbols:
            state = self.step(state, symbol)
            if state < 0:
                return False
        return bool(self.accepting[state])

    def key(self) -> tuple[object, ...]:
        """Equal for equal languages, if both automata are minimal (states are numbered breadth first)."""
        if not self._key:
            spans = tuple(
                tuple(
                    (start, row[c])
                    for i, (start, c) in enumerate(zip(self.starts, self.classes, strict=True))
                    if i == 0 or row[c] != row[self.classes[i - 1]]
                )
                for row in self.transitions
            )
            self._key.append((self.max_symbol, spans, tuple(self.accepting)))
        return self._key[0]


def compile_chars(node: ir.Node, *, max_states: int = MAX_STATES, name: str = "") -> Dfa:
    """Return the automaton over code points of a regular node (no Bytes that are not UTF-8, no Table)."""
    return _Builder(ir.MAX_CODE_POINT, max_states, name).build(node)


def compile_bytes(node: ir.Node, *, max_states: int = MAX_STATES, name: str = "") -> Dfa:
    """Return the automaton over bytes of a regular node.

    Raises: GrammarTooLarge naming `name` past `max_states`.
    """
    return _Builder(BYTE_MAX, max_states, name).build(node)


def byte_table(dfa: Dfa) -> NDArray[np.int32]:
    """int32 [num_states, 256] of a byte automaton."""
    assert dfa.max_symbol == BYTE_MAX
    lengths = np.diff([*dfa.starts, 256])
    rows = np.asarray(dfa.transitions, dtype=np.int32).reshape(len(dfa.transitions), dfa.num_classes)
    return np.ascontiguousarray(rows[:, np.repeat(np.asarray(dfa.classes), lengths)])


# --- boolean algebra -------------------------------------------------------------------------------------------------


def product(
    parts: list[Dfa], accept: Callable[[tuple[bool, ...]], int], *, max_states: int = MAX_STATES, name: str = ""
) -> Dfa:
    """Run automata side by side; `accept` decides from who accepts (a dead part never does)."""
    starts, signatures = _merge_classes(parts)
    first = tuple(0 if d.transitions else -1 for d in parts)
    index, queue, rows = {first: 0}, [first], []
    for states in queue:
        deadline.check(name)
        row = []
        for signature in signatures[1]:
            target = tuple(
                -1 if s < 0 else d.transitions[s][c] for d, s, c in zip(parts, states, signature, strict=True)
            )
            found = index.get(target)
            if found is None:
                found = index[target] = len(queue)
                queue.append(target)
                if len(queue) > max_states:
                    raise _too_large(name, max_states)
            row.append(found)
        rows.append(row)
    accepting = [
        accept(tuple(s >= 0 and bool(d.accepting[s]) for d, s in zip(parts, states, strict=True))) for states in queue
    ]
    return minimize(Dfa(parts[0].max_symbol, starts, signatures[0], len(signatures[1]), rows, accepting))


def intersect(parts: list[Dfa], *, max_states: int = MAX_STATES, name: str = "") -> Dfa:
    return parts[0] if len(parts) == 1 else product(parts, all, max_states=max_states, name=name)


def union(parts: list[Dfa], *, max_states: int = MAX_STATES, name: str = "") -> Dfa:
    return parts[0] if len(parts) == 1 else product(parts, any, max_states=max_states, name=name)


def complement(dfa: Dfa) -> Dfa:
    """All other symbol sequences."""
    dead = len(dfa.transitions)
    rows = [[dead if t < 0 else t for t in row] for row in dfa.transitions]
    rows.append([dead] * dfa.num_classes)
    return minimize(
        Dfa(dfa.max_symbol, dfa.starts, dfa.classes, dfa.num_classes, rows, [*(not a for a in dfa.accepting), True])
    )


def minimize(dfa: Dfa) -> Dfa:
    """Return the minimal trim automaton, states numbered breadth first. The empty language has one refusing state."""
    n, k = len(dfa.transitions), dfa.num_classes
    table = np.asarray(dfa.transitions, dtype=np.int64).reshape(n, k)
    table = np.vstack([np.where(table < 0, n, table), np.full((1, k), n)])
    block = equivalence(table, np.append(np.asarray(dfa.accepting, dtype=np.int64), 0))
    num = int(block.max()) + 1
    return _renumber(dfa, block, num, table)


@lru_cache(maxsize=512)
def _weights(n: int) -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(-(2**62), 2**62, size=n, dtype=np.int64)


def _renumber(dfa: Dfa, block: NDArray[np.int64], num: int, table: NDArray[np.int64]) -> Dfa:
    """Keep one state per block, drop the dead one (the sink's block), number breadth first, merge equal classes."""
    representative = np.zeros(num, dtype=np.int64)
    representative[block] = np.arange(len(block))
    rows = block[table[representative]]
    accepts = np.append(np.asarray(dfa.accepting, dtype=np.int64), 0)[representative]
    dead = int(block[-1])
    start = int(block[0])
    order, seen = [start], {start}
    lists = rows.tolist()
    for s in order:
        for t in lists[s]:
            if t != dead and t not in seen:
                seen.add(t)
                order.append(t)
    number = np.full(num, -1, dtype=np.int64)
    number[order] = np.arange(len(order))
    kept = number[rows[order]]
    _, first, inverse = np.unique(_weights(len(kept)) @ kept, return_index=True, return_inverse=True)
    columns, inverse = kept[:, first], inverse.reshape(-1)
    starts: list[int] = []
    classes: list[int] = []
    for first, cls in zip(dfa.starts, dfa.classes, strict=True):
        c = int(inverse[cls])
        if not classes or classes[-1] != c:
            starts.append(first)
            classes.append(c)
    return Dfa(dfa.max_symbol, starts, classes, columns.shape[1], columns.tolist(), accepts[order].tolist())


def _merge_classes(parts: list[Dfa]) -> tuple[list[int], tuple[list[int], list[tuple[int, ...]]]]:
    """Common intervals of several automata: (starts, (class of each interval, classes in each part))."""
    cuts = sorted({s for d in parts for s in d.starts})
    starts: list[int] = []
    classes: list[int] = []
    index: dict[tuple[int, ...], int] = {}
    positions = [0] * len(parts)
    for cut in cuts:
        for i, d in enumerate(parts):
            while positions[i] + 1 < len(d.starts) and d.starts[positions[i] + 1] <= cut:
                positions[i] += 1
        c = index.setdefault(tuple(d.classes[p] for d, p in zip(parts, positions, strict=True)), len(index))
        if not classes or classes[-1] != c:
            starts.append(cut)
            classes.append(c)
    return starts, (classes, list(index))


def _too_large(name: str, limit: int) -> GrammarTooLarge:
    return GrammarTooLarge(
        f"{name or 'a regular part'} needs more than {limit:,} automaton states; simplify it or raise the limit"
    )


# --- from nodes ------------------------------------------------------------------------------------------------------

_Conjunction = frozenset[int]
_Formula = frozenset[_Conjunction]
_TRUE_END = 0  # leaf 0: the end of the input
_FALSE: _Formula = frozenset()


class _Builder:
    """Compiles one node. Leaves: 0 is the end; (ranges, next state) reads a symbol; (dfa, state, next) runs a part."""

    def __init__(self, max_symbol: int, max_states: int, name: str) -> None:
        self.max_symbol = max_symbol
        self.max_states = max_states
        self.name = name
        # states of the alternating automaton: ("or" | "and", targets) or ("leaf", index)
        self.states: list[tuple[str, list[int]]] = [("leaf", [0])]
        self.leaves: list[tuple[ir.Ranges, int] | tuple[Dfa, int, int]] = [((), 0)]
        self.run_leaves: dict[tuple[int, int, int], int] = {}
        self.dfas: list[Dfa] = []  # keeps automata alive, so that id() is a key
        self.closures: dict[int, _Formula] = {}
        self.has_and = False

    def build(self, node: ir.Node) -> Dfa:
        start = self.compile(node, 0)
        return self.determinize(start)

    def _state(self, kind: str, targets: list[int]) -> int:
        self.states.append((kind, targets))
        deadline.check(self.name)
        if len(self.states) > 20 * self.max_states:
            raise _too_large(self.name, self.max_states)
        return len(self.states) - 1

    def _read(self, ranges: ir.Ranges, then: int) -> int:
        self.leaves.append((ranges, then))
        return self._state("leaf", [len(self.leaves) - 1])

    def _run_leaf(self, dfa: Dfa, state: int, then: int) -> int:
        key = (id(dfa), state, then)
        leaf = self.run_leaves.get(key)
        if leaf is None:
            self.dfas.append(dfa)
            self.leaves.append((dfa, state, then))
            leaf = self.run_leaves[key] = len(self.leaves) - 1
        return leaf

    def _run(self, dfa: Dfa, then: int) -> int:
        return self._state("leaf", [self._run_leaf(dfa, 0, then)])

    def compile(self, node: ir.Node, then: int) -> int:
        """Return the state that reads `node` and goes on with `then`."""
        match node:
            case ir.Bytes(value):
                symbols = value if self.max_symbol == BYTE_MAX else [ord(c) for c in value.decode()]
                for symbol in reversed(list(symbols)):
                    then = self._read(((symbol, symbol),), then)
                return then
            case ir.Chars(ranges):
                return self._chars(ranges, then)
            case ir.Sequence(parts):
                for part in reversed(parts):
                    then = self.compile(part, then)
                return then
            case ir.Choice(options):
                return self._state("or", [self.compile(o, then) for o in options])
            case ir.Repeat(item, low, high):
                return self._repeat(item, low, high, then)
            case ir.Lookahead(item, is_negative):
                self.has_and = True
                starts = self._part(ir.Sequence((item, ir.Repeat(_AnySymbol()))))  # type: ignore[arg-type]
                return self._state("and", [self._run(complement(starts) if is_negative else starts, 0), then])
            case ir.Intersect(parts):
                return self._run(
                    intersect([self._part(p) for p in parts], max_states=self.max_states, name=self.name), then
                )
            case ir.Complement(item):
                whole = self._part(ir.ANY_TEXT)
                both = [whole, complement(self._part(item))]
                return self._run(intersect(both, max_states=self.max_states, name=self.name), then)
            case ir.Terminal(item, _):
                return self._run(self._part(item), then) if _has_lookahead(item) else self.compile(item, then)
            case ir.Table(transitions, accepting):
                if self.max_symbol != BYTE_MAX:
                    raise InvalidGrammar("a byte table cannot stand inside a language of code points")
                return self._run(_dfa_of_table(transitions, accepting), then)
            case _AnySymbol():
                return self._read(((0, self.max_symbol),), then)
            case _:
                raise InvalidGrammar(f"{type(node).__name__} cannot stand inside a regular part")

    def _part(self, node: ir.Node) -> Dfa:
        return _Builder(self.max_symbol, self.max_states, self.name).build(node)

    def _chars(self, ranges: ir.Ranges, then: int) -> int:
        if self.max_symbol != BYTE_MAX:
            return self._read(ranges, then)
        single, options = [], []
        for sequence in utf8_sequences(ranges):
            if len(sequence) == 1:
                single.append(sequence[0])
            else:
                state = then
                for part in reversed(sequence):
                    state = self._read((part,), state)
                options.append(state)
        if single:
            options.append(self._read(ir.normalize_ranges(single), then))
        return options[0] if len(options) == 1 else self._state("or", options)

    def _repeat(self, item: ir.Node, low: int, high: int | None, then: int) -> int:
        if high is None:
            loop = self._state("or", [])
            self.states[loop][1].extend([self.compile(item, loop), then])
            state = loop
        else:
            state = then
            for _ in range(high - low):
                state = self._state("or", [self.compile(item, state), then])
        for _ in range(low):
            state = self.compile(item, state)
        return state

    # --- determinisation

    def closure(self, state: int) -> _Formula:
        """Which leaves stand at a state: a set of conjunctions."""
        found = self.closures.get(state)
        if found is None:
            found = self._and_closure(state, frozenset()) if self.has_and else self._or_closure(state)
            self.closures[state] = found
        return found

    def _or_closure(self, state: int) -> _Formula:
        seen, stack, out = {state}, [state], set()
        while stack:
            kind, targets = self.states[stack.pop()]
            if kind == "leaf":
                leaf = targets[0]
                out.add(frozenset((leaf,)))
                entry = self.leaves[leaf]
                if len(entry) == 3 and entry[0].accepting[entry[1]] and entry[2] not in seen:
                    seen.add(entry[2])
                    stack.append(entry[2])
            else:
                for t in targets:
                    if t not in seen:
                        seen.add(t)
                        stack.append(t)
        return frozenset(out)

    def _and_closure(self, state: int, pending: frozenset[int]) -> _Formula:
        """Least fixed point: a state met again on its own way adds nothing."""
        if state in pending:
            return _FALSE
        pending |= {state}
        kind, targets = self.states[state]
        if kind == "leaf":
            out = {frozenset(targets)}
            entry = self.leaves[targets[0]]
            if len(entry) == 3 and entry[0].accepting[entry[1]] and entry[2] != 0:
                out |= self._and_closure(entry[2], pending)
            return _absorb(out)
        formulas = [self._and_closure(t, pending) for t in targets]
        if kind == "or":
            return _absorb(c for f in formulas for c in f)
        result: _Formula = frozenset((frozenset(),))
        for f in formulas:
            result = _absorb(a | b for a in result for b in f)
        return result

    def _leaf_accepts(self, leaf: int) -> bool:
        entry = self.leaves[leaf]
        if leaf == _TRUE_END:
            return True
        # a part followed by the end accepts where the part does; otherwise the closure holds what follows
        return len(entry) == 3 and entry[2] == 0 and bool(entry[0].accepting[entry[1]])

    def _alphabet(self) -> tuple[list[int], list[int], list[int]]:
        """(starts, class of each interval, one symbol of each class); intervals that no leaf tells apart are one
        class.
        """
        cuts = {0}
        dfas: dict[int, Dfa] = {}
        for entry in self.leaves:
            if len(entry) == 2:
                for low, high in entry[0]:
                    cuts.update((low, high + 1))
            else:
                dfas[id(entry[0])] = entry[0]
        for d in dfas.values():
            cuts.update(d.starts)
        starts = sorted(c for c in cuts if c <= self.max_symbol)
        position = {s: i for i, s in enumerate(starts)}
        signatures: list[list[int]] = [[] for _ in starts]
        distinct = {entry[0] for entry in self.leaves if len(entry) == 2}
        for number, ranges in enumerate(distinct):
            for low, high in ranges:
                end = position[high + 1] if high < self.max_symbol else len(starts)
                for i in range(position[low], end):
                    signatures[i].append(number)
        for d in dfas.values():
            for i, s in enumerate(starts):
                signatures[i].append(-1 - d.classes[bisect.bisect_right(d.starts, s) - 1])
        index: dict[tuple[int, ...], int] = {}
        classes = [index.setdefault(tuple(s), len(index)) for s in signatures]
        symbols = [0] * len(index)
        for s, c in zip(starts, classes, strict=True):
            symbols[c] = s
        return starts, classes, symbols

    def determinize(self, start: int) -> Dfa:
        starts, classes, symbols = self._alphabet()
        leaf_classes: dict[int, list[int]] = {}

        def classes_of(leaf: int) -> list[int]:
            found = leaf_classes.get(leaf)
            if found is None:
                entry = self.leaves[leaf]
                if len(entry) == 2:
                    inside: set[int] = set()
                    for low, high in entry[0]:
                        begin = bisect.bisect_left(starts, low)
                        inside.update(classes[begin : bisect.bisect_right(starts, high, begin)])
                    found = sorted(inside)
                else:
                    found = [c for c, s in enumerate(symbols) if entry[0].step(entry[1], s) >= 0]
                leaf_classes[leaf] = found
            return found

        def next_of(leaf: int, cls: int) -> _Formula:
            entry = self.leaves[leaf]
            if len(entry) == 2:
                return self.closure(entry[1])
            to = entry[0].step(entry[1], symbols[cls])
            target = self._run_leaf(entry[0], to, entry[2])
            out: set[_Conjunction] = {frozenset((target,))}
            if entry[2] != 0 and entry[0].accepting[to]:
                out |= self.closure(entry[2])
            return frozenset(out)

        first = self.closure(start)
        index, queue, rows = {first: 0}, [first], []
        for formula in queue:
            deadline.check(self.name)
            targets: list[set[_Conjunction]] = [set() for _ in symbols]
            for conjunction in formula:
                if self.has_and:
                    deadline.check(self.name)
                if len(conjunction) == 1:
                    (leaf,) = conjunction
                    if leaf != _TRUE_END:
                        for c in classes_of(leaf):
                            targets[c] |= next_of(leaf, c)
                    continue
                if _TRUE_END in conjunction:
                    continue
                common = set.intersection(*(set(classes_of(leaf)) for leaf in conjunction)) if conjunction else set()
                for c in common:
                    result: _Formula = frozenset((frozenset(),))
                    for leaf in conjunction:
                        result = _absorb(a | b for a in result for b in next_of(leaf, c))
                    targets[c] |= result
            row = []
            for found_targets in targets:
                if not found_targets:
                    row.append(-1)
                    continue
                key = _absorb(found_targets) if self.has_and else frozenset(found_targets)
                found = index.get(key)
                if found is None:
                    found = index[key] = len(queue)
                    queue.append(key)
                    if len(queue) > self.max_states:
                        raise _too_large(self.name, self.max_states)
                row.append(found)
            rows.append(row)
        accepting = [int(any(all(self._leaf_accepts(leaf) for leaf in c) for c in f)) for f in queue]
        return minimize(Dfa(self.max_symbol, starts, classes, len(symbols), rows, accepting))


@dataclass(frozen=True, slots=True)
class _AnySymbol:
    """Any one symbol of the alphabet at hand (for what follows a lookahead)."""


def _absorb(conjunctions: Iterable[_Conjunction]) -> _Formula:
    """Drop a conjunction that contains another: a or (a and b) is a."""
    kept: list[_Conjunction] = []
    for c in sorted(set(conjunctions), key=len):
        if not any(k <= c for k in kept):
            kept.append(c)
    return frozenset(kept)


def _has_lookahead(node: ir.Node) -> bool:
    match node:
        case ir.Lookahead():
            return True
        case ir.Sequence(parts) | ir.Choice(parts):
            return any(_has_lookahead(p) for p in parts)
        case ir.Repeat(item, _, _):
            return _has_lookahead(item)
        case _:
            return False


def _dfa_of_table(transitions: NDArray[np.int32], accepting: NDArray[np.bool_]) -> Dfa:
    columns, inverse = np.unique(transitions, axis=1, return_inverse=True)
    inverse = inverse.reshape(-1)
    starts = [b for b in range(256) if b == 0 or inverse[b] != inverse[b - 1]]
    classes = [int(inverse[b]) for b in starts]
    return Dfa(BYTE_MAX, starts, classes, columns.shape[1], columns.tolist(), accepting.tolist())


def utf8_sequences(ranges: ir.Ranges) -> list[tuple[tuple[int, int], ...]]:
    """Split ranges of code points into sequences of byte ranges; surrogates are left out.

    Source: the method of Russ Cox's RE2 (utf8 ranges split at lengths and at continuation boundaries).
    """
    out: list[tuple[tuple[int, int], ...]] = []
    for low, high in ranges:
        for a, b in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)):
            if max(a, low) <= min(b, high):
                _split_utf8(max(a, low), min(b, high), out)
    return out


def _split_utf8(low: int, high: int, out: list[tuple[tuple[int, int], ...]]) -> None:
    """`low` and `high` have the same encoded length."""
    first, last = chr(low).encode(), chr(high).encode()
    for i in range(1, len(first)):
        mask = (1 << (6 * i)) - 1
        if low >> (6 * i) != high >> (6 * i):
            if low & mask:
                _split_utf8(low, low | mask, out)
                _split_utf8((low | mask) + 1, high, out)
                return
            if high & mask != mask:
                _split_utf8(low, (high & ~mask) - 1, out)
                _split_utf8(high & ~mask, high, out)
                return
    out.append(tuple(zip(first, last, strict=True)))
