"""Checks a whole schema before it is compiled: malformed keywords, broken references, unenforceable keywords."""

from __future__ import annotations

import math

from ramet.errors import GrammarTooLarge, InvalidRegex, InvalidSchema, UnsupportedSchema
from ramet.grammar import deadline
from ramet.grammar.json_schema.keywords.interpreter import Interpreter, hides_others
from ramet.grammar.json_schema.keywords.narrowing import mapping
from ramet.grammar.json_schema.schema import pattern
from ramet.grammar.json_schema.schema.document import SchemaNode, escape

MAX_VALUE_DEPTH = 100
Problem = tuple[str, str, str]  # JSON pointer, keyword, reason


def survey(interpreter: Interpreter, root: SchemaNode) -> list[Problem]:
    """Look at every schema under a root that can matter, and report all errors at once.

    Returns the problems that cannot be enforced, if the interpreter is lenient.
    Raises: InvalidSchema for the first malformed keyword; UnsupportedSchema with all problems that cannot be enforced.
    """
    problems: list[tuple[str, str, str]] = []
    stack, seen = [root], {root}
    while stack:
        node = stack.pop()
        deadline.check(node.pointer or "/")
        if not isinstance(node.schema, dict):
            continue
        _check_forms(interpreter, node)
        _check_values(node)
        _check_patterns(interpreter, node, problems)
        for child in reversed(_children(interpreter, node)):  # so that problems come in the order of the schema
            if child not in seen:
                seen.add(child)
                stack.append(child)
    if problems and not interpreter.lenient:
        raise UnsupportedSchema(problems)
    return problems


def _check_forms(interpreter: Interpreter, node: SchemaNode) -> None:
    forms = interpreter.table.forms
    for name in ("$ref",) if hides_others(node) else node.schema:
        form = forms.get(name)
        if form is not None and not form.is_good(node.schema[name]):
            pointer = f"{node.pointer}/{name}"
            raise InvalidSchema(f"{pointer}: must be {form.name}, not {node.schema[name]!r:.100}", pointer)


def _check_values(node: SchemaNode) -> None:
    """Check that the values in `enum` and `const` are JSON, and not nested too deeply for recursion."""
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


def _children(interpreter: Interpreter, node: SchemaNode) -> list[SchemaNode]:
    """Return the schemas that a schema object refers to, and those in it."""
    table, schema, child = interpreter.table, node.schema, node.registry.child
    found = []
    for name, keyword in table.references.items():
        if name in schema and keyword.target is not None and keyword.is_known(node.draft):
            found.append(keyword.target(node))
    if hides_others(node):
        return found
    for name, value in schema.items():
        kind = table.applied.get(name)
        if kind is None:
            continue
        if isinstance(value, list):
            found += [child(node, s, f"/{name}/{i}") for i, s in enumerate(value)]
        elif not isinstance(value, dict):
            continue
        elif kind == "named":
            found += [child(node, s, f"/{name}/{escape(key)}") for key, s in value.items() if isinstance(s, dict)]
        else:
            found.append(child(node, value, f"/{name}"))
    return found
