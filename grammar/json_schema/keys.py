"""The keys of objects: which of them a set of object specs can tell apart, and the tables that read them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ramet.grammar import regular, strings
from ramet.grammar.automaton import Table, leave
from ramet.grammar.json_schema import specs as object_specs
from ramet.grammar.json_schema.frames import Json
from ramet.grammar.json_schema.tables import ANY_CHARS, StringRows, overlay
from ramet.grammar.json_schema.values import Exists, Expr, Objects


class Space:
    """The keys that a set of specs can tell apart: named keys, then classes of others by the languages they match."""

    def __init__(self, json: Json, specs: tuple[Objects, ...]) -> None:
        self.json = json
        self.specs = specs
        self.number = json.new_number()
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
        self.languages = list(languages)
        self._make_signatures()
        self.num_labels = len(self.names) + len(self.signatures)
        self._exprs: dict[tuple[int, int], Expr] = {}
        self._usable: dict[tuple[int, int], bool] = {}
        self._alive: dict[int, tuple[int, int]] = {}
        self._tables: dict[object, Table] = {}
        self._master: tuple[bool, StringRows] | None = None
        self._content: tuple[int, NDArray[np.int64]] = (0, np.zeros(0, dtype=np.int64))
        self.required = [sum(1 << self.index[k] for k in o.required) for o in specs]
        self.is_simple = [o.high is None and not (o.dependent or o.exists or o.low) for o in specs]

    def _make_signatures(self) -> None:
        self.dfa = ANY_CHARS
        self.signatures: list[frozenset[int]] = [frozenset()]
        if not self.languages:
            return
        found: dict[frozenset[int], int] = {}

        def label(accepts: tuple[bool, ...]) -> int:
            matching = frozenset(n for n, a in zip(self.languages, accepts, strict=True) if a)
            return 1 + found.setdefault(matching, len(found))

        get = self.json.expressions.languages.dfa
        self.dfa = regular.product([get(n) for n in self.languages], label)
        self.signatures = list(found)

    def expr(self, spec: int, label: int) -> Expr:
        found = self._exprs.get((spec, label))
        if found is None:
            e, o = self.json.expressions, self.specs[spec]
            if label < len(self.names):
                found = object_specs.expr_of_key(e, o, self.names[label])
            else:
                found = object_specs.expr_of_signature(e, o, self.signatures[label - len(self.names)])
            self._exprs[spec, label] = found
        return found

    def usable(self, spec: int, label: int) -> bool:
        """Has a key of this label any value?"""
        return not self.json.expressions.is_empty(self.expr(spec, label))

    def alive(self, spec: int) -> tuple[int, int]:
        """Labels with values: (bits of names, bits of signatures)."""
        found = self._alive.get(spec)
        if found is None:
            n = len(self.names)
            o = self.specs[spec]
            named = sum(1 << i for i in range(n) if self.usable(spec, i))
            others = sum(1 << i for i in range(len(self.signatures)) if self.usable(spec, n + i))
            own = sum(1 << i for i in range(n) if (named >> i) & 1 and self.names[i] in o.table)
            if o.named_only and not o.exists and o.low <= own.bit_count():
                named, others = own, 0
            found = self._alive[spec] = named, others
        return found

    def in_class(self, x: Exists, label: int) -> bool:
        if label < len(self.names):
            return self.json.expressions.in_class(x, self.names[label])
        matching = self.signatures[label - len(self.names)]
        return x.pattern in matching if x.pattern is not None else not matching.intersection(x.others)

    def table(self, named: int, others: int) -> Table:
        """Keys that may come now: exit i for name i, len(names) + s for any other key of signature s.

        Where any other key may come, one table serves all states: the exits of names already seen are dead, and no text
        ends there, since more characters make another key. Keys seen that have no name are not the table's concern.
        """
        is_free = others and self.dfa is ANY_CHARS
        key = ("free",) if is_free else (named, others)
        found = self._tables.get(key)
        if found is None:
            if self._master is None or self._master[0] != bool(others):
                self._master = bool(others), self._all_keys(bool(others))
            all_keys = self._master[1]
            if not is_free:
                gone = [i for i in range(len(self.names)) if not (named >> i) & 1]
                gone += [len(self.names) + i for i in range(len(self.signatures)) if not (others >> i) & 1]
                rows = all_keys.rows.copy()
                strings.drop_exits(rows, np.array([leave(i) for i in gone], dtype=np.int32))
                if others and gone:  # what may follow has changed
                    all_keys = StringRows.compressed(rows, all_keys.byte_class, *self._content)
                else:
                    all_keys = StringRows(rows, all_keys.byte_class, all_keys.depths, all_keys.loop)
            found = self._tables[key] = self.json.string_frame(all_keys, self.num_labels)
        return found

    def _all_keys(self, with_others: bool) -> StringRows:
        """The table with every label."""
        n = len(self.names)
        entries = {k: i for i, k in enumerate(self.names)}
        base: strings.Content | None = None
        if with_others and self.dfa is ANY_CHARS:
            base = strings.any_string_content(n)
        elif with_others:
            base = strings.json_string_rows(self.dfa, [n + int(a) - 1 for a in self.dfa.accepting])
        if base is None or self.dfa is ANY_CHARS:
            plain = strings.plain_trie(base, entries)
            if plain is not None:
                return StringRows.of_trie(*plain)
        content = overlay(base, entries)
        self._content = content.num_content, content.beyond
        return StringRows.of(content)
