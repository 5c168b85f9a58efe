"""A constrained value ends where the text that follows begins: in programs, on the engine and on the scripted one."""

from __future__ import annotations

from typing import Any

import pytest

from ramet import Engine, function, gen
from ramet.lang.backends.in_process import MockBackend
from ramet.lang.graph.following import MAX_BYTES, children_of, following, is_ended_by_following, known_start
from ramet.lang.graph.ir import (
    AnyNode,
    Argument,
    Capture,
    Constraint,
    Fork,
    Generate,
    Ref,
    Role,
    Sampling,
    Text,
)
from ramet.runtime.engine.core import EngineCore
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.steps.launched_step import LaunchedStep
from ramet.runtime.text.detokenizer import Detokenizer
from ramet.runtime.types import Batch

DIGITS = Constraint("regex", "[0-9]+")


def following_of(*nodes: AnyNode) -> tuple[Any, ...]:
    return following(nodes[0], children_of(nodes))


def test_what_follows_is_the_text_of_the_same_part_up_to_the_next_generation() -> None:
    first = Generate(id=0, name="a", constraint=DIGITS)
    text, more = Text(id=1, parent=0, parts=(" years", Ref(0))), Text(id=2, parent=1, parts=(".",))
    assert following_of(first, text, more) == (" years", Ref(0), ".")
    assert following_of(first, text, Generate(id=2, parent=1), Text(id=3, parent=2, parts=("x",))) == text.parts
    assert following_of(first, Capture(id=1, parent=0), Text(id=2, parent=0, parts=("y",))) == ("y",)
    assert following_of(first, Capture(id=1, parent=0), Text(id=2, parent=1, parts=("y",))) == ("y",)
    assert following_of(first) == ()
    assert following_of(first, Role(id=1, parent=0, role="user", is_open=False)) == ()
    forks = [Fork(id=i, parent=0, group=1, index=i - 1, width=2) for i in (1, 2)]
    assert following_of(first, *forks, Text(id=3, parent=1, parts=("z",))) == ()
    assert following_of(first, text, Text(id=2, parent=0, parts=("other",))) == (), "two texts follow"


def test_free_text_does_not_end_where_the_following_text_begins() -> None:
    assert is_ended_by_following(Generate(id=0, constraint=DIGITS))
    assert not is_ended_by_following(Generate(id=0))
    assert not is_ended_by_following(Generate(id=0, constraint=Constraint("tools", "[]")))
    assert not is_ended_by_following(Generate(id=0, constraint=DIGITS, sampling=Sampling(min_tokens=2)))
    assert not is_ended_by_following(Generate(id=0, constraint=DIGITS, sampling=Sampling(ignore_eos=True)))
    assert not is_ended_by_following(Argument(id=0, name="a"))


