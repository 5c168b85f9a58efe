"""`where=` of a generation: checks that travel with the graph, checks in Python, retries, and errors."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest

from ramet import (
    CheckFailed,
    MockBackend,
    State,
    between,
    contains,
    ends_with,
    function,
    gen,
    is_in,
    length,
    select,
    starts_with,
    use_backend,
)
from ramet.errors import InvalidProgram, InvalidRequest, ProgramCancelled, ProgramError
from ramet.lang.graph.ir import Check, Generate, Graph
from ramet.lang.running.output_types import Selected
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer

ANY = "start: /(?s:.)+/"  # checks of a text with a Lark grammar are not masked, so that what fails is retried


@pytest.fixture(autouse=True)
def backend() -> Iterator[MockBackend]:
    script = {"name?": ["x", "Annabel Lee", "Ann", "Ann"], "age?": ["12", "150", "41"]}
    with MockBackend(script, tokenizer=ByteTokenizer()) as mock:
        yield mock
    mock.engine.shutdown()


@pytest.mark.parametrize(
    ("check", "fine", "wrong", "problem"),
    [
        (length(2, 4), "abc", "a", "its length is 1, but must be between 2 and 4 characters"),
        (length(2, 4), [1, 2], [1], "its length is 1"),
        (length(at_most=2, unit="words"), "a b", "a b c", "its length is 3, but must be at most 2 words"),
        (length(at_least=2, unit="lines"), "a\nb", "a", "at least 2 lines"),
        (length(3, 3), "abc", "ab", "must be 3 characters"),
        (between(0, 1.5), 1, 2, "it is 2, but must be between 0 and 1.5"),
        (between(at_least=3), 3, True, "must be a number"),
        (is_in("a", 3, ["b"]), ["b"], "b", "it is 'b', but must be one of 'a' or 3 or"),
        (starts_with("A", "B"), "Bea", "Cea", "must start with 'A' or 'B'"),
        (ends_with("."), "So.", "So", "it is 'So', but must end with '.'"),
        (contains("and"), "a and b", "a", "must contain 'and'"),
        (length(2) & ends_with("."), "a.", "a", "its length is 1"),
        (length(3) | is_in("x"), "x", "xy", "must be at least 3 characters, or it is 'xy', but must be one of 'x'"),
        (~contains(" "), "ab", "a b", "it is 'a b', but must not have: contains ' '"),
        (is_in(1), 1.0, True, "it is True, but must be one of 1"),
    ],
)
def test_a_check_says_what_is_wrong(check: Check, fine: Any, wrong: Any, problem: str) -> None:
    assert check.problem(fine) is None
    found = check.problem(wrong)
    assert found is not None
    assert problem in found
    assert str(check)


@pytest.mark.parametrize(
    "make",
    [
        lambda: length(),
        lambda: length(4, 2),
        lambda: between(at_least="a"),  # type: ignore[arg-type]
        lambda: is_in(),
        lambda: is_in(object()),
        lambda: ends_with(""),
        lambda: contains(3),  # type: ignore[arg-type]
        lambda: gen("x", where=3),  # type: ignore[arg-type]
        lambda: gen("x", where=Check("not", of=(length(1), length(2)))),
        lambda: gen("x", where=Check("all")),
        lambda: gen("x", where=Check("length", at_least=1, of=(length(1),))),
        lambda: gen("x", where=length(1), retries=-1),
        lambda: gen("x", where=length(1), retries=True),
    ],
)
def test_a_check_that_makes_no_sense_is_refused_where_it_is_written(make: Any) -> None:
    with pytest.raises(InvalidRequest):
        make()


def test_a_check_is_a_part_of_the_graph_and_its_retries_happen_in_the_engine() -> None:
    @function
    def program(s: State) -> None:
        s += "name? " + gen("name", cfg=ANY, where=[length(2, 5), starts_with("A")], retries=2)
        s += f", dear {s['name']}."

    compiled = program.compile()
    node = next(n for n in compiled.graph.nodes if isinstance(n, Generate))
    assert node.checks == (length(2, 5), starts_with("A"))
    assert Graph.from_json(compiled.graph.to_json()) == compiled.graph
    state = compiled.run()
    assert state.text() == "name? Ann, dear Ann."
    assert state.record.stages == ()


def test_what_was_refused_is_in_the_record() -> None:
    @function
    def program(s: State) -> None:
        s += "name? " + gen("name", cfg=ANY, where=length(2, 5))

    state = program.run()
    assert state["name"] == "Ann"
    attempts = state.meta("name")["attempts"]
    assert [attempt["text"] for attempt in attempts] == ["x", "Annabel Lee"]
    assert "its length is 11" in attempts[1]["problem"]
    assert state.record.attempts == {1: tuple(attempts)}
    # Tokens of all three tries count.
    assert state.meta("name")["usage"].completion_tokens >= len("xAnnabel LeeAnn")
    assert state.usage.completion_tokens == state.meta("name")["usage"].completion_tokens


@pytest.mark.parametrize("kind", ["data", "python"])
def test_a_spent_budget_is_a_clear_error(kind: str) -> None:
    @function
    def program(s: State) -> None:
        s += "age? " + gen("age", int, cfg=ANY, where=between(200) if kind == "data" else _is_old, retries=2)
        s += f" So {s['age']}."
        assert s["age"] > 0

    with pytest.raises(CheckFailed, match="failed its `where` checks 3 times") as raised:
        program.run()
    error = raised.value
    assert isinstance(error, ProgramError)
    assert error.program == "program"
    assert error.source_line is not None
    assert error.source_line.startswith("tests/lang/graph/test_checks.py:")
    assert error.prompt_tail == "age? "
    assert [attempt["text"] for attempt in error.attempts] == ["12", "150", "41"]
    assert "raise retries (2)" in str(error)


def _is_old(age: int) -> bool:
    return age >= 200


def test_a_failed_check_cancels_its_siblings_and_the_engine_lives(backend: MockBackend) -> None:
    @function
    def program(s: State) -> None:
        a, b = s.fork(2)
        a += "name? " + gen("x", cfg=ANY, where=ends_with("!"), retries=0)
        b += "other" + gen("y", max_tokens=400, min_tokens=400)
        s.join(a, b)

    with use_backend(MockBackend({"name?": "Ann"}, latency_s=0.01)) as slow:
        first = function(lambda s: s.append("name? " + gen("x", cfg=ANY, where=ends_with("!"), retries=0)))
        assert (
            first.run(failures="keep").error() is not None
        )  # so that the sibling cannot end while the grammar is compiled
        state = program.run(failures="keep")
        with pytest.raises(CheckFailed, match="once"):
            state["x"]
        with pytest.raises(ProgramCancelled):
            state["y"]
        assert isinstance(slow, MockBackend)
        assert slow.engine.submit("still there").result().text


def test_a_python_check_stages_and_data_checks_beside_it_count_in_the_same_budget() -> None:
    seen: list[str] = []

    def is_short(name: str) -> bool:
        seen.append(name)
        return len(name) < 5

    @function
    def program(s: State) -> None:
        s += "name? " + gen("name", cfg=ANY, where=[starts_with("A"), is_short], retries=2)
        s += "!"

    state = program.run()
    assert state.text() == "name? Ann!"
    assert seen == ["Annabel Lee", "Ann"]
    assert [stage.why for stage in state.record.stages] == ["where"] * 2  # the engine refused the first try
    assert [attempt["text"] for attempt in state.meta("name")["attempts"]] == ["x", "Annabel Lee"]
    trace = program.trace()
    assert trace.stop is not None
    assert trace.stop.why == "where"


def test_a_python_check_may_refuse_by_raising() -> None:
    def is_even(text: str) -> bool:
        return int(text) % 2 == 0

    def is_boring(text: str) -> bool:
        raise KeyError("a bug of the check itself")

    @function
    def program(s: State, check: Any) -> None:
        s += "n: " + gen("n", where=check)

    with use_backend(MockBackend(["one", "4"])):
        state = program.run(check=is_even)
    assert state["n"] == "4"
    assert state.meta("n")["attempts"][0]["problem"].startswith("ValueError: invalid literal")
    with pytest.raises(KeyError, match="a bug"):
        program.run(check=is_boring)


def test_a_value_that_its_type_cannot_read_counts_as_refused() -> None:
    schema = {"type": "object"}

    @function
    def program(s: State, check: Any) -> None:
        s += "trip: " + gen("trip", schema, regex=r".*", where=check)

    for check in (length(1), lambda trip: len(trip) == 1):
        with use_backend(MockBackend(["{", '{"city": "Rome"}'])):
            state = program.run(check=check, failures="keep")
        assert state["trip"] == {"city": "Rome"}
        assert "not a value of type json" in state.meta("trip")["attempts"][0]["problem"]


def test_greedy_and_seeded_retries_repeat_and_differ_from_the_first_try() -> None:
    @function(temperature=0)
    def program(s: State, check: Any) -> None:
        s += "Say: " + gen("x", cfg="start: /[a-z]+/", where=check, retries=20)

    first = program.run(check=length(1), backend=MockBackend())["x"]
    runs = []
    for check in (_NotStart(first[:2]), _not_start(first[:2])):
        for stage in ("needed", "always"):
            state = program.run(check=check, backend=MockBackend(), stage=stage)
            runs.append((state["x"], [one["text"] for one in state.meta("x")["attempts"]]))
    assert len({repr(run) for run in runs}) == 1
    assert runs[0][1][0] == first
    assert not runs[0][0].startswith(first[:2])


def _not_start(text: str) -> Any:
    return lambda value: not value.startswith(text)


def _NotStart(text: str) -> Check:
    letters = [chr(code) for code in range(97, 123) if chr(code) != text[0]]
    return starts_with(*letters, *(text[0] + chr(code) for code in range(97, 123) if chr(code) != text[1]))


def test_the_token_budget_covers_every_try() -> None:
    @function(max_tokens=8)
    def program(s: State) -> None:
        s += "name? " + gen("x", cfg=ANY, where=ends_with("!"), retries=50)

    state = program.run(token_budget=20, failures="keep")
    error = state.error()
    assert error is not None
    assert "token budget of 20 is used up" in str(error)


def test_a_stream_shows_no_text_that_is_refused() -> None:
    @function
    def program(s: State) -> None:
        s += "name? " + gen("name", cfg=ANY, where=length(2, 5))

    assert "".join(program.stream(var="name")) == "Ann"


def test_branches_retry_on_their_own() -> None:
    @function
    def program(s: State, words: Sequence[str]) -> None:
        s += "Words. "
        s.map(words, lambda branch, word: branch.append(f"{word}: " + gen("x", int, cfg=ANY, where=between(5)))).join()

    with use_backend(MockBackend({"a:": ["1", "2", "7"], "b:": ["9"], "c:": ["3", "8"]})):
        state = program.run(words=["a", "b", "c"])
    assert state["x"] == [7, 9, 8]
    assert [len(meta["attempts"]) for meta in state.meta("x")["branches"]] == [2, 0, 1]


def test_the_graph_refuses_checks_that_make_no_sense() -> None:
    bad = Generate(id=0, checks=(Check("length"),))
    with pytest.raises(InvalidProgram, match="has a bad check: length has no limit"):
        Graph.from_json(Graph((bad,)).to_json())
    with pytest.raises(InvalidProgram, match="retries must be in"):
        Graph.from_json(Graph((Generate(id=0, retries=-1),)).to_json())


def test_checks_look_at_the_json_value_of_a_type() -> None:
    class Colour(enum.Enum):
        RED = "red"
        BLUE = "blue"

    @function
    def program(s: State) -> None:
        s += "colour? " + gen("colour", Colour, where=is_in(Colour.BLUE))
        s += " number? " + gen("number", Literal[1, 2], where=is_in("2"))

    with use_backend(MockBackend({"colour?": ["red", "blue"], "number?": ["1", "2"]})):
        state = program.run()
    assert (state["colour"], state["number"]) == (Colour.BLUE, 2)


def test_select_returns_its_probabilities_with_the_choice() -> None:
    @function
    def program(s: State) -> None:
        s += "I take " + select("drink", ["tea", "coffee"], return_probs=True)
        s += f" because {s['drink']} is warm"

    state = program.run()
    drink = state["drink"]
    assert isinstance(drink, Selected)
    assert drink in ("tea", "coffee")
    assert list(drink.probs) == ["tea", "coffee"]
    assert sum(drink.probs.values()) == pytest.approx(1)
    assert max(drink.probs, key=drink.probs.__getitem__) == drink
    assert state.record.stages == ()
