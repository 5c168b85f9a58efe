"""A request has the same answer whatever is drafted for it: tokens, text, log-probabilities, the reason of its end."""

from __future__ import annotations

import copy
import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from ramet.errors import ConfigError, InvalidRequest, ModelNotFound, RequestCancelled
from ramet.grammar import Vocabulary
from ramet.grammar.service.sources import compile_constraint
from ramet.runtime.engine import core, factory
from ramet.runtime.engine.engine import Engine
from ramet.runtime.handle import RequestHandle, RequestResult
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.models.weights import expected_tensors
from ramet.runtime.scheduling.scheduler import NO_DRAFTS
from ramet.runtime.speculation.draft_model import DRAFT_KV_TOKENS, DraftModel
from ramet.runtime.speculation.speculation import Speculation, StepTimes
from ramet.runtime.testing.dummy import write_dummy_adapter
from ramet.runtime.types import Batch, Grammar, SamplingParams, Sequence

SETTINGS: dict[str, Any] = {"num_kv_tokens": 4096, "context_length": 512, "max_running_requests": 6, "max_step_ms": 0}
SOURCES = (
    ("regex", "[a-c]{3,8}(xy|z){1,6}"),
    ("regex", "(yes|no)(, (yes|no)){0,9}"),
    ("regex", "(first|second|third) [0-9]{2} done[.]"),
    ("json_schema", {"type": "object", "properties": {"name": {"type": "string"}, "size": {"type": "integer"}}}),
)


class Guesses(Speculation):
    """Drafts that are right for a while, by the answers without drafts, and then perhaps wrong."""

    def __init__(self, answers: dict[tuple[bytes, int], list[int]], rng: random.Random, num_right: int) -> None:
        super().__init__()
        self.answers, self.rng, self.num_right = answers, rng, num_right
        self.num_drafted = 0

    def propose(self, sequences: Iterable[Sequence]) -> dict[Sequence, list[int]]:
        super().propose(sequences)
        return {sequence: self.guess(sequence) for sequence in sequences if self.rng.random() < 0.8}

    def pays(self, sequences: Iterable[Sequence]) -> bool:
        super().pays(sequences)
        return self.rng.random() < 0.6

    def guess(self, sequence: Sequence) -> list[int]:
        request = sequence.request
        answer = self.answers.get((request.prompt_ids.tobytes(), request.seed), [])
        right = answer[len(sequence.output_ids) :][: self.rng.randrange(self.num_right + 1)]
        wrong = [self.rng.randrange(250) for _ in range(self.rng.choice((0, 0, 1, 5)))]
        return [*right, *wrong] or [65]

    def note_step(self, batch: Batch, seconds: float) -> None:
        super().note_step(batch, seconds)
        self.num_drafted += sum(max(item.num_samples - 1, 0) for item in batch.items)


class FixedTimes(StepTimes):
    """Times of steps that no clock has measured."""

    def __init__(self, one: float = 1.0) -> None:
        super().__init__()
        self.one = one

    def knows(self, num_tokens: int, kv_len: float) -> bool:
        return True

    def seconds(self, num_tokens: int, kv_len: float) -> float:
        return self.one * (1 + 0.1 * (num_tokens - 1))


def draft_by(engine: Engine, speculation: Speculation) -> None:
    engine._core.speculation = speculation


def grammars_of(model: LoadedModel) -> list[Grammar]:
    tokenizer = model.tokenizer
    words = Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)
    return [compile_constraint(kind, source, words) for kind, source in SOURCES]


def random_sampling(rng: random.Random, seed: int) -> SamplingParams:
    """Sampling values of all kinds, each of them rare enough that many requests have few."""
    values: dict[str, Any] = {"temperature": rng.choice((0.0, 0.7, 1.3)), "max_tokens": rng.choice((1, 2, 9, 24, 40))}
    some: list[dict[str, Any]] = [
        {"top_p": 0.9},
        {"top_k": 20},
        {"min_p": 0.02},
        {"frequency_penalty": 0.6},
        {"presence_penalty": -0.4, "repetition_penalty": 1.2},
        {"logit_bias": {65: 4.0, 66: 3.0}},
        {"min_tokens": 5, "max_tokens": 30},
        {"stop": tuple(chr(rng.randrange(32, 127)) for _ in range(6))},
        {"stop": (bytes(rng.randrange(97, 123) for _ in range(2)).decode(), "e")},
        {"stop_regex": ("[0-9][a-z]", "[A-F]")},
        {"stop_token_ids": tuple(rng.randrange(250) for _ in range(8))},
        {"ignore_eos": True},
        {"logprobs": rng.choice((0, 3))},
        {"logprobs": 2},
    ]
    for part in rng.sample(some, rng.choice((0, 1, 2, 4))):
        values |= part
    return SamplingParams(**values, seed=seed)


