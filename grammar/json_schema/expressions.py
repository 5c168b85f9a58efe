"""Expressions: conjunctions of schemas, negations and value sets, interned; their values; which of them are empty.

An expression is a number: 0 is anything, 1 is nothing. Its values are computed when first needed, so a schema's unused parts
cost nothing. Emptiness is the least fixed point of "has a finite value", so a schema that needs itself is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import lru_cache

from ramet.errors import GrammarTooLarge, InvalidSchema
from ramet.grammar import ir, numeric, regular
from ramet.grammar.json_schema import formats, pattern
from ramet.grammar.json_schema import values as v
from ramet.grammar.json_schema.document import SchemaNode
from ramet.grammar.json_schema.values import FALSE, TRUE, Arrays, Contains, Exists, Expr, Objects, Rule, Strings, Values
from ramet.grammar.regular import Dfa

INFINITE = 1 << 60
MAX_SPECS = 1000


class _NotYet(Exception):
    """A question about a schema whose own meaning is just being worked out."""


class Languages:
    """Regular languages on strings, by number; automata are made when needed and shared by all compilations."""

    def __init__(self, max_states: int) -> None:
        self.max_states = max_states
        self.sources: list[tuple[str, str]] = []  # (kind, source): see `language_node`
        self._index: dict[tuple[str, str], int] = {}
        self._dfas: dict[int, Dfa] = {}
        self._conjunctions: dict[object, Dfa] = {}

    def add(self, kind: str, source: str) -> int:
        """Number of a language.

        Raises: InvalidRegex if its source does not parse.
        """
        found = self._index.get((kind, source))
        if found is None:
            language_node(kind, source)
            found = self._index[kind, source] = len(self.sources)
            self.sources.append((kind, source))
        return found

    def add_automaton(self, name: str, dfa: Dfa) -> int:
        """Number of a language that is only known as an automaton over code points."""
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
            found = self._dfas[number] = _automaton(*self.sources[number], self.max_states)
        return found

    def accepts(self, number: int, text: str) -> bool:
        return self.dfa(number).accepts(map(ord, text))

    def contains(self, spec: Strings, text: str) -> bool:
        if spec.finite is not None:
            return text in spec.finite
        if len(text) < spec.low or (spec.high is not None and len(text) > spec.high) or text in spec.excluded:
            return False
        return all(self.accepts(n, text) == wanted for n, wanted in spec.languages)

    def base(self, spec: Strings) -> Dfa:
        """The automaton of a spec's lengths and languages (not of `excluded`)."""
        key = (spec.low, spec.high, spec.languages)
        found = self._conjunctions.get(key)
        if found is None:
            found = None
            name = " and ".join(self.name(n) for n, _ in spec.languages) or "a string's length"
            parts = [self.dfa(n) if wanted else regular.complement(self.dfa(n)) for n, wanted in sorted(spec.languages)]
            parts.sort(key=lambda d: len(d.transitions))
            if spec.low or spec.high is not None or not parts:
                parts.append(length_automaton(spec.low, spec.high))
            for part in parts:  # one by one: what comes between is minimal
                found = (
                    part if found is None else regular.intersect([found, part], max_states=self.max_states, name=name)
                )
            assert found is not None
            self._conjunctions[key] = found
        return found

    def is_empty(self, spec: Strings) -> bool:
        """Whether no string is in the set."""
        if spec.finite is not None:
            return not spec.finite
        if spec.high is not None and spec.low > spec.high:
            return True
        if not spec.languages:
            return spec.high == 0 and "" in spec.excluded
        if len(spec.languages) == 1 and spec.low == 0 and spec.high is None and not spec.excluded:
            ((number, wanted),) = spec.languages
            if wanted and number not in self._dfas and _is_plain(*self.sources[number]):
                return False
        base = self.base(spec)
        if base.is_empty:
            return True
        return bool(spec.excluded) and all(t in spec.excluded for t in _few_texts(base, len(spec.excluded) + 1))


