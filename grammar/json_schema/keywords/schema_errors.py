"""A look at a whole schema before it is compiled: malformed keywords, broken references, what cannot be enforced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from ramet.errors import GrammarTooLarge, InvalidRegex, InvalidSchema, UnsupportedSchema
from ramet.grammar import deadline
from ramet.grammar.json_schema.keywords.keywords import TYPES, Interpreter, mapping
from ramet.grammar.json_schema.schema import pattern
from ramet.grammar.json_schema.schema.document import DRAFT7, DRAFT2019, SchemaNode, escape


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and (isinstance(x, int) or math.isfinite(x))


def _count(x: Any) -> bool:
    return _number(x) and x >= 0 and x == int(x)


def _schema(x: Any) -> bool:
    return isinstance(x, dict | bool)


def _schemas(x: Any) -> bool:
    return isinstance(x, list) and all(map(_schema, x))


def _schema_map(x: Any) -> bool:
    return isinstance(x, dict) and all(map(_schema, x.values()))


def _names(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(n, str) for n in x)


_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (
        lambda x: x in (*TYPES, "any") if isinstance(x, str) else isinstance(x, list) and len(x) > 0,
        f"a type ({', '.join(TYPES)}) or a list of types",
    ),
    "enum": (lambda x: isinstance(x, list), "a list"),
    "minimum": (_number, "a number"),
    "maximum": (_number, "a number"),
    "exclusiveMinimum": (lambda x: _number(x) or isinstance(x, bool), "a number"),
    "exclusiveMaximum": (lambda x: _number(x) or isinstance(x, bool), "a number"),
    "multipleOf": (lambda x: _number(x) and x > 0, "a number above 0"),
    "divisibleBy": (lambda x: _number(x) and x > 0, "a number above 0"),
    "minLength": (_count, "a count"),
    "maxLength": (_count, "a count"),
    "minItems": (_count, "a count"),
    "maxItems": (_count, "a count"),
    "minContains": (_count, "a count"),
    "maxContains": (_count, "a count"),
    "minProperties": (_count, "a count"),
    "maxProperties": (_count, "a count"),
    "uniqueItems": (lambda x: isinstance(x, bool), "a boolean"),
    "pattern": (lambda x: isinstance(x, str), "a string"),
    "required": (lambda x: _names(x) or isinstance(x, bool), "a list of strings"),
    "properties": (_schema_map, "a map of schemas"),
    "patternProperties": (_schema_map, "a map of schemas"),
    "dependentSchemas": (_schema_map, "a map of schemas"),
    "dependentRequired": (lambda x: isinstance(x, dict) and all(map(_names, x.values())), "a map of lists of strings"),
    "additionalProperties": (_schema, "a schema"),
    "propertyNames": (_schema, "a schema"),
    "additionalItems": (_schema, "a schema"),
    "contains": (_schema, "a schema"),
    "items": (lambda x: _schema(x) or _schemas(x), "a schema"),
    "prefixItems": (_schemas, "a list of schemas"),
    "allOf": (_schemas, "a list of schemas"),
    "anyOf": (_schemas, "a list of schemas"),
    "oneOf": (_schemas, "a list of schemas"),
    "not": (_schema, "a schema"),
    "if": (_schema, "a schema"),
    "then": (_schema, "a schema"),
    "else": (_schema, "a schema"),
    "$ref": (lambda x: isinstance(x, str), "a string"),
    "$dynamicRef": (lambda x: isinstance(x, str), "a string"),
}
_CHILD = (
    "unevaluatedProperties",
    "unevaluatedItems",
    "additionalProperties",
    "propertyNames",
    "additionalItems",
    "contains",
    "not",
    "if",
    "then",
    "else",
)
_CHILD_MAPS = ("properties", "patternProperties", "dependentSchemas", "dependencies")
_CHILD_KEYS = frozenset((*_CHILD, *_CHILD_MAPS, "prefixItems", "allOf", "anyOf", "oneOf", "items"))


MAX_VALUE_DEPTH = 100
Problem = tuple[str, str, str]  # JSON pointer, keyword, reason


def survey(interpreter: Interpreter, root: SchemaNode) -> list[Problem]:
    """Look at every schema under a root that can matter, and report all that is wrong at once.

    Returns what cannot be enforced, where the interpreter is lenient.
    Raises: InvalidSchema for the first malformed keyword; UnsupportedSchema with all that cannot be enforced.
    """
    problems: list[tuple[str, str, str]] = []
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        deadline.check(node.pointer or "/")
        if not isinstance(node.schema, dict):
            continue
        _check_shapes(node)
        _check_values(node)
        _check_patterns(interpreter, node, problems)
        for child in reversed(list(_children(interpreter, node))):  # so that problems come in the schema's order
            if child not in seen:
                seen.add(child)
                stack.append(child)
    if problems and not interpreter.lenient:
        raise UnsupportedSchema(problems)
    return problems


def _check_shapes(node: SchemaNode) -> None:
    schema = node.schema
    hides = "$ref" in schema and node.draft <= DRAFT7
    for key in ("$ref",) if hides else schema.keys() & _SHAPES.keys():
        good, what = _SHAPES[key]
        if not good(schema[key]):
            pointer = f"{node.pointer}/{key}"
            raise InvalidSchema(f"{pointer}: must be {what}, not {schema[key]!r:.100}", pointer)


def _check_values(node: SchemaNode) -> None:
    """Values in `enum` and `const` must be JSON, and no deeper than recursion can follow."""
    for key in ("enum", "const"):
        stack = [(node.schema.get(key), 0)]
        while stack:
            value, depth = stack.pop()
            if depth > MAX_VALUE_DEPTH:
                raise GrammarTooLarge(f"{node.pointer}/{key}: values are nested deeper than {MAX_VALUE_DEPTH}")
            if isinstance(value, float) and not math.isfinite(value):
                raise InvalidSchema(f"{node.pointer}/{key}: {value} is not a JSON number", f"{node.pointer}/{key}")
            if isinstance(value, list | dict):
                stack.extend((v, depth + 1) for v in (value.values() if isinstance(value, dict) else value))


def _check_patterns(interpreter: Interpreter, node: SchemaNode, problems: list[tuple[str, str, str]]) -> None:
    sources = []
    if isinstance(node.schema.get("pattern"), str):
        sources.append((node.schema["pattern"], "pattern"))
    sources.extend((p, "patternProperties") for p in mapping(node.schema, "patternProperties"))
    for source, keyword in sources:
        try:
            interpreter.languages.add("pattern", source)
        except pattern.UnsupportedPattern as error:
            problems.append((node.pointer, keyword, str(error)))
        except InvalidRegex as error:
            raise InvalidSchema(f"{node.pointer or '/'}: {error}", node.pointer) from error


def _children(interpreter: Interpreter, node: SchemaNode) -> Iterable[SchemaNode]:
    schema = node.schema
    for key in ("$ref", "$dynamicRef", "$recursiveRef"):
        if key in schema and (key == "$ref" or node.draft >= DRAFT2019):
            yield interpreter.target(node, key)
    if "$ref" in schema and node.draft <= DRAFT7:
        return
    for key in [k for k in schema if k in _CHILD_KEYS]:
        value = schema[key]
        if isinstance(value, list):
            for i, s in enumerate(value):
                yield interpreter.child(node, s, f"/{key}/{i}")
        elif not isinstance(value, dict):
            continue
        elif key in _CHILD_MAPS:
            for name, s in value.items():
                if isinstance(s, dict):
                    yield interpreter.child(node, s, f"/{key}/{escape(name)}")
        else:
            yield interpreter.child(node, value, f"/{key}")