def random_requests(rng: random.Random, grammars: list[Grammar], count: int) -> list[dict[str, Any]]:
    stem = "the prompts of these requests begin with the same words, "
    requests = []
    for index in range(count):
        prompt = f"{stem[: rng.randrange(1, len(stem))]}{rng.choice(('', 'and then', str(index)))} "
        grammar = rng.choice(grammars) if rng.random() < 0.4 else None
        requests.append({"prompt": prompt, "sampling": random_sampling(rng, index), "grammar": grammar})
    return requests


def answers_of(engine: Engine, requests: list[dict[str, Any]]) -> list[RequestResult]:
    handles = [engine.submit(**request) for request in requests]
    return [handle.result() for handle in handles]


def by_prompt(results: list[RequestResult], requests: list[dict[str, Any]], engine: Engine) -> dict[Any, list[int]]:
    """The whole answers, with the tokens that a result leaves out: a stop token, and what follows a stop string."""
    found = {}
    for result, request in zip(results, requests, strict=True):
        stop = [result.stop_match] if isinstance(result.stop_match, int) else []
        key = np.asarray(engine.tokenizer.encode(request["prompt"], parse_special=True), dtype=np.int32).tobytes()
        found[key, request["sampling"].seed] = [*result.token_ids, *stop, 70, 71]
    return found


def assert_same(found: RequestResult, expected: RequestResult, request: dict[str, Any]) -> None:
    assert found.token_ids == expected.token_ids, request
    for name in ("text", "finish_reason", "stop_match", "incomplete", "was_closed"):
        assert getattr(found, name) == getattr(expected, name), (name, request)
    assert found.usage.completion_tokens == expected.usage.completion_tokens, request
    if expected.logprobs is not None:
        assert found.logprobs is not None
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    if expected.top_logprobs is not None:
        assert found.top_logprobs is not None
        for one, other in zip(found.top_logprobs, expected.top_logprobs, strict=True):
            np.testing.assert_allclose([p for _, p in one], [p for _, p in other], atol=1e-4)


@pytest.fixture(scope="module")
def plain(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, **SETTINGS) as engine:
        yield engine


@pytest.fixture(scope="module")
def grammars(tiny_model: LoadedModel) -> list[Grammar]:
    return grammars_of(tiny_model)


# 1,000 requests each, cold and warm, and some of them alone.
LONG = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 42)]


@pytest.mark.parametrize("seed", [*range(4), *LONG])
@pytest.mark.parametrize("num_right", [0, 3, 12])
def test_random_requests_have_the_answers_that_they_have_without_drafts(
    tiny_model: LoadedModel,
    plain: Engine,
    grammars: list[Grammar],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    num_right: int,
) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, grammars, 24)
    plain.flush_cache()
    expected = answers_of(plain, requests)
    # With few pages, sequences are preempted.
    tight = {"num_kv_tokens": 640, "reservation_ratio": 0.0} if seed % 2 else {}
    with Engine(tiny_model, **{**SETTINGS, **tight}) as engine:
        guesses = Guesses(by_prompt(expected, requests, engine), rng, num_right)
        draft_by(engine, guesses)
        inner, schedule = engine._core, engine._core.scheduler.schedule
        inner.overlap = seed % 4 > 1

        def checked(drafts: Mapping[Sequence, Seq[int]] = NO_DRAFTS) -> Batch | None:
            is_free = not any(sequence.is_finished for sequence in inner._with_logprobs)
            assert is_free, "what has ended holds nothing that those who join may need"
            return schedule(drafts)

        monkeypatch.setattr(inner.scheduler, "schedule", checked)
        for _ in range(2):  # cold and warm
            for found, wanted, request in zip(answers_of(engine, requests), expected, requests, strict=True):
                assert_same(found, wanted, request)
        for request, wanted in list(zip(requests, expected, strict=True))[:4]:  # alone
            assert_same(engine.submit(**request).result(), wanted, request)
        engine.check_integrity()
        assert guesses.num_drafted > 40


