"""Programs compiled ahead of time."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ramet import MockBackend, State, function, gen
from ramet.errors import InvalidProgram
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer

PROGRAMS = sorted((Path(__file__).resolve().parents[3] / "examples" / "programs").glob("*.py"))
Load = Callable[[Path], Any]  # Any: the Example of conftest.py


@pytest.fixture
def backend() -> Iterator[MockBackend]:
    with MockBackend(tokenizer=ByteTokenizer()) as mock:
        yield mock
    mock.engine.shutdown()


def test_the_function_is_executed_once_for_all_runs_of_a_compiled_program(backend: MockBackend) -> None:
    calls = []

    @function(temperature=0)
    def program(s: State, city: str, n: int) -> str:
        calls.append(city)
        s += f"{n:02} days in {city}: " + gen("plan")
        s += f" So: {s['plan']}"
        return f"<{s['plan']}>"

    compiled = program.compile(n=3)
    states = compiled.run_batch([{"city": "Rome"}, {"city": "Oslo", "n": 4}])
    assert len(calls) == 1
    assert [state.text() for state in states] == [
        program.run(city="Rome", n=3).text(),
        program.run(city="Oslo", n=4).text(),
    ]
    assert states[0].result == f"<{states[0]['plan']}>"
    assert asyncio.run(compiled.arun(city="Bern")).text().startswith("03 days in Bern: ")


def test_arguments_that_a_compiled_program_returns_or_keeps_are_those_of_each_run(backend: MockBackend) -> None:
    @function(max_tokens=4)
    def program(s: State, city: str, tags: list[str], note: str = "none") -> Any:
        s += f"About {city}: " + gen("x")
        s.set_var("kept", [city, note])
        return city, {"tags": tags}

    compiled = program.compile(tags=["a"])
    first, second = compiled.run(city="Rome"), compiled.run(city="Oslo", tags=["b", "c"], note="new")
    assert first.result == ("Rome", {"tags": ["a"]})
    assert first["kept"] == ["Rome", "none"]
    assert second.result == program.run(city="Oslo", tags=["b", "c"]).result == ("Oslo", {"tags": ["b", "c"]})
    assert second["kept"] == ["Oslo", "new"]
    with pytest.raises(InvalidProgram, match="needs argument 'tags'"):
        program.compile().run(city="Rome")


def test_a_program_that_needs_a_value_in_python_is_not_compiled_and_the_line_is_named() -> None:
    @function
    def program(s: State, n: int) -> None:
        s += gen("x")
        if s["x"] == "a":
            s += "b"

    with pytest.raises(InvalidProgram, match=r"test_compiled.py:\d+ needs a value in Python \(==\)"):
        program.compile()

    @function
    def loops(s: State, n: int) -> None:
        for i in range(n):
            s += f"{i}"

    with pytest.raises(InvalidProgram, match="needs a value in Python"):
        loops.compile()
    assert loops.compile(n=3).graph.nodes[-1].id == 2


def test_wrong_arguments_are_named(backend: MockBackend) -> None:
    @function
    def program(s: State, city: str) -> None:
        s += f"{city}" + gen("x")

    compiled = program.compile()
    with pytest.raises(InvalidProgram, match="needs argument 'city'"):
        compiled.run()
    with pytest.raises(InvalidProgram, match=r"has no argument 'seed'; what .* is fixed: give it to compile\(seed="):
        compiled.run(city="Rome", seed=3)
    with pytest.raises(InvalidProgram, match="has no argument 'town'"):
        compiled.run(city="a", town="b")
    with pytest.raises(InvalidProgram, match="has no JSON form"):
        compiled.run(city=object())


@pytest.mark.parametrize(
    "value",
    ["é", 3, 2.5, 1e15, 2**70, float("inf"), True, None, ["l", 1.5], ("t",), {"k": None}, datetime.date(2024, 5, 1)],
    ids=repr,
)
def test_an_argument_is_the_same_text_as_in_a_run(value: Any, backend: MockBackend) -> None:
    @function(temperature=0)
    def program(s: State, what: Any) -> None:
        s += f"<{what}>" + gen("x")

    text = program.run(what=value).text()
    assert text.startswith(f"<{value}>")
    assert program.compile().run(what=value).text() == text
    assert program.compile(what=value).run().text() == text
    [row] = program.compile().run_batch([{"what": value}])
    assert row.text() == text
    plan = program.explain(what=value)
    assert plan.prompt.at_most == len(f"<{value}>".encode())


def test_an_argument_that_no_text_holds_may_be_given_all_the_same(backend: MockBackend) -> None:
    @function
    def program(s: State, city: str, comment: str) -> None:
        s += f"{city}" + gen("x")

    compiled = program.compile()
    assert compiled.arguments == ("city",)
    assert compiled.run(city="Rome", comment="none", failures="keep").error() is None


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_that_compiles_gives_what_a_run_gives(path: Path, load_example: Load, backend: MockBackend) -> None:
    example = load_example(path)
    program, arguments = example.program, example.arguments
    trace = program.trace(**arguments)
    if trace.stop is not None:
        pytest.skip(f"{trace.stop.line} needs a value ({trace.stop.why})")
    compiled = program.compile(**arguments, seed=5)
    state, expected = compiled.run(failures="keep"), program.run(**arguments, seed=5, failures="keep")
    assert state.text() == expected.text()
    assert repr(state.variables) == repr(expected.variables)
