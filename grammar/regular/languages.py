"""Turns IR nodes of regular languages into deterministic automata, over code points or over bytes.

A node is compiled in continuation style ("read this, then go to that state"). The result is an alternating automaton:
it has "or" states and "and" states, and only lookaheads make "and" states. It is made deterministic by tracking sets of
conjunctions of positions. Without lookaheads, these are the usual sets of states. The results are minimal and trim:
every state leads to an accepting one.

The automata and their boolean operations are in dfas.py, the escapes of JSON strings in strings.py, recursion in
pushdown.py.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from ramet.errors import InvalidGrammar
from ramet.grammar import deadline, ir
from ramet.grammar.regular.dfas import BYTE_MAX, MAX_STATES, Dfa, complement, intersect, minimize, of_table, too_large


def compile_chars(node: ir.Node, *, max_states: int = MAX_STATES, name: str = "") -> Dfa:
    """Return the automaton over code points of a regular node.

    The node must not hold a Table, nor Bytes that are not UTF-8.
    """
    return RegularCompiler(ir.MAX_CODE_POINT, max_states, name).build(node)


def compile_bytes(node: ir.Node, *, max_states: int = MAX_STATES, name: str = "") -> Dfa:
    """Return the automaton over bytes of a regular node.

    Raises: GrammarTooLarge naming `name` past `max_states`.
    """
    return RegularCompiler(BYTE_MAX, max_states, name).build(node)


_Conjunction = frozenset[int]
_Formula = frozenset[_Conjunction]
_TRUE_END = 0  # leaf 0: the end of the input
_FALSE: _Formula = frozenset()


class RegularCompiler:
    """Compiles one node. Leaf 0 is the end; (ranges, next state) reads a symbol; (dfa, state, next) runs a part."""

    def __init__(self, max_symbol: int, max_states: int, name: str) -> None:
        self.max_symbol = max_symbol
        self.max_states = max_states
        self.name = name
        # states of the alternating automaton: ("or" | "and", targets) or ("leaf", index)
        self.states: list[tuple[str, list[int]]] = [("leaf", [0])]
        self.leaves: list[tuple[ir.Ranges, int] | tuple[Dfa, int, int]] = [((), 0)]
        self.run_leaves: dict[tuple[int, int, int], int] = {}
        self.dfas: list[Dfa] = []  # keeps the automata alive, because their id() is a key
        self.conditions: dict[ir.Node, Dfa] = {}
        self.closures: dict[int, _Formula] = {}
        self.has_and = False

    def build(self, node: ir.Node, *, any_rest: bool = False) -> Dfa:
        """Return the automaton of a node. any_rest: any symbols of the alphabet may follow."""
        then = 0
        if any_rest:
            then = self._state("or", [0])
            self.states[then][1].append(self._read(((0, self.max_symbol),), then))
        return self.determinize(self.compile(node, then))

    def _state(self, kind: str, targets: list[int]) -> int:
        self.states.append((kind, targets))
        deadline.check(self.name)
        if len(self.states) > 20 * self.max_states:
            raise too_large(self.name, self.max_states)
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
        """Return the state that reads `node` and continues in state `then`."""
        match node:
            case ir.Bytes(value):
                symbols = value if self.max_symbol == BYTE_MAX else [ord(c) for c in value.decode()]
                for symbol in reversed(list(symbols)):
                    then = self._read(((symbol, symbol),), then)
                return then
            case ir.Chars(ranges):
                return self._chars(ranges, then)
            case ir.Concatenation(parts):
                for part in reversed(parts):
                    then = self.compile(part, then)
                return then
            case ir.Choice(options):
                return self._state("or", [self.compile(o, then) for o in options])
            case ir.Repeat(item, low, high):
                return self._repeat(item, low, high, then)
            case ir.Lookahead(item, is_negative):
                self.has_and = True
                condition = self.conditions.get(node)  # equal conditions are one, however often they are asked
                if condition is None:
                    starts = RegularCompiler(self.max_symbol, self.max_states, self.name).build(item, any_rest=True)
                    condition = self.conditions[node] = complement(starts) if is_negative else starts
                return self._state("and", [self._run(condition, 0), then])
            case ir.Intersect(parts):
                return self._run(
                    intersect([self._part(p) for p in parts], max_states=self.max_states, name=self.name), then
                )
            case ir.Complement(item):
                whole = self._part(ir.ANY_TEXT)
                both = [whole, complement(self._part(item))]
                return self._run(intersect(both, max_states=self.max_states, name=self.name), then)
            case ir.Terminal(item, _):
                return self._run(self._part(item), then) if has_lookahead(item) else self.compile(item, then)
            case ir.Table():
                if self.max_symbol != BYTE_MAX:
                    raise InvalidGrammar("a byte table cannot stand inside a language of code points")
                return self._run(of_table(node), then)
            case _:
                raise InvalidGrammar(f"{type(node).__name__} cannot stand inside a regular part")

    def _part(self, node: ir.Node) -> Dfa:
        return RegularCompiler(self.max_symbol, self.max_states, self.name).build(node)

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
        """Return the leaves that a state reaches without reading a symbol, as a set of conjunctions."""
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
        """Compute the least fixed point: a state that is reached again from itself adds nothing."""
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
        # a part followed by the end accepts exactly when the part does; else the closure holds what follows the part
        return len(entry) == 3 and entry[2] == 0 and bool(entry[0].accepting[entry[1]])

    def _alphabet(self) -> tuple[list[int], list[int], list[int]]:
        """Return (starts, class of each interval, one symbol of each class).

        Intervals that all leaves treat alike are one class.
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
                        raise too_large(self.name, self.max_states)
                row.append(found)
            rows.append(row)
        accepting = [int(any(all(self._leaf_accepts(leaf) for leaf in c) for c in f)) for f in queue]
        return minimize(Dfa(self.max_symbol, starts, classes, len(symbols), rows, accepting))


def _absorb(conjunctions: Iterable[_Conjunction]) -> _Formula:
    """Drop each conjunction that contains another: a or (a and b) is a."""
    kept: list[_Conjunction] = []
    for c in sorted(set(conjunctions), key=len):
        if not any(k <= c for k in kept):
            kept.append(c)
    return frozenset(kept)


def has_lookahead(node: ir.Node) -> bool:
    """Return whether a lookahead stands in a node."""
    return ir.holds(node, lambda one: isinstance(one, ir.Lookahead))


def utf8_sequences(ranges: ir.Ranges) -> list[tuple[tuple[int, int], ...]]:
    """Split ranges of code points into sequences of byte ranges. Surrogates are left out.

    U+0080 to U+07FF, for example, is the sequence (C2..DF, 80..BF).
    Source: the method of Russ Cox's RE2 (utf8 ranges split at lengths and at continuation boundaries).
    """
    out: list[tuple[tuple[int, int], ...]] = []
    for low, high in ranges:
        for a, b in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)):
            if max(a, low) <= min(b, high):
                _split_utf8(max(a, low), min(b, high), out)
    return out


def _split_utf8(low: int, high: int, out: list[tuple[tuple[int, int], ...]]) -> None:
    """Split low..high, whose encoded forms have the same length."""
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
