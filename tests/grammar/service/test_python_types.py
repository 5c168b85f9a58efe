from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import uuid
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import jsonschema
import pydantic
import pytest

from ramet.errors import InvalidSchema
from ramet.grammar import Vocabulary, compile_constraint
from ramet.grammar.service.python_types import schema_of

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b"<eos>"], [256], [256])


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Person(pydantic.BaseModel):
    name: str
    age: Annotated[int, pydantic.Field(ge=0, le=150)]
    email: str | None = None


class Tree(pydantic.BaseModel):
    value: int
    children: list[Tree] = []


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    properties: int  # a field with the name of a keyword


@dataclasses.dataclass
class Point:
    x: float
    y: float


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


CASES: list[tuple[Any, Any, Any]] = [
    (Person, {"name": "A", "age": 3}, {"name": "A", "age": 200}),
    (Person, {"age": 3, "name": "A", "email": None}, {"name": "A", "age": 3, "x": 1}),
    (Tree, {"value": 1, "children": [{"value": 2, "children": []}]}, {"value": 1, "children": [{"value": "2"}]}),
    (Open, {"properties": 1, "more": 2}, {"properties": "1"}),
    (Point, {"x": 1.5, "y": 2}, {"x": 1.5}),
    (Movie, {"title": "M"}, {"title": "M", "director": "L"}),
    (list[Movie] | None, [{"title": "M", "year": 1}], [{"year": 1}]),
    (dict[str, Annotated[list[Movie], "note"]], {"x": []}, {"x": [1]}),
    (Literal["a", 1, None], None, "b"),
    (Color, "red", "green"),
    (list[int], [1, 2], ["1"]),
    (dict[str, Color], {"k": "blue"}, {"k": 1}),
    (tuple[int, str], [1, "a"], [1, "a", 2]),
    (int | str | None, "x", 1.5),
    (datetime.datetime, "2024-02-29T12:00:00Z", "2024-02-30T12:00:00Z"),
    (datetime.date, "2024-02-29", "2023-02-29"),
    (uuid.UUID, "123e4567-e89b-12d3-a456-426614174000", "123"),
    (decimal.Decimal, 1.5, "x"),
    (Annotated[decimal.Decimal, pydantic.Field(decimal_places=2, ge=0)], 1.25, 1.255),
    (Annotated[list[int], pydantic.Field(min_length=2, max_length=3)], [1, 2], [1]),
]


@pytest.mark.parametrize(("kind", "good", "bad"), CASES, ids=lambda v: str(v)[:40])
def test_schema_accepts_values_of_the_type_and_no_others(kind: Any, good: Any, bad: Any) -> None:
    schema = schema_of(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    grammar = compile_constraint("json_schema", schema, BYTES)
    for value, expected in ((good, True), (bad, False)):
        state = grammar.advance_bytes(0, json.dumps(value, ensure_ascii=False).encode())
        assert (state is not None and grammar.is_accepting(state)) == expected, value


def test_equal_types_give_equal_schemas() -> None:
    assert schema_of(Person) == schema_of(Person)
    assert schema_of(list[Point]) == schema_of(list[Point])


class NoJson:
    pass


class Empty(enum.Enum):
    pass


@pytest.mark.parametrize("kind", [NoJson, {"type": "object"}, "int", None, Empty, 3])
def test_what_is_no_type_or_has_no_schema_is_refused(kind: Any) -> None:
    with pytest.raises(InvalidSchema):
        schema_of(kind)
