"""Constrained sequences in the engine: the same tokens by masks of the host and of the device, closed in time."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Hashable
from itertools import product
from typing import Any, cast

import msgspec
import pytest
import torch

from ramet.errors import RequestCancelled
from ramet.grammar import Bordered, CompiledGrammar, Vocabulary, deadline
from ramet.grammar.service.sources import compile_constraint
from ramet.kernels.grammar.arena import GrammarArena
from ramet.kernels.grammar.mask import AutomatonTables, TokenTable
from ramet.runtime.constraints import states
from ramet.runtime.constraints.states import GrammarStates, _OnDevice
from ramet.runtime.engine.core import Update
from ramet.runtime.engine.engine import Engine
from ramet.runtime.engine.factory import make_device_grammars
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.steps.launched_step import LaunchedStep
from ramet.runtime.steps.model_runner import ModelRunner
from ramet.runtime.types import Batch, FinishReason, Grammar, SamplingParams

PATTERNS = ["[a-c]{3,8}(xy|z){1,6}", "(yes|no)", '"[^"]{0,20}"', "[0-9]{1,3}(,[0-9]{1,3}){2,5}"]


def vocabulary(model: LoadedModel) -> Vocabulary:
    tokenizer = model.tokenizer
    return Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)


@pytest.fixture(scope="module")
def grammars(tiny_model: LoadedModel) -> list[Grammar]:
    compiled = [compile_constraint("regex", pattern, vocabulary(tiny_model)) for pattern in PATTERNS]
    assert all(grammar.close() for grammar in compiled)
    return list(compiled)


def make_engine(model: LoadedModel, *, on_device: bool, max_grammars: int = 256) -> Engine:
    engine = Engine(model, num_kv_tokens=4096, max_running_requests=8)
    if on_device:
        tokenizer = model.tokenizer
        tokens = TokenTable.create(
            tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size, "cpu"
        )
        core, given = engine._core, engine._core.runner
        limits = {"max_states": 4096, "max_transitions": 1 << 18, "max_mask_rows": 512, "max_grammars": max_grammars}
        arena = GrammarArena(tokens, 8, **limits)
        parts = model.decoder, given.kv_cache, given.slots
        runner = core.runner = ModelRunner(*parts, device=given.device, max_kv_len=given.max_kv_len, arena=arena)
        device_grammars = make_device_grammars(model, arena)
        core.grammars = GrammarStates(tokenizer.vocab_size, runner.computes_run, device_grammars, tokenizer.token_bytes)
    return engine


def run_all(engine: Engine, grammars: list[Grammar], temperature: float, max_tokens: int = 40) -> list[str]:
    handles = []
    for i in range(12):
        grammar = None if i % 5 == 4 else grammars[i % len(grammars)]
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=i)
        handles.append(engine.submit(f"prompt {i % 3}", sampling, grammar=grammar))
    return [handle.result(timeout_s=60).text for handle in handles]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_host_and_device_automata_give_the_same_tokens(
    tiny_model: LoadedModel, grammars: list[Grammar], temperature: float
) -> None:
    assert all(grammar.is_closed for grammar in grammars)
    with make_engine(tiny_model, on_device=False) as host, make_engine(tiny_model, on_device=True) as device:
        expected = run_all(host, grammars, temperature)
        assert run_all(device, grammars, temperature) == expected
        device.check_integrity()


# What follows each of PATTERNS, and the token of the prompt's end that is given back, or what may lead the value
BORDERS = [{"after": b"zz"}, {"after": b" or", "lead": b" "}, {"after": b'"', "before": b"a"}, {"after": b", 1"}]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_tokens", [7, 40])
def test_a_value_ends_where_what_follows_begins_on_the_device_as_on_the_host(
    tiny_model: LoadedModel, grammars: list[Grammar], temperature: float, max_tokens: int
) -> None:
    bordered: list[Grammar] = []
    for grammar, border in zip(grammars, BORDERS, strict=True):
        assert isinstance(grammar, CompiledGrammar)
        bordered.append(Bordered(grammar, grammar.vocabulary, **border))
    with make_engine(tiny_model, on_device=False) as host, make_engine(tiny_model, on_device=True) as device:
        device._core.overlap = True
        given = device._core.grammars.device
        assert given is not None
        expected = run_all(host, bordered, temperature, max_tokens)
        assert run_all(device, bordered, temperature, max_tokens) == expected
        assert all(given.arena.is_resident((grammar, True)) for grammar in bordered)
        device.check_integrity()
    for i, text in enumerate(expected):
        if i % 5 != 4 and max_tokens == 40:
            value = text.removeprefix(" ") if "lead" in BORDERS[i % 4] else text
            assert re.fullmatch(PATTERNS[i % 4], value), (i, text)


def test_overlapped_steps_advance_automata_as_synchronous_ones_do(
    tiny_model: LoadedModel, grammars: list[Grammar]
) -> None:
    with make_engine(tiny_model, on_device=True) as sync, make_engine(tiny_model, on_device=True) as overlapped:
        overlapped._core.overlap = True
        assert run_all(overlapped, grammars, 1.0) == run_all(sync, grammars, 1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_open_automata_are_masked_by_the_host_beside_those_of_the_device(
    tiny_model: LoadedModel, grammars: list[Grammar], temperature: float
) -> None:
    opened = [compile_constraint("regex", pattern, vocabulary(tiny_model)) for pattern in PATTERNS]
    mixed = [opened[0], grammars[1], opened[2], grammars[3]]
    with make_engine(tiny_model, on_device=False) as host, make_engine(tiny_model, on_device=True) as device:
        device._core.overlap = True
        expected = run_all(host, mixed, temperature)
        assert run_all(device, mixed, temperature) == expected
        assert run_all(device, mixed, temperature) == expected, "in slots that others had"
        assert not any(grammar.is_closed for grammar in opened)
        device.check_integrity()


@pytest.mark.parametrize("num_open", [1, 6])
def test_the_steps_of_others_overlap_beside_open_automata(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, num_open: int
) -> None:
    opened = compile_constraint("regex", PATTERNS[0], vocabulary(tiny_model))
    masks: list[Grammar | None] = [None, *[opened] * num_open, *[None] * (7 - num_open)]

    def run(engine: Engine) -> list[str]:
        params = [SamplingParams(temperature=0.0, max_tokens=30, seed=i, ignore_eos=masks[i] is None) for i in range(8)]
        gate = threading.Event()

        def wait() -> None:
            gate.wait()

        engine._send(wait)  # all of them begin together
        handles = [engine.submit(f"p{i}", params[i], grammar=masks[i]) for i in range(8)]
        gate.set()
        return [handle.result(timeout_s=60).text for handle in handles]

    with make_engine(tiny_model, on_device=False) as host, make_engine(tiny_model, on_device=True) as device:
        core = device._core
        core.overlap = True
        sizes: list[int] = []
        launch = core.runner.launch

        def note(batch: Batch, **options: Any) -> LaunchedStep:
            sizes.append(len(batch.items) if core.is_stepping else 0)
            return launch(batch, **options)

        monkeypatch.setattr(core.runner, "launch", note)
        expected = run(host)
        assert run(device) == expected
        assert re.fullmatch(PATTERNS[0], expected[1])
        assert 8 - num_open in sizes, "steps without those that the host masks, launched before the last ended"
        assert max(sizes) > 8 - num_open, "steps with them, launched before the last ended"
        device.check_integrity()


def test_a_waiting_request_that_the_host_will_mask_costs_the_running_ones_nothing(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = compile_constraint("regex", PATTERNS[0], vocabulary(tiny_model))
    with Engine(tiny_model, num_kv_tokens=4096, max_running_requests=1) as engine:
        core = engine._core
        core.overlap = True
        running: list[str] = []  # when a step was not overlapped
        step_informed, launch = core.step_informed, core.launch
        is_sync = False

        def note(updates: list[Update]) -> None:
            nonlocal is_sync
            is_sync = True
            step_informed(updates)
            is_sync = False

        def note_batch(batch: Batch) -> LaunchedStep:
            if is_sync:
                running.extend(item.sequence.request.request_id for item in batch.items)
            return launch(batch)

        monkeypatch.setattr(core, "step_informed", note)
        monkeypatch.setattr(core, "launch", note_batch)
        params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
        first = engine.submit("x", params, request_id="free")
        second = engine.submit("x", SamplingParams(max_tokens=40, seed=1), grammar=opened, request_id="masked")
        assert len(first.result(timeout_s=60).token_ids) == 30
        assert re.fullmatch(PATTERNS[0], second.result(timeout_s=60).text)
    assert set(running) == {"masked"}


class _Slow:
    """A grammar whose answers, from its third mask on, are not ready until `may_end` is set."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._num_masks = 0
        self.is_slow, self.may_end = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grammar, name)

    def fill_mask(self, state: int, row: Any) -> None:
        self._num_masks += 1
        if self._num_masks > 2:
            self.is_slow.set()
            while not self.may_end.is_set():
                deadline.check()
        self._grammar.fill_mask(state, row)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_row_waits_for_its_grammar_while_the_others_go_on(tiny_model: LoadedModel, overlap: bool) -> None:
    opened = compile_constraint("regex", PATTERNS[0], vocabulary(tiny_model))
    other = compile_constraint("regex", PATTERNS[2], vocabulary(tiny_model))
    params = SamplingParams(temperature=1.0, max_tokens=30, seed=1)
    free = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    with make_engine(tiny_model, on_device=overlap) as engine:
        engine._core.overlap = overlap
        expected = engine.generate("x", params, grammar=opened)
        slow = _Slow(opened)
        waiting = engine.submit("x", params, grammar=cast(Grammar, slow))
        assert slow.is_slow.wait(60)
        assert len(engine.generate("a b c", free).token_ids) == 60
        assert re.fullmatch(PATTERNS[2], engine.generate("d", params, grammar=other).text), "nor do other grammars wait"
        assert engine.stats()["num_waiting_for_grammar"] == 1
        engine.check_integrity()
        slow.may_end.set()
        assert waiting.result(timeout_s=60).token_ids == expected.token_ids
        engine.check_integrity()


