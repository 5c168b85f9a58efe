"""Python types -> JSON schemas: all types that pydantic understands. Objects are closed.

Understood: models, dataclasses, TypedDicts, Literal, Enum, unions, Optional, list, dict, tuple, set, Annotated
constraints, datetime and related types, UUID. Decimal becomes a number. Recursive types become `$ref`. Equal types give
equal schemas.
"""

from __future__ import annotations

import enum
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from ramet.errors import InvalidSchema


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a type's values, as pydantic reads them.

    An object that lists its properties has no others, unless the type itself allows them (`extra="allow"`).
    Raises: InvalidSchema for a value that is not a type, or a type that has no JSON form.
    """
    from pydantic import PydanticUserError, TypeAdapter
    from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError
    from pydantic.json_schema import GenerateJsonSchema

    class Generator(GenerateJsonSchema):
        def decimal_schema(self, schema: Any) -> dict[str, Any]:
            """Return the schema of a number. pydantic also allows any string, and most strings are not decimals."""
            places = schema.get("decimal_places")
            found = super().decimal_schema(schema)
            number = next(option for option in found.get("anyOf", [found]) if option.get("type") == "number")
            return number if places is None else {**number, "multipleOf": float(f"1e-{places}")}

    if isinstance(kind, Mapping | str) or kind is None:
        raise InvalidSchema(f"{kind!r} is not a type")
    if isinstance(kind, enum.EnumType) and not list(kind):
        raise InvalidSchema(f"the enum {kind.__name__} has no members")
    try:
        schema = TypeAdapter(readable(kind)).json_schema(schema_generator=Generator)
    except (PydanticUserError, PydanticSchemaGenerationError, PydanticInvalidForJsonSchema) as error:
        raise InvalidSchema(f"the type {_name(kind)} has no JSON schema: {_first_line(error)}") from error
    except (NameError, TypeError, RecursionError) as error:
        raise InvalidSchema(f"the type {_name(kind)} cannot be read: {error}") from error
    closed: dict[str, Any] = map_schemas(schema, _close)
    return closed


def readable(kind: Any) -> Any:
    """Return the type with each `typing.TypedDict` replaced by an equal one that pydantic can read.

    pydantic reads `typing.TypedDict` itself only from Python 3.12 on.
    """
    if sys.version_info >= (3, 12):
        return kind
    if typing.is_typeddict(kind) and type(kind).__module__ == "typing":
        import typing_extensions

        hints = typing.get_type_hints(kind, include_extras=True)
        fields = {}
        for name, hint in hints.items():
            marker = typing.Required if name in kind.__required_keys__ else typing.NotRequired
            # the class misses markers in annotations that are strings, so the markers themselves are read
            while get_origin(hint) in (typing.Required, typing.NotRequired):
                marker = get_origin(hint)
                (hint,) = get_args(hint)
            fields[name] = marker[readable(hint)]
        return typing_extensions.TypedDict(kind.__name__, fields)  # type: ignore[operator]
    arguments = get_args(kind)
    if not arguments or get_origin(kind) is Literal:
        return kind
    changed = tuple(readable(a) for a in arguments)
    if all(a is b for a, b in zip(arguments, changed, strict=True)):
        return kind
    if get_origin(kind) is Annotated:
        return Annotated[changed]
    if isinstance(kind, types.UnionType):
        return typing.Union[changed]  # noqa: UP007
    origin: Any = get_origin(kind)  # Any: a generic class
    return origin[changed] if isinstance(kind, types.GenericAlias) else kind.copy_with(changed)


def map_schemas(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:  # any JSON value
    """Return a JSON schema in which every object schema is replaced by its `change`, inner ones first."""
    if isinstance(schema, list):
        return [map_schemas(item, change) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return change(
        {
            # names of properties and the values of enum, const, default and examples are not schemas
            key: {k: map_schemas(v, change) for k, v in value.items()}
            if key in ("properties", "$defs")
            else value
            if key in ("enum", "const", "default", "examples")
            else map_schemas(value, change)
            for key, value in schema.items()
        }
    )


def _close(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") == "object" and "properties" in schema:
        schema.setdefault("additionalProperties", False)
    return schema


def _name(kind: Any) -> str:
    if isinstance(kind, types.GenericAlias) or get_args(kind):
        return str(kind)
    return getattr(kind, "__name__", repr(kind))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
