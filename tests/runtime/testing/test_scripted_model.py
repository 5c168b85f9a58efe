"""The scripted engine: scripts, the interface of the real engine, prefix accounting."""

from __future__ import annotations

import math
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ramet import MockBackend, State, function, gen, select, system, user
from ramet.errors import ConfigError, ContextOverflow, EngineStopped, InvalidRequest, ModelNotFound
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer, small_subword_tokenizer
from ramet.runtime.testing.scripted_model import ScriptedEngine
from ramet.runtime.types import FinishReason, RequestOutput, SamplingParams

GREEDY = SamplingParams(temperature=0)


def test_the_text_found_last_in_the_prompt_decides_the_answer() -> None:
    with ScriptedEngine({"colour": "red", "size": "big"}) as engine:
        assert engine.submit("the size? the colour? ").result().text == "red"
        assert engine.submit("the colour? the size? ").result().text == "big"
        assert engine.submit("something else").result().text.endswith(".")


def test_a_list_of_answers_serves_each_once_and_the_last_one_goes_on() -> None:
    with ScriptedEngine({"n?": ["1", "2"]}) as engine:
        assert [engine.submit("n?").result().text for _ in range(3)] == ["1", "2", "2"]
    with ScriptedEngine(["a", "b"]) as engine:
        assert [engine.submit("x").result().text for _ in range(2)] == ["a", "b"]
    with ScriptedEngine(lambda prompt: prompt.upper()) as engine:
        assert engine.submit("shout").result().text == "SHOUT"


def test_greedy_answers_repeat_and_sampled_ones_follow_their_seed() -> None:
    with ScriptedEngine() as engine:
        assert engine.submit("p", GREEDY).result().text == engine.submit("p", GREEDY).result().text
        seeds = [engine.submit("p", SamplingParams(seed=s)).result().text for s in (1, 1, 2, 3)]
        assert seeds[0] == seeds[1]
        assert len(set(seeds)) == 3
        assert len({engine.submit("q").result().text for _ in range(4)}) > 1


def test_limits_and_stops_end_a_text_as_the_real_engine_does() -> None:
    with ScriptedEngine({"say": "one two three"}, tokenizer=ByteTokenizer()) as engine:
        cut = engine.submit("say", SamplingParams(max_tokens=5)).result()
        assert (cut.text, cut.finish_reason) == ("one t", FinishReason.LENGTH)
        stopped = engine.submit("say", SamplingParams(stop=("wo", " th"))).result()
        assert (stopped.text, stopped.finish_reason) == ("one t", FinishReason.STOP)
        assert bytes(stopped.token_ids) == b"one two"
        token = engine.submit("say", SamplingParams(stop_token_ids=(ord("w"),))).result()
        assert (token.text, bytes(token.token_ids)) == ("one t", b"one t")
        long = engine.submit("say", SamplingParams(ignore_eos=True, max_tokens=20)).result()
        assert len(long.token_ids) == 20


def test_prefixes_are_counted_as_a_radix_cache_counts_them() -> None:
    with ScriptedEngine({"a" * 10: "bcd"}, tokenizer=ByteTokenizer()) as engine:
        first = engine.submit("a" * 10, GREEDY).result()
        second = engine.submit("a" * 10 + "bcd" + "x", GREEDY).result()
        again = engine.submit("a" * 10, GREEDY).result()
        salted = engine.submit("a" * 10, GREEDY, cache_salt="other").result()
    assert [r.usage.cached_tokens for r in (first, second, again, salted)] == [0, 13, 9, 0]


def test_log_probabilities_are_a_distribution_and_scores_follow_it() -> None:
    with ScriptedEngine(tokenizer=ByteTokenizer()) as engine:
        assert math.isclose(float(np.exp(engine.logprobs([1, 2])).sum()), 1.0)
        prompt = engine.tokenizer.encode("abcd")
        scored = engine.submit(prompt, GREEDY, score_from=2).result()
        assert scored.prompt_logprobs is not None
        expected = [engine.logprobs(prompt[:i])[prompt[i]] for i in (2, 3)]
        np.testing.assert_allclose(scored.prompt_logprobs, expected, rtol=1e-6)


def test_failures_deadlines_and_bad_input_end_one_request_alone() -> None:
    boom = RuntimeError("boom")
    with ScriptedEngine(failures={"bad": boom}, latency_s=0.02, context_length=50) as engine:
        with pytest.raises(RuntimeError, match="boom"):
            engine.submit("a bad one").result()
        late = engine.submit("slow", deadline_s=0.001).result()
        assert late.finish_reason is FinishReason.ABORT
        with pytest.raises(InvalidRequest, match="no tokens"):
            engine.submit("")
        with pytest.raises(ContextOverflow):
            engine.submit("x" * 60)
        assert engine.submit("good").result().finish_reason is FinishReason.STOP