def test_a_row_that_waits_for_its_grammar_can_be_aborted_and_has_a_deadline(tiny_model: LoadedModel) -> None:
    opened = compile_constraint("regex", PATTERNS[0], vocabulary(tiny_model))
    params = SamplingParams(temperature=1.0, max_tokens=30, seed=1)
    with make_engine(tiny_model, on_device=False) as engine:
        for deadline_s in (None, 0.5):
            slow = _Slow(opened)
            handle = engine.submit("x", params, grammar=cast(Grammar, slow), deadline_s=deadline_s)
            if deadline_s is None:
                assert slow.is_slow.wait(60)
                handle.cancel()
            with pytest.raises(RequestCancelled):
                handle.result(timeout_s=60)
        assert engine.generate("x", params, grammar=opened).finish_reason is not None, "the grammar goes on"
        while engine._core.has_work:
            time.sleep(0.01)
        assert engine.stats()["num_waiting_for_grammar"] == 0
        engine.check_integrity()


def test_every_finished_text_matches_its_pattern(tiny_model: LoadedModel, grammars: list[Grammar]) -> None:
    with make_engine(tiny_model, on_device=False) as engine:
        for seed in range(10):
            for pattern, grammar in zip(PATTERNS, grammars, strict=True):
                sampling = SamplingParams(temperature=1.5, max_tokens=60, seed=seed)
                result = engine.submit("x", sampling, grammar=grammar).result(timeout_s=60)
                assert re.fullmatch(pattern, result.text), (pattern, result.text)
                assert result.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


