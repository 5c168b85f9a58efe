"""What fields of a body must be to each other: the check and the schema in the document say the same."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from ramet.errors import OutOfMemory
from ramet.runtime.server.errors import HttpError
from ramet.runtime.server.native.bodies import GenerateBody
from ramet.runtime.server.openai.bodies import ChatBody, CompletionBody
from ramet.runtime.server.validation import Condition, FieldRule, Strict, body_schema, parsed

VALUES: dict[str, list[Any]] = {  # what each field may be; of the first two, a missing one is not null
    "on": [True, False],
    "number": [0, 1, 2],
    "flag": [None, True, False],
    "text": [None, "", "a"],
    "items": [None, [], [1]],
    "table": [None, {}, {"a": 1}],
    "inner.flag": [None, True, False],
    "inner.name": [None, "", "a"],
}


class Inner(Strict):
    flag: bool | None = None
    other_name: str | None = Field(default=None, alias="name")


class Body(Strict):
    on: bool = False
    number: int = 1
    flag: bool | None = None
    text: str | None = None
    items: list[int] | None = None
    table: dict[str, int] | None = None
    inner: Inner | None = None


def conditions(path: str) -> st.SearchStrategy[tuple[str, Condition]]:
    plain = [value for value in VALUES[path] if not isinstance(value, list | dict)]
    some = st.lists(st.sampled_from(plain), min_size=1, max_size=2, unique_by=repr).map(tuple)
    kinds: st.SearchStrategy[Any] = st.sampled_from(["given", "some", "none"])
    return st.tuples(st.just(path), kinds | some)


WAYS = st.lists(st.sampled_from(list(VALUES)).flatmap(conditions), min_size=1, max_size=3).map(dict)
BODIES = st.fixed_dictionaries({}, optional={path: st.sampled_from(values) for path, values in VALUES.items()})


@settings(max_examples=200)
@given(st.lists(st.lists(WAYS, min_size=1, max_size=3), min_size=1, max_size=2), BODIES)
def test_a_body_is_taken_exactly_if_the_document_calls_it_valid(rules: list[list[Any]], flat: dict[str, Any]) -> None:
    model = type("Ruled", (Body,), {"rules": tuple(FieldRule("{given} is wrong", tuple(ways)) for ways in rules)})
    body: dict[str, Any] = {}
    for path, value in flat.items():
        outer, _, name = path.partition(".")
        if name:
            body.setdefault(outer, {})[name] = value
        else:
            body[outer] = value
    is_valid = jsonschema.Draft202012Validator(body_schema(model)).is_valid(body)
    data = json.dumps(body).encode()
    if is_valid:
        assert parsed(model, data, 10_000)
        return
    with pytest.raises(HttpError) as raised:
        parsed(model, data, 10_000)
    error = raised.value.body.error
    assert error.param in {path for ways in rules for way in ways for path in way}
    assert str(error.param) in error.message


@pytest.mark.parametrize(
    ("model", "body", "message"),
    [
        (ChatBody, {"regex": "a", "cfg": "b", "guided_json": {}}, "regex and cfg and guided_json each constrain"),
        (ChatBody, {"regex": "a", "response_format": {"type": "json_object"}}, "regex and response_format.type each"),
        (ChatBody, {"regex": "a", "response_format": {"type": "text"}, "order": "any"}, "order is of JSON"),
        (
            ChatBody,
            {"structured_outputs": {"json": {}, "choice": ["a"]}},
            "structured_outputs.json and struct",
        ),
        (CompletionBody, {"structured_outputs": {"json": {}}, "regex": "a"}, "regex and structured_outputs.json each"),
        (GenerateBody, {"sampling_params": [{}, {"regex": "a", "cfg": "b"}]}, r"sampling_params\[1\].regex and sampl"),
    ],
)
def test_an_error_names_the_fields_that_are_in_each_others_way(
    model: type[Strict], body: dict[str, Any], message: str
) -> None:
    needed: dict[Any, Any] = {
        ChatBody: {"messages": [{"role": "user", "content": "a"}]},
        CompletionBody: {"prompt": "a"},
    }
    with pytest.raises(HttpError, match=message):
        parsed(model, json.dumps({**needed.get(model, {"text": "a"}), **body}).encode(), 10_000)


def test_integers_with_a_fraction_of_zero_are_taken_wherever_they_stand() -> None:
    body = b'{"input_ids": [[1.0, 2], [3], [4.0]], "sampling_params": [{"n": 2.0}, {"top_k": 3.0}, {"n": 1}]}'
    found: Any = parsed(GenerateBody, body, 10_000)
    assert found.input_ids == [[1, 2], [3], [4]]
    assert all(type(token) is int for ids in found.input_ids for token in ids)
    many = json.dumps({"text": "a", "sampling_params": [{"n": 2.0}] * 40}).encode()
    with pytest.raises(HttpError, match="write 16, not"):
        parsed(GenerateBody, many, 10_000)


def test_memory_that_ends_in_a_step_is_no_fault_of_the_request() -> None:
    error = HttpError.of(OutOfMemory("a step did not fit"))
    assert (error.status, error.retry_after_s, str(error)) == (503, 2.0, "a step did not fit")
