"""Every kind of constraint, from its source to a compiled grammar.

    kind            source
    json_schema     a JSON schema: JSON text, or a dict or bool
    regex           a pattern of Python's module re
    cfg             a grammar in Lark's own syntax
    choice          a JSON list of texts, or a list
    substring       the text to quote from
    tools           a tool set (tools/tool_set.py): JSON text, a dict, or a ToolSet
    structural_tag  free text with values in it (tools/structural_tag.py): JSON text or a dict
    grammar         a grammar composed of the others (tools/composed.py): JSON text or a dict

A source is parsed without a vocabulary. The result is an `ir.Table` (regular, every state known), a
`TextWithValues` (text with JSON values in it) or an `ir.NamedRules`. Then it is compiled for a vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args

import numpy as np

from ramet.errors import GrammarError, GrammarTooLarge, InvalidGrammar, InvalidSchema
from ramet.grammar import ir
from ramet.grammar.deadline import time_limit
from ramet.grammar.json_schema.compile import place_schema
from ramet.grammar.machine.automaton import Limits, Machine
from ramet.grammar.machine.compiled_grammar import CompiledGrammar
from ramet.grammar.machine.frame import DEAD, OneWayFrame, target
from ramet.grammar.machine.vocabulary import Vocabulary
from ramet.grammar.regular import dfas
from ramet.grammar.regular import languages as regular
from ramet.grammar.regular.pushdown import Pushdown
from ramet.grammar.regular.utf8 import compile_text
from ramet.grammar.text.cfg import parse_cfg
from ramet.grammar.text.choices import choices
from ramet.grammar.text.regex import parse_regex
from ramet.grammar.text.substring import substring_of
from ramet.grammar.tools.composed import Composed
from ramet.grammar.tools.structural_tag import structural_text
from ramet.grammar.tools.text_with_values import TextWithValues, compile_with_values
from ramet.grammar.tools.tool_set import ToolSet, tools_text

Kind = Literal["json_schema", "regex", "cfg", "choice", "substring", "tools", "structural_tag", "grammar"]
Parsed = ir.Table | TextWithValues | ir.NamedRules

MAX_SOURCE_BYTES = 16 << 20


def compile_constraint(
    kind: str, source: Any, vocabulary: Vocabulary, *, limits: Limits | None = None, **options: Any
) -> CompiledGrammar:
    """Compile a constraint of any kind for a vocabulary.

    options: json_schema takes the fields of `ir.JsonOptions`; regex `flags`; cfg `start` and `max_ignored`; substring
    `unit` and `allow_empty`; the others none.
    Raises: GrammarError and its subclasses.
    """
    return compile_parsed(parse_source(kind, source, limits=limits, **options), vocabulary, limits=limits)


def compile_parsed(parsed: Parsed, vocabulary: Vocabulary, *, limits: Limits | None = None) -> CompiledGrammar:
    """Compile what `parse_source` returned."""
    limits = limits or Limits()
    with time_limit(limits.max_time_s):
        if isinstance(parsed, ir.Table):
            return _compile_table(parsed, vocabulary, limits)
        if isinstance(parsed, TextWithValues):
            return compile_with_values(parsed, vocabulary, limits)
        return compile_grammar(parsed, vocabulary, limits=limits)


def _compile_table(table: ir.Table, vocabulary: Vocabulary, limits: Limits) -> CompiledGrammar:
    """Compile a table as one frame, so that all states are known from the start and no Python runs per state."""
    machine = Machine(vocabulary, limits)
    ends = np.where(table.accepting, 0, -1).astype(np.int32)
    frame = OneWayFrame(machine.table(table.rows, table.byte_class, 1, ends), target(machine.done))
    return CompiledGrammar(machine, target(machine.add(frame)) if table.accepting.any() else DEAD)


def compile_grammar(
    constraint: ir.NamedRules | ir.Node, vocabulary: Vocabulary, *, limits: Limits | None = None
) -> CompiledGrammar:
    """Compile a grammar, or one node of it, for a vocabulary.

    Raises: GrammarError and its subclasses if the grammar cannot be compiled, has no text at all, or is too large.
    """
    limits = limits or Limits()
    grammar = constraint if isinstance(constraint, ir.NamedRules) else ir.NamedRules.of(constraint)
    machine = Machine(vocabulary, limits)
    only = grammar.rules.get(grammar.start)
    with time_limit(limits.max_time_s):
        if isinstance(only, ir.JsonSchema):
            return CompiledGrammar(machine, *place_schema(only, machine))
        return CompiledGrammar(machine, Pushdown(grammar, machine).start())


def parse_source(kind: str, source: Any, *, limits: Limits | None = None, **options: Any) -> Parsed:
    """Parse a source, without a vocabulary. Options and errors as in `compile_constraint`."""
    parse = _PARSERS.get(kind)
    if parse is None:
        raise InvalidGrammar(f"there is no constraint of kind {kind!r}; kinds are {', '.join(get_args(Kind))}")
    if isinstance(source, str) and len(source) > MAX_SOURCE_BYTES:
        raise GrammarTooLarge(
            f"the source of the {kind} constraint has {len(source):,} characters; the limit is {MAX_SOURCE_BYTES:,}"
        )
    unknown = sorted(set(options) - set(OPTIONS[kind]))
    if unknown:
        known = ", ".join(OPTIONS[kind]) or "none"
        raise InvalidGrammar(f"a {kind} constraint has no option {', '.join(map(repr, unknown))}; it has: {known}")
    limits = limits or Limits()
    try:
        with time_limit(limits.max_time_s):
            return parse(source, limits, options)
    except RecursionError as error:
        raise GrammarTooLarge(f"the source of the {kind} constraint is nested too deeply") from error


_JSON_OPTIONS = tuple(field.name for field in fields(ir.JsonOptions))
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "json_schema": _JSON_OPTIONS,
    "regex": ("flags",),
    "cfg": ("start", "max_ignored"),
    "choice": (),
    "substring": ("unit", "allow_empty"),
    "tools": (),
    "structural_tag": _JSON_OPTIONS,
    "grammar": _JSON_OPTIONS,
}


def _json_schema(source: Any, limits: Limits, options: dict[str, Any]) -> Parsed:
    schema = _decoded(source, InvalidSchema, "the schema") if isinstance(source, str) else source
    return ir.NamedRules.of(ir.JsonSchema(schema, ir.JsonOptions(**options)))


def _regex(source: Any, limits: Limits, options: dict[str, Any]) -> Parsed:
    terminal = parse_regex(source, **options)
    return compile_text(terminal.item, max_states=limits.max_regular_states, name=terminal.name)


def _cfg(source: Any, limits: Limits, options: dict[str, Any]) -> Parsed:
    grammar = parse_cfg(source, max_regular_states=limits.max_regular_states, **options)
    if len(grammar.rules) > 1:
        return grammar
    whole = grammar.rules[grammar.start]
    return dfas.table(regular.compile_bytes(whole, max_states=limits.max_regular_states, name="the grammar"))


def _choice(source: Any, limits: Limits, options: dict[str, Any]) -> Parsed:
    texts = _decoded(source, InvalidGrammar, "the list of choices") if isinstance(source, str) else source
    if not isinstance(texts, list | tuple):
        raise InvalidGrammar(f"choices are a list of texts, not {type(texts).__name__}")
    return choices(texts)


def _substring(source: Any, limits: Limits, options: dict[str, Any]) -> Parsed:
    return substring_of(source, **options)


def _tools(source: Any, limits: Limits, options: dict[str, Any]) -> Parsed:
    if isinstance(source, ToolSet):
        return tools_text(source)
    return tools_text(
        ToolSet.of(_decoded(source, InvalidGrammar, "the tool set") if isinstance(source, str) else source)
    )


def _structural_tag(source: Any, limits: Limits, options: dict[str, Any]) -> Parsed:
    decoded = _decoded(source, InvalidGrammar, "the structural tag") if isinstance(source, str) else source
    return structural_text(decoded, ir.JsonOptions(**options))


def _grammar(source: Any, limits: Limits, options: dict[str, Any]) -> Parsed:
    decoded = _decoded(source, InvalidGrammar, "the grammar") if isinstance(source, str) else source
    return Composed.of(decoded, ir.JsonOptions(**options)).parsed(limits.max_regular_states)


def _decoded(source: str, error_type: type[GrammarError], what: str) -> Any:
    try:
        return json.loads(source)
    except json.JSONDecodeError as error:
        raise error_type(f"{what} is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from error
    except ValueError as error:  # a number with more digits than Python reads
        raise error_type(f"{what} cannot be read: {error}") from error


_PARSERS: Mapping[str, Callable[[Any, Limits, dict[str, Any]], Parsed]] = {
    "json_schema": _json_schema,
    "regex": _regex,
    "cfg": _cfg,
    "choice": _choice,
    "substring": _substring,
    "tools": _tools,
    "structural_tag": _structural_tag,
    "grammar": _grammar,
}