@pytest.mark.parametrize("max_tokens", range(9, 16))
def test_a_small_budget_is_closed_in_time(tiny_model: LoadedModel, grammars: list[Grammar], max_tokens: int) -> None:
    with make_engine(tiny_model, on_device=False) as engine:
        for seed in range(6):
            for pattern, grammar in zip(PATTERNS, grammars, strict=True):
                sampling = SamplingParams(temperature=1.5, max_tokens=max_tokens, seed=seed)
                text = engine.submit("x", sampling, grammar=grammar).result(timeout_s=60).text
                assert re.fullmatch(pattern, text), (pattern, text)


@pytest.mark.parametrize("on_device", [False, True])
def test_a_token_that_closes_a_text_has_its_own_log_probability(
    tiny_model: LoadedModel, grammars: list[Grammar], on_device: bool
) -> None:
    with make_engine(tiny_model, on_device=on_device) as engine:
        prompt = list(engine.tokenizer.encode("x"))
        for seed in range(3):
            for grammar in grammars:
                sampling = SamplingParams(temperature=1.5, max_tokens=11, seed=seed, logprobs=1)
                found = engine.submit(prompt, sampling, grammar=grammar).result(timeout_s=60)
                scored = engine.submit([*prompt, *found.token_ids], score_from=len(prompt)).result(timeout_s=60)
                assert found.logprobs is not None
                assert found.top_logprobs is not None
                assert scored.prompt_logprobs is not None
                assert found.logprobs == pytest.approx(scored.prompt_logprobs, abs=1e-4)
                assert len(found.top_logprobs) == len(found.token_ids)


