"""Checks that become masks: the narrowed constraint allows exactly the values that pass."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet import MockBackend, State, between, contains, ends_with, function, gen, is_in, length, starts_with
from ramet.errors import GrammarError, ProgramError
from ramet.grammar.ir import Table
from ramet.grammar.service.check import byte_vocabulary
from ramet.grammar.service.sources import compile_constraint, parse_source
from ramet.lang.graph import ir
from ramet.lang.graph.checks import Check
from ramet.lang.graph.narrowing import MAX_STATES

UNITS = ("characters", "words", "lines")
TEXTS = st.text(alphabet="ab .\n\r\u2028é😀\x1c\x85\ufeff", max_size=12)
PARTS = st.sampled_from(["a", "b", " a", ".", "\n", "é", "(", "\\", "a.", "-"])


def lengths() -> st.SearchStrategy[Check]:
    def made(low: int, more: int | None, unit: Any) -> Check:
        return length(low, None if more is None else low + more, unit=unit)

    return st.builds(made, st.integers(0, 4), st.none() | st.integers(0, 4), st.sampled_from(UNITS))


def combined(leaves: st.SearchStrategy[Check]) -> st.SearchStrategy[Check]:
    return st.recursive(
        leaves,
        lambda of: st.builds(lambda a, b: a & b, of, of) | st.builds(lambda a, b: a | b, of, of) | of.map(lambda a: ~a),
        max_leaves=4,
    )


def on_parts(make: Any) -> st.SearchStrategy[Check]:
    return st.lists(PARTS, min_size=1, max_size=3).map(lambda texts: make(*texts))


TEXT_CHECKS = combined(lengths() | on_parts(starts_with) | on_parts(ends_with) | on_parts(contains) | on_parts(is_in))
LIMITS = st.none() | st.integers(-30, 130) | st.sampled_from([-2.5, 0.1, 7.25])


@st.composite
def ranges(draw: st.DrawFn) -> Check:
    low, high = draw(LIMITS), draw(LIMITS)
    if low is None and high is None:
        return between(0)
    return between(low, high) if low is None or high is None or low <= high else between(high, low)


NUMBER_CHECKS = combined(ranges() | st.lists(st.integers(-9, 99), min_size=1, max_size=3).map(lambda v: is_in(*v)))


def automaton(node: ir.Generate) -> Table:
    constraint = node.narrowed().constraint
    assert constraint is not None
    found = parse_source(constraint.kind, constraint.source)
    assert isinstance(found, Table)
    return found


@settings(max_examples=80, deadline=None)
@given(check=TEXT_CHECKS, texts=st.lists(TEXTS, min_size=1, max_size=8))
def test_a_narrowed_text_is_one_that_passes_the_check(check: Check, texts: list[str]) -> None:
    node = ir.Generate(id=0, checks=(check,))
    assert node.narrowed().masked == (check,)
    found = automaton(node)
    for text in texts:
        assert found.accepts(text.encode()) == (check.problem(text) is None), text


@settings(max_examples=60, deadline=None)
@given(check=TEXT_CHECKS, text=TEXTS, stop=st.sampled_from(["\n", "a", "ab", ".."]), rest=TEXTS)
def test_a_stop_string_may_only_follow_a_text_that_passes(check: Check, text: str, stop: str, rest: str) -> None:
    found = automaton(ir.Generate(id=0, checks=(check,), sampling=ir.Sampling(stop=(stop,))))
    whole = text + stop + rest
    assert found.accepts(whole.encode()) == (check.problem(whole[: whole.find(stop)]) is None)
    if stop not in text:
        assert found.accepts(text.encode()) == (check.problem(text) is None)


@settings(max_examples=40, deadline=None)
@given(check=TEXT_CHECKS, text=st.text(alphabet="ab. ", max_size=6))
def test_checks_narrow_a_pattern_and_choices(check: Check, text: str) -> None:
    pattern = automaton(ir.Generate(id=0, checks=(check,), constraint=ir.Constraint("regex", "[ab]*[. ]?")))
    is_fine = check.problem(text) is None
    assert pattern.accepts(text.encode()) == (is_fine and re.fullmatch("[ab]*[. ]?", text) is not None)
    chosen = automaton(ir.Generate(id=0, checks=(check,), constraint=ir.Constraint("choice", '["a", "ab.", "b a"]')))
    assert chosen.accepts(text.encode()) == (is_fine and text in ("a", "ab.", "b a"))


@settings(max_examples=40, deadline=None)
@given(check=NUMBER_CHECKS, value=st.integers(-40, 140), zeros=st.integers(0, 2))
def test_a_narrowed_integer_is_one_that_passes_the_check(check: Check, value: int, zeros: int) -> None:
    regex = ir.Constraint("regex", "-?[0-9]{1,6}")
    found = automaton(ir.Generate(id=0, checks=(check,), type="int", constraint=regex))
    text = f"{'-' if value < 0 else ''}{'0' * zeros}{abs(value)}"
    assert found.accepts(text.encode()) == (check.problem(value) is None)


@settings(max_examples=30, deadline=None)
@given(check=NUMBER_CHECKS, value=st.decimals(-40, 140, places=2))
def test_a_narrowed_decimal_is_one_that_passes_the_check(check: Check, value: Any) -> None:
    regex = ir.Constraint("regex", r"-?[0-9]{1,6}(\.[0-9]{1,4})?")
    found = automaton(ir.Generate(id=0, checks=(check,), type="float", constraint=regex))
    assert found.accepts(str(value).encode()) == (check.problem(float(value)) is None)


def test_text_may_follow_a_number_as_its_type_allows() -> None:
    node = next(
        n
        for n in function(lambda s: s.append(gen("n", int, where=between(0, 120)))).trace().graph.nodes
        if isinstance(n, ir.Generate)
    )
    found = automaton(node)
    assert found.accepts(b"120")
    assert not found.accepts(b"121")
    assert not found.accepts(b"1200")


@settings(max_examples=80, deadline=None)
@given(check=TEXT_CHECKS.filter(lambda check: "lines" not in repr(check)), value=TEXTS)
def test_a_narrowed_json_string_is_one_that_passes_the_check(check: Check, value: str) -> None:
    node = ir.Generate(
        id=0, checks=(check,), type="json", constraint=ir.Constraint("json_schema", '{"type": "string"}')
    )
    narrowed = node.narrowed()
    assert narrowed.masked == (check,)
    assert narrowed.constraint is not None
    try:
        grammar = compile_constraint("json_schema", narrowed.constraint.source, byte_vocabulary())
    except GrammarError:
        assert check.problem(value) is not None
        return
    state = grammar.advance_bytes(0, json.dumps(value, ensure_ascii=False).encode())
    accepted = state is not None and grammar.is_accepting(state)
    assert accepted == (check.problem(value) is None)


@pytest.mark.parametrize(
    ("schema", "check", "values"),
    [
        ({"type": "array", "items": {"type": "integer"}}, length(1, 2), [[], [1], [1, 2], [1, 2, 3]]),
        ({"type": "object"}, ~length(at_least=2), [{}, {"a": 1}, {"a": 1, "b": 2}]),
        ({"anyOf": [{"type": "array"}, {"type": "string"}]}, length(2, 3), ["a", "ab", [1], [1, 2], "abcd"]),
        ({"type": ["integer", "null"]}, between(1, 3), [None, 0, 1, 3, 4]),
        ({}, is_in(1, [2], {"a": None}), [1, [2], {"a": None}, True, "1"]),
        ({"$ref": "#/$defs/N", "$defs": {"N": {"type": "array"}}}, length(1, 1), [[], [1]]),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/definitions/N",
          "definitions": {"N": {"type": "array"}}}, length(1, 1), [[], [1], 3]),
    ],
)  # fmt: skip
def test_checks_of_json_become_keywords(schema: Any, check: Check, values: list[Any]) -> None:
    node = ir.Generate(id=0, checks=(check,), type="json", constraint=ir.Constraint("json_schema", json.dumps(schema)))
    narrowed = node.narrowed()
    assert narrowed.masked == (check,)
    assert narrowed.constraint is not None
    whole = json.loads(narrowed.constraint.source)
    for value in values:
        validator = jsonschema.validators.validator_for(whole)
        is_fine = validator(schema).is_valid(value) and check.problem(value) is None
        assert validator(whole).is_valid(value) == is_fine, value


@pytest.mark.parametrize(
    ("node", "retried"),
    [
        (ir.Generate(id=0, constraint=ir.Constraint("cfg", 'start: "a"'), checks=(length(1),)), 1),
        (ir.Generate(id=0, constraint=ir.Constraint("json_schema", "{}"), type="json", checks=(length(1),)), 1),
        (ir.Generate(id=0, type="json", checks=(length(1),)), 1),
        (ir.Generate(id=0, type="int", checks=(length(1), between(3))), 1),
        (ir.Generate(id=0, checks=(length(1, MAX_STATES),)), 1),
        (ir.Generate(id=0, checks=(length(1, 200), length(1, 80, unit="words"))), 1),
        (ir.Generate(id=0, checks=(length(1, 200), contains("a"), length(1, 8, unit="words"))), 0),
    ],
)
def test_a_check_that_is_not_regular_or_takes_too_many_states_is_retried(node: ir.Generate, retried: int) -> None:
    narrowed = node.narrowed()
    assert len(narrowed.retried) == retried
    assert {*map(str, narrowed.masked + narrowed.retried)} == {*map(str, node.checks)}


@pytest.mark.parametrize(
    ("kind", "source"),
    [("json_schema", "{"), ("json_schema", "[1]"), ("json_schema", '{"allOf": 3}'), ("choice", "3"), ("choice", "x")],
)
def test_a_source_that_is_wrong_is_left_to_the_compiler(kind: Any, source: str) -> None:
    node = ir.Generate(id=0, type="json", constraint=ir.Constraint(kind, source), checks=(length(1),))
    assert node.narrowed().constraint == node.constraint
    assert node.narrowed().retried == node.checks


@pytest.mark.parametrize("check", [length(at_most=-1), length(0.4, 0.6), ~length(0)])  # type: ignore[arg-type]
@pytest.mark.parametrize("unit", UNITS)
def test_a_length_that_no_text_has_leaves_no_text(check: Check, unit: Any) -> None:
    one = check if check.of else length(check.at_least, check.at_most, unit=unit)  # type: ignore[arg-type]
    found = automaton(ir.Generate(id=0, checks=(one,)))
    assert not found.accepts(b"")
    assert not found.accepts(b"a")
    schema = ir.Constraint("json_schema", '{"type": "array"}')
    narrowed = ir.Generate(id=0, checks=(one,), type="json", constraint=schema).narrowed()
    assert narrowed.constraint is not None
    with pytest.raises(GrammarError):
        compile_constraint("json_schema", narrowed.constraint.source, byte_vocabulary())


def test_a_model_can_not_write_what_a_mask_refuses() -> None:
    @function
    def program(s: State) -> None:
        s += "name? " + gen("name", where=[length(3, 5), starts_with("A")], stop="\n", retries=0)
        s += " age? " + gen("age", int, where=between(200, 300), retries=0)
        s += " tags? " + gen("tags", list[str], where=length(2, 2) & ~length(3, 4), retries=0, max_tokens=60)

    with MockBackend({"name?": "Zoe is my name\n", "age?": "12", "tags?": '["a", "b", "c"]'}) as mock:
        state = program.run(backend=mock)
    assert 3 <= len(state["name"]) <= 5
    assert state["name"].startswith("A")
    assert 200 <= state["age"] <= 300
    assert len(state["tags"]) == 2


def test_a_text_that_passes_is_not_changed_by_its_mask() -> None:
    @function
    def program(s: State) -> None:
        s += "motto? " + gen("motto", where=[length(2, 8, unit="words"), ends_with(".")], stop="\n", retries=0)

    with MockBackend({"motto?": "By the sea we stand.\nAnd so on"}) as mock:
        assert program.run(backend=mock)["motto"] == "By the sea we stand."


def test_a_masked_text_ends_where_the_text_after_it_begins() -> None:
    @function
    def program(s: State) -> None:
        s += "city? " + gen("city", where=length(3, 20), retries=0) + " is a city."

    with MockBackend({"city?": "Bergen is a city. And Oslo"}) as mock:
        state = program.run(backend=mock)
    assert state["city"] == "Bergen"
    assert state.text() == "city? Bergen is a city."


def test_checks_that_no_text_passes_are_an_error_that_names_them() -> None:
    @function
    def program(s: State) -> None:
        s += "x? " + gen("x", where=[length(1, 2), starts_with("abc")])

    with MockBackend() as mock:
        state = program.run(backend=mock, failures="keep")
        with pytest.raises(ProgramError, match=r"no text passes the `where` checks \(length between 1 and 2 charact"):
            state["x"]


def test_a_narrowed_constraint_that_is_too_large_is_retried_instead() -> None:
    pattern = "(?:[ab]*a[ab]{8}|c)"

    @function
    def program(s: State) -> None:
        s += "x? " + gen("x", regex=pattern, where=length(1, 9000), retries=1)

    with MockBackend({"x?": "c"}) as mock:
        state = program.run(backend=mock)
        assert state["x"] == "c"
        shown = str(program.explain(backend=mock))
    assert "retried x: length between 1 and 9,000 characters" in shown


def test_explain_says_which_checks_are_masks() -> None:
    @function
    def program(s: State) -> None:
        s += "a: " + gen("a", where=[length(1, 20), ~contains("\n")])
        s += " b: " + gen("b", cfg='start: "b"+', where=length(1, 3))

    with MockBackend() as mock:
        found = program.explain(backend=mock)
    report = next(one for one in found.passes if one.name == "checks")
    assert report.numbers == {"masked": 2, "retried": 1}
    assert "masks a: length between 1 and 20 characters; a: not (contains '\\n')" in report.text
    assert "retried b: length between 1 and 3 characters" in report.text
