"""What users get wrong: clear errors where it is written, and an engine that lives and has lost no page."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ramet import Engine, State, function, gen, one_or_more, select
from ramet.errors import ConfigError, InvalidProgram, InvalidRequest, RametError, UndefinedVariable
from ramet.lang.recording.generations import Gen
from ramet.runtime.models.load import LoadedModel


@pytest.fixture(scope="module")
def engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, num_kv_tokens=1 << 13, max_running_requests=16) as engine:
        yield engine


@pytest.fixture(autouse=True)
def the_engine_lives_and_no_page_is_lost(engine: Engine) -> Iterator[None]:
    yield
    state = plain_program.run(backend=engine)
    assert state.error() is None
    deadline = time.monotonic() + 5
    while engine.stats()["num_running"] and time.monotonic() < deadline:
        time.sleep(0.005)
    engine.check_integrity()
    stats = engine.stats()
    assert stats["num_running"] == stats["num_waiting"] == 0
    assert stats["num_free_pages"] + stats["num_evictable_pages"] == stats["num_pages"]


@function(temperature=0, max_tokens=3)
def plain_program(s: State) -> None:
    s += "One two " + gen("x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": "high"}, "plain_program: priority is 'high', but must be an integer"),
        ({"priority": True}, "priority is True"),
        ({"priority": 10**30}, "priority is 1000"),
        ({"timeout_s": "soon"}, "timeout_s is 'soon', but must be seconds"),
        ({"timeout_s": float("inf")}, "timeout_s is inf"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"timeout_s": 1e12}, "timeout_s is 1000"),
        ({"token_budget": 0}, "token_budget is 0, but must be an integer from 1"),
        ({"token_budget": 2.5}, "token_budget is 2.5"),
        ({"cache_salt": 3}, "cache_salt is 3"),
        ({"cache_salt": "\ud800"}, "cache_salt is .* UTF-8"),
        ({"seed": "x"}, "seed is 'x', but must be an integer"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"tools": [3]}, "tools is .*, but must be a list of tools"),
        ({"tools": "x"}, "tools is 'x'"),
        ({"tools": {"f": 3}}, "tools is "),
    ],
    ids=repr,
)
def test_options_of_a_run_are_checked_before_it_starts(options: Any, message: str, engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match=message):
        plain_program.run(backend=engine, **options)
    if "seed" not in options and "tools" not in options:
        with pytest.raises(InvalidRequest, match=message):
            plain_program.compile().run(backend=engine, **options)


def test_a_long_deadline_is_no_deadline(engine: Engine) -> None:
    assert plain_program.run(backend=engine, timeout_s=1e9, failures="keep").error() is None


@pytest.mark.parametrize(
    "options",
    [
        {"priority": "high"},
        {"priority": 10**400},
        {"cache_salt": "\ud800"},
        {"cache_salt": None},
        {"deadline_s": "soon"},
        {"deadline_s": float("nan")},
        {"program_id": 3},
        {"request_id": 3},
    ],
    ids=repr,
)
def test_a_request_is_refused_before_the_engines_thread_computes_with_it(options: Any, engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match=f"{next(iter(options))} is "):
        engine.submit("Hello", **options)


def test_a_request_that_breaks_the_loop_is_told_like_all_others(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    are_submitted = threading.Event()

    def broken(request: object) -> None:
        are_submitted.wait(10)
        raise ZeroDivisionError("a bug")

    with Engine(tiny_model, num_kv_tokens=1 << 10) as engine:
        monkeypatch.setattr(engine._core, "add", broken)
        handles = [engine.submit("Hello") for _ in range(3)]
        are_submitted.set()
        for handle in handles:
            with pytest.raises(RametError, match="engine"):
                handle.result(timeout_s=10)
        with pytest.raises(RametError, match="stopped"):
            engine.submit("Hello").result(timeout_s=10)


def _generator(s: State) -> Iterator[int]:
    yield 1


async def _async_generator(s: State) -> Any:
    yield 1


@pytest.mark.parametrize("body", [_generator, _async_generator])
def test_a_generator_is_no_program(body: Callable[..., Any]) -> None:
    with pytest.raises(InvalidProgram, match="has a `yield`"):
        function(body)


def test_an_async_program_in_a_running_loop_says_how_to_run_it(engine: Engine) -> None:
    @function
    async def program(s: State) -> None:
        s += "a"

    async def main() -> None:
        with pytest.raises(InvalidProgram, match=r"await program\.arun"):
            program.run(backend=engine)
        assert (await program.arun(backend=engine)).text() == "a"

    asyncio.run(main())


def test_a_message_is_closed_when_an_error_leaves_it_that_is_caught_outside(engine: Engine) -> None:
    @function(max_tokens=2)
    def program(s: State) -> None:
        for _ in range(2):
            try:
                with s.user():
                    s += "a question"
                    raise KeyError("mine")
            except KeyError:
                pass
        with s.assistant():
            s += gen("x")

    assert [one["role"] for one in program.run(backend=engine).messages()] == ["user", "user", "assistant"]


def test_a_text_that_was_cut_within_a_value_is_refused(engine: Engine) -> None:
    @function(max_tokens=3)
    def program(s: State) -> None:
        s += "a" + gen("x")
        s += f"It was {s['x']}, I think."[:12]

    with pytest.raises(InvalidProgram, match=r"cut within a generated value .* str\("):
        program.run(backend=engine)


def test_values_count_as_numbers_do(engine: Engine) -> None:
    @function(max_tokens=2)
    def program(s: State) -> Any:
        s += "a" + gen("n", int, regex="7")
        n = s["n"]
        return [n**2, 2**n, 100 // n, divmod(n, 2), pow(n, 2)]

    assert program.run(backend=engine).result == [49, 128, 14, (3, 1), 49]


def test_a_stream_of_a_variable_that_nothing_writes_says_so(engine: Engine) -> None:
    with pytest.raises(UndefinedVariable, match="no variable 'y' was written; known: x"):
        list(plain_program.stream(backend=engine, var="y"))

    async def follow() -> list[Any]:
        return [piece async for piece in plain_program.astream(backend=engine, var="y")]

    with pytest.raises(UndefinedVariable, match="no variable 'y'"):
        asyncio.run(follow())


@pytest.mark.parametrize("limits", [{"num_threads": -1}, {"num_threads": 0}, {"max_live": 0}, {"max_live": 1.5}])
def test_a_batch_needs_a_thread_and_a_live_row(limits: Any, engine: Engine) -> None:
    with pytest.raises(ConfigError, match="but must be an integer from 1"):
        plain_program.run_batch([(), ()], backend=engine, **limits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: select("x", ["a", "b"], temperature="hot"), "temperature is 'hot'"),  # type: ignore[call-overload]
        (lambda: select("x", ["a", "b"], temperature=float("nan")), "temperature is nan"),
        (lambda: select("x", ["a", "b"], temperature=-1), "temperature is -1"),
        (lambda: select("x", ["a", "b"], seed=1.5), "seed is 1.5"),  # type: ignore[call-overload]
        (lambda: function(temprature=0)(lambda s: None), "'temprature' is no sampling value; known: max_tokens"),
    ],
)
def test_wrong_sampling_values_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make()


def test_choices_may_come_from_a_generator_and_a_name_must_be_text(engine: Engine) -> None:
    assert select("x", (letter for letter in "ab")) == select("x", ["a", "b"])  # type: ignore[call-overload]

    @function
    def program(s: State) -> None:
        s += "a" + gen(3)  # type: ignore[arg-type]

    with pytest.raises(InvalidProgram, match="a variable is named 3"):
        program.run(backend=engine)


def test_half_a_surrogate_pair_is_said_to_be_no_text(engine: Engine) -> None:
    @function
    def program(s: State, text: str) -> None:
        s += text + gen("x", max_tokens=2)

    state = program.run(text="half \ud83d", backend=engine, failures="keep")
    with pytest.raises(RametError, match="not valid Unicode"):
        assert state["x"]


def test_a_limit_of_strings_is_one_of_json() -> None:
    made = gen("x", list[str], string_tokens=8)
    assert isinstance(made, Gen)
    assert made.sampling.string_tokens == 8
    for kind in (str, int, bool):
        with pytest.raises(InvalidRequest, match="string_tokens is of strings in JSON, but the value is none"):
            gen("x", kind, string_tokens=8)
    wrong: Any = "8"
    with pytest.raises(InvalidRequest, match="string_tokens"):
        gen("x", list[str], string_tokens=wrong)


def test_a_tokenization_is_one_of_a_constraint() -> None:
    wrong: Any = "odd"
    with pytest.raises(InvalidRequest, match="tokenization is 'odd', but must be canonical or any"):
        gen("x", int, tokenization=wrong)
    with pytest.raises(InvalidRequest, match="tokenization is of a constraint, but the text is free"):
        gen("x", tokenization="any")
    with pytest.raises(InvalidRequest, match="x says tokenization inside of a grammar"):
        gen("y", one_or_more(gen("x", int, tokenization="any")))
    for written in (gen("x", int, tokenization="any"), gen("y", one_or_more(gen("x", int)), tokenization="any")):
        constraint = written.constraint if isinstance(written, Gen) else written.gen.constraint
        assert constraint is not None
        assert constraint.tokenization == "any"


def test_a_form_is_one_of_json() -> None:
    with pytest.raises(InvalidRequest, match=r'whitespace is \'wide\', but must be one of "model", "compact"'):
        gen("x", list[int], whitespace="wide")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="order is 1"):
        gen("x", list[int], order=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="order is of JSON, but the text is free"):
        gen("x", order="any")
    with pytest.raises(InvalidRequest, match="additional_properties is of JSON, but a regex has none"):
        gen("x", regex="a", additional_properties="schema")
    with pytest.raises(InvalidRequest, match="x says whitespace inside of a grammar"):
        gen("all", one_or_more(gen("x", list[int], whitespace="any")))