def bits_of(words: NDArray[np.int32]) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def test_the_mask_of_each_drafted_position_is_that_of_brute_force(
    tiny_model: LoadedModel, plain: Engine, grammars: list[Grammar], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token of the vocabulary is tried after the text and the drafted tokens before the position."""
    rng, tokens = random.Random(3), range(tiny_model.tokenizer.vocab_size)
    requests: list[dict[str, Any]] = [
        {"prompt": f"{i} ", "sampling": SamplingParams(max_tokens=40, seed=i), "grammar": grammar}
        for i, grammar in enumerate(grammars)
    ]
    expected = answers_of(plain, requests)
    own, num_drafted = grammars_of(tiny_model), 0  # compiled again: nothing that the engine has found is used
    with Engine(tiny_model, **SETTINGS) as engine:
        draft_by(engine, Guesses(by_prompt(expected, requests, engine), rng, 12))
        states = engine._core.grammars
        make = states.masks

        def compared(batch: Batch) -> Any:
            nonlocal num_drafted
            masks, row = make(batch), 0
            for item in batch.items:
                sequence = item.sequence
                grammar = own[int(sequence.request.request_id.split("-")[-1])]
                text = [*sequence.output_ids, *sequence.draft_ids]
                for place in range(len(text) - item.num_samples + 1, len(text) + 1) if item.num_samples else ():
                    row += 1
                    if sequence.request.stop_ids & set(text[:place]):
                        continue  # nothing is taken behind the end
                    state: int | None = 0
                    for token in text[:place]:
                        assert state is not None
                        state = grammar.advance(state, token)
                    assert state is not None
                    right = {token for token in tokens if grammar.advance(state, token) is not None}
                    if grammar.is_accepting(state):
                        right |= sequence.request.stop_ids
                    ends = grammar.ends(state)  # tokens that mean an end
                    right |= set() if ends is None else bits_of(ends)
                    assert masks is not None
                    assert bits_of(masks.words[row - 1]) == right, text[:place]
                    num_drafted += place < len(text)
            return masks

        monkeypatch.setattr(states, "masks", compared)
        for index, (request, wanted) in enumerate(zip(requests, expected, strict=True)):
            assert_same(engine.submit(**request, request_id=f"r-{index}").result(), wanted, request)
    assert num_drafted > 20


def test_right_drafts_save_steps_and_wrong_ones_cost_none(tiny_model: LoadedModel, plain: Engine) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, seed=1)
    request: dict[str, Any] = {"prompt": "as many steps as tokens", "sampling": sampling}
    expected = answers_of(plain, [request])
    steps = {}
    for num_right in (0, 12):
        with Engine(tiny_model, **SETTINGS) as engine:
            draft_by(engine, Guesses(by_prompt(expected, [request], engine), random.Random(1), num_right))
            assert_same(answers_of(engine, [request])[0], expected[0], request)
            steps[num_right] = engine.stats()["num_steps"]
            assert engine.stats()["num_decoded_tokens"] == 39
    assert steps[0] == 40
    assert steps[12] < 20


def test_the_time_of_a_step_has_that_of_its_drafts_and_their_masks(
    tiny_model: LoadedModel, plain: Engine, grammars: list[Grammar], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So drafts whose masks take longer than they save do not pay."""
    requests: list[dict[str, Any]] = [
        {"prompt": f"{i} ", "sampling": SamplingParams(max_tokens=40, seed=i), "grammar": grammars[i % 4]}
        for i in range(8)
    ]
    expected = answers_of(plain, requests)
    clock, noted = SimpleNamespace(monotonic=time.monotonic, now=0.0), list[tuple[float, int]]()
    clock.thread_time = lambda: clock.now
    monkeypatch.setattr(core, "time", clock)
    with Engine(tiny_model, **SETTINGS) as engine:
        guesses = Guesses(by_prompt(expected, requests, engine), random.Random(2), 12)
        note, look_ahead = guesses.note_step, engine._core.grammars.look_ahead

        def slow(sequence: Sequence, draft: Seq[int]) -> int:
            clock.now += 7.0
            return look_ahead(sequence, draft)

        def note_time(batch: Batch, seconds: float) -> None:
            noted.append((seconds, max(item.num_samples for item in batch.items)))
            note(batch, seconds)

        monkeypatch.setattr(guesses, "note_step", note_time)
        monkeypatch.setattr(engine._core.grammars, "look_ahead", slow)
        draft_by(engine, guesses)
        for request, wanted in zip(requests, expected, strict=True):
            assert_same(engine.submit(**request).result(), wanted, request)
    assert any(num_samples > 1 for _, num_samples in noted)
    assert {seconds for seconds, num_samples in noted if num_samples > 1} == {7.0}


@pytest.mark.parametrize("overlap", [False, True])
def test_samples_of_one_prompt_and_a_cancelled_one_leave_the_others_alone(
    tiny_model: LoadedModel, plain: Engine, grammars: list[Grammar], overlap: bool
) -> None:
    rng = random.Random(5)
    sampling = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True)
    requests: list[dict[str, Any]] = [
        {"prompt": "four samples of ", "sampling": msgspec.structs.replace(sampling, seed=seed)} for seed in range(4)
    ]
    requests.append({"prompt": "constrained ", "sampling": sampling, "grammar": grammars[3]})
    requests[-1]["sampling"] = msgspec.structs.replace(sampling, seed=9)
    expected = answers_of(plain, requests)
    with Engine(tiny_model, **SETTINGS) as engine:
        draft_by(engine, Guesses(by_prompt(expected, requests, engine), rng, 6))
        engine._core.overlap = overlap
        handles: list[RequestHandle] = [engine.submit(**request) for request in requests]
        extra = engine.submit("to be cancelled", msgspec.structs.replace(sampling, seed=77))
        next(iter(extra))
        extra.cancel()
        for handle, wanted, request in zip(handles, expected, requests, strict=True):
            assert_same(handle.result(), wanted, request)
        with pytest.raises(RequestCancelled):
            extra.result()
        engine.check_integrity()


