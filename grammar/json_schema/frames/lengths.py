"""Strings whose length and language are both limited, without one automaton for both.

The automaton of the languages alone is unrolled into *layers*: layer i holds its states after i characters. A table
holds a few layers, and the next table is made when a text gets there. If no limit of length is near, all tables are the
same one. So `maxLength: 65535` beside a pattern costs only what the pattern costs.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarTooLarge
from ramet.grammar import deadline
from ramet.grammar.json_schema.algebra.languages import Languages
from ramet.grammar.json_schema.algebra.values import Strings
from ramet.grammar.machine.frame import REFUSE, leave, sample_bytes
from ramet.grammar.regular import dfas, strings
from ramet.grammar.regular.dfas import Dfa

MAX_PRODUCT = 1500  # up to this number of states (of the languages, times lengths), all is one table
MAX_CONTENT = 512  # states between characters in one table of layers
MAX_STATES = 2000  # states of the languages together; with more, one table is made if possible
MAX_DISTANCES = 1 << 26  # number of distances kept

_INFINITE = 1 << 30
Condition = tuple[int, int, int | None]  # a tag that a text of low..high characters satisfies: tag, low, high


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """The layers [position, position + num_layers) of a text, or all from `position` on.

    rows: the content states of layer i are at [i * n, (i + 1) * n). masks: the tags of the first exits. Exit len(masks)
    + q continues in state q of the layer after the last one.
    """

    rows: strings.Content
    masks: tuple[int, ...]
    num_layers: int
    num_exits: int
    _costs: dict[tuple[int, ...], NDArray[np.int64]] = field(default_factory=dict)

    def way_out(self, state: int, exit_costs: tuple[int, ...]) -> tuple[bytes, int]:
        """Return the cheapest way out of the table: (its bytes, the exit).

        The cost of a way is the number of its bytes and the cost of what follows its exit.
        """
        rows = self.rows.rows
        costs = self._costs.get(exit_costs)
        if costs is None:
            costs = self._costs[exit_costs] = _cheapest(rows, exit_costs)
        samples = sample_bytes(self.rows.byte_class, rows.shape[1])
        out = bytearray()
        while True:
            ahead = _ahead(rows[state], costs, exit_costs)
            c = int(np.argmin(ahead))
            sample, entry = samples[c], int(rows[state, c])
            assert sample is not None
            assert ahead[c] < _INFINITE
            out.append(sample)
            if entry < REFUSE:
                return bytes(out), (-2 - entry) >> 1
            state = entry


def _ahead(entries: NDArray[np.int32], costs: NDArray[np.int64], exit_costs: tuple[int, ...]) -> NDArray[np.int64]:
    """Return, for each table entry, the cost from where it leads; infinite for a refusal."""
    known = np.concatenate([costs, [_INFINITE], exit_costs])
    return known[
        np.where(entries >= REFUSE, np.where(entries >= 0, entries, len(costs)), len(costs) + 1 + (-2 - entries) // 2)
    ]


def _cheapest(rows: NDArray[np.int32], exit_costs: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the cost from each row: the bytes to an exit, and what follows the exit."""
    costs = np.full(len(rows), _INFINITE, dtype=np.int64)
    while True:
        following = np.minimum(_ahead(rows, costs, exit_costs).min(axis=1) + 1, _INFINITE)
        if (following == costs).all():
            return costs
        costs = following


