"""Grammars composed of texts, patterns, JSON schemas and other grammars, as JSON -> one grammar.

A node is a text, or an object with one of these fields:

    {"regex": "[a-z]+"}                      a pattern of Python's module re
    {"choices": ["a", "b"]}                  one of these texts
    {"substring_of": "..."}                  a passage of this text
    {"cfg": "start: ..."}                    a grammar in Lark's syntax
    {"json_schema": {...}}                   a JSON value
    {"number": {"minimum": 0, "maximum": 9}}  a decimal number; both limits may be left out
    {"sequence": [node, ...]}                all of them in order
    {"select": [node, ...]}                  any one of them
    {"repeat": node, "at_least": 0, "at_most": 3}  the node again and again; without `at_most` there is no limit
    {"all": [node, ...]}, {"not": node}      texts of all nodes; texts that are not of the node. Of regular nodes only
    {"until": ["."], "of": node}             a text of the node without ".", and then, if "." follows, any text after it
    {"rule": "name"}                         another node, by its name
    {"capture": "name", "of": node, "type": "int", "list": true}  the node; what it reads is kept (captures.py)

and a whole grammar is a node, or {"start": node, "rules": {"name": node, ...}}. Rules may be recursive.

Not here: finding the captures in a finished text (captures.py).

The composed grammar is regular, or regular with JSON values in it (text_with_values.py), or has recursive rules
(regular/pushdown.py). A JSON value inside of a recursive rule is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NoReturn, get_args

import numpy as np

from ramet.errors import GrammarTooLarge, InvalidGrammar
from ramet.grammar import ir
from ramet.grammar.regular import dfas, numbers
from ramet.grammar.regular import languages as regular
from ramet.grammar.regular.utf8 import compile_text
from ramet.grammar.text.cfg import parse_cfg
from ramet.grammar.text.regex import parse_regex
from ramet.grammar.text.substring import substring_of
from ramet.grammar.tools.text_with_values import Gap, TextBuilder, TextWithValues

MAX_COUNT = 10_000
MAX_NODES = 20_000
_MARK = 0xFF  # no byte of UTF-8: it stands where a JSON value begins
_SPACES = ir.Repeat(ir.Chars(((9, 10), (13, 13), (32, 32))))
_ZEROS = ir.Repeat(ir.text("0"))


CaptureType = Literal["str", "int", "float", "bool", "json"]


@dataclass(frozen=True, slots=True)
class CaptureForm:
    """How the texts of a capture become a value. `is_list`: all its texts are kept, not only the last one."""

    type: CaptureType = "str"
    is_list: bool = False


@dataclass(frozen=True, slots=True)
class Composed:
    """A grammar as nodes of the intermediate form, and the captures in it by name."""

    rules: ir.NamedRules
    captures: Mapping[str, CaptureForm]

    @staticmethod
    def of(source: Any, options: ir.JsonOptions | None = None) -> Composed:  # Any: JSON
        """Read a composed grammar. Raises InvalidGrammar naming the place, and the errors of patterns and schemas.

        options: of all its schemas.
        """
        return _Reader(options or ir.JsonOptions()).read(source)

    def parsed(self, max_regular_states: int) -> ir.Table | TextWithValues | ir.NamedRules:
        """Return the grammar in the simplest form that can hold it. Raises GrammarTooLarge, InvalidGrammar."""
        schemas: list[ir.JsonSchema] = []
        rules = ir.NamedRules(
            {name: _plain(node, schemas) for name, node in self.rules.rules.items()}, self.rules.start
        )
        recursive = rules.recursive()
        if rules.start not in recursive:
            whole = rules.inlined(rules.rules[rules.start])
            table = table_of(whole, max_regular_states)
            return _with_values(table, schemas) if schemas else table
        if schemas:
            names = ", ".join(sorted(name.removeprefix("rule ") for name in recursive - {rules.start}))
            raise InvalidGrammar(
                f"a JSON value can't stand in a grammar with recursive rules ({names}); let the JSON schema itself be "
                "recursive, or write the value as a rule of texts"
            )
        bodies = {
            name: _tabled(_inline_plain(rules.rules[name], rules, recursive), max_regular_states) for name in recursive
        }
        return ir.NamedRules(bodies, rules.start)


class _Reader:
    """Reads one source. `place` is the path to the node that is being read, for messages."""

    def __init__(self, options: ir.JsonOptions) -> None:
        self.options = options
        self.rules: dict[str, ir.Node] = {}
        self.captures: dict[str, CaptureForm] = {}
        self.is_regular = False  # inside of a part that must be regular
        self.rule_names: frozenset[str] = frozenset()
        self.place: list[str] = []
        self.num_nodes = 0

    def read(self, source: Any) -> Composed:
        rules: dict[str, Any] = {}
        start = source
        if isinstance(source, Mapping) and "start" in source:
            self.check_fields(source, {"start", "rules"})
            start, rules = source["start"], source.get("rules", {})
            if not isinstance(rules, Mapping) or not all(isinstance(name, str) and name for name in rules):
                self.fail(f"rules must be an object of nodes by name, not {_shown(rules)}")
        self.rule_names = frozenset(rules)
        for name, node in rules.items():
            self.rules[f"rule {name}"] = self.inside(f"rules.{name}", node)
        self.rules["start"] = self.inside("start", start)
        return Composed(ir.NamedRules(self.rules), self.captures)

    def inside(self, place: str, source: Any) -> ir.Node:
        self.place.append(place)
        node = self.node(source)
        self.place.pop()
        return node

    def node(self, source: Any) -> ir.Node:
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise GrammarTooLarge(f"the grammar has more than {MAX_NODES:,} nodes")
        if isinstance(source, str):
            return ir.Bytes(self.utf8(source))
        if not isinstance(source, Mapping):
            self.fail(f"a node is a text or an object, not {_shown(source)}")
        kind = next((name for name in _KINDS if name in source), None)
        if kind is None:
            self.fail(f"a node has one of the fields {', '.join(_KINDS)}, not {_shown(list(source))}")
        read, *more = _KINDS[kind]
        self.check_fields(source, {kind, *more})
        return read(self, source)

    def read_regex(self, source: Mapping[str, Any]) -> ir.Node:
        return parse_regex(self.text(source, "regex"))

    def read_choices(self, source: Mapping[str, Any]) -> ir.Node:
        texts = self.items(source, "choices")
        if not texts or not all(isinstance(text, str) for text in texts):
            self.fail(f"choices must be a list of texts, not {_shown(texts)}")
        return ir.Choice(tuple(ir.Bytes(self.utf8(text)) for text in texts))

    def read_substring_of(self, source: Mapping[str, Any]) -> ir.Node:
        return substring_of(self.text(source, "substring_of"))

    def read_json_schema(self, source: Mapping[str, Any]) -> ir.Node:
        schema = source["json_schema"]
        if not isinstance(schema, dict | bool):
            self.fail(f"json_schema must be an object or a boolean, not {_shown(schema)}")
        self.must_be_free("a JSON value", "say in the JSON schema which values are allowed")
        return ir.JsonSchema(schema, self.options)

    def read_cfg(self, source: Mapping[str, Any]) -> ir.Node:
        found = parse_cfg(self.text(source, "cfg"))
        if len(found.rules) > 1:
            self.must_be_free("a grammar with rules", "use patterns")
        prefix = f"cfg {len(self.rules)} {self.num_nodes} "
        for name, node in found.rules.items():
            self.rules[prefix + name] = ir.changed(
                node, lambda one: ir.Reference(prefix + one.rule) if isinstance(one, ir.Reference) else None
            )
        return ir.Reference(prefix + found.start)

    def read_capture(self, source: Mapping[str, Any]) -> ir.Node:
        name, kind, is_list = self.text(source, "capture"), source.get("type", "str"), source.get("list", False)
        if kind not in get_args(CaptureType):
            self.fail(f"the type of a capture is one of {', '.join(get_args(CaptureType))}, not {_shown(kind)}")
        if not isinstance(is_list, bool) or "of" not in source or not name:
            self.fail("a capture has a name, a node `of`, and `list`, which is true or false")
        self.must_be_free("a capture", "capture the whole")
        form = CaptureForm(kind, is_list)
        if self.captures.setdefault(name, form) != form:
            self.fail(f"the capture {name!r} has two forms; give each its own name, or all of them one type")
        return ir.Named(self.inside("of", source["of"]), name)

    def read_number(self, source: Mapping[str, Any]) -> ir.Node:
        limits = source["number"]
        if not isinstance(limits, Mapping):
            self.fail(f"number must be an object with limits, not {_shown(limits)}")
        self.check_fields(limits, {"minimum", "maximum"})
        for name, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                self.fail(f"{name} must be a number, not {_shown(value)}")
        low, high = (None if n not in limits else numbers.fraction(limits[n]) for n in ("minimum", "maximum"))
        return _number_texts(low, high)

    def read_sequence(self, source: Mapping[str, Any]) -> ir.Node:
        return ir.Concatenation(self.nodes(source, "sequence"))

    def read_select(self, source: Mapping[str, Any]) -> ir.Node:
        return ir.Choice(self.nodes(source, "select"))

    def read_repeat(self, source: Mapping[str, Any]) -> ir.Node:
        low, high = source.get("at_least", 0), source.get("at_most")
        for name, count in (("at_least", low), ("at_most", high)):
            is_count = isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= MAX_COUNT
            if not is_count and not (name == "at_most" and count is None):
                self.fail(f"{name} must be an integer in [0, {MAX_COUNT:,}], not {_shown(count)}")
        if high is not None and high < low:
            self.fail(f"at_least is {low}, but at_most is {high}")
        return ir.Repeat(self.inside("repeat", source["repeat"]), low, high)

    def read_all(self, source: Mapping[str, Any]) -> ir.Node:
        nodes = self.nodes(source, "all", is_regular=True)
        return ir.Intersect(nodes) if nodes else ir.ANY_TEXT

    def read_not(self, source: Mapping[str, Any]) -> ir.Node:
        return ir.Complement(self.regular("not", source["not"]))

    def read_until(self, source: Mapping[str, Any]) -> ir.Node:
        stops = self.items(source, "until")
        if not stops or not all(isinstance(stop, str) and stop for stop in stops) or "of" not in source:
            self.fail(f"until must be a list of texts that are not empty, beside `of`, not {_shown(stops)}")
        stop: ir.Node = ir.Choice(tuple(ir.Bytes(self.utf8(one)) for one in stops))
        item = self.regular("of", source["of"])
        has_stop = ir.Concatenation((ir.ANY_TEXT, stop, ir.ANY_TEXT))
        stopped_before = ir.Concatenation((ir.ANY_TEXT, stop, ir.ANY_CHAR, ir.ANY_TEXT))
        stopped = ir.Intersect((ir.Concatenation((item, stop)), ir.Complement(stopped_before)))
        plain = ir.Intersect((item, ir.Complement(has_stop)))
        return ir.Choice((plain, ir.Concatenation((stopped, ir.ANY_TEXT))))

    def read_rule(self, source: Mapping[str, Any]) -> ir.Node:
        name = self.text(source, "rule")
        self.must_be_free("a rule", "write its node there")
        if name not in self.rule_names:
            self.fail(f"there is no rule {name!r}; rules are {', '.join(sorted(self.rule_names)) or 'none'}")
        return ir.Reference(f"rule {name}")

    # --- fields

    def nodes(self, source: Mapping[str, Any], field: str, *, is_regular: bool = False) -> tuple[ir.Node, ...]:
        read = self.regular if is_regular else self.inside
        return tuple(read(f"{field}[{i}]", one) for i, one in enumerate(self.items(source, field)))

    def regular(self, place: str, source: Any) -> ir.Node:
        """Read a node that must be regular."""
        before, self.is_regular = self.is_regular, True
        node = self.inside(place, source)
        self.is_regular = before
        return node

    def must_be_free(self, what: str, way_out: str) -> None:
        """Fail inside of a part that must be regular."""
        if self.is_regular:
            self.fail(f"{what} can't stand inside of `all`, `not` or `until`; {way_out}")

    def text(self, source: Mapping[str, Any], field: str) -> str:
        value = source[field]
        if not isinstance(value, str):
            self.fail(f"{field} must be a text, not {_shown(value)}")
        return value

    def items(self, source: Mapping[str, Any], field: str) -> list[Any]:
        value = source[field]
        if not isinstance(value, list):
            self.fail(f"{field} must be a list, not {_shown(value)}")
        return value

    def utf8(self, text: str) -> bytes:
        try:
            return text.encode()
        except UnicodeEncodeError:
            self.fail(f"the text {text!r} has a lone surrogate, which UTF-8 cannot write")

    def check_fields(self, source: Mapping[str, Any], known: set[str]) -> None:
        wrong = sorted(set(source) - known, key=str)
        if wrong:
            self.fail(f"field {wrong[0]!r} does not stand beside {', '.join(sorted(known & set(source)))}")

    def fail(self, message: str) -> NoReturn:
        raise InvalidGrammar(f"{'.'.join(self.place) or 'the grammar'}: {message}")


# The reader of each kind of node, and its fields besides the one that names it.
_KINDS: Mapping[str, tuple[Callable[[_Reader, Mapping[str, Any]], ir.Node], *tuple[str, ...]]] = {
    "regex": (_Reader.read_regex,),
    "choices": (_Reader.read_choices,),
    "substring_of": (_Reader.read_substring_of,),
    "cfg": (_Reader.read_cfg,),
    "json_schema": (_Reader.read_json_schema,),
    "number": (_Reader.read_number,),
    "sequence": (_Reader.read_sequence,),
    "select": (_Reader.read_select,),
    "repeat": (_Reader.read_repeat, "at_least", "at_most"),
    "all": (_Reader.read_all,),
    "not": (_Reader.read_not,),
    "until": (_Reader.read_until, "of"),
    "rule": (_Reader.read_rule,),
    "capture": (_Reader.read_capture, "of", "type", "list"),
}


def _number_texts(low: Fraction | None, high: Fraction | None) -> ir.Node:
    """Return the texts of the numbers within these limits that `int` or `float` reads: zeros may stand before them."""
    zero = Fraction(0)
    positive = _digits(max(low or zero, zero), high)
    negative = _digits(max(-high if high is not None else zero, zero), None if low is None else -low)
    ways = [] if positive is None else [ir.Concatenation((ir.optional(ir.text("+")), _ZEROS, positive))]
    if negative is not None:
        ways.append(ir.Concatenation((ir.text("-"), _ZEROS, negative)))
    return ir.Concatenation((_SPACES, ir.Choice(tuple(ways)), _SPACES))


def _digits(low: Fraction, high: Fraction | None) -> ir.Node | None:
    if high is not None and high < low:
        return None
    found = numbers.simplify(numbers.Numbers(low=low, high=high))
    if found is None:
        return None
    dfa = dfas.intersect([numbers.automaton(found), regular.compile_bytes(_UNSIGNED)])
    return dfas.table(dfa)


_UNSIGNED = ir.Concatenation((ir.Chars(((48, 57),)), ir.ANY_TEXT))


def _plain(node: ir.Node, schemas: list[ir.JsonSchema]) -> ir.Node:
    """Return a node without captures, and with a mark for each JSON value, whose schema is added to `schemas`."""

    def change(one: ir.Node) -> ir.Node | None:
        if isinstance(one, ir.Named):
            return _plain(one.item, schemas)
        if isinstance(one, ir.JsonSchema):
            schemas.append(one)
            return ir.Bytes(bytes((_MARK, *(len(schemas) - 1).to_bytes(2, "big"))))
        return None

    return ir.changed(node, change)


def _with_values(table: ir.Table, schemas: list[ir.JsonSchema]) -> TextWithValues:
    """Return the automaton with a gap where a mark is read."""
    rows = table.transitions
    plain = rows.copy()
    plain[:, _MARK] = -1
    builder = TextBuilder()
    builder.add(plain, table.accepting)
    for state in np.flatnonzero(rows[:, _MARK] >= 0).tolist():
        after = _marks_after(rows, int(rows[state, _MARK]))
        if len(after) > 1:
            raise InvalidGrammar(
                "two JSON values can begin in the same place; make them one value of a union, as gen(type=A | B)"
            )
        ((mark, to),) = after.items()
        builder.put(state, Gap(schemas[mark], to))
    return builder.build()


def _inline_plain(node: ir.Node, grammar: ir.NamedRules, recursive: frozenset[str]) -> ir.Node:
    """Replace the references to rules that are not recursive."""

    def change(one: ir.Node) -> ir.Node | None:
        return grammar.inlined(one) if isinstance(one, ir.Reference) and one.rule not in recursive else None

    return ir.changed(node, change)


def _tabled(node: ir.Node, max_states: int) -> ir.Node:
    """Return a node with tables for its regular parts, which are then compiled over classes of code points."""
    return ir.changed(node, lambda one: None if _refers(one) else table_of(one, max_states))


def table_of(node: ir.Node, max_states: int = dfas.MAX_STATES) -> ir.Table:
    """Compile a regular node to a table: parts of text by way of code points, and what has bytes in it byte by byte."""
    if isinstance(node, ir.Table):
        return node
    if _is_text(node):
        return compile_text(node, max_states=max_states, name="the grammar")
    whole = ir.changed(node, lambda one: table_of(one, max_states) if _is_text(one) else None)
    dfa = regular.compile_bytes(whole, max_states=10 * max_states, name="the grammar")
    return dfas.table(dfa)


def _is_text(node: ir.Node) -> bool:
    return not ir.holds(
        node, lambda one: isinstance(one, ir.Table) or (isinstance(one, ir.Bytes) and _MARK in one.value)
    )


def _refers(node: ir.Node) -> bool:
    return ir.holds(node, lambda one: isinstance(one, ir.Reference))


def is_leaf(node: ir.Node) -> bool:
    """Return whether a node is regular, without captures in it."""
    return not ir.holds(node, lambda one: isinstance(one, ir.Reference | ir.JsonSchema | ir.Named))


def _marks_after(rows: Any, state: int) -> dict[int, int]:  # Any: int32 [num_states, 256]
    """Return the states after the marks whose number is read from this state on, by mark."""
    found = {}
    for high in np.flatnonzero(rows[state] >= 0).tolist():
        between = int(rows[state, high])
        for low in np.flatnonzero(rows[between] >= 0).tolist():
            found[high << 8 | low] = int(rows[between, low])
    return found


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
