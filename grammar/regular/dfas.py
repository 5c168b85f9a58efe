"""Deterministic automata over code points or bytes, and the boolean operations on them.

Results are minimal and trim: they have as few states as possible, and every state leads to an accepting one.
languages.py turns patterns into such automata; grammar/machine makes masks of them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarTooLarge
from ramet.grammar import deadline, ir
from ramet.grammar.regular.partition import equivalence, reachable_tuples

BYTE_MAX = 255
MAX_STATES = 20_000
MAX_BYTES = 1 << 29  # of a table


@dataclass(frozen=True, slots=True, eq=False)
class Dfa:
    """A deterministic automaton over the symbols 0..`max_symbol`. State 0 is the start.

    starts: the first symbols of intervals that cover the alphabet, ascending. classes[i]: the symbol class of interval
    i. transitions[state][class]: the next state, -1 if refused. accepting: truth values, or labels: 0 refuses, and
    other labels distinguish kinds of acceptance (see `product`). Minimal and trim, unless built by hand.

    [0-9]* over code points: starts=[0, 48, 58], classes=[0, 1, 0], num_classes=2, transitions=[[-1, 0]], accepting=[1].
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
        """Return the next state, -1 if the symbol is refused."""
        return self.transitions[state][self.classes[bisect.bisect_right(self.starts, symbol) - 1]]

    def accepts(self, symbols: Iterable[int]) -> bool:
        state = 0
        for symbol in symbols:
            state = self.step(state, symbol)
            if state < 0:
                return False
        return bool(self.accepting[state])

    def key(self) -> tuple[object, ...]:
        """Return a key that is equal for minimal automata of equal languages. (States are numbered breadth first.)"""
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


def table(dfa: Dfa) -> ir.Table:
    """Return an automaton over bytes as a table."""
    assert dfa.max_symbol == BYTE_MAX
    rows = np.asarray(dfa.transitions, dtype=np.int32).reshape(len(dfa.transitions), dfa.num_classes)
    byte_class = np.repeat(np.asarray(dfa.classes, dtype=np.uint8), np.diff([*dfa.starts, 256]))
    return ir.Table(rows, byte_class, np.asarray(dfa.accepting, dtype=np.bool_))


def byte_table(dfa: Dfa) -> NDArray[np.int32]:
    """Return the table of a byte automaton over bytes, int32 [num_states, 256]."""
    return np.ascontiguousarray(table(dfa).transitions)


def of_table(table: ir.Table) -> Dfa:
    byte_class = table.byte_class.tolist()
    starts = [b for b in range(256) if b == 0 or byte_class[b] != byte_class[b - 1]]
    classes = [byte_class[b] for b in starts]
    return Dfa(BYTE_MAX, starts, classes, table.rows.shape[1], table.rows.tolist(), table.accepting.tolist())


def table_of_edges(edges: list[dict[int, int]], accepting: list[bool], name: str) -> ir.Table:
    """Build a table from the edges of each state, byte -> state.

    Raises: GrammarTooLarge naming `name` if the table would take more than 512 MiB.
    """
    used = sorted({byte for row in edges for byte in row})
    byte_class = np.zeros(256, dtype=np.uint8)
    num_classes = len(used) + (len(used) < 256)  # class 0: all bytes that are on no edge
    byte_class[used] = np.arange(num_classes - len(used), num_classes)
    if 4 * len(edges) * num_classes > MAX_BYTES:
        raise GrammarTooLarge(
            f"{name} needs {len(edges):,} states of {num_classes} byte classes; the limit is {MAX_BYTES >> 20} MiB"
        )
    rows = np.full((len(edges), num_classes), -1, dtype=np.int32)
    source = np.repeat(np.arange(len(edges)), [len(row) for row in edges])
    read = np.fromiter((b for row in edges for b in row), dtype=np.int64, count=len(source))
    rows[source, byte_class[read]] = np.fromiter(
        (t for row in edges for t in row.values()), dtype=np.int32, count=len(source)
    )
    return ir.Table(rows, byte_class, np.asarray(accepting, dtype=np.bool_))


def product(
    parts: list[Dfa], accept: Callable[[tuple[bool, ...]], int], *, max_states: int = MAX_STATES, name: str = ""
) -> Dfa:
    """Run automata side by side. `accept` gets which of them accept, and returns the label of the combined state.

    A part that has refused never accepts again.
    """
    starts, signatures = _merge_classes(parts)
    deadline.check(name)
    found = reachable_tuples(
        [np.array(d.transitions, dtype=np.int64).reshape(-1, d.num_classes) for d in parts],
        np.array(signatures[1], dtype=np.int64).reshape(-1, len(parts)),
        np.array([0 if d.transitions else -1 for d in parts], dtype=np.int64),
        max_states,
    )
    deadline.check(name)
    if found is None:
        raise too_large(name, max_states)
    states, rows = found
    # whether each part accepts; a state of -1 reads the last entry, which is false
    accepts = np.stack([np.array([*map(bool, d.accepting), False])[s] for d, s in zip(parts, states.T, strict=True)], 1)
    labels: dict[bytes, int] = {}
    for row in accepts:
        if row.tobytes() not in labels:
            labels[row.tobytes()] = accept(tuple(row.tolist()))
    accepting = [labels[row.tobytes()] for row in accepts]
    return minimize(Dfa(parts[0].max_symbol, starts, signatures[0], len(signatures[1]), rows.tolist(), accepting))


def intersect(parts: list[Dfa], *, max_states: int = MAX_STATES, name: str = "") -> Dfa:
    return parts[0] if len(parts) == 1 else product(parts, all, max_states=max_states, name=name)


def union(parts: list[Dfa], *, max_states: int = MAX_STATES, name: str = "") -> Dfa:
    """Return the automaton of the texts that some part accepts.

    Parts are united in pairs, and each result is minimised: many differences between parts do not matter in their
    union.
    """
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [pair[0] if len(pair) == 1 else product(pair, any, max_states=max_states, name=name) for pair in pairs]
    return parts[0]


def complement(dfa: Dfa) -> Dfa:
    """Return the automaton of all other symbol sequences."""
    dead = len(dfa.transitions)
    rows = [[dead if t < 0 else t for t in row] for row in dfa.transitions]
    rows.append([dead] * dfa.num_classes)
    return minimize(
        Dfa(dfa.max_symbol, dfa.starts, dfa.classes, dfa.num_classes, rows, [*(not a for a in dfa.accepting), True])
    )


def minimize(dfa: Dfa) -> Dfa:
    """Return the minimal trim automaton, with states numbered breadth first.

    The automaton of the empty language has one state, which refuses everything.
    """
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
    """Keep one state per block, drop the block of the sink, number states breadth first, and merge equal classes."""
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
    """Return the common intervals of several automata: (starts, (class of each interval, classes in each part))."""
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


def too_large(name: str, limit: int) -> GrammarTooLarge:
    return GrammarTooLarge(
        f"{name or 'a regular part'} needs more than {limit:,} automaton states; simplify it or raise the limit"
    )
