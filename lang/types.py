"""Python types of generated values: from a type to a constraint, and from the generated JSON value back to the type.

`str`, `int`, `float`, `bool`, `Literal`, `Enum`, `datetime`, `date` and `time` are written as plain text; as
JSON: whatever else pydantic understands (dataclasses, TypedDicts, models, `list[...]`, unions) and JSON schema dicts.
Not here: compiling constraints (the grammar does).
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from ramet.errors import InvalidRequest
from ramet.lang.ir import Constraint

Wire = Literal["str", "int", "float", "bool", "json"]

_INT = r"-?(?:0|[1-9][0-9]{0,14})"
_DATE = (
    r"[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"


@dataclass(frozen=True, slots=True)
class Shape:
    """The declared fields of a JSON value, so that a field can be put into text without reading the value."""

    schema: Mapping[str, Any]  # a JSON schema
    root: Mapping[str, Any]

    def child(self, name: str) -> Shape | None:
        """The field `name`, or None where none of that name is declared."""
        schema = self.schema
        while "$ref" in schema:
            target: Any = self.root
            for step in str(schema["$ref"]).removeprefix("#/").split("/"):
                target = target[step.replace("~1", "/").replace("~0", "~")]
            schema = target
        found = schema.get("properties", {}).get(name)
        return Shape(found, self.root) if isinstance(found, Mapping) else None


@dataclass(frozen=True, slots=True)
class OutputType:
    """How a generated text becomes a value: its form in the graph, its constraint, and the last step in Python."""

    wire: Wire = "str"
    constraint: Constraint | None = None
    convert: Callable[[Any], Any] = field(default=lambda value: value)  # JSON value -> value of the type
    shape: Shape | None = None


TEXT = OutputType()


def output_type(kind: object) -> OutputType:
    """Return how values of `kind` are generated. Raises InvalidRequest for what isn't a type or a JSON schema."""
    if kind is None or kind is str:
        return TEXT
    if kind is int:
        return OutputType("int", Constraint("regex", _INT))
    if kind is float:
        return OutputType("float", Constraint("regex", _INT + r"(?:\.[0-9]{1,15})?"))
    if kind is bool:
        return OutputType("bool", choice(["true", "false"]))
    if isinstance(kind, Mapping):
        return OutputType("json", json_schema(kind), shape=Shape(kind, kind))
    if get_origin(kind) is Literal:
        return _one_of({_plain(value): value for value in get_args(kind)})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _one_of({_plain(member.value): member for member in kind})
    if kind is datetime.datetime:
        return OutputType("str", Constraint("regex", _DATE + "T" + _TIME), datetime.datetime.fromisoformat)
    if kind is datetime.date:
        return OutputType("str", Constraint("regex", _DATE), datetime.date.fromisoformat)
    if kind is datetime.time:
        return OutputType("str", Constraint("regex", _TIME), datetime.time.fromisoformat)
    return _by_pydantic(kind)


def choice(texts: list[str]) -> Constraint:
    """One of these texts."""
    return Constraint("choice", json.dumps(texts, ensure_ascii=False))


def json_schema(schema: Mapping[str, Any]) -> Constraint:
    """JSON that fits the schema. Fields are written in the schema's order."""
    try:
        return Constraint("json_schema", json.dumps(schema, ensure_ascii=False))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the JSON schema is not JSON: {error}", param="json_schema") from error


def _one_of(values: Mapping[str, Any]) -> OutputType:
    if not values:
        raise InvalidRequest("the type has no values to choose from", param="type")
    return OutputType("str", choice(list(values)), values.__getitem__)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _by_pydantic(kind: object) -> OutputType:
    from pydantic import PydanticUserError, TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError

    is_class = isinstance(kind, type) or get_origin(kind) is not None or typing.is_typeddict(kind)
    if not (is_class or dataclasses.is_dataclass(kind)):
        raise InvalidRequest(f"type is {kind!r}, but must be a type or a JSON schema dict", param="type")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(_readable(kind))
        schema = adapter.json_schema()
    except (PydanticUserError, PydanticSchemaGenerationError) as error:
        raise InvalidRequest(f"type {kind!r} has no JSON schema: {error}", param="type") from error
    closed = _close(schema)
    return OutputType(
        "json", json_schema(closed), lambda value: adapter.validate_json(json.dumps(value)), Shape(closed, closed)
    )


def _readable(kind: Any) -> Any:  # Any: types
    """`kind` with every typing.TypedDict as one that pydantic reads before Python 3.12."""
    if sys.version_info >= (3, 12):
        return kind
    if typing.is_typeddict(kind):
        import typing_extensions

        fields = typing.get_type_hints(kind, include_extras=True)
        required = {n: typing.Required[_readable(f)] for n, f in fields.items() if n in kind.__required_keys__}
        optional = {n: typing.NotRequired[_readable(f)] for n, f in fields.items() if n in kind.__optional_keys__}
        ordered = {n: (required | optional)[n] for n in fields}
        make: Any = typing_extensions.TypedDict  # with fields known at run time
        return make(kind.__name__, ordered)
    arguments = get_args(kind)
    if get_origin(kind) in (list, dict, tuple, set, typing.Union, types.UnionType) and arguments:
        changed = tuple(_readable(argument) for argument in arguments)
        if any(new is not old for new, old in zip(changed, arguments, strict=True)):
            is_union = get_origin(kind) in (typing.Union, types.UnionType)
            return typing.Union[changed] if is_union else get_origin(kind)[changed]  # noqa: UP007 - made at run time
    return kind


def _close(schema: Any) -> Any:  # Any: JSON
    """A class says all its fields: forbid others, in every object that lists its properties."""
    if isinstance(schema, list):
        return [_close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _close(value) for key, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed
