"""Python types of generated values: from a type to a constraint, and from the generated JSON value back to the type.

`str`, `int`, `float`, `bool`, `Literal`, `Enum`, `datetime`, `date` and `time` are written as plain text. JSON schema
dicts, and all other types that pydantic supports (dataclasses, TypedDicts, models, `list[...]`, unions), are written
as JSON.

Not here: compiling constraints (grammar/).
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_origin

from ramet.errors import InvalidRequest, InvalidSchema
from ramet.grammar.service.python_types import readable, schema_of
from ramet.lang.graph.constraint import FLOAT, INT
from ramet.lang.graph.ir import Constraint, NodeEvent

if TYPE_CHECKING:
    from types import GenericAlias, UnionType
    from typing import _SpecialForm

# What stands for a type beside a class: `int | None`, `Literal[...]`, a JSON schema.
Form: TypeAlias = "UnionType | GenericAlias | _SpecialForm | Mapping[str, Any]"
Kind: TypeAlias = "type[Any] | Form"
Wire = Literal["str", "int", "float", "bool", "json", "tools", "captures"]

_YEAR = r"(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"  # Python's dates begin with year 1
_DATE = (
    _YEAR + r"-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"


@dataclass(frozen=True, slots=True)
class Shape:
    """The declared fields of a JSON value, so that a field can be put into text without reading the value."""

    schema: Mapping[str, Any]  # a JSON schema
    root: Mapping[str, Any]

    def child(self, name: str | int) -> Shape | None:
        """Return the shape of field `name`, or of an item of a list; None if no such part is declared."""
        schema = self.schema
        while "$ref" in schema:
            target: Any = self.root
            for step in str(schema["$ref"]).removeprefix("#/").split("/"):
                target = target[step.replace("~1", "/").replace("~0", "~")]
            schema = target
        if isinstance(name, int):
            is_list = schema.get("type") == "array" and not schema.get("uniqueItems") and "prefixItems" not in schema
            found = schema.get("items") if is_list else None
        else:
            found = schema.get("properties", {}).get(name)
        return Shape(found, self.root) if isinstance(found, Mapping) else None

    @property
    def kind(self) -> type | None:
        """The Python type of the value, where only one is possible."""
        name = self.schema.get("type")
        if not isinstance(name, str) or "format" in self.schema or "enum" in self.schema:
            return None
        return {"string": str, "integer": int, "boolean": bool}.get(name)


@dataclass(frozen=True, slots=True)
class OutputType:
    """How a generated text becomes a value: its type in the graph, its constraint, and the conversion in Python."""

    wire: Wire = "str"
    constraint: Constraint | None = None
    kind: type | None = None  # the Python type of every value, if there is only one
    convert: Callable[[Any], Any] = field(default=lambda value: value)  # JSON value -> value of the type
    from_event: Callable[[NodeEvent], Any] | None = None  # instead of `convert`, if more than the JSON value is needed
    shape: Shape | None = None
    is_json: bool = False  # the value in Python is the JSON value itself, and so are its parts
    has_plain_fields: bool = False  # its texts, integers, booleans, and lists of these are as they stand in the JSON


class Selected(str):
    """A selected choice with the probabilities of all choices: `probs`, choice -> probability."""

    probs: dict[str, float]


def _selected(event: NodeEvent) -> Selected:
    found, meta = Selected(event.value), event.meta or {}
    found.probs = dict(zip(meta.get("choices", ()), meta.get("probs", ()), strict=True))
    return found


class CapturedText(str):
    """A text that a grammar described. `captures`: the values of its named parts."""

    captures: dict[str, Any]


def captured(output: OutputType, *, is_list: bool) -> OutputType:
    """Return the type of a named part of a grammar, whose texts have type `output`.

    `is_list`: it may stand there several times. A part that is not in the text has the value None.
    """
    if is_list:
        return replace(output, kind=None, convert=lambda value: [output.convert(one) for one in value], shape=None)
    shape = Shape({"type": "string"}, {}) if output is TEXT else output.shape
    return replace(
        output, convert=lambda value: None if value is None else output.convert(value), kind=None, shape=shape
    )


def captures_type(constraint: Constraint, captures: Mapping[str, OutputType]) -> OutputType:
    """Return the type of the texts of a grammar: text, with the values of its named parts."""

    def convert(value: Any) -> CapturedText:
        found = CapturedText(value["text"])
        found.captures = {name: one.convert(value["captures"][name]) for name, one in captures.items()}
        return found

    return OutputType("captures", constraint, str, convert)


TEXT = OutputType(kind=str)
SELECTED = OutputType(kind=str, from_event=_selected)


def output_type(kind: object) -> OutputType:
    """Return how values of `kind` are generated. Raises InvalidRequest if it isn't a type or a JSON schema."""
    if kind is None or kind is str:
        return TEXT
    if kind is int:
        return OutputType("int", Constraint("regex", INT), int)
    if kind is float:
        return OutputType("float", Constraint("regex", FLOAT), float)
    if kind is bool:
        return OutputType("bool", choice(["true", "false"]), bool)
    if isinstance(kind, Mapping):
        return OutputType("json", json_schema(kind), shape=Shape(kind, kind), is_json=True)
    if get_origin(kind) is Literal:
        return _one_of({_plain(value): value for value in get_args(kind)})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _one_of({_plain(member.value): member for member in kind})
    if kind is datetime.datetime:
        return OutputType("str", Constraint("regex", _DATE + "T" + _TIME), kind, datetime.datetime.fromisoformat)
    if kind is datetime.date:
        return OutputType("str", Constraint("regex", _DATE), kind, datetime.date.fromisoformat)
    if kind is datetime.time:
        return OutputType("str", Constraint("regex", _TIME), kind, datetime.time.fromisoformat)
    return _by_pydantic(kind)


def choice(texts: list[str]) -> Constraint:
    """Return the constraint to one of these texts."""
    return Constraint("choice", json.dumps(texts, ensure_ascii=False))


def json_schema(schema: Mapping[str, Any]) -> Constraint:
    """Return the constraint to JSON that fits the schema. Fields are written in the schema's order."""
    try:
        return Constraint("json_schema", json.dumps(schema, ensure_ascii=False))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the JSON schema is not JSON: {error}", param="json_schema") from error


def _one_of(values: Mapping[str, Any]) -> OutputType:
    if not values:
        raise InvalidRequest("the type has no values to choose from", param="type")
    kinds = {type(value) for value in values.values()}
    return OutputType("str", choice(list(values)), kinds.pop() if len(kinds) == 1 else None, values.__getitem__)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _by_pydantic(kind: object) -> OutputType:
    from pydantic import TypeAdapter

    is_class = isinstance(kind, type) or get_origin(kind) is not None or typing.is_typeddict(kind)
    if not is_class:
        raise InvalidRequest(f"type is {kind!r}, but must be a type or a JSON schema dict", param="type")
    try:
        schema = schema_of(kind)
    except InvalidSchema as error:
        raise InvalidRequest(str(error), param="type") from error
    adapter: TypeAdapter[Any] = TypeAdapter(readable(kind))
    return OutputType(
        "json",
        json_schema(schema),
        kind if isinstance(kind, type) and not typing.is_typeddict(kind) and get_origin(kind) is None else None,
        lambda value: adapter.validate_json(json.dumps(value)),
        shape=Shape(schema, schema),
        is_json=_is_json(kind),
        has_plain_fields=_has_plain_fields(kind),
    )


def _is_json(kind: object) -> bool:
    """Return whether values of a type surely are their JSON values: no validator changes them, and no class."""
    if get_origin(kind) is list:
        return all(map(_is_json, get_args(kind)))
    if typing.is_typeddict(kind):
        assert isinstance(kind, type)
        return all(map(_is_json, typing.get_type_hints(kind, include_extras=True).values()))
    return kind in (str, int, bool)


def _has_plain_fields(kind: object) -> bool:
    """Return whether a dataclass or a pydantic model surely takes its fields from JSON unchanged."""
    from pydantic import BaseModel

    if not isinstance(kind, type):
        return False
    if issubclass(kind, BaseModel):
        decorators = kind.__pydantic_decorators__
        validators = (decorators.validators, decorators.field_validators, decorators.root_validators)
        is_changed = any((*validators, decorators.model_validators))
        is_changed = is_changed or kind.model_post_init is not BaseModel.model_post_init
        is_changed = is_changed or any(name.startswith("str_") for name in kind.model_config)
        fields = kind.model_fields.values()
        is_changed = is_changed or any(one.metadata or one.alias or one.validation_alias for one in fields)
        types = [one.annotation for one in fields]
    elif dataclasses.is_dataclass(kind):
        changing = {"__post_init__", "__pydantic_config__"}
        is_changed = any(changing & vars(one).keys() for one in kind.__mro__)
        types = list(typing.get_type_hints(kind, include_extras=True).values())
    else:
        return False
    return not is_changed and all(_is_json(one) or _has_plain_fields(one) for one in types)