def test_a_preempted_constrained_sequence_goes_on_in_its_state(
    tiny_model: LoadedModel, grammars: list[Grammar]
) -> None:
    with make_engine(tiny_model, on_device=True) as roomy:
        expected = run_all(roomy, grammars, 1.0)
    with make_engine(tiny_model, on_device=True) as engine:
        scheduler = engine._core.scheduler
        step = engine._core.step
        count = 0

        def preempting() -> list[object]:
            nonlocal count
            count += 1
            if count % 3 == 0:
                idle = [s for s in scheduler._decoding if not s.num_in_flight]
                if idle:
                    scheduler._preempt(idle[-1])
            return step()  # type: ignore[return-value]

        engine._core.step = preempting  # type: ignore[assignment, method-assign]
        assert run_all(engine, grammars, 1.0) == expected
        assert engine.stats()["num_preemptions"] > 3
        engine.check_integrity()


def test_a_torch_device_without_an_arena_masks_on_the_host(tiny_model: LoadedModel, grammars: list[Grammar]) -> None:
    with make_engine(tiny_model, on_device=False) as engine:
        assert engine._core.runner.arena is None
        assert engine._core.runner.device == torch.device("cpu")
        engine.submit("x", SamplingParams(max_tokens=40, seed=1), grammar=grammars[0]).result(timeout_s=60)
        assert not engine._core.scheduler.held


@pytest.mark.parametrize("max_tokens", [9, 11, 14])
def test_the_device_closes_a_small_budget_as_the_host_does(
    tiny_model: LoadedModel, grammars: list[Grammar], max_tokens: int
) -> None:
    with make_engine(tiny_model, on_device=True) as engine:
        engine._core.overlap = True
        for seed in range(6):
            for pattern, grammar in zip(PATTERNS, grammars, strict=True):
                sampling = SamplingParams(temperature=1.5, max_tokens=max_tokens, seed=seed)
                result = engine.submit("x", sampling, grammar=grammar).result(timeout_s=60)
                assert re.fullmatch(pattern, result.text), (pattern, result.text)
                assert len(result.token_ids) <= max_tokens
        assert not engine._core.scheduler.held


