"""Tool sets -> IR: free text until a marker, then calls whose names and arguments are those of the tools.

A set as JSON:

    {"tools": [{"name": "add", "parameters": {...schema...}}],     also {"type": "function", "function": {...}}
     "format": "hermes",                                           a name in tool_formats.FORMATS, or the fields of one
     "choice": "auto" | "required" | "none" | {"name": "add"},     default auto
     "parallel": true,                                             more than one call; or the largest number of calls
     "answer": {...schema...},                                     what an answer without calls must be; text if absent
     "json": {"mode": ..., "whitespace": ..., "on_unsupported": ...}}

Language: `auto` answers, or writes text (none where `answer` is given) and then calls; nothing follows the calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ramet.errors import InvalidGrammar
from ramet.grammar import ir
from ramet.grammar.tool_formats import NAME_PATTERN, ToolFormat, tool_format
from ramet.grammar.vocabulary import Vocabulary

MAX_TOOLS = 1024
MAX_CALLS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Tool:
    """A tool's name and the JSON schema of its arguments, which are an object."""

    name: str
    parameters: Any  # a JSON schema: dict or bool


@dataclass(frozen=True, slots=True, eq=False)
class ToolSet:
    """What may be called, how a call is written, and what else may be said. `only`: the tool that must be called."""

    tools: tuple[Tool, ...]
    format: ToolFormat
    choice: Literal["auto", "required", "none"] = "auto"
    only: str | None = None
    max_calls: int | None = None
    answer: Any | None = None  # a JSON schema: dict or bool
    json_options: ir.JsonOptions = field(default_factory=ir.JsonOptions)

    @staticmethod
    def of(source: Mapping[str, Any]) -> ToolSet:
        """Read a set from its JSON form. Raises: InvalidGrammar naming the field that is wrong."""
        known = {"tools", "format", "choice", "parallel", "answer", "json"}
        wrong = sorted(set(_mapping(source, "a tool set")) - known)
        if wrong:
            raise InvalidGrammar(f"a tool set has no field {wrong[0]!r}; its fields are {', '.join(sorted(known))}")
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


def tools_grammar(tool_set: ToolSet) -> ir.Grammar:
    """Return the grammar of the answers that a tool set allows; to be compiled by `linked`."""
    layout = tool_set.format
    marker = ir.text(layout.marker)
    with_marker = ir.Sequence((ir.ANY_TEXT, marker, ir.ANY_TEXT))
    if tool_set.answer is not None:
        answer: ir.Node = ir.JsonSchema(tool_set.answer, tool_set.json_options)
        before_calls: ir.Node = marker
    elif layout.is_only_at_start:
        answer = ir.Complement(ir.Sequence((marker, ir.ANY_TEXT)))
        before_calls = marker
    else:
        answer = ir.Complement(with_marker)
        twice = ir.Sequence((ir.ANY_TEXT, marker, ir.ANY_CHAR, ir.ANY_TEXT))
        before_calls = ir.Intersect((ir.Sequence((ir.ANY_TEXT, marker)), ir.Complement(twice)))
    if tool_set.choice == "none":
        return ir.Grammar.of(answer)
    if tool_set.choice == "required":
        before_calls = marker
    first = ir.text((layout.begin + layout.before_name)[len(layout.marker) :])
    calls: list[ir.Node] = [before_calls, first, ir.Reference("call")]
    if tool_set.max_calls != 1:
        more = ir.Sequence((ir.text(layout.separator + layout.before_name), ir.Reference("call")))
        calls.append(ir.Repeat(more, 0, None if tool_set.max_calls is None else tool_set.max_calls - 1))
    calls.append(ir.text(layout.end))
    whole: ir.Node = ir.Sequence(tuple(calls))
    if tool_set.choice == "auto":
        whole = ir.Choice((whole, answer))
    return ir.Grammar({"start": whole, "call": _call(tool_set)})


