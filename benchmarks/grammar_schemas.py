"""Schemas for bench_grammar.py, of the shapes that people use: each with valid instances to walk."""

from __future__ import annotations

from typing import Any

Json = Any  # a decoded JSON document


def cases() -> list[tuple[str, Json, list[Json]]]:
    """(name, schema, valid instances)."""
    return [
        ("empty object", {"type": "object"}, [{}, {"any": [1, {"thing": None}], "goes": "here"}]),
        ("flat", _FLAT, [{"name": "Ada Lovelace", "age": 36, "email": "ada@example.org", "is_active": True}]),
        ("optional fields", _optional(24), [{f"field_{i}": f"value {i}" for i in range(0, 24, 5)}]),
        ("array of objects", _ORDERS, [{"id": 4711, "lines": [_line(i) for i in range(6)]}]),
        ("long enum", {"enum": [f"category-{i:03d}" for i in range(500)]}, ["category-417"]),
        ("unions", _SHAPES, [[{"kind": "circle", "radius": 2.5}, {"kind": "square", "side": 3}]]),
        ("one of", _ONE_OF, [{"card": "4111 1111 1111 1111"}, {"iban": "DE89370400440532013000"}]),
        ("recursive tree", _TREE, [{"value": 1, "children": [{"value": 2, "children": []}]}]),
        ("formats", _FORMATS, [{"id": "123e4567-e89b-12d3-a456-426614174000", "at": "2024-02-29T12:00:00Z"}]),
        ("patterns", _PATTERNS, [{"plate": "B-XY 1234", "phone": "+49 30 901820", "tags": ["a-b", "c"]}]),
        ("string lengths", _LENGTHS, [{"title": "A title", "body": "Some text. " * 20}]),
        ("numbers", _NUMBERS, [{"percent": 42, "price": 19.99, "even": 128, "ratio": 0.25}]),
        ("map", {"type": "object", "additionalProperties": {"type": "integer"}}, [{"a": 1, "b": 22, "c": 333}]),
        ("tuple", _TUPLE, [["2024-01-01", 3.5, "EUR", {"note": "x"}]]),
        ("composition", _COMPOSED, [{"id": "a1", "created": "2024-01-01", "title": "T", "lines": 3}]),
        ("conditional", _CONDITIONAL, [{"country": "US", "zip": "12345"}, {"country": "DE", "zip": "10115"}]),
        ("deep nesting", _nested(12), [_nested_value(12)]),
        ("manifest", _MANIFEST, [_MANIFEST_VALUE]),
        ("free text", {"type": "string"}, ["The quick brown fox jumps over the lazy dog; é, 漢字 and 🙂 too. " * 4]),
        ("any value", True, [{"a": [1, 2.5, "x", None, True]}]),
    ]


def _closed(properties: dict[str, Json], required: list[str] | None = None) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def _optional(count: int) -> Json:
    return _closed({f"field_{i}": {"type": "string"} for i in range(count)}, [])


def _line(i: int) -> Json:
    return {"sku": f"SKU-{i:04d}", "quantity": i + 1, "price": 9.5 * (i + 1), "note": None}


def _nested(depth: int) -> Json:
    return {"type": "integer"} if depth == 0 else _closed({"inner": _nested(depth - 1), "tag": {"type": "string"}})


def _nested_value(depth: int) -> Json:
    return 7 if depth == 0 else {"inner": _nested_value(depth - 1), "tag": f"level {depth}"}