def test_a_budget_that_no_text_fits_is_left_alone_on_the_device(
    tiny_model: LoadedModel, grammars: list[Grammar]
) -> None:
    with make_engine(tiny_model, on_device=True) as engine:
        sampling = SamplingParams(temperature=1.5, max_tokens=2, seed=1)
        result = engine.submit("x", sampling, grammar=grammars[0]).result(timeout_s=60)
        assert result.finish_reason is FinishReason.LENGTH
        assert len(result.token_ids) == 2


@pytest.mark.parametrize("on_device", [False, True])
def test_a_text_that_its_budget_cannot_hold_says_what_it_would_take(
    tiny_model: LoadedModel, grammars: list[Grammar], on_device: bool
) -> None:
    with make_engine(tiny_model, on_device=on_device) as engine:
        for pattern, grammar in zip(PATTERNS, grammars, strict=True):
            needed = len(grammar.shortest_completion(0))
            for max_tokens in {1, needed - 1, needed, needed + 1} - {0}:
                sampling = SamplingParams(temperature=1.5, max_tokens=max_tokens, seed=1)
                result = engine.submit("x", sampling, grammar=grammar).result(timeout_s=60)
                is_whole = re.fullmatch(pattern, result.text) is not None
                assert (result.incomplete is None) == is_whole, (pattern, max_tokens, result)
                assert is_whole or result.finish_reason is FinishReason.LENGTH
                assert result.incomplete is None or f"takes {needed:,} tokens" in result.incomplete
                assert f"({max_tokens:,})" in (result.incomplete or f"({max_tokens:,})")


@pytest.mark.parametrize("on_device", [False, True])
def test_a_text_that_its_budget_made_end_says_so(tiny_model: LoadedModel, on_device: bool) -> None:
    grammar = compile_constraint("regex", r"\[(a|b|c|d){0,60}\]", vocabulary(tiny_model))
    assert grammar.close()
    with make_engine(tiny_model, on_device=on_device) as engine:
        for max_tokens, seed in product((2, 5, 9, 64), range(6)):
            sampling = SamplingParams(temperature=1.5, max_tokens=max_tokens, seed=seed)
            result = engine.submit("x", sampling, grammar=grammar).result(timeout_s=60)
            assert result.finish_reason is FinishReason.STOP
            roomy = msgspec.structs.replace(sampling, max_tokens=64)
            wanted = engine.submit("x", roomy, grammar=grammar).result(timeout_s=60)
            was_closed = result.text != wanted.text
            if on_device and len(wanted.token_ids) == max_tokens:
                was_closed = True  # the device does not tell which tokens it replaced
            assert result.was_closed == was_closed, (result, wanted)
        cut = engine.submit("x", SamplingParams(max_tokens=1, seed=1), grammar=grammar).result(timeout_s=60)
        assert (cut.finish_reason, cut.was_closed) == (FinishReason.LENGTH, False)
        free = engine.submit("x", SamplingParams(max_tokens=3)).result(timeout_s=60)
        assert not free.was_closed


@pytest.mark.parametrize("on_device", [False, True])
def test_a_limit_of_tokens_ends_each_string_and_names_it(tiny_model: LoadedModel, on_device: bool) -> None:
    tags = {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 2}
    properties = {"a": {"type": "string"}, "long key": tags}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    grammar = compile_constraint("json_schema", json.dumps(schema), vocabulary(tiny_model))
    with make_engine(tiny_model, on_device=on_device) as engine:
        params = [SamplingParams(temperature=1.5, seed=seed, max_tokens=200, string_tokens=4) for seed in range(6)]
        results = [engine.submit("x", one, grammar=grammar).result(timeout_s=60) for one in params]
    named = set()
    for result in results:
        value = json.loads(result.text)
        assert result.finish_reason is FinishReason.STOP
        for place, text in (
            ("/a", value["a"]),
            ("/long key/0", value["long key"][0]),
            ("/long key/1", value["long key"][1]),
        ):
            assert len(text) <= 4
            if place in (result.incomplete or ""):
                named.add(place)
            else:
                assert len(text) < 4
    assert named == {"/a", "/long key/0", "/long key/1"}