def test_a_cancelled_request_ends_within_a_step() -> None:
    with ScriptedEngine({"x": "a b c d e f g h"}, latency_s=0.01) as engine:
        handle = engine.submit("x")
        handle.cancel()
        assert handle.result().finish_reason is FinishReason.ABORT


def test_an_output_callback_may_submit_the_next_request() -> None:
    texts: list[str] = []
    done = threading.Event()
    with ScriptedEngine(["one", "two"]) as engine:

        def on_output(output: RequestOutput) -> None:
            texts.append(output.text)
            if output.finish_reason is not None:
                if len(texts) == 1:
                    engine.submit("next", on_output=on_output)
                else:
                    done.set()

        engine.submit("first", on_output=on_output)
        assert done.wait(5)
    assert texts == ["one", "two"]


def test_shutting_down_ends_what_runs() -> None:
    engine = ScriptedEngine({"x": "a b c d e f"}, latency_s=0.05)
    handle = engine.submit("x")
    engine.shutdown()
    with pytest.raises(EngineStopped):
        handle.result()
    with pytest.raises(EngineStopped):
        engine.submit("y")


def test_a_script_that_raises_fails_its_request_alone() -> None:
    def script(prompt: str) -> str:
        return {"a": "b"}[prompt]

    with ScriptedEngine(script) as engine:
        with pytest.raises(KeyError):
            engine.submit("x").result()
        assert engine.submit("a").result().text == "b"


@dataclass
class Town:
    name: str
    size: int


@function
def towns(s: State) -> None:
    s += "A town: " + gen("first", Town) + "\nAnother: " + gen("second", Town, max_tokens=60)
    s += "\nWhy: " + gen("why", stop="\n")


def test_values_of_a_script_are_written_as_json() -> None:
    state = towns.run(backend=MockBackend([Town("Rome", 3), {"name": "Zürich", "size": 1}, "No reason."], strict=True))
    assert (state["first"], state["second"], state["why"]) == (Town("Rome", 3), Town("Zürich", 1), "No reason.")
    several = MockBackend({"Another: ": [[Town("a", 1)], "x"], "A town: ": Town("b", 2), "Why: ": 7})
    assert towns.run(backend=several)["why"] == "7"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"A town": Town("Rome", 3), "Another": Town("Oslo", 1)}, None),
        ({"A town: ": Town("Rome", 3), "Another: ": {"name": "Oslo"}}, 'is refused after \'{"name": "Oslo"\''),
        ({"A town: ": Town("Rome", 3), "Another: ": '{"name": "Oslo", "size": '}, "is no whole value"),
        ({"A town: ": Town("Rome", 3), "Another: ": {"name": "x" * 80, "size": 1}}, "max_tokens"),
        ({"A town: ": '{"name": "Rome", "size": 3} and more'}, 'is refused after \'{"name": "Rome", "size": 3}\''),
        ([Town("Rome", 3), Town("Oslo", 1)], "the script has 2 answers, and this is request 3"),
        ({"no such text": "x"}, "no answer to the prompt, which ends with 'A town: '"),
        (lambda prompt: None, "no answer to the prompt"),
    ],
)
def test_a_strict_script_must_fit_the_program(script: Any, message: str | None) -> None:
    state = towns.run(backend=MockBackend(script, strict=True), failures="keep")
    error = state.error()
    if message is None:
        assert error is None
    else:
        assert message in str(error)
    assert not isinstance(script, dict) or towns.run(backend=MockBackend(script), failures="keep").error() is None


@function
def choose(s: State) -> None:
    s += "Sea or hills? " + select("best", ["sea", "hills"])


def test_selections_need_no_answer_of_a_strict_script() -> None:
    assert choose.run(backend=MockBackend({"Sea or": "hills"}, strict=True))["best"] == "hills"
    assert choose.run(backend=MockBackend({"Sea or": "hills, of course"}, strict=True))["best"] == "hills"
    assert choose.run(backend=MockBackend({}, strict=True))["best"] in ("sea", "hills")


def test_an_answer_that_is_none_of_the_choices_is_an_error_of_a_strict_script() -> None:
    state = choose.run(backend=MockBackend({"Sea or": "woods"}, strict=True), failures="keep")
    assert "every choice of ['sea', 'hills'] has the probability 0; a strict script" in str(state.error())
    assert choose.run(backend=MockBackend({"Sea or": "woods"}))["best"] in ("sea", "hills")

    @function
    def after_an_answer(s: State) -> None:
        s += "Name? " + gen("name", stop="\n") + " Sea or hills? " + select("best", ["sea", "hills"])

    state = after_an_answer.run(backend=MockBackend({"Name?": "Ann"}, strict=True))  # Ann is no choice, and not meant
    assert state["best"] in ("sea", "hills")