class BoundedStrings:
    """The strings of several tags: an automaton without lengths, and for each of its states the lengths that are
    accepted.

    Raises: GrammarTooLarge if the languages together, or the lengths, are too large.
    """

    def __init__(self, specs: tuple[tuple[Strings, ...], ...], languages: Languages) -> None:
        parts: dict[Strings, list[Condition]] = {}
        for tag, group in enumerate(specs):
            for spec in group:
                low, high = languages.bounds(spec)
                parts.setdefault(spec._replace(low=0, high=None), []).append((tag, low, high))
        name = languages.describe(specs)
        alike: dict[tuple[Condition, ...], list[Dfa]] = {}
        for spec, own in parts.items():
            alike.setdefault(tuple(own), []).append(languages.whole(spec))
        conditions = list(alike)
        labels: dict[tuple[Condition, ...], int] = {(): 0}

        def label(accepts: tuple[bool, ...]) -> int:
            found = tuple(c for a, group in zip(accepts, conditions, strict=True) if a for c in group)
            return labels.setdefault(found, len(labels))

        automata = [dfas.union(some, max_states=languages.max_states, name=name) for some in alike.values()]
        self.dfa = dfas.product(automata, label, max_states=languages.max_states, name=name)
        self.labels = list(labels)
        self.tags = sorted({tag for label in self.labels for tag, _, _ in label})
        self.accepting = np.array(self.dfa.accepting)
        self.num_states = len(self.accepting)
        self.num_layers = max(1, min(64, MAX_CONTENT // self.num_states))
        content = strings.json_string_rows(self.dfa, [0 if a else -1 for a in self.dfa.accepting])
        self.rows, self.byte_class = content.rows, content.byte_class
        self.beyond = content.beyond
        bounds = {b for c in self.labels for _, low, high in c for b in (low, 0 if high is None else high + 1)}
        self.last = max(bounds, default=0)
        """From this position on, lengths no longer matter."""
        self._starts, self._distances = self._measure(sorted(bounds | {0}), name)
        self._cache: dict[bytes, Layers] = {}

    def mask(self, state: int, position: int) -> int:
        """Return the tags satisfied by a text that ends in a state after `position` characters."""
        out = 0
        for tag, low, high in self.labels[self.accepting[state]]:
            if position >= low and (high is None or position <= high):
                out |= 1 << tag
        return out

    def _masks(self, position: int) -> NDArray[np.int64]:
        """Return `mask` for all states."""
        by_label = np.zeros(len(self.labels), dtype=object)
        for i, conditions in enumerate(self.labels):
            for tag, low, high in conditions:
                if position >= low and (high is None or position <= high):
                    by_label[i] |= 1 << tag
        return by_label[self.accepting]  # type: ignore[no-any-return]

    def _measure(self, bounds: list[int], name: str) -> tuple[list[int], list[NDArray[np.int32]]]:
        """Compute the least number of characters to an end from each state, for each position.

        Returns (positions where it changes, ascending; the distances from each of them on).
        """
        table = np.array(self.dfa.transitions, dtype=np.int64).reshape(self.num_states, -1)
        targets = np.where(table < 0, self.num_states, table)

        def before(distances: NDArray[np.int32], ends: NDArray[np.bool_]) -> NDArray[np.int32]:
            extended = np.append(distances, _INFINITE)
            return np.where(ends, 0, np.minimum(extended[targets].min(axis=1) + 1, _INFINITE)).astype(np.int32)

        distances = np.full(self.num_states, _INFINITE, dtype=np.int32)
        ends = self._masks(self.last) != 0
        while True:
            following = before(distances, ends)
            if (following == distances).all():
                break
            distances = following
        starts, kept = [self.last], [distances]
        position = self.last
        for low in reversed(bounds[:-1] if bounds[-1] == self.last else bounds):
            ends = self._masks(low) != 0
            while position > low:
                deadline.check(name)
                following = before(kept[-1], ends)
                position -= 1
                if (following == kept[-1]).all():
                    starts[-1] = position = low  # nothing changes down to the next bound
                    break
                starts.append(position)
                kept.append(following)
                if len(kept) * self.num_states > MAX_DISTANCES:
                    raise GrammarTooLarge(f"{name}: a length of {self.last:,} is too large for this automaton")
        return starts[::-1], kept[::-1]

    def distances(self, position: int) -> NDArray[np.int32]:
        """Return the number of characters from each state to the nearest end, `position` characters into the text."""
        return self._distances[max(bisect.bisect_right(self._starts, position) - 1, 0)]

    def is_alive(self, position: int, state: int) -> bool:
        return bool(self.distances(position)[state] < _INFINITE)

    def layers(self, position: int) -> Layers:
        """Return the layers from a position on. Equal layers are one object."""
        if position >= self.last:
            return self._kept(np.stack([self._masks(self.last)]), np.stack([self.distances(self.last)] * 2), True)
        n = self.num_layers
        masks = np.stack([self._masks(position + i) for i in range(n)])
        distances = np.stack([self.distances(position + i) for i in range(n + 1)])
        return self._kept(masks, distances, False)

    def _kept(self, masks: NDArray[np.int64], distances: NDArray[np.int32], is_tail: bool) -> Layers:
        alive = distances < _INFINITE
        key = b"".join((bytes((is_tail,)), repr(masks.tolist()).encode(), alive.tobytes()))
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._make(masks, alive, is_tail)
        return found

    def _make(self, masks: NDArray[np.int64], alive: NDArray[np.bool_], is_tail: bool) -> Layers:
        n, num_inner, count = self.num_states, len(self.rows) - self.num_states, len(masks)
        kinds = sorted({int(m) for m in masks.flat if m})
        ends = np.vectorize(lambda m: leave(kinds.index(m)) if m else REFUSE, otypes=[np.int32])(masks)
        out = np.empty((count * (n + num_inner), self.rows.shape[1]), dtype=np.int32)
        beyond = np.empty(count * n, dtype=np.int64)
        quote = self.byte_class[strings.QUOTE]
        for i in range(count):
            is_last = i + 1 == count and not is_tail
            own = np.arange(n)
            if is_last:
                following = np.array([leave(len(kinds) + q) for q in range(n)])
            else:
                following = own if is_tail else own + (i + 1) * n
            inner = count * n + i * num_inner + np.arange(num_inner)
            # an entry becomes a content state of the next layer, an inner state of this layer, or a refusal
            becomes = np.concatenate([np.where(alive[i + 1], following, REFUSE), inner, [REFUSE]])
            layer = becomes[np.where(self.rows >= 0, self.rows, n + num_inner)]
            layer[:n, quote] = ends[i]
            out[i * n : (i + 1) * n] = layer[:n]
            out[inner] = layer[n:]
            known = np.append(becomes[:n], REFUSE)[np.maximum(self.beyond, -1)]
            beyond[i * n : (i + 1) * n] = np.where((self.beyond == -2) | (known < -1), -2, known)
        strings.trim(out)
        rows = strings.Content(out, self.byte_class, count * n, beyond)
        return Layers(rows, tuple(kinds), count, len(kinds) + (0 if is_tail else n))


def bounded_strings(specs: tuple[tuple[Strings, ...], ...], languages: Languages) -> BoundedStrings | None:
    """Return the strings of several tags; None if one table of all lengths is small enough."""
    spans = [(s, *languages.bounds(s)) for group in specs for s in group]
    if all(not low and high is None for _, low, high in spans):
        return None
    num_states = product = 0
    for spec, low, high in spans:
        size = len(languages.whole(spec._replace(low=0, high=None)).transitions)
        num_states += size
        product += size * (1 + (low if high is None else high))
    is_own = all((s.low, s.high) == (low, high) for s, low, high in spans)
    if is_own and (product <= MAX_PRODUCT or (num_states > MAX_STATES and product <= languages.max_states)):
        return None
    return BoundedStrings(specs, languages)