def test_a_whole_text_that_could_go_on_is_complete(tiny_model: LoadedModel) -> None:
    grammar = compile_constraint("regex", "a*", vocabulary(tiny_model))
    with make_engine(tiny_model, on_device=False) as engine:
        sampling = SamplingParams(max_tokens=3, ignore_eos=True)
        result = engine.submit("x", sampling, grammar=grammar).result(timeout_s=60)
        assert result.finish_reason is FinishReason.LENGTH
        assert result.incomplete is None
        free = engine.submit("x", SamplingParams(max_tokens=3, ignore_eos=True)).result(timeout_s=60)
        assert free.incomplete is None


def test_a_preempted_sequence_that_ignores_end_tokens_goes_on_past_one(tiny_model: LoadedModel) -> None:
    grammar = compile_constraint("regex", "ab?", vocabulary(tiny_model))
    assert grammar.close()
    with make_engine(tiny_model, on_device=True) as engine:
        core = engine._core
        sampling = SamplingParams(temperature=1.0, max_tokens=8, seed=1, ignore_eos=True)
        step = core.step
        count = 0

        def preempting() -> list[object]:
            nonlocal count
            count += 1
            idle = [s for s in core.scheduler._decoding if not s.num_in_flight and len(s.output_ids) > 3]
            if idle and count % 3 == 0:
                core.scheduler._preempt(idle[-1])
            return step()  # type: ignore[return-value]

        core.step = preempting  # type: ignore[assignment, method-assign]
        result = engine.submit("x", sampling, grammar=grammar).result(timeout_s=60)
        assert len(result.token_ids) == 8
        assert result.finish_reason is FinishReason.LENGTH
        assert engine.stats()["num_preemptions"] > 0