@lru_cache(maxsize=2048)
def language_node(kind: str, source: str) -> ir.Node:
    """The texts that a "pattern" is found in, or those of a "format"."""
    return formats.format_node(source) if kind == "format" else pattern.search(source)


@lru_cache(maxsize=2048)
def _automaton(kind: str, source: str, max_states: int) -> Dfa:
    return regular.compile_chars(language_node(kind, source), max_states=max_states, name=f"{kind} {source[:100]!r}")


@lru_cache(maxsize=2048)
def _is_plain(kind: str, source: str) -> bool:
    return _surely_not_empty(language_node(kind, source))


def _surely_not_empty(node: ir.Node) -> bool:
    """True where syntax alone shows that a text matches (no lookaheads, no empty classes)."""
    match node:
        case ir.Chars(ranges):
            return bool(ranges)
        case ir.Sequence(parts):
            return all(_surely_not_empty(p) for p in parts)
        case ir.Choice(options):
            return bool(options) and all(_surely_not_empty(o) for o in options)
        case ir.Repeat(item, low, _):
            return low == 0 or _surely_not_empty(item)
        case ir.Bytes():
            return True
        case _:
            return False


def _few_texts(dfa: Dfa, limit: int) -> Iterable[str]:
    """Texts of the language, shortest first, up to `limit`; enough to see whether a finite set covers it."""
    level: list[tuple[int, str]] = [(0, "")]
    found = 0
    while level and found < limit:
        following = []
        for state, text in level:
            if dfa.accepting[state]:
                found += 1
                yield text
                if found >= limit:
                    return
            for i, start in enumerate(dfa.starts):
                to = dfa.transitions[state][dfa.classes[i]]
                end = dfa.starts[i + 1] if i + 1 < len(dfa.starts) else ir.MAX_CODE_POINT + 1
                if to >= 0:
                    following.extend((to, text + chr(c)) for c in range(start, min(end, start + limit)))
        level = following[: 4 * limit]


def length_automaton(low: int, high: int | None) -> Dfa:
    """Strings of low..high code points."""
    n = (low if high is None else high) + 1
    rows = [[i + 1] for i in range(n - 1)] + [[n - 1 if high is None else -1]]
    return Dfa(ir.MAX_CODE_POINT, [0], [0], 1, rows, [i >= low for i in range(n)])


