"""OpenAI's rules for structured outputs: what a schema must say, and must not say, in strict mode.

Source: OpenAI, "Structured model outputs", section "Supported schemas".
"""

from __future__ import annotations

from typing import Any

from ramet.errors import InvalidSchema
from ramet.grammar.json_schema.keywords.narrowing import mapping
from ramet.grammar.json_schema.keywords.table import KEYWORDS
from ramet.grammar.json_schema.schema.document import SchemaNode, escape

MAX_DEPTH = 10
MAX_PROPERTIES = 5000
_REFUSED = sorted((k.strict_rank, name) for name, k in KEYWORDS.rows.items() if k.strict_rank)


def check_strict(root: SchemaNode) -> None:
    """Raise InvalidSchema for the first rule that a schema breaks, naming the place."""
    schema = root.schema
    if not isinstance(schema, dict) or schema.get("type") != "object" or "anyOf" in schema:
        raise InvalidSchema("strict mode: the root must have type object, and no anyOf", "")
    count = [0]
    _check(schema, "", 1, count)


def _check(schema: Any, pointer: str, depth: int, count: list[int]) -> None:  # schema: any JSON value
    if not isinstance(schema, dict):
        return
    if depth > MAX_DEPTH:
        raise InvalidSchema(f"strict mode: {pointer}: nested deeper than {MAX_DEPTH}", pointer)
    for _, key in _REFUSED:
        if key in schema:
            raise InvalidSchema(f"strict mode: {pointer or '/'}: {key} is not permitted", f"{pointer}/{key}")
    types = schema.get("type")
    if types == "object" or (isinstance(types, list) and "object" in types) or "properties" in schema:
        _check_object(schema, pointer, count)
    for key in ("properties", "$defs", "definitions"):
        for name, child in mapping(schema, key).items():
            _check(child, f"{pointer}/{key}/{escape(name)}", depth + (key == "properties"), count)
    _check(schema.get("items"), f"{pointer}/items", depth + 1, count)
    for i, child in enumerate(schema.get("anyOf", ())):
        _check(child, f"{pointer}/anyOf/{i}", depth, count)


def _check_object(schema: dict[str, Any], pointer: str, count: list[int]) -> None:
    where = pointer or "/"
    if schema.get("additionalProperties") is not False:
        raise InvalidSchema(f"strict mode: {where}: additionalProperties must be false", pointer)
    properties = schema.get("properties", {})
    required = schema.get("required")
    missing = [k for k in properties if not isinstance(required, list) or k not in required]
    if missing:
        raise InvalidSchema(
            f"strict mode: {where}: required must name every property; it lacks {missing[0]!r}", pointer
        )
    count[0] += len(properties)
    if count[0] > MAX_PROPERTIES:
        raise InvalidSchema(f"strict mode: more than {MAX_PROPERTIES:,} properties", pointer)
