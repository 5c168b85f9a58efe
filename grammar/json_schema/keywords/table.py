"""The table of JSON-schema keywords, with a row for each keyword.

Rows stand in the order in which keywords narrow a set of values. The columns are explained at `Keyword` in
interpreter.py. A keyword without a row has no meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ramet.grammar.json_schema.keywords import narrowing as n
from ramet.grammar.json_schema.keywords import unevaluated as u
from ramet.grammar.json_schema.keywords.interpreter import Form, Keyword, KeywordTable
from ramet.grammar.json_schema.schema.document import DRAFT4, DRAFT2019, SchemaNode

# --- forms


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and (isinstance(x, int) or math.isfinite(x))


def _is_schema(x: Any) -> bool:
    return isinstance(x, dict | bool)


def _is_list_of(is_good: Callable[[Any], bool], x: Any) -> bool:
    return isinstance(x, list) and all(map(is_good, x))


def _is_names(x: Any) -> bool:
    return _is_list_of(lambda name: isinstance(name, str), x)


def _is_map_of(is_good: Callable[[Any], bool], x: Any) -> bool:
    return isinstance(x, dict) and all(map(is_good, x.values()))


_TYPE = Form(
    f"a type ({', '.join(n.TYPES)}) or a list of types",
    lambda x: x in (*n.TYPES, "any") if isinstance(x, str) else isinstance(x, list) and len(x) > 0,
)
_NUMBER = Form("a number", _is_number)
_LIMIT = Form("a number", lambda x: _is_number(x) or isinstance(x, bool))
_DIVISOR = Form("a number above 0", lambda x: _is_number(x) and x > 0)
_COUNT = Form("a count", lambda x: _is_number(x) and x >= 0 and x == int(x))
_BOOLEAN = Form("a boolean", lambda x: isinstance(x, bool))
_STRING = Form("a string", lambda x: isinstance(x, str))
_LIST = Form("a list", lambda x: isinstance(x, list))
_NAMES = Form("a list of strings", lambda x: _is_names(x) or isinstance(x, bool))  # draft 3: a boolean in a property
_MAP_OF_NAMES = Form("a map of lists of strings", lambda x: _is_map_of(_is_names, x))
_SCHEMA = Form("a schema", _is_schema)
_SCHEMAS = Form("a list of schemas", lambda x: _is_list_of(_is_schema, x))
_ITEMS = Form("a schema", lambda x: _is_schema(x) or _is_list_of(_is_schema, x))
_SCHEMA_MAP = Form("a map of schemas", lambda x: _is_map_of(_is_schema, x))

# --- references


def _ref(node: SchemaNode) -> SchemaNode:
    return node.registry.resolve(node, node.schema["$ref"])


def _dynamic_ref(node: SchemaNode) -> SchemaNode:
    return node.registry.resolve_dynamic(node, node.schema["$dynamicRef"], "$dynamicRef")


def _recursive_ref(node: SchemaNode) -> SchemaNode:
    return node.registry.resolve_dynamic(node, "#", "$recursiveRef")


# --- the table

_STRUCTURE, _ANNOTATION = Keyword(role="structure"), Keyword(role="annotation")

KEYWORDS = KeywordTable({
    # numbers, strings
    "type": Keyword(form=_TYPE, narrow=n.of_type, combine=n.of_type_with_schemas),
    "minimum": Keyword(form=_NUMBER, narrow=n.minimum),
    "maximum": Keyword(form=_NUMBER, narrow=n.maximum, may_empty=True),
    "exclusiveMinimum": Keyword(form=_LIMIT, narrow=n.exclusive_minimum),
    "exclusiveMaximum": Keyword(form=_LIMIT, narrow=n.exclusive_maximum, may_empty=True),
    "multipleOf": Keyword(form=_DIVISOR, narrow=n.multiple_of, may_empty=True),
    "divisibleBy": Keyword(form=_DIVISOR, narrow=n.multiple_of, may_empty=True),
    "minLength": Keyword(form=_COUNT, narrow=n.min_length, may_empty=True),
    "maxLength": Keyword(form=_COUNT, narrow=n.max_length),
    "pattern": Keyword(form=_STRING, narrow=n.pattern_of, may_empty=True),
    "format": Keyword(narrow=n.format_of),
    # objects
    "properties": Keyword(
        form=_SCHEMA_MAP, subschemas="named", narrow=n.members, read_together=True, looks=u.look_at_names
    ),
    "patternProperties": Keyword(
        form=_SCHEMA_MAP, subschemas="named", strict_rank=8,
        narrow=n.members, read_together=True, looks=u.look_at_languages,
    ),
    "additionalProperties": Keyword(
        form=_SCHEMA, subschemas="direct", narrow=n.members, read_together=True, looks=u.look_at_all_names
    ),
    "required": Keyword(form=_NAMES, may_empty=True, narrow=n.members, read_together=True),
    "minProperties": Keyword(form=_COUNT, may_empty=True, strict_rank=11, narrow=n.min_properties),
    "maxProperties": Keyword(form=_COUNT, strict_rank=12, narrow=n.max_properties),
    "dependentRequired": Keyword(form=_MAP_OF_NAMES, strict_rank=3, narrow=n.dependent_required),
    "propertyNames": Keyword(form=_SCHEMA, subschemas="direct", strict_rank=10, narrow=n.property_names),
    # arrays
    "prefixItems": Keyword(form=_SCHEMAS, subschemas="direct", narrow=n.prefix_items, looks=u.look_at_prefix),
    "items": Keyword(form=_ITEMS, subschemas="direct", narrow=n.items, looks=u.look_at_items),
    "additionalItems": Keyword(
        form=_SCHEMA, subschemas="direct", narrow=n.additional_items, looks=u.look_at_additional_items
    ),
    "minItems": Keyword(form=_COUNT, may_empty=True, narrow=n.min_items),
    "maxItems": Keyword(form=_COUNT, narrow=n.max_items),
    "uniqueItems": Keyword(form=_BOOLEAN, narrow=n.unique_items),
    "contains": Keyword(
        form=_SCHEMA, subschemas="direct", may_empty=True, narrow=n.contains, looks=u.look_at_contained
    ),
    "minContains": Keyword(form=_COUNT, first_draft=DRAFT2019, narrow=n.min_contains),
    "maxContains": Keyword(form=_COUNT, first_draft=DRAFT2019, narrow=n.max_contains),
    # any value
    "enum": Keyword(form=_LIST, may_empty=True, narrow=n.enum),
    "const": Keyword(may_empty=True, narrow=n.const),
    # other schemas
    "$ref": Keyword(
        form=_STRING, may_empty=True, target=_ref, combine=n.referred, refuse=n.not_referred, track=u.track_referred
    ),
    "$dynamicRef": Keyword(
        form=_STRING, first_draft=DRAFT2019, may_empty=True,
        target=_dynamic_ref, combine=n.referred, refuse=n.not_referred, track=u.track_referred,
    ),
    "$recursiveRef": Keyword(
        first_draft=DRAFT2019, may_empty=True,
        target=_recursive_ref, combine=n.referred, refuse=n.not_referred, track=u.track_referred,
    ),
    "allOf": Keyword(
        form=_SCHEMAS, subschemas="direct", may_empty=True, strict_rank=1,
        combine=n.all_of, refuse=n.not_all_of, track=u.track_all_of,
    ),
    "extends": Keyword(last_draft=DRAFT4, may_empty=True, combine=n.all_of, refuse=n.not_all_of),
    "anyOf": Keyword(
        form=_SCHEMAS, subschemas="direct", may_empty=True,
        combine=n.any_of, refuse=n.not_any_of, track=u.track_any_of,
    ),
    "oneOf": Keyword(
        form=_SCHEMAS, subschemas="direct", may_empty=True, strict_rank=13,
        combine=n.one_of, refuse=n.not_one_of, track=u.track_one_of,
    ),
    "not": Keyword(
        form=_SCHEMA, subschemas="direct", may_empty=True, strict_rank=2,
        combine=n.not_, refuse=n.not_not, track=u.track_not,
    ),
    "disallow": Keyword(last_draft=DRAFT4, may_empty=True, combine=n.disallow),
    "if": Keyword(
        form=_SCHEMA, subschemas="direct", may_empty=True, strict_rank=5,
        combine=n.if_, refuse=n.not_if, track=u.track_if,
    ),
    "then": Keyword(form=_SCHEMA, subschemas="direct", strict_rank=6),
    "else": Keyword(form=_SCHEMA, subschemas="direct", strict_rank=7),
    "dependentSchemas": Keyword(
        form=_SCHEMA_MAP, subschemas="named", may_empty=True, strict_rank=4,
        combine=n.dependent_schemas, refuse=n.not_dependent_schemas, track=u.track_dependent,
    ),
    "dependencies": Keyword(
        subschemas="named", may_empty=True, narrow=n.dependent_required,
        combine=n.dependent_schemas, refuse=n.not_dependent_schemas,
    ),
    "unevaluatedProperties": Keyword(
        first_draft=DRAFT2019, subschemas="direct", may_empty=True, strict_rank=9, close=u.close_objects
    ),
    "unevaluatedItems": Keyword(first_draft=DRAFT2019, subschemas="direct", may_empty=True, close=u.close_arrays),
    # the rest; document.py reads identifiers
    "$schema": _STRUCTURE,
    "$id": _STRUCTURE,
    "id": _STRUCTURE,
    "$anchor": _STRUCTURE,
    "$dynamicAnchor": _STRUCTURE,
    "$recursiveAnchor": _STRUCTURE,
    "$defs": Keyword(role="structure", subschemas="named"),
    "definitions": Keyword(role="structure", subschemas="named"),
    "$vocabulary": _STRUCTURE,
    "$comment": _STRUCTURE,
    "title": _ANNOTATION,
    "description": _ANNOTATION,
    "default": _ANNOTATION,
    "examples": _ANNOTATION,
    "deprecated": _ANNOTATION,
    "readOnly": _ANNOTATION,
    "writeOnly": _ANNOTATION,
    "contentEncoding": _ANNOTATION,
    "contentMediaType": _ANNOTATION,
    "contentSchema": Keyword(role="annotation", subschemas="direct"),
})  # fmt: skip
