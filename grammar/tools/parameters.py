"""The grammar of tool calls whose arguments stand one by one between tags, instead of as one JSON object.

They come in the order of the schema, and each at most once. The end of a value is its closing tag, white space, and the
tag of another argument or of the call's end: a closing tag alone may stand inside of a string.

Not here: which values are strings (`arguments`), the text around the calls (`tool_set`).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramet.errors import InvalidGrammar, UnsupportedSchema
from ramet.grammar import ir
from ramet.grammar.json_schema.schema.formats import format_node
from ramet.grammar.json_schema.schema.pattern import search
from ramet.grammar.regular.utf8 import text_dfa, utf8_table
from ramet.grammar.tools.arguments import NOTES, Schema, kind_of, properties_of, referred
from ramet.grammar.tools.formats import ToolFormat
from ramet.grammar.tools.text_with_values import Gap, TextBuilder

_OF_OBJECTS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "strict", *NOTES}
_SPACE = ir.Repeat(ir.Chars(((9, 10), (13, 13), (32, 32))))
_FIRST_SURROGATE = 0xD800  # surrogates, which are in no text, stand for what follows a value


def add_parameters(
    builder: TextBuilder,
    start: int,
    tool: str,
    parameters: Schema,
    layout: ToolFormat,
    options: ir.JsonOptions,
    done: int,
) -> dict[ir.JsonSchema, str]:
    """Add the arguments of a tool from the state `start` on, and the text after them, which ends in `done`.

    Returns the names of the JSON schemas. Raises UnsupportedSchema, InvalidGrammar.
    """
    parameters = referred(parameters, parameters)
    _check(tool, parameters)
    properties = properties_of(parameters)
    names, required = list(properties), set(parameters.get("required", ()) if isinstance(parameters, dict) else ())
    last = layout.first_after_parameters
    rest = layout.after_arguments[len(last) :]
    definitions = {
        key: parameters[key] for key in ("$defs", "definitions") if isinstance(parameters, dict) and key in parameters
    }
    schemas: dict[ir.JsonSchema, str] = {}
    begins: list[int] = []  # of each value
    after: list[tuple[int | None, int | None]] = []  # of each value: state at the next name, state after `last`
    for index, name in enumerate(names):
        may_end = not required.intersection(names[index + 1 :])
        may_go_on = index + 1 < len(names)
        schema = properties[name]
        kind = kind_of(referred(schema, parameters))
        if kind in ("string", "nullable"):
            key = json.dumps(referred(schema, parameters), sort_keys=True)
            rows, accepting, marked = _string_table(key, layout.after_value, layout.before_key, last)
            rows = rows.copy()
            for state, is_allowed in zip(marked, (may_go_on, may_end), strict=True):
                if not is_allowed:
                    rows[rows == state] = -1
            begins.append(builder.add(rows, accepting))
            next_key, closed = (begins[-1] + state for state in marked)
            after.append((next_key if may_go_on else None, closed if may_end else None))
        else:
            whole = ir.JsonSchema({**schema, **definitions} if isinstance(schema, dict) else schema, options)
            schemas[whole] = f"parameter {name!r} of tool {tool!r}"
            behind = builder.new()
            begins.append(builder.new())
            builder.put(begins[-1], Gap(whole, behind))
            go_on = builder.spell(behind, layout.after_value + layout.before_key) if may_go_on else None
            after.append((go_on, builder.spell(behind, layout.after_value + last) if may_end else None))
    first = builder.spell(start, layout.before_key) if names else None
    ends = None if required else builder.spell(start, last)
    for index, (go_on, end) in enumerate([(first, ends), *after]):
        if end is not None:
            builder.lead(end, rest, done)
        if go_on is not None:
            for at in range(index, len(names)):
                builder.lead(go_on, names[at] + layout.before_value, begins[at])
                if names[at] in required:
                    break
    return schemas


def _check(tool: str, parameters: Schema) -> None:
    """Raise UnsupportedSchema for what arguments one by one cannot follow, InvalidGrammar for names that no tag has."""
    if not isinstance(parameters, dict):
        return
    problems = [
        (f"/{key}", key, f"arguments of tool {tool!r} are written one by one, which this cannot limit")
        for key in sorted(set(parameters) - _OF_OBJECTS)
    ]
    if problems:
        raise UnsupportedSchema(problems)
    for name in properties_of(parameters):
        if not name or name != name.strip() or any(c in "<>\n\r" for c in name):
            raise InvalidGrammar(
                f"parameter {name!r} of tool {tool!r} cannot be written in a tag; give it a plain name"
            )


@lru_cache(maxsize=256)
def _string_table(
    schema: str, after_value: str, before_key: str, last: str
) -> tuple[NDArray[np.int32], NDArray[np.bool_], list[int]]:
    """Return the automaton of a string and what ends it: (transitions, accepting (none), states after the two ends)."""
    ends = [after_value + before_key, after_value + last]
    tag = ir.text(after_value.strip())
    closing = ir.Concatenation((tag, _SPACE, ir.Choice((ir.text(before_key), ir.text(last)))))
    later = ir.Complement(ir.Concatenation((ir.ANY_TEXT, closing, ir.ANY_CHAR, ir.ANY_TEXT)))
    value = _string_node(json.loads(schema))
    ways = []
    for index, end in enumerate(ends):
        mark = _FIRST_SURROGATE + index
        whole = ir.Intersect((ir.Concatenation((value, ir.text(end))), later))
        ways.append(ir.Concatenation((whole, ir.Chars(((mark, mark),)))))
    dfa = text_dfa(ir.Choice(tuple(ways)), name="a string of a tool call")
    table = utf8_table(dfa)
    states = range(len(dfa.transitions))
    marked = [next(s for s in states if dfa.step(s, _FIRST_SURROGATE + index) >= 0) for index in range(2)]
    rows = table.transitions.copy()
    return rows, np.zeros_like(table.accepting), marked


def _string_node(schema: Any) -> ir.Node:
    """Return the strings that a schema of kind string or nullable allows, as they are."""
    if "anyOf" in schema or "oneOf" in schema:
        (string,) = (one for one in schema.get("anyOf", schema.get("oneOf")) if one != {"type": "null"})
        return ir.Choice((_string_node(string), ir.text("null")))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    limits: list[ir.Node] = []
    if values is not None:
        limits.append(ir.Choice(tuple(ir.text(value) for value in values if isinstance(value, str))))
    if "pattern" in schema:
        limits.append(search(schema["pattern"]))
    if "format" in schema:
        limits.append(format_node(schema["format"]))
    if "minLength" in schema or "maxLength" in schema:
        limits.append(ir.Repeat(ir.ANY_CHAR, schema.get("minLength", 0), schema.get("maxLength")))
    node: ir.Node = ir.ANY_TEXT if not limits else limits[0] if len(limits) == 1 else ir.Intersect(tuple(limits))
    return ir.Choice((node, ir.text("null"))) if isinstance(schema.get("type"), list) else node
