"""Uses of a program's language that look right must do what they say, or refuse."""

from __future__ import annotations

import asyncio
import datetime
import enum
import json
import re
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from ramet import MockBackend, State, function, gen, select, system, use_backend
from ramet.errors import InvalidProgram, InvalidRequest, ProgramError, UndefinedVariable
from ramet.lang.graph.ir import Generate


class Person(BaseModel):
    name: str
    age: int


class Colour(enum.Enum):
    red = "red"


SCRIPT = {"yes?": "yes", "age?": "41", "who?": '{"name": "Ann", "age": 3}', "day?": "2026-11-30", "colour?": "red"}


@pytest.fixture(autouse=True)
def mock() -> Iterator[MockBackend]:
    backend = MockBackend(SCRIPT)
    with use_backend(backend):
        yield backend


def seen_in(body: Callable[[State, Any], object]) -> Any:
    """Return the result of `body`, called in a program with the value "yes"."""

    @function
    def program(s: State) -> object:
        s += "yes?" + gen("x")
        return body(s, s["x"])

    return program.run().result


@pytest.mark.parametrize(
    ("use", "wanted"),
    [
        (lambda x: x + "." == "yes.", True),
        (lambda x: "." + x + "!" == ".yes!", True),
        (lambda x: x + "." != "yes.", False),
        (lambda x: "yes" in ("ans" + x), True),
        (lambda x: "no" in (x + x), False),
        (lambda x: len(x + "."), 4),
        (lambda x: (x + " and no").split(), ["yes", "and", "no"]),
        (lambda x: (x + ".")[-1], "."),
        (lambda x: sorted(x + "."), [".", "e", "s", "y"]),
        (lambda x: bool("" + x), True),
        (lambda x: {x + ".": 1}["yes."], 1),
        (lambda x: str(x + "."), "yes."),
        (lambda x: f"{x + '.':>6}", "  yes."),
        (lambda x: (x + ".").upper() + "?", "YES.?"),
        (lambda x: f"{x}".strip() == "yes", True),
        (lambda x: f"{x}" == "yes", True),
        (lambda x: f"{x}" in {"yes", "no"}, True),
        (lambda x: "es" in f"{x}", True),
        (lambda x: f"{x}".replace("y", "Y"), "Yes"),
        (lambda x: f"{x}" + "." == "yes.", True),
        (lambda x: "." + f"{x}" == ".yes", True),
        (lambda x: f"{f'{x}':>5}", "  yes"),
        (lambda x: list(f"{x}"), ["y", "e", "s"]),
        (lambda x: f"{x}"[0], "y"),
        (lambda x: f"{x}" < "z", True),
        (lambda x: f"{x}" * 2, "yesyes"),
        (lambda x: f"{x:>5}".lstrip(), "yes"),
        (lambda x: isinstance(x, str), True),
        (lambda x: isinstance(x + ".", str), True),
        (lambda x: isinstance(x, int), False),
    ],
)
def test_text_with_a_value_in_it_reads_itself_for_any_use_in_python(use: Callable[[Any], Any], wanted: object) -> None:
    assert seen_in(lambda s, x: use(x)) == wanted


