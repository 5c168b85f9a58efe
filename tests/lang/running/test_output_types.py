"""Python types of generated values."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, TypedDict

import pytest
from pydantic import BaseModel, Field

from ramet import MockBackend, State, function, gen
from ramet.errors import InvalidRequest, ProgramError
from ramet.lang.running.output_types import OutputType, output_type


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Level(Enum):
    LOW = 1
    HIGH = 2


@dataclass
class Point:
    x: int
    y: int = 0
    tags: list[str] = field(default_factory=list)


class Row(TypedDict):
    name: str
    score: float


class Order(BaseModel):
    item: str
    count: int = Field(ge=1, le=99)
    colour: Colour
    when: datetime.date
    places: list[Point]


def generate(kind: Any, text: str) -> Any:
    @function
    def program(s: State) -> None:
        s += "value: " + gen("x", kind, max_tokens=300)

    mock = MockBackend({"value:": text})
    try:
        return program.run(backend=mock)["x"]
    finally:
        mock.engine.shutdown()


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (str, "free text!", "free text!"),
        (None, "free text!", "free text!"),
        (int, "-42", -42),
        (float, "3.25", 3.25),
        (bool, "true", True),
        (bool, "false", False),
        (Literal["a", "b c"], "b c", "b c"),
        (Literal[1, 2, "x"], "2", 2),
        (Colour, "blue", Colour.BLUE),
        (Level, "2", Level.HIGH),
        (datetime.date, "2024-02-28", datetime.date(2024, 2, 28)),
        (datetime.time, "23:59:01", datetime.time(23, 59, 1)),
        (datetime.datetime, "2024-12-31T08:00:00", datetime.datetime(2024, 12, 31, 8)),
        (Point, '{"x": 1, "y": 2, "tags": ["a"]}', Point(1, 2, ["a"])),
        (Row, '{"name": "Ann", "score": 1.5}', {"name": "Ann", "score": 1.5}),
        (
            Order,
            '{"item": "pen", "count": 3, "colour": "red", "when": "2024-05-01", "places": [{"x": 1}]}',
            Order(item="pen", count=3, colour=Colour.RED, when=datetime.date(2024, 5, 1), places=[Point(1)]),
        ),
        (list[int], "[1, 2, 3]", [1, 2, 3]),
        (int | None, "null", None),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (tuple[int, str], '[1, "a"]', (1, "a")),
        ({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, '{"a": 5}', {"a": 5}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_value_has_the_type_that_was_asked_for(kind: object, text: str, value: object) -> None:
    found = generate(kind, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("kind", [int, float, bool, datetime.date, datetime.time, datetime.datetime, Order, list[Row]])
def test_whatever_the_model_says_the_value_is_of_its_type(kind: Any) -> None:
    assert generate(kind, "something quite different") is not None


def pattern_of(kind: object) -> re.Pattern[str]:
    constraint = output_type(kind).constraint
    assert constraint is not None
    assert constraint.kind == "regex"
    return re.compile(constraint.source)


def test_the_pattern_of_a_date_allows_days_that_exist_and_no_others() -> None:
    pattern = pattern_of(datetime.date)
    for month in range(14):
        for day in range(33):
            text = f"2023-{month:02}-{day:02}"
            try:
                datetime.date.fromisoformat(text)
                exists = True
            except ValueError:
                exists = False
            assert bool(pattern.fullmatch(text)) is exists, text


def test_numbers_have_no_leading_zeros_and_an_end() -> None:
    for text, is_int in [("0", True), ("-7", True), ("12", True), ("007", False), ("+1", False), ("1" * 16, False)]:
        assert bool(pattern_of(int).fullmatch(text)) is is_int
    assert pattern_of(float).fullmatch("1.50")
    assert not pattern_of(float).fullmatch("1.")


def test_a_class_allows_no_fields_but_its_own() -> None:
    constraint = output_type(Order).constraint
    assert constraint is not None
    schema = json.loads(constraint.source)
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Point"]["additionalProperties"] is False
    assert list(schema["properties"]) == ["item", "count", "colour", "when", "places"]


def test_declared_fields_are_found_through_references() -> None:
    shape = output_type(Order).shape
    assert shape is not None
    assert shape.child("item") is not None
    assert shape.child("nothing") is None
    nested: OutputType = output_type(
        {"$defs": {"a/b": {"properties": {"c": {"type": "string"}}}}, "$ref": "#/$defs/a~1b"}
    )
    assert nested.shape is not None
    assert nested.shape.child("c") is not None


def test_what_is_no_type_is_refused() -> None:
    for kind in (3, "int", object()):
        with pytest.raises(InvalidRequest, match="must be a type"):
            output_type(kind)

    class Strange:
        pass

    with pytest.raises(InvalidRequest, match="has no JSON schema"):
        output_type(Strange)
    with pytest.raises(InvalidRequest, match="not JSON"):
        output_type({"enum": [object()]})


def test_a_value_that_its_class_refuses_is_an_error_with_its_cause() -> None:
    class Even(BaseModel):
        n: int

        def model_post_init(self, context: Any) -> None:
            if self.n % 2:
                raise ValueError("odd")

    with pytest.raises(ProgramError, match="odd") as raised:
        generate(Even, '{"n": 3}')
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize(
    ("kind", "written", "value"),
    [(int, "36 trees", 36), (int, "-5.", -5), (float, "2.5, or so", 2.5), (float, "3! Then", 3.0), (float, "7", 7.0)],
)
def test_a_number_ends_where_the_model_goes_on_with_something_else(kind: Any, written: str, value: object) -> None:
    @function
    def program(s: State) -> None:
        s += "value: " + gen("x", kind) + "!"

    mock = MockBackend({"value:": written})
    state = program.run(backend=mock)
    assert state["x"] == value
    assert state.text() == f"value: {written.rstrip('.').split(' ')[0].rstrip('.,!')}!"
    mock.engine.shutdown()


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3.\n", 3.0),
        ("3. Then", 3.0),
        ("3.", 3.0),
        ("3.5. Then", 3.5),
        ("3.5\n", 3.5),
        ("7, or 8", 7.0),
        ("-0.25)", -0.25),
    ],
)
def test_a_decimal_number_that_nothing_follows_may_end_a_sentence(written: str, value: float) -> None:
    @function
    def program(s: State) -> None:
        s += "value: " + gen("x", float)

    mock = MockBackend({"value:": written})
    state = program.run(backend=mock)
    assert state["x"] == value
    assert float(state.text().removeprefix("value: ")) == value
    assert state.text()[-1].isdigit()
    mock.engine.shutdown()
