"""One table says what sampling values are: for the engine's form, for what a program says, and on the wire."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import pytest

from ramet.errors import InvalidRequest
from ramet.lang.graph.sampling import FIELDS, Sampling, SamplingParams, sampling_problem
from ramet.lang.program.function import Runs
from ramet.lang.recording.primitives import gen

VALUES: dict[str, tuple[list[Any], list[Any]]] = {  # field: what is taken, what is refused
    "max_tokens": ([1, 10**9, None], [0, -1, 1.5, True, "x"]),
    "temperature": ([0, 0.0, 100], [-0.1, 100.1, float("nan"), float("inf"), None, True, "x"]),
    "top_k": ([0, 2**31 - 1], [-1, 2**31, 2.5, None]),
    "top_p": ([1e-9, 1], [0, 1.01, None]),
    "min_p": ([0, 1], [-0.1, 1.1]),
    "frequency_penalty": ([-2, 2], [-2.1, 2.1]),
    "presence_penalty": ([-2, 2], [-2.1, 2.1]),
    "repetition_penalty": ([0.1, 10], [0, 10.1]),
    "logit_bias": ([{}, {0: -100, 5: 100.0}], [{-1: 0}, {1: 101}, {1: "x"}, {"1": 1}, "x", [1], 3]),
    "seed": ([None, -(2**63), 2**63], [1.5, True, "x"]),
    "min_tokens": ([0, 128], [-1, 129, 1.5]),
    "string_tokens": ([None, 1, 10**9], [0, -1, 1.5, True, "x"]),
    "stop": ([(), ("a", "b")], [("",), ["a"], "a", (1,)]),
    "stop_regex": ([(), ("a+", "[b]")], [("",), ["a"], "a", (1,)]),
    "stop_token_ids": ([(), (0, 7)], [(-1,), (1.5,), (True,), 5]),
    "ignore_eos": ([True, False], [None, 1, "x"]),
    "logprobs": ([None, 0, 64], [-1, 65, 1.5]),
}
CASES = [(name, value) for name, (taken, _) in VALUES.items() for value in taken]
WRONG = [(name, value) for name, (_, refused) in VALUES.items() for value in refused]


def test_the_table_and_both_structs_have_the_same_fields_of_the_same_types() -> None:
    engine = {field.name: field.type for field in msgspec.structs.fields(SamplingParams)}
    said = {field.name: field.type for field in msgspec.structs.fields(Sampling)}
    assert list(FIELDS) == list(engine)
    assert set(FIELDS) == set(said) == set(VALUES)
    for name in set(FIELDS) - {"logit_bias"}:  # pairs in a graph, which can be hashed
        assert said[name] == engine[name] | None, name


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_value_in_its_range_is_taken_and_comes_back_from_the_wire(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == value
    if name != "seed":  # 64 bits go over the wire; HTTP's bodies take no others
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_outside_its_range_is_refused_with_its_name_value_and_limit(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name} is .* but must be ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [case for case in WRONG if case[1] is not None and case != ("min_tokens", 129)]
)
def test_what_a_program_says_has_the_engines_ranges_in_the_engines_words(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})
    assert sampling_problem(Sampling(**{name: value})) == str(caught.value)


def test_a_minimum_is_compared_with_the_maximum_once_both_are_said() -> None:
    assert sampling_problem(Sampling(min_tokens=500)) is None, "the maximum may come from the program's defaults"
    text = "min_tokens is 5 but must be at most max_tokens (4)"
    assert sampling_problem(Sampling(min_tokens=5, max_tokens=4)) == text
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert str(caught.value) == text


def test_what_a_program_leaves_open_has_the_engines_default() -> None:
    assert Sampling().params() == SamplingParams()
    said = Sampling(temperature=0.5, logit_bias=((3, 1.5),), stop=("x",))
    assert said.said() == {"temperature": 0.5, "logit_bias": ((3, 1.5),), "stop": ("x",)}
    assert said.params() == SamplingParams(temperature=0.5, logit_bias={3: 1.5}, stop=("x",))


def test_programs_spell_every_parameter_for_type_checkers() -> None:
    runs = inspect.getsource(Runs)  # its overloads are known to type checkers alone
    assert [name for name in FIELDS if f" {name}: " not in runs] == []
    assert {*FIELDS} <= {*inspect.signature(gen).parameters}