_STRING, _INTEGER, _NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_FLAT = _closed(
    {"name": _STRING, "age": {"type": "integer", "minimum": 0}, "email": _STRING, "is_active": {"type": "boolean"}}
)
_ORDERS = _closed(
    {
        "id": _INTEGER,
        "lines": {
            "type": "array",
            "minItems": 1,
            "items": _closed(
                {"sku": _STRING, "quantity": _INTEGER, "price": _NUMBER, "note": {"type": ["string", "null"]}}
            ),
        },
    }
)
_SHAPES = {
    "type": "array",
    "items": {
        "anyOf": [
            _closed({"kind": {"const": "circle"}, "radius": _NUMBER}),
            _closed({"kind": {"const": "square"}, "side": _NUMBER}),
            _closed(
                {
                    "kind": {"const": "polygon"},
                    "points": {"type": "array", "items": {"type": "array", "items": _NUMBER}},
                }
            ),
        ]
    },
}
_ONE_OF = {"oneOf": [_closed({"card": _STRING}), _closed({"iban": _STRING}), _closed({"cash": {"type": "boolean"}})]}
_TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": _closed({"value": _INTEGER, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}})},
}
_FORMATS = _closed({"id": {"type": "string", "format": "uuid"}, "at": {"type": "string", "format": "date-time"}})
_PATTERNS = _closed(
    {
        "plate": {"type": "string", "pattern": "^[A-Z]{1,3}-[A-Z]{1,2} [1-9][0-9]{0,3}$"},
        "phone": {"type": "string", "pattern": "^\\+[0-9]{1,3}( [0-9]+)+$"},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+(-[a-z]+)*$"}},
    }
)
_LENGTHS = _closed(
    {"title": {"type": "string", "minLength": 1, "maxLength": 80}, "body": {"type": "string", "maxLength": 2000}}
)
_NUMBERS = _closed(
    {
        "percent": {"type": "integer", "minimum": 0, "maximum": 100},
        "price": {"type": "number", "minimum": 0},
        "even": {"type": "integer", "minimum": -1000, "maximum": 1000},
        "ratio": {"type": "number", "minimum": 0, "maximum": 1},
    }
)
_TUPLE = {
    "type": "array",
    "prefixItems": [{"type": "string", "format": "date"}, _NUMBER, {"enum": ["EUR", "USD"]}, {"type": "object"}],
    "items": False,
    "minItems": 4,
}
_COMPOSED = {
    "allOf": [
        {
            "type": "object",
            "properties": {"id": _STRING, "created": {"type": "string", "format": "date"}},
            "required": ["id"],
        },
        {"type": "object", "properties": {"title": _STRING, "lines": _INTEGER}, "required": ["title"]},
    ]
}
_CONDITIONAL = {
    **_closed({"country": {"enum": ["US", "DE"]}, "zip": _STRING}),
    "if": {"properties": {"country": {"const": "US"}}},
    "then": {"properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"}}},
    "else": {"properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}},
}
_PORT = _closed({"containerPort": _INTEGER, "protocol": {"enum": ["TCP", "UDP"]}}, ["containerPort"])
_MANIFEST = {
    "type": "object",
    "properties": {
        "apiVersion": {"const": "v1"},
        "kind": {"enum": ["Pod", "Service", "Deployment"]},
        "metadata": {
            "type": "object",
            "properties": {
                "name": _STRING,
                "labels": {"type": "object", "additionalProperties": _STRING},
                "annotations": {"type": "object", "additionalProperties": _STRING},
            },
            "required": ["name"],
        },
        "spec": {
            "type": "object",
            "properties": {
                "replicas": {"type": "integer", "minimum": 0},
                "containers": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "name": _STRING,
                            "image": _STRING,
                            "ports": {"type": "array", "items": _PORT},
                            "env": {"type": "array", "items": _closed({"name": _STRING, "value": _STRING}, ["name"])},
                        },
                        "required": ["name", "image"],
                    },
                },
            },
        },
    },
    "required": ["apiVersion", "kind", "metadata"],
}
_MANIFEST_VALUE = {
    "apiVersion": "v1",
    "kind": "Deployment",
    "metadata": {"name": "web", "labels": {"app": "web", "tier": "front"}},
    "spec": {
        "replicas": 3,
        "containers": [
            {
                "name": "web",
                "image": "registry.example.org/web:1.2.3",
                "ports": [{"containerPort": 8080, "protocol": "TCP"}],
                "env": [{"name": "MODE", "value": "production"}],
            }
        ],
    },
}