@pytest.mark.parametrize(("kind", "overlap"), [("adapters", False), ("adapters", True), ("fp8", True)])
def test_beside_adapters_and_with_a_cache_in_fp8_drafts_change_no_answer(
    tiny_model: LoadedModel, tmp_path: Path, kind: str, overlap: bool
) -> None:
    settings: dict[str, Any] = {**SETTINGS, "kv_cache_dtype": "fp8_e4m3"}
    names = [""]
    if kind == "adapters":
        shapes = expected_tensors(tiny_model.config).items()
        matrices = {n.removesuffix(".weight"): s for n, s in shapes if len(s) == 2 and ".layers." in n}
        for name in ("one", "two"):
            write_dummy_adapter(tmp_path / name, matrices, rank=3, alpha=9.0, seed=len(names))
            names.append(name)
        settings = {**SETTINGS, "lora": tuple(f"{name}={tmp_path / name}" for name in names[1:])}
    values: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}
    requests: list[dict[str, Any]] = [
        {"prompt": f"{i} a prompt ", "sampling": SamplingParams(temperature=i % 2, seed=i, **values), "adapter": name}
        for i, name in enumerate(names * 3)
    ]
    with Engine(tiny_model, **settings) as engine:
        expected = answers_of(engine, requests)
    with Engine(tiny_model, **settings) as engine:
        guesses = Guesses(by_prompt(expected, requests, engine), random.Random(3), 12)
        draft_by(engine, guesses)
        engine._core.overlap = overlap
        for _ in range(2):
            for found, wanted, request in zip(answers_of(engine, requests), expected, requests, strict=True):
                assert_same(found, wanted, request)
        engine.check_integrity()
    assert guesses.num_drafted > 20