@pytest.mark.parametrize(
    ("answer", "max_tokens", "message"),
    [
        ("A short one.", 5, None),
        ("This is a much longer answer", 3, "has 5 tokens, but 3 may be written: it is cut after 'This is a much'"),
        ("This is one. And more that nobody reads", 6, None),  # the stop string ends it
    ],
)
def test_a_text_that_max_tokens_cuts_is_an_error_of_a_strict_script(
    answer: str, max_tokens: int, message: str | None
) -> None:
    @function
    def program(s: State) -> None:
        s += "Say: " + gen("x", max_tokens=max_tokens, stop=".")

    error = program.run(backend=MockBackend({"Say": answer}, strict=True), failures="keep").error()
    assert error is None if message is None else message in str(error)
    assert program.run(backend=MockBackend({"Say": answer}))["x"]


def test_keys_are_looked_for_in_what_the_program_wrote_and_not_in_the_templates_marks() -> None:
    @function
    def program(s: State) -> None:
        s += system("Be brief.") + user("Who was it?")
        with s.assistant():
            s += gen("who")

    script = {"user": "wrong", "assistant": "wrong", "<|im_": "wrong", "brief": "wrong", "Who was": "Ann"}
    assert program.run(backend=MockBackend(script, strict=True))["who"] == "Ann"
    state = program.run(backend=MockBackend({"assistant": "x"}, strict=True), failures="keep")
    assert "Be brief.\\nWho was it?\\n'" in str(state.error())


def test_tokens_are_those_of_subwords() -> None:
    text = "The quick brown fox jumps over the lazy dog, and nobody counts its 12 steps."
    tokenizer = small_subword_tokenizer()
    tokens = tokenizer.encode(text)
    assert 16 <= len(tokens) <= 26  # SmolLM2's own tokenizer: 18
    assert b"".join(tokenizer.token_bytes[token] for token in tokens).decode() == tokenizer.decode(tokens) == text
    assert [tokenizer.token_bytes[byte] for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.decode(tokenizer.encode("Zürich, 東京 🎈\n\tx")) == "Zürich, 東京 🎈\n\tx"

    @function
    def program(s: State) -> None:
        s += "Say: " + gen("x", max_tokens=5)

    assert program.run(backend=MockBackend({"Say": text}))["x"] == "The quick brown fox j"
    assert program.run(backend=MockBackend({"Say": text}, tokenizer=ByteTokenizer()))["x"] == "The q"


def test_an_answer_of_larger_pieces_than_a_constraint_allows_is_written_in_smaller_ones() -> None:
    @function
    def program(s: State) -> None:
        s += "Colour: " + gen("x", choices=["yes", "yellow"])

    assert program.run(backend=MockBackend({"Colour": "yellowish"}))["x"] == "yellow"
    state = program.run(backend=MockBackend({"Colour": "yellowish"}, strict=True), failures="keep")
    assert "'yellowish' is refused after 'yellow'" in str(state.error())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("just text", "the script is 'just text', but must be a dict"),
        (7, "the script is 7"),
        (b"bytes", "the script is b'bytes'"),
        ({1: "x"}, "has the key 1, but a key is text"),
        ({"": "x"}, "has the key ''"),
        ({"a": []}, "answer to 'a' is an empty list"),
        ({"a": object()}, "answer to 'a' has <object"),
        (["fine", {1, object()}], "which cannot be written as text or JSON"),
        ({"a": "half \ud83d"}, "answer to 'a' has 'half"),
    ],
)
def test_what_is_no_script_is_refused_before_anything_runs(script: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MockBackend(script)


def test_the_tokenizer_of_a_model_may_be_named(smollm2_path: Path) -> None:
    mock = MockBackend(["Good day to you."], tokenizer="smollm2-135m")
    assert mock.engine.tokenizer.vocab_size == 49152
    text = (Path(__file__).parents[3] / "README.md").read_text()
    ratio = len(small_subword_tokenizer().encode(text)) / len(mock.engine.tokenizer.encode(text))
    assert 1.1 < ratio < 1.3, "the documents say: a fifth more tokens than those of models"
    assert choose.run(backend=mock)["best"] in ("sea", "hills")
    with pytest.raises(ModelNotFound, match="no-such-model"):
        MockBackend(tokenizer="no-such-model")
    with pytest.raises(ConfigError, match="the tokenizer is 7, but must be"):
        MockBackend(tokenizer=7)  # type: ignore[arg-type]
