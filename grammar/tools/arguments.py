"""How the arguments of a tool call are read that stand one by one between tags, instead of as one JSON object.

A value that is a string stands there as it is; any other value is JSON. Which one it is, the tool's schema says. A
string that may also be null is null if it reads so. Of a schema that allows strings beside other values, JSON is
written; what is no JSON there is read as a string.

Not here: the grammar of such arguments (`parameters`), reading their tags (`events`).
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal["string", "nullable", "json", "any"]
"""How a value is read: as a string, as a string or null, as JSON, or as JSON if it is some and else as a string."""

Schema: TypeAlias = Any  # a JSON schema: dict or bool
NOTES = {"title", "description", "default", "examples", "$schema", "$comment", "deprecated", "readOnly", "writeOnly"}
OF_STRINGS = {"type", "enum", "const", "pattern", "minLength", "maxLength", "format", "nullable", *NOTES}


def properties_of(parameters: Schema) -> dict[str, Schema]:
    """Return the schemas of a tool's arguments by name, in their order."""
    found: dict[str, Schema] = {}
    if isinstance(parameters, dict):
        properties = parameters.get("properties", {})
        found |= properties if isinstance(properties, dict) else {}
        for name in parameters.get("required", ()):
            found.setdefault(name, True)
    return found


def kinds_of(parameters: Schema) -> dict[str, Kind]:
    """Return how each argument of a tool is read."""
    return {name: kind_of(referred(schema, parameters)) for name, schema in properties_of(parameters).items()}


def referred(schema: Schema, root: Schema) -> Schema:
    """Return what a schema refers to, if it is nothing but a reference within `root`."""
    for _ in range(8):
        if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str) or set(schema) - NOTES - {"$ref"}:
            break
        found: Any = root
        for step in schema["$ref"].removeprefix("#").split("/")[1:]:
            found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        if found is None:
            break
        schema = found
    return schema


def kind_of(schema: Schema) -> Kind:
    if not isinstance(schema, dict):
        return "any"
    types = schema.get("type")
    if isinstance(types, str):
        return "any" if types == "string" and set(schema) - OF_STRINGS else "string" if types == "string" else "json"
    if isinstance(types, list) and "string" not in types:
        return "json"
    if isinstance(types, list) and set(types) == {"string", "null"} and not set(schema) - OF_STRINGS:
        return "nullable"
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if types is None and isinstance(values, list) and not set(schema) - OF_STRINGS:
        is_string = [isinstance(value, str) for value in values]
        return "string" if all(is_string) else "any" if any(is_string) else "json"
    options = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(options, list) and not set(schema) - NOTES - {"anyOf", "oneOf"}:
        kinds = {"null" if option == {"type": "null"} else kind_of(option) for option in options}
        if kinds == {"string", "null"} and len(options) == 2:
            return "nullable"
        return "json" if kinds <= {"json", "null"} else "any"
    return "any"


def value_text(text: str, kind: Kind) -> str:
    """Return a written argument as JSON. What its kind does not allow is a string."""
    plain = text.strip()
    if kind == "string" or (kind == "nullable" and plain.lower() not in ("null", "none")):
        return json.dumps(text, ensure_ascii=False)
    if plain in ("True", "False", "None", "none") or kind == "nullable":
        plain = {"true": "true", "false": "false"}.get(plain.lower(), "null")
    try:
        json.loads(plain, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return plain


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
