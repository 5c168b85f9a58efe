"""Tool sets: free text until a marker, then calls with the names and arguments of the tools.

A set as JSON:

    {"tools": [{"name": "add", "parameters": {...schema...}}],     also {"type": "function", "function": {...}}
     "format": "hermes",                                           a name in formats.FORMATS, or the fields of one
     "choice": "auto" | "required" | "none" | {"name": "add"},     default auto
     "parallel": true,                                             more than one call; or the largest number of calls
     "answer": {...schema...},                                     what an answer without calls must be; text if absent
     "json": {"whitespace": ..., "order": ..., ...}}               how arguments are written, see ir.JsonOptions

The language of `auto`: an answer without calls; or text (empty if `answer` is given) and then calls. Nothing follows
the calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ramet.errors import InvalidGrammar
from ramet.grammar import ir
from ramet.grammar.machine.splits import Splitter
from ramet.grammar.machine.vocabulary import Vocabulary
from ramet.grammar.regular.char_classes import category
from ramet.grammar.regular.utf8 import text_dfa, utf8_table
from ramet.grammar.tools.formats import NAME_PATTERN, ToolFormat, checked_fields, tool_format
from ramet.grammar.tools.parameters import add_parameters
from ramet.grammar.tools.text_with_values import Gap, TextBuilder, TextWithValues

MAX_TOOLS = 1024
MAX_CALLS = 64


@dataclass(frozen=True, slots=True, eq=False)
class ToolSet:
    """The tools that may be called, the format of calls, and what else may be written.

    tools: by name, the JSON schema of the tool's arguments, which are an object. only: the tool to be called.
    """

    tools: Mapping[str, Any]  # JSON schemas: dict or bool
    format: ToolFormat
    choice: Literal["auto", "required", "none"] = "auto"
    only: str | None = None
    max_calls: int | None = None
    answer: Any | None = None  # a JSON schema: dict or bool
    json_options: ir.JsonOptions = field(default_factory=ir.JsonOptions)

    @staticmethod
    def of(source: Mapping[str, Any]) -> ToolSet:
        """Read a set from its JSON form.

        Raises: InvalidGrammar naming the field that is wrong.
        """
        checked_fields(source, "a tool set", ("tools", "format", "choice", "parallel", "answer", "json"))
        tools = _tools(source.get("tools"))
        choice, only = _choice(source.get("choice", "auto"), tools)
        return ToolSet(
            tools,
            tool_format(source.get("format", "hermes")),
            choice,
            only,
            1 if only else _max_calls(source.get("parallel", True)),
            source.get("answer"),
            _json_options(source.get("json", {})),
        )


def tools_text(tool_set: ToolSet) -> TextWithValues:
    """Return the answers that a tool set allows.

    Raises: InvalidGrammar if the format is ambiguous.
    """
    layout = tool_set.format
    rows, accepting, values, marked = _head(
        layout.marker, tool_set.choice, layout.is_only_at_start, tool_set.answer is not None
    )
    builder = TextBuilder()
    builder.add(rows, accepting)
    names: dict[ir.JsonSchema, str] = {}
    if tool_set.answer is not None:
        answer = ir.JsonSchema(tool_set.answer, tool_set.json_options)
        for state, after in values.items():
            builder.put(state, Gap(answer, after))
        names[answer] = "the answer"
    if marked is None:
        return builder.build(names=names)
    names |= _add_calls(builder, marked, tool_set)
    return builder.build(often=layout.marker, names=names)


# surrogates, which are in no text, stand for what follows the marker and for a value
_CALLS, _ANSWER = 0xD800, 0xD801


@lru_cache(maxsize=256)
def _head(
    marker: str, choice: str, is_only_at_start: bool, has_answer: bool
) -> tuple[NDArray[np.int32], NDArray[np.bool_], dict[int, int], int | None]:
    """Return the automaton of the text before the calls.

    Returns (transitions, accepting, state before an answer -> state after it, state after the marker).
    """
    first = ir.text(marker)
    space = ir.Repeat(ir.Chars(category("s", is_ascii=False)))  # the reader of events skips it, too
    free = ir.Complement(ir.Concatenation(((space if is_only_at_start else ir.ANY_TEXT), first, ir.ANY_TEXT)))
    answer: ir.Node = ir.Chars(((_ANSWER, _ANSWER),)) if has_answer else free
    before: ir.Node = first
    if choice == "auto" and not has_answer and not is_only_at_start:
        twice = ir.Concatenation((ir.ANY_TEXT, first, ir.ANY_CHAR, ir.ANY_TEXT))
        before = ir.Intersect((ir.Concatenation((ir.ANY_TEXT, first)), ir.Complement(twice)))
    calls = ir.Concatenation((before, ir.Chars(((_CALLS, _CALLS),))))
    ways = {"auto": (answer, calls), "required": (calls,), "none": (answer,)}[choice]
    dfa = text_dfa(ir.Choice(ways), name="free text")
    table = utf8_table(dfa)
    values = {s: t for s in range(len(dfa.transitions)) if (t := dfa.step(s, _ANSWER)) >= 0}
    marked = next((s for s in range(len(dfa.transitions)) if dfa.step(s, _CALLS) >= 0), None)
    return table.transitions, table.accepting, values, marked


def _add_calls(builder: TextBuilder, marked: int, tool_set: ToolSet) -> dict[ir.JsonSchema, str]:
    """Add what follows the marker, which ends in the state `marked`. Returns the names of the JSON schemas.

    The names of the tools are spelled once for all calls, unless the number of calls is limited.
    """
    layout = tool_set.format
    name = builder.spell(marked, (layout.begin + layout.before_name)[len(layout.marker) :])
    count = 1
    names: dict[ir.JsonSchema, str] = {}
    while True:
        after_value = builder.new()
        end = after_value
        if layout.before_key:
            for tool, parameters in tool_set.tools.items():
                if tool_set.only in (None, tool):
                    begin = builder.spell(name, tool + layout.before_arguments)
                    options = tool_set.json_options
                    names |= add_parameters(builder, begin, tool, parameters, layout, options, after_value)
        else:
            for tool, schema in _argument_schemas(tool_set).items():
                builder.put(builder.spell(name, tool + layout.before_arguments), Gap(schema, after_value))
                names[schema] = f"the parameters of tool {tool!r}"
            end = builder.spell(after_value, layout.after_arguments)
        builder.end_at(builder.spell(end, layout.end))
        again = layout.separator + layout.before_name
        if tool_set.max_calls is None:
            if not builder.lead(end, again, name):
                raise InvalidGrammar("in this tool format a further call and the end of the calls begin alike")
            break
        if count == tool_set.max_calls:
            break
        name = builder.spell(end, again)
        count += 1
    if builder.is_ambiguous:
        raise InvalidGrammar("in this tool format the name of one tool and its layout begin those of another")
    return names


def with_marker_tokens(vocabulary: Vocabulary, texts: Mapping[int, str]) -> Vocabulary:
    """Return a vocabulary in which special tokens write texts, e.g. `{5: "[TOOL_CALLS]"}`.

    For formats whose marker is a special token: grammars do not allow special tokens otherwise.
    Raises: InvalidGrammar for an id that is not a special token, or that ends the text.
    """
    token_bytes = list(vocabulary.token_bytes)
    for token, text in texts.items():
        if token not in vocabulary.special_ids or token in vocabulary.eos_ids:
            raise InvalidGrammar(f"token {token} ({text!r}) is not a special token that can stand inside a text")
        token_bytes.extend([b""] * (token + 1 - len(token_bytes)))
        token_bytes[token] = text.encode()
    special = vocabulary.special_ids - set(texts)
    splits = vocabulary.splits
    splitter = None if splits is None else _AtMarkers(splits.splitter, texts)
    return Vocabulary(token_bytes, vocabulary.eos_ids, special, vocabulary.vocab_size, splitter)


class _AtMarkers:
    """A tokenizer that writes each marker with its token, as a chat template does."""

    def __init__(self, splitter: Splitter, texts: Mapping[int, str]) -> None:
        self._splitter = splitter
        self._tokens = {text.encode(): token for token, text in texts.items()}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile(b"(%s)" % b"|".join(map(re.escape, longest_first)))

    def split(self, text: bytes) -> list[int]:
        out: list[int] = []
        for part in filter(None, self._pattern.split(text)):
            out += [self._tokens[part]] if part in self._tokens else self._splitter.split(part)
        return out

    def rest_of_piece(self, before: bytes, text: bytes) -> int:
        return self._splitter.rest_of_piece(before, self._pattern.split(text)[0])


def _argument_schemas(tool_set: ToolSet) -> dict[str, ir.JsonSchema]:
    """Return the schema of each tool's arguments, by the tool's name. Equal schemas are one object."""
    found: dict[str, ir.JsonSchema] = {}
    out: dict[str, ir.JsonSchema] = {}
    for name, parameters in tool_set.tools.items():
        if tool_set.only is None or name == tool_set.only:
            key = json.dumps(parameters, sort_keys=True)
            if key not in found:
                found[key] = ir.JsonSchema(_of_object(parameters), tool_set.json_options)
            out[name] = found[key]
    return out


def _of_object(schema: Any) -> Any:
    """Return the schema limited to objects: arguments are an object, whatever else the schema says."""
    if schema is True:
        return {"type": "object"}
    if isinstance(schema, dict) and "type" not in schema and "$ref" not in schema:
        return {**schema, "type": "object"}
    return schema


def _tools(source: Any) -> dict[str, Any]:
    if not isinstance(source, list | tuple) or not source:
        raise InvalidGrammar("the field 'tools' must be a list of at least one tool")
    if len(source) > MAX_TOOLS:
        raise InvalidGrammar(f"there are {len(source):,} tools; the limit is {MAX_TOOLS:,}")
    tools: dict[str, Any] = {}
    for i, given in enumerate(source):
        fields = _mapping(given, f"tools[{i}]")
        if "function" in fields:
            fields = _mapping(fields["function"], f"tools[{i}].function")
        name = fields.get("name")
        if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
            raise InvalidGrammar(f"the name of tools[{i}] is {name!r} but must match {NAME_PATTERN}")
        if name in tools:
            raise InvalidGrammar(f"two tools have the name {name!r}")
        parameters = fields.get("parameters", {"type": "object", "properties": {}, "additionalProperties": False})
        if not isinstance(parameters, dict | bool):
            raise InvalidGrammar(f"the parameters of tool {name!r} must be a JSON schema, not {parameters!r}")
        tools[name] = parameters
    return tools


def _choice(source: Any, tools: Mapping[str, Any]) -> tuple[Literal["auto", "required", "none"], str | None]:
    if source in ("auto", "required", "none"):
        return source, None
    if isinstance(source, dict):
        name = source.get("name", source.get("function", {}).get("name"))
        if name not in tools:
            raise InvalidGrammar(f"the choice asks for tool {name!r}; tools are {', '.join(tools)}")
        return "required", name
    raise InvalidGrammar(f'the choice is {source!r} but must be "auto", "required", "none" or {{"name": ...}}')


def _max_calls(source: Any) -> int | None:
    if isinstance(source, bool):
        return None if source else 1
    if isinstance(source, int) and 1 <= source <= MAX_CALLS:
        return source
    raise InvalidGrammar(f"parallel is {source!r} but must be true, false or a number of calls from 1 to {MAX_CALLS:,}")


def _json_options(source: Any) -> ir.JsonOptions:
    known = [option.name for option in fields(ir.JsonOptions)]
    return ir.JsonOptions(**checked_fields(source, "the field 'json' of a tool set", known))


def _mapping(source: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(source, Mapping):
        raise InvalidGrammar(f"{what} must be an object, not {source!r}")
    return source