def test_the_engines_own_drafts_change_no_answer(tiny_model: LoadedModel, plain: Engine) -> None:
    """Biased logits make the random model repeat itself."""
    rng = random.Random(8)
    requests = [
        {
            "prompt": f"{index} abababababab ab ",
            "sampling": SamplingParams(
                temperature=rng.choice((0.0, 0.5)),
                max_tokens=48,
                seed=index,
                ignore_eos=True,
                logit_bias={97: 6.0, 98: 6.0, 32: 4.0},
            ),
        }
        for index in range(12)
    ]
    expected = answers_of(plain, requests)
    with Engine(tiny_model, speculative="auto", **SETTINGS) as engine:
        draft_by(engine, Speculation(FixedTimes()))
        for _ in range(3):
            for found, wanted, request in zip(answers_of(engine, requests), expected, requests, strict=True):
                assert_same(found, wanted, request)
        stats = engine.stats()
        assert stats["num_drafted_tokens_text"] + stats["num_drafted_tokens_runs"] > 0
        engine.check_integrity()


def test_an_expected_answer_saves_steps_and_garbage_costs_none(tiny_model: LoadedModel, plain: Engine) -> None:
    sampling = SamplingParams(
        temperature=0.0, max_tokens=120, ignore_eos=True, logit_bias=dict.fromkeys(range(32, 97), 9.0)
    )
    request: dict[str, Any] = {"prompt": "a file to be edited: ", "sampling": sampling}
    (wanted,) = answers_of(plain, [request])
    rng, steps = random.Random(1), []
    garbage = "".join(chr(rng.randrange(32, 97)) for _ in range(300_000))
    edited = wanted.text[:70] + "(something else)" + wanted.text[75:]
    for expected in ("", garbage, wanted.text, edited):
        with Engine(tiny_model, speculative="auto", **SETTINGS) as engine:
            draft_by(engine, Speculation(FixedTimes()))
            for name in ("one", "two", "three"):  # other prompts, by which the engine learns what its drafts are worth
                engine.generate(name, sampling, draft=wanted.text)
            before = engine.stats()["num_steps"]
            assert_same(engine.generate(**request, draft=expected), wanted, request)
            steps.append(engine.stats()["num_steps"] - before)
    assert steps[1] <= 121
    assert steps[2] < 0.6 * steps[0]
    assert steps[3] < 0.8 * steps[0]


@pytest.fixture
def with_draft_model(monkeypatch: pytest.MonkeyPatch, tiny_model: LoadedModel) -> Callable[..., Engine]:
    """Makes engines whose draft model is any loaded one, with times that no clock has measured."""

    def make(draft: LoadedModel, **settings: Any) -> Engine:
        monkeypatch.setattr(factory, "load_model", lambda name, device: draft)
        engine = Engine(tiny_model, speculative="auto", speculative_draft="small", **{**SETTINGS, **settings})
        model = draft_model_of(engine)
        speculation = Speculation(FixedTimes(), model=model)
        speculation._model_times = FixedTimes(0.05)
        draft_by(engine, speculation)
        return engine

    return make


def draft_model_of(engine: Engine) -> DraftModel:
    speculation = engine._core.speculation
    assert speculation is not None
    model = speculation._model
    assert isinstance(model, DraftModel)
    return model


def test_a_model_that_drafts_for_itself_is_always_right(
    tiny_model: LoadedModel, plain: Engine, with_draft_model: Callable[..., Engine]
) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, seed=1)
    requests: list[dict[str, Any]] = [
        {"prompt": prompt, "sampling": sampling} for prompt in ("one", "a longer prompt " * 20, "three")
    ]
    expected = answers_of(plain, requests)
    with with_draft_model(tiny_model) as engine:
        for found, wanted, request in zip(answers_of(engine, requests), expected, requests, strict=True):
            assert_same(found, wanted, request)
            assert found.usage.accepted_tokens == found.usage.drafted_tokens > 30
        stats = engine.stats()
        assert stats["num_accepted_tokens_model"] == stats["num_drafted_tokens_model"] > 100
        assert stats["num_steps"] < 40
        draft_model_of(engine).check_integrity()