class Expressions:
    """Owner of all expressions of one compilation. `interpret` gives the values of a schema node, `interpret_not` all others."""

    def __init__(
        self,
        languages: Languages,
        interpret: Callable[[SchemaNode], Values],
        interpret_not: Callable[[SchemaNode], Values],
    ) -> None:
        self.languages = languages
        self.interpret = interpret
        self.interpret_not = interpret_not
        self._atoms: list[tuple[str, object]] = []
        self._atom_index: dict[tuple[str, object], int] = {}
        self._contents: list[tuple[int, ...]] = [(), (-1,)]
        self._index: dict[tuple[int, ...], Expr] = {(): TRUE, (-1,): FALSE}
        self._of_node: dict[SchemaNode, Expr] = {}
        self._kinds: dict[Expr, int] = {}
        self._conjunctions: dict[tuple[Expr, Expr], Expr] = {}
        self._values: dict[Expr, Values] = {TRUE: v.ANY, FALSE: v.NONE}
        self._atom_values: dict[int, Values] = {}
        self._open: list[int] = []
        self._costs: dict[Expr, int] = {TRUE: 1, FALSE: INFINITE}
        self._in_progress: set[Expr] = set()
        self._asked_at = 0  # atoms opened before this depth were opened by whoever asks about emptiness
        self._tainted = False
        self._scalar: dict[Expr, bool] = {TRUE: False, FALSE: True}

    # --- making

    def _atom(self, kind: str, content: object) -> Expr:
        key = (kind, content)
        found = self._atom_index.get(key)
        if found is None:
            found = self._atom_index[key] = len(self._atoms)
            self._atoms.append(key)
        return self._of((found,))

    def _of(self, atoms: tuple[int, ...]) -> Expr:
        found = self._index.get(atoms)
        if found is None:
            found = self._index[atoms] = len(self._contents)
            self._contents.append(atoms)
        return found

    def of_schema(self, node: SchemaNode) -> Expr:
        found = self._of_node.get(node)
        if found is None:
            found = self._of_node[node] = self._of_schema(node)
        return found

    def _of_schema(self, node: SchemaNode) -> Expr:
        if node.schema is True or node.schema == {}:
            return TRUE
        if node.schema is False:
            return FALSE
        return self._atom("schema", node)

    def of_values(self, values: Values) -> Expr:
        if values == v.ANY:
            return TRUE
        return FALSE if values.is_empty else self._atom("values", values)

    def negate(self, expr: Expr) -> Expr:
        if expr <= FALSE:
            return FALSE - expr
        atoms = self._contents[expr]
        if len(atoms) == 1 and self._atoms[atoms[0]][0] == "not":
            return self._atoms[atoms[0]][1]  # type: ignore[return-value]
        return self._atom("not", expr)

    def both(self, a: Expr, b: Expr) -> Expr:
        """The conjunction."""
        if a == b or b == TRUE:
            return a
        if a == TRUE:
            return b
        if FALSE in (a, b):
            return FALSE
        key = (a, b) if a < b else (b, a)
        found = self._conjunctions.get(key)
        if found is None:
            found = self._of(tuple(sorted({*self._contents[a], *self._contents[b]})))
            if found not in (a, b) and (self.is_scalar(a) or self.is_scalar(b)):
                found = self._simpler(a, b, found)
            self._conjunctions[key] = found
        return found

    def _simpler(self, a: Expr, b: Expr, whole: Expr) -> Expr:
        """The conjunction `whole` of a and b, one of them scalar, in a form that shows when it is empty or no news."""
        asked_at, self._asked_at = self._asked_at, len(self._open)
        try:
            found = self.intersect(self.values(a), self.values(b))
            if found.is_empty:
                return FALSE
            for e in (a, b):
                if self.is_scalar(e) and found == self.values(e):
                    return e
        except _NotYet:
            return whole
        finally:
            self._asked_at = asked_at
        return self.of_values(found) if self.is_scalar(a) and self.is_scalar(b) else whole

    def is_scalar(self, expr: Expr) -> bool:
        """True where the values are known to be plain, so that comparing them now is cheap and cannot recurse."""
        found = self._scalar.get(expr)
        if found is None:
            found = all(self._is_scalar_atom(a) for a in self._contents[expr])
            self._scalar[expr] = found
        return found

    def _is_scalar_atom(self, atom: int) -> bool:
        kind, content = self._atoms[atom]
        if kind == "not":
            return self.is_scalar(content)  # type: ignore[arg-type]
        if kind == "values":
            return all(s is v.ANY_OBJECTS for s in content.objects) and all(s is v.ANY_ARRAYS for s in content.arrays)  # type: ignore[attr-defined]
        schema = content.schema  # type: ignore[attr-defined]
        if not isinstance(schema, dict) or _NESTING & schema.keys():
            return False
        if "const" in schema:
            return not isinstance(schema["const"], dict | list)
        if isinstance(schema.get("enum"), list):
            return not any(isinstance(x, dict | list) for x in schema["enum"])
        return isinstance(schema.get("type"), str) and schema["type"] not in ("object", "array")

    # --- values

    def values(self, expr: Expr) -> Values:
        """The set of values.

        Raises: InvalidSchema where a schema's meaning depends on itself without any nesting (a cycle of references).
        """
        found = self._values.get(expr)
        if found is None:
            found = v.ANY
            for atom in self._contents[expr]:
                found = self.intersect(found, self._values_of_atom(atom))
            self._values[expr] = found
        return found

    def _values_of_atom(self, atom: int) -> Values:
        found = self._atom_values.get(atom)
        if found is None:
            kind, content = self._atoms[atom]
            if atom in self._open:
                if self._open.index(atom) < self._asked_at:
                    raise _NotYet
                node = next(
                    self._atoms[a][1] for a in self._open[self._open.index(atom) :] if self._atoms[a][0] == "schema"
                )
                pointer = node.pointer  # type: ignore[attr-defined]
                raise InvalidSchema(f"{pointer or '/'}: the schema refers to itself without an end", pointer)
            if len(self._open) > 150:
                raise GrammarTooLarge("schemas refer to each other more than 150 levels deep")
            self._open.append(atom)
            try:
                if kind == "schema":
                    found = self.interpret(content)  # type: ignore[arg-type]
                elif kind == "not":
                    found = self._values_of_not(content)  # type: ignore[arg-type]
                else:
                    found = content  # type: ignore[assignment]
            finally:
                self._open.pop()
            assert isinstance(found, Values)
            self._atom_values[atom] = found
        return found

    def _values_of_not(self, expr: Expr) -> Values:
        """Not a conjunction: not the first, or not the second, ..."""
        parts = []
        for atom in self._contents[expr]:
            kind, content = self._atoms[atom]
            if kind == "schema":
                parts.append(self.interpret_not(content))  # type: ignore[arg-type]
            elif kind == "not":
                parts.append(self.values(content))  # type: ignore[arg-type]
            else:
                parts.append(self.complement(content))  # type: ignore[arg-type]
        return v.unite(parts)

    def kinds(self, expr: Expr) -> int:
        """Bits of the kinds of value there are: 0 object, 1 array, 2 string, 3 number, 4 true, 5 false, 6 null."""
        found = self._kinds.get(expr)
        if found is None:
            a = self.values(expr)
            found = bool(a.objects) | bool(a.arrays) << 1 | bool(a.strings) << 2 | bool(a.numbers) << 3
            found |= (a.booleans >> 1 & 1) << 4 | (a.booleans & 1) << 5 | a.null << 6
            self._kinds[expr] = found
        return found

    # --- algebra

    def intersect(self, a: Values, b: Values) -> Values:
        if a is v.ANY or a == b:
            return b
        if b is v.ANY:
            return a
        self._check_size(a, b)
        return Values(
            a.null and b.null,
            a.booleans & b.booleans,
            v.product(a.numbers, b.numbers, numeric.intersect) if a.numbers and b.numbers else (),
            v.product(a.strings, b.strings, self.both_strings) if a.strings and b.strings else (),
            v.product(a.objects, b.objects, self.both_objects) if a.objects and b.objects else (),
            v.product(a.arrays, b.arrays, self.both_arrays) if a.arrays and b.arrays else (),
        )

    def _check_size(self, a: Values, b: Values) -> None:
        size = max(len(a.objects) * len(b.objects), len(a.arrays) * len(b.arrays), len(a.strings) * len(b.strings))
        if size > MAX_SPECS:
            where = next((self._atoms[x][1] for x in reversed(self._open) if self._atoms[x][0] == "schema"), None)
            pointer = getattr(where, "pointer", "") or "/"
            raise GrammarTooLarge(f"{pointer}: combining its alternatives needs more than {MAX_SPECS:,} cases")

    def complement(self, a: Values) -> Values:
        """All other values."""
        numbers: tuple[numeric.Numbers, ...] = (numeric.ANY,)
        for n in a.numbers:
            numbers = v.product(numbers, tuple(numeric.complement(n)), numeric.intersect)
        strings: tuple[Strings, ...] = (v.ANY_STRINGS,)
        for s in a.strings:
            strings = v.product(strings, tuple(_not_strings(s)), self.both_strings)
        objects: tuple[Objects, ...] = (v.ANY_OBJECTS,)
        for o in a.objects:
            other = tuple(self.not_objects(o))
            self._check_size(Values(objects=objects), Values(objects=other))
            objects = v.product(objects, other, self.both_objects)
        arrays: tuple[Arrays, ...] = (v.ANY_ARRAYS,)
        for r in a.arrays:
            rest = tuple(self.not_arrays(r))
            self._check_size(Values(arrays=arrays), Values(arrays=rest))
            arrays = v.product(arrays, rest, self.both_arrays)
        return Values(not a.null, 3 & ~a.booleans, numbers, strings, objects, arrays)

    def both_strings(self, a: Strings, b: Strings) -> Strings | None:
        if a is v.ANY_STRINGS or b is v.ANY_STRINGS:
            return b if a is v.ANY_STRINGS else a
        if a.finite is not None or b.finite is not None:
            if a.finite is None:
                a, b = b, a
            assert a.finite is not None
            kept = frozenset(t for t in a.finite if self.languages.contains(b, t))
            return Strings(finite=kept) if kept else None
        high = a.high if b.high is None else b.high if a.high is None else min(a.high, b.high)
        if any((n, not wanted) in b.languages for n, wanted in a.languages):
            return None
        out = Strings(max(a.low, b.low), high, a.languages | b.languages, None, a.excluded | b.excluded)
        return None if self.languages.is_empty(out) else out

    def expr_of_key(self, o: Objects, key: str) -> Expr:
        """Expression of the value of a key, declared or not."""
        found = o.table.get(key)
        return self._undeclared(o, lambda n: self.languages.accepts(n, key)) if found is None else found

    def _undeclared(self, o: Objects, matches: Callable[[int], bool]) -> Expr:
        expr = o.default
        for rule in o.rules:
            hit = False
            for number, e in rule.patterns:
                if matches(number):
                    hit = True
                    expr = self.both(expr, e)
            if not hit:
                expr = self.both(expr, rule.additional)
        return expr

    def expr_of_signature(self, o: Objects, matching: frozenset[int]) -> Expr:
        """Expression of the value of an undeclared key that matches exactly these languages."""
        return self._undeclared(o, matching.__contains__)

    def both_objects(self, a: Objects, b: Objects) -> Objects | None:
        if a is v.ANY_OBJECTS or b is v.ANY_OBJECTS:
            return b if a is v.ANY_OBJECTS else a
        names = dict.fromkeys([*a.table, *b.table])
        properties = tuple((k, self.both(self.expr_of_key(a, k), self.expr_of_key(b, k))) for k in names)
        high = a.high if b.high is None else b.high if a.high is None else min(a.high, b.high)
        dependent = dict(a.dependent)
        for k, needs in b.dependent:
            dependent[k] = dependent.get(k, frozenset()) | needs
        return self.tidy_objects(
            Objects(
                properties,
                self.both(a.default, b.default),
                tuple(dict.fromkeys(a.rules + b.rules)),
                a.required | b.required,
                max(a.low, b.low),
                high,
                tuple(sorted(dependent.items())),
                tuple(dict.fromkeys(a.exists + b.exists)),
            )
        )

    def tidy_objects(self, o: Objects) -> Objects | None:
        """Declare all keys that are named anywhere; None where it is seen that there is no such object."""
        low = max(o.low, len(o.required))
        if o.high is not None and low > o.high:
            return None
        named = set(o.required)
        for k, needs in o.dependent:
            named.add(k)
            named |= needs
        missing = sorted(named - o.table.keys())
        properties = o.properties + tuple((k, self.expr_of_key(o, k)) for k in missing)
        table = dict(properties)
        for k in o.required:
            e = table[k]
            if e == FALSE or (len(self._contents[e]) > 1 and self.is_empty(e)):
                return None
        default, rules = o.default, o.rules
        if default == FALSE:
            rules = ()
        if default == FALSE and any(e == FALSE for _, e in properties):
            properties = tuple((k, e) for k, e in properties if e != FALSE)
        if default == FALSE and low > len(properties):
            return None
        low = o.low if o.low > len(o.required) else 0
        return Objects(properties, default, rules, o.required, low, o.high, o.dependent, o.exists)

    def not_objects(self, o: Objects) -> list[Objects]:
        out = []
        for k, e in o.properties:
            if e != TRUE and k in o.required:
                out.append(Objects(((k, self.negate(e)),), required=frozenset((k,))))
                out.append(Objects(((k, FALSE),)))
            elif e != TRUE:
                out.append(Objects(((k, self.negate(e)),), required=frozenset((k,))))
            elif k in o.required:
                out.append(Objects(((k, FALSE),)))
        if o.low:
            out.append(Objects(high=o.low - 1))
        if o.high is not None:
            out.append(Objects(low=o.high + 1))
        for k, needs in o.dependent:
            out.extend(Objects(((k, TRUE), (r, FALSE)), required=frozenset((k,))) for r in sorted(needs) if r != k)
        names = frozenset(o.table)
        if o.default != TRUE:
            out.append(Objects(exists=(Exists(None, (), names, self.negate(o.default)),)))
        for rule in o.rules:
            for number, e in rule.patterns:
                if e != TRUE:
                    out.append(Objects(exists=(Exists(number, (), names, self.negate(e)),)))
            if rule.additional != TRUE:
                others = tuple(n for n, _ in rule.patterns)
                out.append(Objects(exists=(Exists(None, others, names, self.negate(rule.additional)),)))
        out.extend(self._not_exists(x) for x in o.exists)
        return out

    def _not_exists(self, x: Exists) -> Objects:
        free = tuple((k, TRUE) for k in sorted(x.names))
        other = self.negate(x.expr)
        if x.pattern is None and not x.others:
            return Objects(free, other)
        if x.pattern is None:
            return Objects(free, rules=(Rule(tuple((n, TRUE) for n in x.others), other),))
        return Objects(free, rules=(Rule(((x.pattern, other),), TRUE),))

    @staticmethod
    def item(a: Arrays, index: int) -> Expr:
        return a.prefix[index] if index < len(a.prefix) else a.rest

    def both_arrays(self, a: Arrays, b: Arrays) -> Arrays | None:
        if a is v.ANY_ARRAYS or b is v.ANY_ARRAYS:
            return b if a is v.ANY_ARRAYS else a
        n = max(len(a.prefix), len(b.prefix))
        high = a.high if b.high is None else b.high if a.high is None else min(a.high, b.high)
        return self.tidy_arrays(
            Arrays(
                tuple(self.both(self.item(a, i), self.item(b, i)) for i in range(n)),
                self.both(a.rest, b.rest),
                max(a.low, b.low),
                high,
                tuple(dict.fromkeys(a.contains + b.contains)),
                a.unique or b.unique,
                a.repeats or b.repeats,
            )
        )

    def tidy_arrays(self, a: Arrays) -> Arrays | None:
        high = a.high
        if a.rest == FALSE:
            high = len(a.prefix) if high is None else min(high, len(a.prefix))
        if FALSE in a.prefix:
            at = a.prefix.index(FALSE)
            high = at if high is None else min(high, at)
        if high is not None and a.low > high:
            return None
        if a.unique and a.repeats:
            return None
        for i in range(min(a.low, len(a.prefix) + 1)):
            e = self.item(a, i)
            if len(self._contents[e]) > 1 and self.is_empty(e):
                return None
        prefix = a.prefix if high is None else a.prefix[:high]
        rest = FALSE if high is not None and len(prefix) >= high else a.rest
        contains = tuple(c for c in a.contains if c.low > 0 or c.high is not None)
        return Arrays(prefix, rest, a.low, high, contains, a.unique, a.repeats)

    def not_arrays(self, a: Arrays) -> list[Arrays]:
        out = []
        for i, e in enumerate(a.prefix):
            if e != TRUE:
                out.append(Arrays((*([TRUE] * i), self.negate(e)), low=i + 1))
        if a.rest == FALSE:
            out.append(Arrays(low=len(a.prefix) + 1))
        elif a.rest != TRUE:
            out.append(Arrays(contains=(Contains(len(a.prefix), self.negate(a.rest), 1, None),)))
        if a.low:
            out.append(Arrays(high=a.low - 1))
        if a.high is not None:
            out.append(Arrays(low=a.high + 1))
        for c in a.contains:
            if c.low:
                out.append(Arrays(contains=(Contains(c.start, c.expr, 0, c.low - 1),)))
            if c.high is not None:
                out.append(Arrays(contains=(Contains(c.start, c.expr, c.high + 1, None),)))
        if a.unique:
            out.append(Arrays(repeats=True, low=2))
        if a.repeats:
            out.append(Arrays(unique=True))
        return [t for t in map(self.tidy_arrays, out) if t is not None]

    # --- emptiness

    def is_empty(self, expr: Expr) -> bool:
        """True where no value is in the set; asked while schemas are being read, False may also mean that it is not known."""
        found = self._costs.get(expr)
        if found is None:
            if self._is_plain(expr):
                return False
            try:
                found = self.cost(expr)
            except _NotYet:
                return False
        return found >= INFINITE

    def _is_plain(self, expr: Expr) -> bool:
        """True where a schema's keywords show at once that it has values; so that its values need not be worked out."""
        atoms = self._contents[expr]
        if len(atoms) != 1 or self._atoms[atoms[0]][0] != "schema":
            return False
        schema = self._atoms[atoms[0]][1].schema  # type: ignore[attr-defined]
        return isinstance(schema, dict) and not _MAY_EMPTY & schema.keys()

    def values_are_empty(self, a: Values) -> bool:
        """As `is_empty`, for values."""
        asked_at, self._asked_at = self._asked_at, len(self._open)
        try:
            return a.is_empty or self.cost_of_values(a) >= INFINITE
        except _NotYet:
            return False
        finally:
            self._asked_at = asked_at

    def cost(self, expr: Expr) -> int:
        """About the bytes of the shortest value; INFINITE where there is none."""
        found = self._costs.get(expr)
        if found is not None:
            return found
        if expr in self._in_progress:
            self._tainted = True
            return INFINITE
        if len(self._in_progress) > 200:
            raise GrammarTooLarge("required properties are nested more than 200 levels deep")
        outer, self._tainted = self._tainted, False
        asked_at, self._asked_at = self._asked_at, len(self._open)
        self._in_progress.add(expr)
        try:
            found = self.cost_of_values(self.values(expr))
        finally:
            self._in_progress.discard(expr)
            self._asked_at = asked_at
        # an answer "empty" that rests on a question still open holds only for the outermost question
        if found < INFINITE or not self._tainted or not self._in_progress:
            self._costs[expr] = found
        self._tainted = outer or (self._tainted and found >= INFINITE)
        return found

    def cost_of_values(self, a: Values) -> int:
        if a.null or a.booleans or a.numbers:
            return 4
        if a.strings:
            return min(2 + (s.low if s.finite is None else min(map(len, s.finite))) for s in a.strings)
        best = INFINITE
        for r in a.arrays:
            best = min(best, self.cost_of_array(r))
        for o in a.objects:
            best = min(best, self.cost_of_object(o))
        return best

    def cost_of_object(self, o: Objects) -> int:
        total = 2
        needed = self.closure_of_keys(o, o.required)
        if o.high is not None and len(needed) > o.high:
            return INFINITE
        for k in needed:
            c = self.cost(self.expr_of_key(o, k))
            if c >= INFINITE:
                return INFINITE
            total += len(k) + 4 + c
        if o.low > len(needed):
            if o.default == FALSE:
                usable = sum(1 for k, e in o.properties if k in needed or not self.is_empty(e))
                if usable < o.low:
                    return INFINITE
            total += 8 * (o.low - len(needed))
        for x in o.exists:
            if not self._may_exist(o, x):
                return INFINITE
            total += 8
        return total

    def _may_exist(self, o: Objects, x: Exists) -> bool:
        for k, e in o.properties:
            if self.in_class(x, k) and not self.is_empty(self.both(e, x.expr)):
                return True
        matching = {x.pattern} if x.pattern is not None else set()
        others = [n for rule in o.rules for n, _ in rule.patterns if n not in matching and n not in x.others]
        # the key matches what it must; other patterns may or may not match it: try none, then each one
        for extra in (None, *others):
            found = frozenset(matching if extra is None else {*matching, extra})
            if not self.is_empty(self.both(self.expr_of_signature(o, found), x.expr)):
                return True
        return False

    def in_class(self, x: Exists, key: str) -> bool:
        if key in x.names:
            return False
        if x.pattern is not None:
            return self.languages.accepts(x.pattern, key)
        return not any(self.languages.accepts(n, key) for n in x.others)

    @staticmethod
    def closure_of_keys(o: Objects, keys: frozenset[str]) -> frozenset[str]:
        """All keys that must stand in an object that has these."""
        if not o.dependent:
            return keys
        needed = set(keys)
        while True:
            more = {r for k, needs in o.dependent if k in needed for r in needs} - needed
            if not more:
                return frozenset(needed)
            needed |= more

    def cost_of_array(self, a: Arrays) -> int:
        total = 2
        need = max([a.low, *(c.start + c.low for c in a.contains if c.low)], default=0)
        if a.high is not None and need > a.high:
            return INFINITE
        for i in range(min(need, len(a.prefix))):
            c = self.cost(self.item(a, i))
            if c >= INFINITE:
                return INFINITE
            total += c + 1
        if need > len(a.prefix):
            c = self.cost(a.rest)
            if c >= INFINITE:
                return INFINITE
            total += (c + 1) * (need - len(a.prefix))
        for x in a.contains:
            if x.low and not self.may_contain(a, x, 0):
                return INFINITE
        return INFINITE if a.unique and self.count(a.rest) + len(a.prefix) < need else total

    def may_contain(self, a: Arrays, x: Contains, index: int) -> bool:
        """Can an item from `index` on be in x?"""
        first = max(x.start, index)
        last = len(a.prefix) + 1 if a.high is None else min(len(a.prefix) + 1, a.high)
        return any(
            not self.is_empty(self.both(self.item(a, i), x.expr))
            for i in range(first, max(last, first + (a.high is None)))
        )

    def count(self, expr: Expr) -> int:
        """Number of values, at most 2^31."""
        many = 1 << 31
        a = self.values(expr)
        if (
            a.objects
            or a.arrays
            or any(s.finite is None for s in a.strings)
            or any(n.finite is None for n in a.numbers)
        ):
            return many
        found: set[str | Fraction] = {t for s in a.strings for t in s.finite or ()}
        found |= {t for n in a.numbers for t in n.finite or ()}
        return len(found) + int(a.null) + a.booleans.bit_count()


# keywords that can leave a schema without any value, alone or together
_MAY_EMPTY = {
    "enum", "const", "required", "allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "$recursiveRef", "extends",
    "disallow", "dependentSchemas", "dependencies", "pattern", "minLength", "maximum", "exclusiveMaximum", "multipleOf",
    "divisibleBy", "minItems", "contains", "minProperties", "unevaluatedProperties", "unevaluatedItems",
}  # fmt: skip
_NESTING = {
    "$ref", "allOf", "anyOf", "oneOf", "not", "if", "$dynamicRef", "$recursiveRef", "properties", "items", "required",
    "additionalProperties", "patternProperties", "dependencies", "dependentSchemas", "contains", "prefixItems",
}  # fmt: skip


def _not_strings(s: Strings) -> list[Strings]:
    if s.finite is not None:
        return [Strings(excluded=s.finite)]
    out = []
    if s.low:
        out.append(Strings(high=s.low - 1))
    if s.high is not None:
        out.append(Strings(low=s.high + 1))
    out.extend(Strings(languages=frozenset(((n, not wanted),))) for n, wanted in s.languages)
    if s.excluded:
        out.append(Strings(finite=s.excluded))
    return out
