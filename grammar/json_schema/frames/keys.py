"""The keys of objects: groups of keys that all specs of an object treat alike, and the tables that read a key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.json_schema.algebra import distinct
from ramet.grammar.json_schema.algebra import specs as object_specs
from ramet.grammar.json_schema.algebra.values import Exists, Expr, Objects
from ramet.grammar.json_schema.frames.compilation import Compilation
from ramet.grammar.json_schema.frames.tables import ANY_CHARS, overlay
from ramet.grammar.machine.frame import REFUSE, FrameTable, leave, ways_to_exits
from ramet.grammar.regular import strings

MAX_WAYS = 16  # ways to write a key, up to which its endings are stored; with more, they are searched
MAX_COUNT = 1 << 10  # texts that can still follow; counting stops here

# a spec that an object may still satisfy: tag, spec (index in the space), bits of what must still exist, rivals
ObjectThread = tuple[int, int, int, tuple[int, ...]]
# the expressions of a key's value, and the threads that may read it, each with the index of its expression
ObjectChoices = tuple[tuple[Expr, ...], list[tuple[ObjectThread, int]]]


class KeySpace:
    """The keys of objects that satisfy some of `specs`, grouped by *label*. All keys of a label are treated alike.

    A *named* key, which some spec names, has its own label: label i is names[i]. All other keys are *unnamed*. Their
    label depends on their *signature*, the set of the specs' patterns that they match: label len(names) + s is
    signatures[s]. A set of labels is given as bits of names (`named`) and bits of signatures (`others`).

    With {"properties": {"a": {}}, "patternProperties": {"^x": {"type": "null"}}}, the key "a" is label 0. All keys that
    begin with x share one label, and all other keys share another.
    """

    def __init__(self, compilation: Compilation, specs: tuple[Objects, ...]) -> None:
        self.compilation = compilation
        self.specs = specs
        names: dict[str, None] = {}
        languages: dict[int, None] = {}
        for o in specs:
            names.update(dict.fromkeys(o.table))
            for rule in o.rules:
                languages.update(dict.fromkeys(n for n, _ in rule.patterns))
            for x in o.exists:
                names.update(dict.fromkeys(sorted(x.names)))
                languages.update(dict.fromkeys(([] if x.pattern is None else [x.pattern]) + list(x.others)))
        self.names = list(names)
        self.index = {k: i for i, k in enumerate(self.names)}
        self._all_names = frozenset(names)
        self.languages = list(languages)
        self._make_signatures()
        self.num_labels = len(self.names) + len(self.signatures)
        self._exprs: dict[tuple[int, int], Expr] = {}
        self.choices_of_threads: dict[tuple[tuple[ObjectThread, ...], int], ObjectChoices] = {}
        self._differs: dict[tuple[int, int, tuple[int, ...], int], bool] = {}
        self._alive: dict[int, tuple[int, int]] = {}
        self._tables: dict[object, FrameTable] = {}
        self._possible: dict[FrameTable, tuple[int, int]] = {}
        self._every_key: strings.Content | None = None
        self.required = [self.bits(o.required) for o in specs]
        self._dependent = [tuple((self.bits((k,)), self.bits(needs)) for k, needs in o.dependent) for o in specs]
        self._endings: dict[bytes, list[tuple[str, bytes]]] = {}
        self._endings_after: dict[bytes, list[tuple[str, bytes]]] = {}
        self._noted: set[str] = set()
        self._names_from: dict[int, int] = {}
        self._many_ways: list[str] = []
        self.is_simple = [o.high is None and not (o.dependent or o.exists or o.low) for o in specs]
        self._counts: dict[int, NDArray[np.int64]] = {}
        self._room: dict[tuple[int, str], int] = {}

    def bits(self, names: Iterable[str]) -> int:
        return sum(1 << self.index[k] for k in names)

    def needed(self, spec: int, seen: int) -> int:
        """Return bits of the named keys that must still come in an object with the names `seen`."""
        needed, before = self.required[spec] | seen, -1
        while needed != before:
            before = needed
            for key, needs in self._dependent[spec]:
                if needed & key:
                    needed |= needs
        return needed & ~seen

    def _make_signatures(self) -> None:
        self.dfa = ANY_CHARS
        self.signatures: list[frozenset[int]] = [frozenset()]
        if not self.languages:
            return
        self.dfa, self.signatures = self.compilation.expressions.languages.signatures(tuple(self.languages))

    def are_simple(self, threads: tuple[ObjectThread, ...]) -> bool:
        """Tell whether the only effect of earlier keys on these threads is that they may not come again."""
        return not self.compilation.ordered and all(
            self.is_simple[spec] and not rivals for _, spec, _, rivals in threads
        )

    def expr(self, spec: int, label: int) -> Expr:
        found = self._exprs.get((spec, label))
        if found is None:
            e, o = self.compilation.expressions, self.specs[spec]
            if label < len(self.names):
                found = object_specs.expr_of_key(e, o, self.names[label])
            else:
                found = object_specs.expr_of_signature(e, o, self.signatures[label - len(self.names)])
            self._exprs[spec, label] = found
        return found

    def may_differ(self, spec: int, exists: int, rivals: tuple[int, ...], seen: int) -> bool:
        """Tell whether an object with the names `seen` that equals `rivals` so far can become different from all of
        them.
        """
        key = (spec, exists, rivals, seen)
        found = self._differs.get(key)
        if found is None:
            o = self.specs[spec]
            o = replace(o, exists=tuple(x for i, x in enumerate(o.exists) if (exists >> i) & 1))
            present = frozenset(k for i, k in enumerate(self.names) if (seen >> i) & 1)
            found = self._differs[key] = distinct.object_may_differ(self.compilation.expressions, o, rivals, present)
        return found

    def usable(self, spec: int, label: int) -> bool:
        """Tell whether there is a value for a key of this label."""
        return not self.compilation.expressions.is_empty(self.expr(spec, label))

    def alive(self, spec: int) -> tuple[int, int]:
        """Return the labels that keys of an object of this spec may have: (bits of names, bits of signatures)."""
        found = self._alive.get(spec)
        if found is None:
            n = len(self.names)
            o = self.specs[spec]
            others = sum(1 << i for i in range(len(self.signatures)) if self.usable(spec, n + i))
            if self.is_simple[spec] and self.is_open(others):
                named = (1 << n) - 1  # names without a value are found when they are read: no key can be stuck
            else:
                named = sum(1 << i for i in range(n) if self.usable(spec, i))
            if o.dependent:  # a key is of no use if the keys that it requires cannot come
                for i in range(n):
                    needed = sum(
                        1 << self.index[k] for k in object_specs.closure_of_keys(o, frozenset((self.names[i],)))
                    )
                    if needed & ~named or (o.high is not None and needed.bit_count() > o.high):
                        named &= ~(1 << i)
            found = self._alive[spec] = named, others
        return found

    def may_forget(self, specs: Iterable[int], extras: frozenset[str]) -> bool:
        """Tell whether the only effect of these unnamed keys, once they came, is that they may not come again."""
        for spec in specs:
            others = self.alive(spec)[1]
            if not self.is_simple[spec] or (others and not self.has_room(others, extras)):
                return False
        return True

    def note_key(self, key: str) -> None:
        """Make an unnamed key known to `endings` and `endings_after`."""
        if key in self._noted:
            return
        self._noted.add(key)
        ways = strings.ways_to_write(key)
        if len(ways) > MAX_WAYS:
            self._many_ways.append(key)
            return
        vocabulary = self.compilation.machine.vocabulary
        for written in ways:
            whole = written + b'"'
            for i in range(len(whole)):
                if whole[i:] in vocabulary.quoted:
                    self._endings.setdefault(written[:i], []).append((key, whole[i:]))
            for gap in vocabulary.gaps_before.get(whole, ()):
                self._endings_after.setdefault(gap, []).append((key, gap + whole))

    def endings(self, text: bytes, keys: frozenset[str]) -> list[bytes]:
        """Return the texts that complete the beginning `text` to one of these keys.

        `note_key` was called for each of them.
        """
        out = [rest for key, rest in self._endings.get(text, ()) if key in keys]
        for whole in self._many_ways_of(keys):
            if whole.startswith(text):
                out.append(whole[len(text) :])
        return out

    def endings_after(self, gaps: frozenset[bytes], keys: frozenset[str]) -> list[bytes]:
        """Return the texts that consist of one of `gaps` and one of these keys. `note_key` must know the keys.

        gaps: what may stand before a key, up to its opening quote.
        """
        out = [whole for gap in gaps for key, whole in self._endings_after.get(gap, ()) if key in keys]
        return out + [gap + whole for whole in self._many_ways_of(keys) for gap in gaps]

    def _many_ways_of(self, keys: frozenset[str]) -> list[bytes]:
        many = [key for key in self._many_ways if key in keys]
        return [written + b'"' for key in many for written in strings.ways_to_write(key)]

    def names_from(self, byte: int) -> int:
        """Return bits of the names whose text in JSON begins with this byte. (The empty name begins with its closing
        quote.)
        """
        found = self._names_from.get(byte)
        if found is None:
            ways = [strings.char_sequences(name[0]) if name else [(frozenset(b'"'),)] for name in self.names]
            found = sum(1 << i for i, way in enumerate(ways) if any(byte in sequence[0] for sequence in way))
            self._names_from[byte] = found
        return found

    def in_class(self, x: Exists, label: int) -> bool:
        if label < len(self.names):
            return object_specs.in_class(self.compilation.expressions, x, self.names[label])
        matching = self.signatures[label - len(self.names)]
        return x.pattern in matching if x.pattern is not None else not matching.intersection(x.others)

    def is_open(self, others: int) -> bool:
        """Tell whether every unnamed key may come, so that every text of a key can be completed."""
        return others == (1 << len(self.signatures)) - 1

    def has_room(self, others: int, keys: frozenset[str]) -> bool:
        """Tell whether keys that came before can never make it impossible to complete a key.

        That is so if every beginning of one of `keys` can be completed to more keys than can have come before.
        """
        if self.is_open(others):
            return True
        most = len(self.names) + len(keys)
        return all(self._room_at(others, key) > most for key in keys)

    def _room_at(self, others: int, key: str) -> int:
        """Return the least number of unnamed keys to which a beginning of `key` can be completed."""
        found = self._room.get((others, key))
        if found is None:
            counts = self._counts_of(others)
            found, state = int(counts[0]), 0
            for char in key:
                state = self.dfa.step(state, ord(char))
                found = min(found, int(counts[state])) if state >= 0 else 0
                if not found:
                    break
            self._room[others, key] = found
        return found

    def _counts_of(self, others: int) -> NDArray[np.int64]:
        """Return, for each state of the automaton of unnamed keys, how many texts lead to an end, up to MAX_COUNT."""
        found = self._counts.get(others)
        if found is None:
            dfa = self.dfa
            ends = np.array([label >= 0 for label in self._labels(others)], dtype=np.int64)
            bounds = np.append(np.clip(dfa.starts, 0, 0xD800), 0xD800)  # those below the surrogates are enough
            sizes = np.bincount(dfa.classes, np.diff(bounds), dfa.num_classes).astype(np.int64)
            targets = np.array(dfa.transitions, dtype=np.int64).reshape(len(ends), -1)
            targets[targets < 0] = len(ends)
            following, found = ends, None
            while found is None or (following != found).any():
                found = following
                following = np.minimum(np.append(found, 0)[targets] @ sizes + ends, MAX_COUNT)
            self._counts[others] = found
        return found

    def table(self, named: int, others: int, extras: frozenset[str]) -> FrameTable:
        """Return the table that reads a key of these labels, except the unnamed keys `extras`. Its exits are the
        labels.

        If any unnamed key may come, one table serves all states of an object: its frames make the exits of names that
        came DEAD, and compare unnamed keys with those that came. Otherwise the table itself refuses the keys that may
        not come, and every text that leads only to such keys. If there is room (see `has_room`), it need not refuse
        unnamed keys that came.
        """
        if self.is_open(others):
            key: tuple[object, ...] = ("open",)
        elif not others or self.has_room(others, extras):
            extras = frozenset()
            if others and self.has_room(others, self._all_names):
                named = -1
            key = (named, others, extras)
        else:
            key = (named, others, extras)
        found = self._tables.get(key)
        if found is None:
            if self.is_open(others):
                rows = self._any_keys()
            elif not others:
                rows = self._named_keys(named)
            else:
                rows = self._some_keys(named, others, extras)
            found = self._tables[key] = self.compilation.string_table(rows, self.num_labels)
        return found

    def _any_keys(self) -> strings.Content:
        """Return the table with every label."""
        n = len(self.names)
        if self.dfa is ANY_CHARS:
            base = strings.any_string_content()
            base = replace(base, rows=np.where(base.rows == leave(0), leave(n), base.rows))
        else:
            base = strings.json_string_rows(self.dfa, self._labels(-1))
        return overlay(base, {k: i for i, k in enumerate(self.names)})

    def _named_keys(self, named: int) -> strings.Content:
        """Return the table of these names alone."""
        return overlay(None, {k: i for i, k in enumerate(self.names) if (named >> i) & 1})

    def _some_keys(self, named: int, others: int, extras: frozenset[str]) -> strings.Content:
        """Return the table of these names, and of the unnamed keys of these signatures except `extras`."""
        if extras:
            entries = {k: i if (named >> i) & 1 else -1 for i, k in enumerate(self.names)}
            content = overlay(
                strings.json_string_rows(self.dfa, self._labels(others)), {**entries, **dict.fromkeys(extras, -1)}
            )
            strings.trim(content.rows)
            return content
        if self._every_key is None:
            every = {k: i for i, k in enumerate(self.names)}
            content = overlay(strings.json_string_rows(self.dfa, self._labels(-1)), every)
            strings.trim(content.rows)
            self._every_key = content
        content = self._every_key
        rows = self._dropped(content.rows, named, others)
        is_dead = (rows == REFUSE).all(axis=1)
        beyond = np.where(is_dead[np.maximum(content.beyond, 0)] & (content.beyond >= 0), REFUSE, content.beyond)
        return replace(content, rows=rows, beyond=beyond)

    def _dropped(self, rows: NDArray[np.int32], named: int, others: int) -> NDArray[np.int32]:
        """Return a copy of rows that refuses the labels that are not among these."""
        labels = named & ((1 << len(self.names)) - 1) | others << len(self.names)
        gone = [leave(label) for label in range(self.num_labels) if not (labels >> label) & 1]
        rows = rows.copy()
        strings.drop_exits(rows, np.array(gone, dtype=np.int32))
        return rows

    def _labels(self, others: int) -> list[int]:
        """Return the exit of a key that ends in each state of the automaton of unnamed keys.

        -1: the signature of such a key is not in `others`.
        """
        n = len(self.names)
        return [n + int(a) - 1 if (others >> (int(a) - 1)) & 1 else -1 for a in self.dfa.accepting]

    def possible(self, named: int, others: int, extras: frozenset[str]) -> tuple[int, int]:
        """Return those of these labels that still have a key after `extras` came."""
        if (
            not others
            or self.is_open(others)
            or (self.has_room(others, extras) and self.has_room(others, self._all_names))
        ):
            return named, others
        table = self.table(named, others, extras)
        found = self._possible.get(table)
        if found is None:
            labels = sum(1 << i for i in np.flatnonzero(ways_to_exits(table, 0).lengths >= 0).tolist())
            found = self._possible[table] = labels & ((1 << len(self.names)) - 1), labels >> len(self.names)
        return found