def test_appending_and_formatting_text_with_a_value_reads_nothing(mock: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        s += "yes?" + gen("x")
        s += s["x"] + "."
        s += "|" + s["x"] + f"{s['x']}" + ("(" + s["x"]) + ")"
        s += f" {s['x'] + '!'} " + "".join([f"{s['x']}", ","])
        s += gen("y")

    state = program.run()
    assert state.text().startswith("yes?yesyes.|yesyes(yes) yes! yes,")
    assert state.record.stages == ()


def test_a_description_can_be_added_to_a_value_without_reading_it() -> None:
    @function
    def program(s: State) -> None:
        s += "yes?" + gen("x")
        s += s["x"] + gen("y") + f"{s['x']}" + gen("z")

    assert program.run().record.stages == ()


def test_text_made_of_values_is_a_variable_and_a_result_like_any_other() -> None:
    @function
    def program(s: State) -> object:
        s += "yes?" + gen("x")
        s["twice"] = s["x"] + s["x"]
        return [s["twice"], {"a": s["x"] + "."}]

    state = program.run()
    assert state["twice"] == "yesyes"
    assert state.result == ["yesyes", {"a": "yes."}]
    with pytest.raises(UndefinedVariable, match="was not generated"):
        state.meta("twice")


def test_a_compiled_program_returns_text_made_of_values_and_arguments() -> None:
    @function
    def program(s: State, word: str) -> object:
        s += f"{word} yes?" + gen("x")
        return s["x"] + " " + word

    assert program.compile().run(word="sir").result == "yes sir"


def test_text_made_of_values_can_be_awaited() -> None:
    @function
    async def program(s: State) -> object:
        s += "yes?" + gen("x")
        return await (s["x"] + ".")

    assert asyncio.run(program.arun()).result == "yes."


@pytest.mark.parametrize(
    "change",
    [
        lambda text: json.dumps({"a": text}),
        lambda text: json.dumps({"a": text + "."}),
        repr,
        urllib.parse.quote,
        lambda text: str.upper(text + "."),
        lambda text: str.lower(text + "."),
        lambda text: str.title(text + "."),
        lambda text: str.swapcase(text + "."),
        lambda text: str.replace(text + ".", "x", "y"),
        lambda text: str.replace(text + ".", " ", "_"),
        lambda text: (text + ".")[:9],
        lambda text: (text + ".")[5:],
    ],
)
def test_a_text_that_was_changed_around_a_value_is_refused(change: Callable[[str], str]) -> None:
    @function
    def program(s: State) -> None:
        s += "yes?" + gen("x")
        s += change(str.__str__(f"{s['x']}"))

    with pytest.raises(InvalidProgram, match="read the value first"):
        program.run()


def test_text_that_looks_like_an_escaped_placeholder_is_text_where_no_value_is_used() -> None:
    @function
    def program(s: State) -> None:
        s += r"\udb80\udc00 yes?" + gen("x")

    assert program.run()["x"] == "yes"


@pytest.mark.parametrize(
    ("question", "made", "kind"),
    [
        ("yes?", gen("x"), str),
        ("age?", gen("x", int), int),
        ("who?", gen("x", Person), Person),
        ("day?", gen("x", datetime.date), datetime.date),
        ("colour?", gen("x", Colour), Colour),
        ("colour?", gen("x", Literal["red", "blue"]), str),
        ("colour?", select("x", ["red", "blue"]), str),
    ],
)
def test_a_value_has_the_same_type_before_and_after_it_is_read(question: str, made: Any, kind: type) -> None:
    @function
    def program(s: State) -> object:
        s += question + made
        before = isinstance(s["x"], kind), isinstance(s["x"], bytes)
        assert s.record.stages == ()
        return before

    state = program.run()
    assert state.result == (True, False)
    assert isinstance(state["x"], kind)


def test_the_fields_of_a_value_have_their_types_before_they_are_read() -> None:
    @function
    def program(s: State) -> object:
        s += "who?" + gen("x", Person)
        return isinstance(s["x"].name, str), isinstance(s["x"].age, int), isinstance(s["x"].age, str)

    state = program.run()
    assert state.result == (True, True, False)
    assert state.record.stages == ()


@pytest.mark.parametrize(
    ("append", "message"),
    [
        (lambda s: s.append(("a", gen("x"))), "a comma too many"),
        (lambda s: s + gen("x"), r"appends nothing; write s \+= "),
        (lambda s: gen("x") + s, "unsupported operand"),
        (lambda s: s.append(s.system("x")), "appended already"),
        (lambda s: s.append(5), "can't append 5"),
    ],
)
def test_what_appends_nothing_or_something_else_is_refused(append: Callable[[State], object], message: str) -> None:
    @function
    def program(s: State) -> None:
        append(s)

    with pytest.raises(TypeError, match=message):
        program.run(failures="keep")


def test_a_role_without_content_says_so() -> None:
    @function
    def program(s: State) -> None:
        s.system()
        s += "yes?" + gen("x")

    with pytest.warns(UserWarning, match="with s.system"):
        program.run()
    with pytest.raises(InvalidRequest, match=r"system\(\) has no content"):
        system()
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        @function
        def block(s: State) -> None:
            with s.system():
                s += "Be brief."
            s.user("yes?")

        block.run()


def test_a_json_schema_may_be_text_and_is_blamed_by_its_name() -> None:
    made: Any = gen("x", json_schema='{"type": "integer"}')
    assert json.loads(made.constraint.source) == {"type": "integer"}
    for wrong in ("{", "[1]", 5):
        with pytest.raises(InvalidRequest, match="json_schema") as raised:
            gen("x", json_schema=wrong)  # type: ignore[arg-type]
        assert raised.value.param == "json_schema"


def test_a_program_that_runs_inside_of_another_uses_its_backend() -> None:
    @function
    def inner(s: State) -> None:
        s += "yes?" + gen("x")

    @function
    def outer(s: State) -> tuple[str, str, str]:
        own = inner.run()["x"]
        with use_backend(MockBackend({"yes?": "block"})):
            return own, inner.run()["x"], inner.run(backend=MockBackend({"yes?": "given"}))["x"]

    assert outer.run(backend=MockBackend({"yes?": "outer"})).result == ("outer", "block", "given")
    assert outer.run().result[0] == "yes"


def test_a_row_whose_function_raised_says_so_wherever_it_is_read() -> None:
    @function
    def program(s: State, i: int) -> object:
        s += "yes?" + gen("x")
        if i == 1 and str(s["x"]):
            raise KeyError("boom")
        return s["x"]

    fine, wrong = program.run_batch([0, 1])
    assert fine.error() is None
    assert fine.result == "yes"
    error = wrong.error()
    assert isinstance(error, ProgramError)
    assert "KeyError" in str(error)
    assert isinstance(error.__cause__, KeyError)
    for read in (lambda: wrong.result, wrong.text, wrong.messages, lambda: wrong["x"], lambda: wrong.variables):
        with pytest.raises(KeyError, match="boom"):
            read()
    assert wrong.record.graph.nodes


@pytest.mark.parametrize(
    ("made", "temperature"),
    [
        (gen("x", choices=["a", "b"]), 0.0),
        (gen("x", Literal["a", "b"]), 0.0),
        (gen("x", bool), 0.0),
        (gen("x", choices=["a", "b"], temperature=0.5), 0.5),
        (gen("x", int), None),
        (gen("x"), None),
    ],
)
def test_one_of_several_texts_is_the_likeliest_unless_a_temperature_is_set(made: Any, temperature: object) -> None:
    @function
    def program(s: State) -> None:
        s += "yes?" + made

    def recorded(**sampling: object) -> object:
        (found,) = [node for node in program.trace(**sampling).graph.nodes if isinstance(node, Generate)]
        return found.sampling.temperature

    assert recorded() == temperature
    assert recorded(temperature=0.3) == (0.5 if temperature == 0.5 else 0.3)


def test_functions_in_c_say_that_a_value_is_to_be_read_first() -> None:
    @function
    def program(s: State) -> None:
        s += "a" + gen("x", max_tokens=3)
        calls: list[Callable[[Any], object]] = [partial(re.findall, ".+"), json.loads, open, "".startswith]
        calls.append(lambda value: "-".join([value]))
        for call in calls:
            with pytest.raises(TypeError, match=r"Value that is not read yet: use str\(\)"):
                call(s["x"])
        assert re.findall(".+", str(s["x"])) == [s["x"]]

    program.run(backend=MockBackend())