def test_a_draft_model_has_no_room_for_adapters_of_the_larger_one(
    tiny_model: LoadedModel, plain: Engine, with_draft_model: Callable[..., Engine]
) -> None:
    request: dict[str, Any] = {"prompt": "one", "sampling": SamplingParams(temperature=0.0, max_tokens=30, seed=1)}
    (wanted,) = answers_of(plain, [request])
    with with_draft_model(tiny_model, max_loras=2) as engine:
        assert draft_model_of(engine)._runner.adapters is None
        assert_same(answers_of(engine, [request])[0], wanted, request)
        assert engine.stats()["num_drafted_tokens_model"] > 0


@pytest.mark.parametrize("num_kv_tokens", [8192, 512])
def test_a_models_drafts_change_no_answer_and_its_pages_come_back(
    tiny_model: LoadedModel,
    plain: Engine,
    grammars: list[Grammar],
    with_draft_model: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    num_kv_tokens: int,
) -> None:
    rng = random.Random(num_kv_tokens)
    requests = random_requests(rng, grammars, 24)  # most of them are not greedy, as the drafts are
    expected = answers_of(plain, requests)
    monkeypatch.setitem(DRAFT_KV_TOKENS, "cpu", num_kv_tokens)  # too small for all
    with with_draft_model(tiny_model, num_kv_tokens=640, reservation_ratio=0.0) as engine:
        for _ in range(2):
            for found, wanted, request in zip(answers_of(engine, requests), expected, requests, strict=True):
                assert_same(found, wanted, request)
        cancelled = engine.submit("to be cancelled", SamplingParams(max_tokens=90, ignore_eos=True))
        next(iter(cancelled))
        cancelled.cancel()
        answers_of(engine, requests[:2])
        assert engine.stats()["num_drafted_tokens_model"] > 5
        draft_model_of(engine).check_integrity()
        assert not draft_model_of(engine).num_sequences
        engine.check_integrity()


def test_a_draft_model_that_cannot_serve_is_refused_at_start(
    tiny_model: LoadedModel, with_draft_model: Callable[..., Engine]
) -> None:
    with pytest.raises(ConfigError, match="speculative_draft is 'small' but must be None with speculative=off"):
        Engine(tiny_model, speculative_draft="small", **SETTINGS)
    with pytest.raises(ModelNotFound, match="no-such-model"):
        Engine(tiny_model, speculative="auto", speculative_draft="no-such-model", **SETTINGS)
    tokenizer = copy.copy(tiny_model.tokenizer)
    tokenizer.token_bytes = [*tokenizer.token_bytes[:65], b"?", *tokenizer.token_bytes[66:]]
    other = dataclasses.replace(tiny_model, name="small", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"small has another vocabulary: token 65 is b'\?' there and b'A' in"):
        with_draft_model(other)


@pytest.mark.parametrize("expected", [7, None, "\ud800", ["a"]])
def test_an_expected_answer_that_is_no_text_is_refused_by_name(plain: Engine, expected: Any) -> None:
    with pytest.raises(InvalidRequest, match="draft"):
        plain.submit("a", draft=expected)


@pytest.mark.model
def test_a_real_model_in_fp32_writes_the_same_with_drafts(smollm2_path: Path) -> None:
    passage = "The ferry leaves Lisbon at nine, passes the old tower, and reaches the island of Faro before noon. "
    prompt = f"{passage}Once more, word by word: {passage}And a third time: The ferry"
    some: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2, "stop": ("island",)},
        {"temperature": 0.7, "repetition_penalty": 1.05},
        {"temperature": 1.3, "top_p": 0.9, "logprobs": 1},
        {"temperature": 0.7, "frequency_penalty": 0.2, "min_tokens": 10},
    ]
    requests: list[dict[str, Any]] = [
        {"prompt": prompt, "sampling": SamplingParams(max_tokens=28, seed=index, **values)}
        for index, values in enumerate(some)
    ]
    settings: dict[str, Any] = {"dtype": "float32", "num_kv_tokens": 4096, "max_step_ms": 0}
    with Engine(str(smollm2_path), **settings) as engine:
        expected = answers_of(engine, requests)
    with Engine(str(smollm2_path), speculative="auto", **settings) as engine:
        draft_by(engine, Speculation(FixedTimes()))
        for found, wanted, request in zip(answers_of(engine, requests), expected, requests, strict=True):
            assert_same(found, wanted, request)
        assert engine.stats()["num_accepted_tokens_text"] > 20
