"""Operations on values in texts: the runtime applies them, with Python's results, and the program does not wait."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet import MockBackend, OpenAI, ProgramError, Remote, State, function, gen
from ramet.errors import InvalidProgram
from ramet.lang.graph import ir
from ramet.lang.graph.operations import MAX_BITS, MAX_CHARACTERS, METHODS, Operation, follow
from ramet.runtime.testing.scripted_model import ScriptedEngine

TEXT, NUMBER, DECIMAL, ITEMS = "  Red, green: and BLUE ", 17, 2.5, ["a", "b", "c"]
Values = tuple[Any, Any, Any, Any]

EXPRESSIONS: list[Callable[[Any, Any, Any, Any], Any]] = [
    lambda x, n, f, i: x.strip(),
    lambda x, n, f, i: x.lstrip(),
    lambda x, n, f, i: x.rstrip(),
    lambda x, n, f, i: x.strip().lower(),
    lambda x, n, f, i: x.upper(),
    lambda x, n, f, i: x.title(),
    lambda x, n, f, i: x.strip().capitalize(),
    lambda x, n, f, i: x.casefold(),
    lambda x, n, f, i: x.swapcase(),
    lambda x, n, f, i: x.strip(" RE"),
    lambda x, n, f, i: x.replace(",", ";"),
    lambda x, n, f, i: x.replace("e", "E", 1),
    lambda x, n, f, i: x.replace("", "-"),
    lambda x, n, f, i: x.strip().removeprefix("Red"),
    lambda x, n, f, i: x.strip().removesuffix("BLUE"),
    lambda x, n, f, i: x.strip().removeprefix("Blue"),
    lambda x, n, f, i: x.strip().ljust(30, "."),
    lambda x, n, f, i: x.strip().rjust(30),
    lambda x, n, f, i: x.strip().center(31, "*"),
    lambda x, n, f, i: x.strip().zfill(30),
    lambda x, n, f, i: x.split(),
    lambda x, n, f, i: x.split(",")[0],
    lambda x, n, f, i: x.split(",")[-1].strip(),
    lambda x, n, f, i: x.rsplit(" ", 1),
    lambda x, n, f, i: x.splitlines(),
    lambda x, n, f, i: x.partition(":"),
    lambda x, n, f, i: x.partition(":")[2].strip().title(),
    lambda x, n, f, i: x.rpartition(",")[0],
    lambda x, n, f, i: x.count("e"),
    lambda x, n, f, i: x.count("e") + 1,
    lambda x, n, f, i: x[3],
    lambda x, n, f, i: x[-2],
    lambda x, n, f, i: x[2:5],
    lambda x, n, f, i: x[::-1],
    lambda x, n, f, i: x.strip()[:3].upper(),
    lambda x, n, f, i: x.split()[1:3],
    lambda x, n, f, i: x.split(None, 1)[1],
    lambda x, n, f, i: x.strip() + "!",
    lambda x, n, f, i: ">" + x.lower(),
    lambda x, n, f, i: x[:3] + x[3:],
    lambda x, n, f, i: n + 1,
    lambda x, n, f, i: 1 + n,
    lambda x, n, f, i: n - 20,
    lambda x, n, f, i: 20 - n,
    lambda x, n, f, i: n * 3,
    lambda x, n, f, i: 3 * n,
    lambda x, n, f, i: n / 4,
    lambda x, n, f, i: 34 / n,
    lambda x, n, f, i: n // 4,
    lambda x, n, f, i: -35 // n,
    lambda x, n, f, i: n % 5,
    lambda x, n, f, i: 100 % n,
    lambda x, n, f, i: (n + 1) * 2 - 3,
    lambda x, n, f, i: n * 0.1,
    lambda x, n, f, i: f + 1,
    lambda x, n, f, i: 1 - f,
    lambda x, n, f, i: f * 2,
    lambda x, n, f, i: f // 1,
    lambda x, n, f, i: f % 1,
    lambda x, n, f, i: i[0],
    lambda x, n, f, i: i[-1].upper(),
    lambda x, n, f, i: i[1] + i[2],
]
FORMATS: list[Callable[[Any, Any], str]] = [
    lambda x, n: f"{x.strip()!r}",
    lambda x, n: f"{x.strip():_^40}",
    lambda x, n: f"{n * 2:05d}",
    lambda x, n: f"{n / 3:.3f}",
    lambda x, n: f"{x.split(',')!r}",
]


@function(max_tokens=64)
def program(s: State) -> None:
    s += "x:" + gen("x") + "\nn:" + gen("n", int) + "\nf:" + gen("f", float) + "\ni:" + gen("i", list[str]) + "\n"
    with s.var_scope("found"):
        for expression in EXPRESSIONS:
            s += f"<{expression(s['x'], s['n'], s['f'], s['i'])}>"
        for formatted in FORMATS:
            s += f"<{formatted(s['x'], s['n'])}>"


SCRIPT = {"x:": TEXT, "\nn:": str(NUMBER), "\nf:": str(DECIMAL), "\ni:": json.dumps(ITEMS)}
WANTED = "".join(f"<{expression(TEXT, NUMBER, DECIMAL, ITEMS)}>" for expression in EXPRESSIONS) + "".join(
    f"<{formatted(TEXT, NUMBER)}>" for formatted in FORMATS
)


def test_there_are_sixty_expressions_and_each_method_is_among_them() -> None:
    assert len(EXPRESSIONS) >= 60
    used = {str(name) for expression in EXPRESSIONS for name in expression.__code__.co_names}
    assert used >= METHODS.keys()


def test_they_are_applied_without_a_stage_and_give_what_python_gives() -> None:
    state = program.run(backend=MockBackend(SCRIPT))
    assert state["found"] == WANTED
    assert state.record.stages == ()
    again = ir.Graph.from_json(state.record.graph.to_json())
    assert again == state.record.graph


def test_a_server_and_an_endpoint_give_the_same(serve: Callable[..., AbstractContextManager[Any]]) -> None:
    with serve(ScriptedEngine(SCRIPT)) as served:
        for backend in (Remote(served.url), OpenAI(served.url + "/v1", extensions=True)):
            with backend:
                state = program.run(backend=backend)
                assert state["found"] == WANTED
                assert state.record.stages == ()


def test_read_in_python_they_give_the_same() -> None:
    @function(max_tokens=64)
    def reading(s: State) -> list[Any]:
        s += "x:" + gen("x") + "\nn:" + gen("n", int) + "\nf:" + gen("f", float) + "\ni:" + gen("i", list[str])
        return [expression(s["x"], s["n"], s["f"], s["i"]) for expression in EXPRESSIONS]

    state = reading.run(backend=MockBackend(SCRIPT))
    wanted = [expression(TEXT, NUMBER, DECIMAL, ITEMS) for expression in EXPRESSIONS]
    assert state.result == wanted
    assert [type(one) for one in state.result] == [type(one) for one in wanted]


@pytest.mark.parametrize("how", ["compare", "iterate", "measure"])
def test_a_result_is_read_where_python_needs_it(how: str) -> None:
    @function(max_tokens=64)
    def needing(s: State) -> object:
        s += "x:" + gen("x")
        found = s["x"].split(",")
        assert isinstance(found, list)
        if how == "compare":
            return found[0].strip() == "Red"
        return next(one.strip() for one in found) == "Red" if how == "iterate" else len(found) == 2

    state = needing.run(backend=MockBackend(SCRIPT))
    assert state.result is True
    assert len(state.record.stages) == 1


def test_what_python_does_with_other_arguments_is_read() -> None:
    @function(max_tokens=64)
    def other(s: State) -> list[Any]:
        s += "x:" + gen("x") + "\nn:" + gen("n", int)
        return [s["x"].split(maxsplit=1), s["x"].replace(s["x"][2], "!"), s["n"] + s["n"], s["n"] ** 2, s["n"] + True]

    wanted = [TEXT.split(maxsplit=1), TEXT.replace(TEXT[2], "!"), 2 * NUMBER, NUMBER**2, NUMBER + 1]
    assert other.run(backend=MockBackend(SCRIPT)).result == wanted


def test_an_operation_that_fails_says_so_and_fails_the_text_alone() -> None:
    @function(max_tokens=64)
    def wrong(s: State) -> None:
        s += "x:" + gen("x")
        s += f"{s['x'].split(',')[7]}" + gen("after")

    state = wrong.run(backend=MockBackend(SCRIPT), failures="keep")
    assert state["x"] == TEXT
    with pytest.raises(ProgramError, match=r"\[7\] of the value of node 1 failed: list index out of range"):
        _ = state["after"]

    @function(max_tokens=64)
    def read(s: State) -> None:
        s += "x:" + gen("x")
        str(s["x"].split(",")[7])

    with pytest.raises(IndexError):
        read.run(backend=MockBackend(SCRIPT), failures="keep")


def test_a_format_that_fails_fails_its_text_and_not_the_generation_before_it() -> None:
    @function(max_tokens=64)
    def wrong(s: State) -> None:
        s += "n:" + gen("n", int) + "x:" + gen("x")
        s += " and " + gen("m", int) + f"{s['x'].upper():d}"

    state = wrong.run(backend=MockBackend({**SCRIPT, "n:": "17", "and": "3"}), failures="keep")
    assert (state["x"], state["m"]) == (TEXT, 3)
    assert "text (node" in str(state.error())
    assert "can't be formatted by 'd'" in str(state.error())


def test_very_many_operations_and_texts_that_no_json_has_are_read() -> None:
    @function(max_tokens=64)
    def program(s: State) -> str:
        s += "x:" + gen("x")
        found = s["x"]
        for _ in range(100):
            found = found.strip().upper()
        s += f"{found}{s['x'].strip(chr(0xD800))}"
        return str(found)

    state = program.run(backend=MockBackend(SCRIPT))
    assert state.result == TEXT.strip().upper()
    assert state.text() == f"x:{TEXT}{TEXT.strip().upper()}{TEXT}"
    assert ir.Graph.from_json(state.record.graph.to_json()).nodes


def test_operations_on_arguments_keep_a_compiled_program_general() -> None:
    @function(max_tokens=8)
    def greet(s: State, name: str, n: int) -> str:
        s += f"Dear {name.strip().title()}, {n + 1} times: " + gen("x")
        return name.upper()

    compiled = greet.compile(name=" ann ", n=1)
    for name, n in ((" ann ", 1), ("bob", 41)):
        state = compiled.run(name=name, n=n, backend=MockBackend({"times": "ok"}))
        assert state.text() == f"Dear {name.strip().title()}, {n + 1} times: ok"
        assert state.result == name.upper()
    assert greet.explain("ann", 3, backend=MockBackend()).is_complete


def test_a_field_and_an_item_of_it() -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["name", "tags"],
    }

    @function(max_tokens=96)
    def fields(s: State) -> None:
        s += "p:" + gen("p", schema)
        s += f"|{s['p']['name'].upper()}|{s['p']['tags'][1].title()}|{s['p']['tags'][-1]}"

    state = fields.run(backend=MockBackend({"p:": '{"name": "ann", "tags": ["one", "two"]}'}))
    assert state.text().endswith("|ANN|Two|two")
    assert state.record.stages == ()


words = st.text(st.characters(codec="utf-8"), max_size=12)
SYMBOLS = st.sampled_from(["+", "-", "*", "/", "//", "%", "r+", "r-", "r*", "r/", "r//", "r%"])
numbers = st.integers(-(10**6), 10**6)
places = st.one_of(st.none(), st.integers(-5, 5))
calls = st.one_of(
    st.tuples(st.sampled_from(["strip", "lstrip", "rstrip"]), st.one_of(st.just(()), st.tuples(words))),
    st.tuples(st.sampled_from(["lower", "upper", "title", "capitalize", "casefold", "swapcase"]), st.just(())),
    st.tuples(st.sampled_from(["removeprefix", "removesuffix"]), st.tuples(words)),
    st.tuples(st.just("replace"), st.tuples(words, words, st.integers(-1, 3))),
    st.tuples(st.sampled_from(["ljust", "rjust", "center"]), st.tuples(st.integers(-3, 20), st.characters())),
    st.tuples(st.just("zfill"), st.tuples(st.integers(-3, 20))),
)


@given(words, st.lists(calls, max_size=4), st.tuples(places, places, places))
def test_a_chain_of_methods_is_str_s(text: str, chain: list[tuple[Any, tuple[Any, ...]]], part: Any) -> None:
    wanted, path = text, list[Operation]()
    for name, args in chain:
        wanted = getattr(wanted, name)(*args)
        path.append(Operation(name, args))
    path.append(Operation("slice", part))
    try:
        wanted = wanted[slice(*part)]
    except ValueError:  # a step of zero
        with pytest.raises(ValueError, match="zero"):
            follow(text, path)
        return
    assert follow(text, path) == wanted
    assert ir.render((ir.Ref(0, tuple(path), "!r"),), lambda _: text, lambda _: text) == repr(wanted)


@given(
    numbers,
    SYMBOLS,
    st.one_of(numbers, st.floats(-1e6, 1e6)),
)
def test_arithmetic_is_python_s(value: int, symbol: Any, other: float) -> None:
    a, b = (other, value) if symbol[0] == "r" else (value, other)
    by_symbol: dict[str, Callable[[], Any]] = {
        "+": lambda: a + b,
        "-": lambda: a - b,
        "*": lambda: a * b,
        "/": lambda: a / b,
        "//": lambda: a // b,
        "%": lambda: a % b,
    }
    operation = Operation(symbol, (other,))
    try:
        wanted = by_symbol[symbol.lstrip("r")]()
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            operation.apply(value)
        return
    found = operation.apply(value)
    assert (found, type(found)) == (wanted, type(wanted))
    assert operation.kind(int) is type(wanted)


def test_strangers_operations_stay_small() -> None:
    for operation, value in (
        (Operation("ljust", (10**12,)), "a"),
        (Operation("zfill", (10**12,)), "a"),
        (Operation("replace", ("", "x" * 1000)), "a" * (MAX_CHARACTERS // 100)),
        (Operation("*", (2,)), 1 << MAX_BITS),
    ):
        with pytest.raises(ValueError, match=r"characters|bits"):
            operation.apply(value)
    for path, problem in (
        ((Operation("upper"),) * 65, "65 steps"),
        ((Operation("slice", (1,)),), "1 arguments"),
        ((Operation("+"),), "0 arguments"),
    ):
        graph = ir.Graph(
            (
                ir.Generate(id=0),
                ir.Text(id=1, parent=0, parts=(ir.Ref(0, path),)),
            )
        )
        with pytest.raises(InvalidProgram, match=problem):
            ir.GraphIndex().add(graph)
    with pytest.raises(InvalidProgram, match="not a program graph"):
        ir.Graph.from_json(
            '{"version": 2, "nodes": [{"kind": "generate", "id": 0}, {"kind": "text", "id": 1, "parent": 0, '
            '"parts": [{"node": 0, "path": [{"name": "__class__"}]}]}]}'
        )