def test_an_aborted_sequence_leaves_its_grammars_place_on_the_device(
    tiny_model: LoadedModel, grammars: list[Grammar], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = grammars[:2]
    with make_engine(tiny_model, on_device=True, max_grammars=1) as engine, caplog.at_level("INFO"):
        started = threading.Event()
        handle = engine.submit(
            "x", SamplingParams(max_tokens=400, ignore_eos=True), grammar=first, on_output=lambda output: started.set()
        )
        assert started.wait(60)
        handle.cancel()
        engine.submit("x", SamplingParams(max_tokens=40), grammar=second).result(timeout_s=60)
        assert "the host computes the masks" not in caplog.text


def test_the_engines_thread_brings_no_grammar_to_the_device(
    tiny_model: LoadedModel, grammars: list[Grammar], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    acquire = GrammarArena.acquire

    def noted(arena: GrammarArena, key: Hashable, tables: AutomatonTables) -> int:
        threads.append(threading.current_thread().name)
        return acquire(arena, key, tables)

    monkeypatch.setattr(GrammarArena, "acquire", noted)
    with make_engine(tiny_model, on_device=True) as engine:
        run_all(engine, grammars, 1.0)
    assert threads
    assert set(threads) == {"ramet-grammar"}


def test_a_request_that_ends_while_its_grammar_is_brought_to_the_device_leaves_no_user(
    tiny_model: LoadedModel, grammars: list[Grammar], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    acquire = GrammarArena.acquire

    def held(arena: GrammarArena, key: Hashable, tables: AutomatonTables) -> int:
        begun.set()
        assert may_go_on.wait(60)
        return acquire(arena, key, tables)

    monkeypatch.setattr(GrammarArena, "acquire", held)
    with make_engine(tiny_model, on_device=True) as engine:
        waiting = engine.submit("a", SamplingParams(max_tokens=5), grammar=grammars[0])
        assert begun.wait(60)
        assert engine.submit("b", SamplingParams(max_tokens=5)).result(timeout_s=60).token_ids, "others go on"
        waiting.cancel()
        with pytest.raises(RequestCancelled):
            waiting.result(timeout_s=60)
        may_go_on.set()
        engine.submit("c", SamplingParams(max_tokens=5), grammar=grammars[1]).result(timeout_s=60)
        device = engine._core.grammars.device
        assert device is not None
        for grammar in grammars[:2]:  # a use of the arena notes what was released before
            engine.submit("d", SamplingParams(max_tokens=5), grammar=grammar).result(timeout_s=60)
        users = {key: resident.num_users for key, resident in device.arena._resident.items()}
        assert sum(users.values()) == len(device._released), users


FORCED = (
    '\\{"a name": "[a-c]{1,4}", "and another": [0-9]{1,2}, "active": (true|false)\\}',
    "(yes, this is so|no, that is wrong)\\.[0-9]{3} end",
    "an only choice",
)


@pytest.mark.parametrize("num_rows", [1, 6])
@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_that_must_follow_are_computed_together_on_the_device(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch, overlap: bool, num_rows: int
) -> None:
    """Rows whose next step runs already skip a step for that. Budgets end in front of, inside of and behind runs."""
    compiled = [compile_constraint("regex", pattern, vocabulary(tiny_model)) for pattern in FORCED]
    assert all(grammar.close() for grammar in compiled)
    found: list[tuple[list[Any], int]] = []
    for appends in (True, False):
        with make_engine(tiny_model, on_device=True) as engine, monkeypatch.context() as patch:
            engine._core.overlap = overlap
            if not appends:
                patch.setattr(_OnDevice, "forced_run", lambda found, request, num_output: ([], found.state))
            handles, results = [], []
            for i in range(24):
                sampling = SamplingParams(
                    temperature=1.0 * (i % 2),
                    max_tokens=(60, 9, 14, 23)[i % 4],
                    seed=i,
                    stop=(" is",) if i % 6 == 5 else (),
                    ignore_eos=i % 5 == 1,
                )
                handles.append(engine.submit(f"prompt {i % 3}", sampling, grammar=compiled[i % 3]))
                if len(handles) == num_rows:
                    results += [handle.result(timeout_s=60) for handle in handles]
                    handles = []
            engine.check_integrity()
            assert not engine._core.scheduler.held
            found.append((results, engine._core.scheduler.counters.num_steps))
    (results, steps), (decoded, steps_decoded) = found
    for ours, theirs in zip(results, decoded, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.finish_reason, ours.incomplete) == (theirs.finish_reason, theirs.incomplete)
    assert steps < steps_decoded * (0.5 if num_rows == 1 else 0.75)


def test_no_step_has_more_tokens_that_must_follow_than_a_graph_holds(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = compile_constraint("regex", FORCED[0], vocabulary(tiny_model))
    assert grammar.close()
    monkeypatch.setattr(states, "_MOST_RUN_TOKENS", 2 * states._LEAST_RUN_TOKENS)
    sizes: list[int] = []
    launch = ModelRunner.launch

    def noted(runner: ModelRunner, batch: Batch, **options: Any) -> LaunchedStep:
        runs = [item for item in batch.items[batch.num_decode :] if item.sequence.output_ids]
        sizes.append(len(runs))
        return launch(runner, batch, **options)

    monkeypatch.setattr(ModelRunner, "launch", noted)
    with make_engine(tiny_model, on_device=True) as engine:
        engine._core.overlap = True
        params = [SamplingParams(temperature=1.0, max_tokens=60, seed=seed) for seed in range(8)]
        handles = [engine.submit("x", sampling, grammar=grammar) for sampling in params]
        for handle in handles:
            assert re.fullmatch(FORCED[0], handle.result(timeout_s=60).text)
    assert 0 < max(sizes) <= 2
