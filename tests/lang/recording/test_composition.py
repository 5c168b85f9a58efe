"""Grammars made of `gen`, `select`, texts and functions: one generation, its named parts read back with their types."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pytest

from ramet import (
    MockBackend,
    State,
    between,
    function,
    gen,
    length,
    one_or_more,
    optional,
    repeat,
    select,
    sequence,
    starts_with,
    use_backend,
    zero_or_more,
)
from ramet.errors import InvalidProgram, InvalidRequest, ProgramError
from ramet.lang.graph import ir
from ramet.lang.recording.composition import Composition, lower


@dataclass
class Point:
    x: int
    label: str


@pytest.fixture(autouse=True)
def backend() -> Iterator[MockBackend]:
    with MockBackend({"Page:": "<h1>Sea</h1><p>Wet.</p><p>Deep.</p>", "Sum:": "1+(22+3)", "Card:": "no"}) as mock:
        yield mock
    mock.engine.shutdown()


def tag(name: str) -> Any:
    return f"<{name}>" + gen(name, stop="<") + f"</{name}>"


def test_a_page_is_one_generation_whose_parts_are_read_by_name() -> None:
    @function
    def page(s: State) -> None:
        s += "Page:" + gen("page", one_or_more(select([tag("h1"), tag("p")])), max_tokens=200)
        s += f" Titles: {s['h1']}, last: {s['p']}"

    state = page.run()
    assert state["page"] == "<h1>Sea</h1><p>Wet.</p><p>Deep.</p>"
    assert (state["h1"], state["p"]) == (["Sea"], ["Wet.", "Deep."])
    assert state.text().endswith(' Titles: ["Sea"], last: ["Wet.","Deep."]')
    compiled = page.compile()
    assert [type(node).__name__ for node in compiled.graph.nodes] == ["Text", "Generate", "Text"]
    assert ir.Graph.from_json(compiled.graph.to_json()) == compiled.graph
    assert compiled.run()["p"] == ["Wet.", "Deep."]


def test_a_function_that_names_itself_is_a_rule() -> None:
    def term() -> Any:
        return select([gen("n", int), sequence("(", total, ")")])

    def total() -> Any:
        return sequence(term, zero_or_more(sequence("+", term)))

    @function
    def program(s: State) -> None:
        s += "Sum:" + gen("sum", sequence(total))

    state = program.run()
    assert (state["sum"], state["n"]) == ("1+(22+3)", [1, 22, 3])


def test_named_parts_have_the_types_of_their_generations() -> None:
    form = sequence(
        "day=", gen("day", datetime.date), " n=", gen("n", int, where=between(0, 50)), " f=", gen("f", float),
        " kind=", gen("kind", Literal["a", "b"]), " tags=", gen("tags", list[str]),
        optional(sequence(" note=", gen("note"))),
        optional(sequence("#", gen("tag", regex="[a-z]+"))),
    )  # fmt: skip

    @function
    def program(s: State) -> None:
        s += "Form: " + gen("form", form, max_tokens=300)
        s += f"|{s['day']}|{s['n']}|{s['tags']}"

    with use_backend(MockBackend({"Form: ": 'day=2024-02-28 n=7 f=2.5 kind=b tags=["#é"] note=so#end'})):
        state = program.run()
    assert state["day"] == datetime.date(2024, 2, 28)
    assert (state["n"], state["f"], state["kind"], state["tags"]) == (7, 2.5, "b", ["#é"])
    assert state["note"] == "so#end"  # a part takes as much as it can
    assert state["tag"] is None
    assert state.text().endswith('|2024-02-28|7|["#é"]')


def test_a_field_of_a_named_part_is_put_into_text_without_waiting() -> None:
    @function
    def program(s: State) -> None:
        s += "Point: " + sequence("at=", gen("point", Point))
        s += f"|{s['point'].label}"

    state = program.run()
    assert isinstance(state["point"], Point)
    assert state.text().endswith(f"|{state['point'].label}")
    assert state.record.stages == ()


def test_a_composition_can_be_appended_as_it_is_and_stand_in_text() -> None:
    @function
    def program(s: State) -> None:
        s += "Card: " + repeat(select(["yes ", "no "]), 1, 3)
        s += f"[{sequence('so ', gen('so', regex='[a-z]{2}'))}]"

    with use_backend(MockBackend({"Card: ": "no yes ", "[": "so it"})):
        state = program.run()
    assert state.text() == "Card: no yes [so it]"
    assert state["so"] == "it"


def test_descriptions_and_values_stand_in_the_texts_of_a_grammar() -> None:
    @function
    def program(s: State, name: str) -> None:
        s += "Who? " + gen("who", choices=["Ann", "Bo"])
        s += " Line: " + gen("line", one_or_more(f"{name} likes {s['who']} {gen('n', int)} times. "))

    with use_backend(MockBackend({"Who?": "Bo", "Line:": "Cy likes Bo 3 times. Cy likes Bo 4 times. "})):
        state = program.run(name="Cy")
    assert state["n"] == [3, 4]


def test_a_name_that_can_be_there_once_is_a_value_and_else_a_list() -> None:
    def counts(grammar: Composition) -> dict[str, bool]:
        return {name: one.shape is None for name, one in lower(grammar)[1].items()}

    def nested() -> Any:
        return select([gen("leaf"), sequence("(", nested, ")")])

    def both() -> Any:
        return sequence("(", nested, ",", nested, ")")

    assert counts(sequence(gen("a"), select([gen("b"), gen("b")]))) == {"a": False, "b": False}
    assert counts(sequence(gen("a"), optional(gen("a")))) == {"a": True}
    assert counts(repeat(gen("a"), 1, 1)) == {"a": False}
    assert counts(repeat(gen("a"), 0, 2)) == {"a": True}
    assert counts(sequence(nested)) == {"leaf": False}
    assert counts(sequence(both)) == {"leaf": True}


def test_a_grammar_with_a_name_stands_inside_of_another_one() -> None:
    row = sequence(gen("key", regex="[a-z]+"), "=", gen("value", int))

    @function
    def program(s: State) -> None:
        s += "Rows: " + one_or_more(sequence(gen("row", row), ";"))

    with use_backend(MockBackend({"Rows:": "a=1;b=22;"})):
        state = program.run()
    assert (state["row"], state["key"], state["value"]) == (["a=1", "b=22"], ["a", "b"], [1, 22])


def test_checks_of_parts_are_masks() -> None:
    @function
    def program(s: State) -> None:
        s += "Go: " + sequence("<", gen("word", where=length(2, 3) & starts_with("a"), stop=">"), ">", gen("n", int))

    with use_backend(MockBackend({"Go:": "<xylophone>5"})):
        state = program.run()
    assert 2 <= len(state["word"]) <= 3
    assert state["word"].startswith("a")
    assert isinstance(state["n"], int)


def test_branches_batches_and_streams_have_their_own_captures() -> None:
    @function
    def program(s: State, start: str) -> None:
        s += f"{start} " + sequence("n=", gen("n", int))
        branches = s.fork(2)
        for i, branch in enumerate(branches):
            branch += f" {i}: " + one_or_more(gen("x", regex="[ab]"))
        s.join(*branches)

    with use_backend(MockBackend({"p ": "n=1", "q ": "n=2", "0:": "ab", "1:": "ba"})):
        states = program.run_batch([{"start": "p"}, {"start": "q"}])
    assert [state["n"] for state in states] == [1, 2]
    assert [state["x"] for state in states] == [[["a", "b"], ["b", "a"]]] * 2


def test_a_text_that_is_cut_off_has_no_values() -> None:
    @function
    def program(s: State) -> None:
        s += "Page:" + gen("page", sequence("<", gen("name", where=length(30, 40)), ">"), max_tokens=5)

    state = program.run(failures="keep")
    with pytest.raises(ProgramError, match="not one of its grammar"):
        state["name"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gen("x", sequence("a"), regex="a"), "constraints and checks of a grammar stand in its parts"),
        (lambda: gen("x", sequence("a"), where=length(1)), "constraints and checks of a grammar stand in its parts"),
        (lambda: gen("x", sequence(3)), "a grammar can't have 3 as a part"),  # type: ignore[arg-type]
        (lambda: gen("x", sequence(int)), "a grammar can't have <class 'int'> as a part"),  # type: ignore[arg-type]
        (lambda: gen("x", sequence(gen("y", max_tokens=3))), "y says max_tokens inside of a grammar"),
        (lambda: gen("x", sequence(gen("y", where=lambda y: True))), "a check in Python of y is no mask"),
        (lambda: gen("x", sequence(gen("y", int, where=length(2)))), "the check length at least 2 characters of y"),
        (lambda: gen("x", sequence(gen("y#2"))), "a variable is named 'y#2'"),
        (lambda: gen("x", sequence(gen("y", int), gen("y"))), "'y' stands in the grammar with two types"),
        (lambda: repeat("a", -1), "at_least is -1"),
        (lambda: repeat("a", 3, 2), "at least 3 and at most 2"),
        (lambda: repeat("a", True), "at_least is True"),
        (lambda: select("x", ["a", optional("b")]), "a selection among descriptions is a grammar"),
        (lambda: select(["a", 3]), "a choice is 3"),  # type: ignore[list-item]
        (lambda: gen("x", sequence(_without_end)), "nested without end"),
        (lambda: gen("x", sequence(_always_new)), "more than 1,000 functions"),
    ],
)
def test_a_part_that_a_grammar_can_not_have_is_refused_where_it_is_written(make: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make()


def _without_end() -> Any:
    return sequence("(", _without_end())


def _always_new() -> Any:
    return sequence("(", partial(_always_new))


def test_the_graph_refuses_captures_without_a_grammar() -> None:
    with pytest.raises(InvalidProgram, match="its constraint is no grammar"):
        ir.Graph.from_json(ir.Graph((ir.Generate(id=0, type="captures"),)).to_json())


def test_a_grammar_of_a_graph_that_does_not_compile_fails_its_own_node() -> None:
    @function
    def program(s: State) -> None:
        s += "x " + sequence(gen("a", list[int]), select([gen("b", list[str]), gen("c", dict[str, int])]))

    with pytest.raises(ProgramError, match="two JSON values can begin in the same place"):
        program.run()["a"]