def test_the_known_start_stops_at_an_unknown_value_and_between_characters() -> None:
    template = (" ", Ref(3), " and ", Ref(4))
    assert known_start(template, lambda ref: ref.node == 3, lambda ref: "é") == " é and ".encode()
    assert known_start(template, lambda ref: False, lambda ref: "") == b" "
    assert (
        known_start(("a" + "é" * 50,), lambda ref: False, lambda ref: "")
        == ("a" + "é" * ((MAX_BYTES - 1) // 2)).encode()
    )


def test_a_text_that_is_no_unicode_fails_its_own_node_only() -> None:
    assert known_start(("ab\ud800c",), lambda ref: False, lambda ref: "") == b"ab"

    @function(temperature=0)
    def broken(s: Any) -> None:
        s += "Age: " + gen("n", int) + " y\ud800" + gen("m", max_tokens=2)

    with MockBackend({"Age: ": "34"}) as mock:
        state = broken.run(backend=mock, failures="keep")
        assert state.error() is not None


class WishfulEngine(Engine):
    """The engine with a model that wants to write one text, and takes the likeliest allowed token where it can't."""

    def wish(self, text: str) -> None:
        core, self.wanted = self._core, text.encode()
        launch = core.runner.launch

        def wishing(batch: Batch, **options: Any) -> LaunchedStep:
            launched = launch(batch, **options)
            masks, launched.tokens = options["masks"], launched.tokens.clone()
            for row, item in enumerate([item for item in batch.items if item.num_samples]):
                allowed = None if masks is None or row not in masks.rows else masks.words[row]
                launched.tokens[row] = self._choose(item.sequence.output_ids, allowed)
            return launched

        core.runner.launch = wishing  # type: ignore[method-assign]

    def _choose(self, written: list[int], allowed: Any) -> int:
        texts = self.tokenizer.token_bytes
        done = b"".join(texts[t] for t in written)
        rest = self.wanted[len(done) :] if self.wanted.startswith(done) else b""
        usable = [
            t
            for t, piece in enumerate(texts)
            if (allowed is None or allowed[t >> 5] >> (t & 31) & 1) and (piece or t in self.tokenizer.eos_ids)
        ]
        fitting = [t for t in usable if texts[t] and rest.startswith(texts[t])]
        ends = [t for t in usable if t in self.tokenizer.eos_ids]
        return max(fitting, key=lambda t: len(texts[t])) if fitting else min(ends or usable)


@pytest.fixture(scope="module")
def engine(tiny_model: LoadedModel) -> Any:
    with WishfulEngine(tiny_model, num_kv_tokens=4096, max_running_requests=4) as made:
        yield made


@function(temperature=0)
def age(s: Any, /, **options: Any) -> None:
    s += "Age: " + gen("n", int, **options) + " years" + gen("then", regex="[a-z ]{3}", max_tokens=4)


def test_a_value_ends_where_the_model_goes_on_with_what_follows(engine: WishfulEngine) -> None:
    engine.wish("34 years old")
    state = age.run(backend=engine)
    assert state["n"] == 34
    assert state.text().startswith("Age: 34 years")
    assert state.meta("n")["finish_reason"] == "stop"


def test_a_number_ends_with_the_first_token_that_is_none_of_it(engine: WishfulEngine) -> None:
    engine.wish("34 years old")
    usage = age.run(backend=engine).meta("n")["usage"]
    assert usage.completion_tokens == 3, "two digits, and the space: its constraint would let other text follow"


def test_a_stop_string_inside_of_what_follows_does_not_lengthen_the_value(engine: WishfulEngine) -> None:
    @function(temperature=0)
    def name(s: Any) -> None:
        s += "Name: " + gen("name", regex="[A-Za-z ]+", stop="e", max_tokens=30) + " there"

    engine.wish("Ann there")
    assert name.run(backend=engine)["name"] == "Ann"


def test_the_text_after_a_value_is_tokenised_with_the_rest_of_its_last_token(engine: WishfulEngine) -> None:
    engine.wish("34 years old")
    prompts: list[list[int]] = []
    add = EngineCore.add

    def noting(core: EngineCore, request: Any) -> Any:
        prompts.append(request.prompt_ids.tolist())
        return add(core, request)

    engine._core.add = noting.__get__(engine._core)  # type: ignore[method-assign]
    try:
        age.run(backend=engine)
    finally:
        del engine._core.add
    text = Detokenizer(engine.tokenizer.token_bytes)
    assert text.push(prompts[1]).endswith("Age: 34 years")


@pytest.mark.parametrize("wish", ["34 yesterday", "3", "-7 years", "34", "1 yearsyears"])
def test_no_more_than_the_value_is_given_whatever_the_model_writes_after_it(engine: WishfulEngine, wish: str) -> None:
    engine.wish(wish)
    stream = age.stream(backend=engine)
    given = "".join(event.text for event in stream if event.kind == "text" and event.name == "n" and event.text)
    assert given == str(stream.state["n"]) == wish.split()[0]


def test_a_pattern_ends_although_it_could_go_on(engine: WishfulEngine) -> None:
    @function(temperature=0)
    def name(s: Any) -> None:
        s += "Name: " + gen("name", regex="[A-Za-z ]+", max_tokens=30) + " is here"

    engine.wish("Ann Lee is here")
    assert name.run(backend=engine)["name"] == "Ann Lee"
    engine.wish("Ann is her")
    assert name.run(backend=engine)["name"] == "Ann is her", "not all that follows was read"


def test_a_scripted_answer_may_go_on_with_what_follows() -> None:
    with MockBackend({"Age: ": ["34 years old", "35"], "years": "old"}) as mock:
        assert age.run(backend=mock)["n"] == 34
        assert age.run(backend=mock)["n"] == 35


def test_a_value_that_is_read_before_the_text_is_written_ends_as_before(engine: WishfulEngine) -> None:
    @function(temperature=0)
    def staged(s: Any) -> None:
        s += "Age: " + gen("n", int, max_tokens=8)
        s += " years" if s["n"] else " none"

    engine.wish("34 years old")
    assert staged.run(backend=engine)["n"] == 34


@pytest.mark.parametrize("wish", [" 34 years old", "34 years old"])
def test_a_typed_value_may_begin_with_a_space_that_is_text_and_no_value(engine: WishfulEngine, wish: str) -> None:
    @function(temperature=0)
    def told(s: Any) -> None:
        s += "Age:" + gen("n", int, max_tokens=8) + " years"
        s += f"; again {s['n']}, {s['n'] + 1}."

    engine.wish(wish)
    state = told.run(backend=engine)
    assert state["n"] == 34
    assert state.text().startswith("Age:" + wish.removesuffix(" old"))
    assert state.text().endswith("; again 34, 35.")


@pytest.mark.parametrize("before", ["Age: ", "(", "n_", "$"])
def test_no_space_comes_before_a_value_where_prose_has_none(engine: WishfulEngine, before: str) -> None:
    @function(temperature=0)
    def told(s: Any) -> None:
        s += before + gen("n", int, max_tokens=8) + " years"

    engine.wish(" 34 years old")
    assert not told.run(backend=engine).text().startswith(before + " ")


def test_the_text_of_a_pattern_is_what_the_pattern_says(engine: WishfulEngine) -> None:
    @function(temperature=0)
    def told(s: Any) -> None:
        s += "Age:" + gen("n", regex="[0-9]+", max_tokens=8) + " years"

    engine.wish(" 34 years old")
    assert told.run(backend=engine)["n"].isdigit()