def with_marker_tokens(vocabulary: Vocabulary, texts: Mapping[int, str]) -> Vocabulary:
    """Return a vocabulary in which special tokens write texts, e.g. `{5: "[TOOL_CALLS]"}`.

    For formats whose marker is a special token, which grammars otherwise never allow. Raises: InvalidGrammar for an id
    that is not a special token, or ends the text.
    """
    token_bytes = list(vocabulary.token_bytes)
    for token, text in texts.items():
        if token not in vocabulary.special_ids or token in vocabulary.eos_ids:
            raise InvalidGrammar(f"token {token} ({text!r}) is not a special token that can stand inside a text")
        token_bytes.extend([b""] * (token + 1 - len(token_bytes)))
        token_bytes[token] = text.encode()
    special = vocabulary.special_ids - set(texts)
    return Vocabulary(token_bytes, vocabulary.eos_ids, special, vocabulary.vocab_size)


def _call(tool_set: ToolSet) -> ir.Node:
    """Behind `before_name`: one of the names, its arguments, and what ends a call. Equal schemas are one node."""
    layout = tool_set.format
    arguments: dict[str, ir.JsonSchema] = {}
    options: list[ir.Node] = []
    for tool in tool_set.tools:
        if tool_set.only is not None and tool.name != tool_set.only:
            continue
        key = json.dumps(tool.parameters, sort_keys=True)
        schema = arguments.get(key)
        if schema is None:
            schema = arguments[key] = ir.JsonSchema(_of_object(tool.parameters), tool_set.json_options)
        options.append(ir.Sequence((ir.text(tool.name + layout.before_arguments), schema)))
    return ir.Sequence((ir.Choice(tuple(options)), ir.text(layout.after_arguments)))


def _of_object(schema: Any) -> Any:
    """Arguments are an object, whatever else the schema says."""
    if schema is True:
        return {"type": "object"}
    if isinstance(schema, dict) and "type" not in schema and "$ref" not in schema:
        return {**schema, "type": "object"}
    return schema


def _tools(source: Any) -> tuple[Tool, ...]:
    if not isinstance(source, list | tuple) or not source:
        raise InvalidGrammar("the field 'tools' must be a list of at least one tool")
    if len(source) > MAX_TOOLS:
        raise InvalidGrammar(f"there are {len(source):,} tools; the limit is {MAX_TOOLS:,}")
    tools: dict[str, Tool] = {}
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
        tools[name] = Tool(name, parameters)
    return tuple(tools.values())


def _choice(source: Any, tools: tuple[Tool, ...]) -> tuple[Literal["auto", "required", "none"], str | None]:
    if source in ("auto", "required", "none"):
        return source, None
    if isinstance(source, dict):
        name = source.get("name", source.get("function", {}).get("name"))
        if name not in [t.name for t in tools]:
            raise InvalidGrammar(f"the choice asks for tool {name!r}; tools are {', '.join(t.name for t in tools)}")
        return "required", name
    raise InvalidGrammar(f'the choice is {source!r} but must be "auto", "required", "none" or {{"name": ...}}')


def _max_calls(source: Any) -> int | None:
    if isinstance(source, bool):
        return None if source else 1
    if isinstance(source, int) and 1 <= source <= MAX_CALLS:
        return source
    raise InvalidGrammar(f"parallel is {source!r} but must be true, false or a number of calls from 1 to {MAX_CALLS:,}")


def _json_options(source: Any) -> ir.JsonOptions:
    fields = _mapping(source, "the field 'json'")
    wrong = sorted(set(fields) - {"mode", "whitespace", "on_unsupported", "registry"})
    if wrong:
        raise InvalidGrammar(f"the field 'json' of a tool set has no option {wrong[0]!r}")
    return ir.JsonOptions(**fields)


def _mapping(source: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(source, Mapping):
        raise InvalidGrammar(f"{what} must be an object, not {source!r}")
    return source
