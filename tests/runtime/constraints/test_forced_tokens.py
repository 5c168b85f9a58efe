"""Tokens that a grammar leaves no choice about are appended, not decoded: the same tokens in fewer steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ramet import Engine
from ramet.grammar import Vocabulary
from ramet.grammar.service.sources import compile_constraint
from ramet.runtime.constraints.host_automaton import HostAutomaton
from ramet.runtime.models.linear_cpu import CpuFeatures
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.types import SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {"a_name_of_some_length": {"type": "boolean"}, "another_long_name": {"enum": ["north", "south"]}},
    "required": ["a_name_of_some_length", "another_long_name"],
    "additionalProperties": False,
}


def grammar_of(engine: Engine, kind: str, source: str) -> Any:
    tokenizer = engine.tokenizer
    words = Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)
    return compile_constraint(kind, source, words)


@pytest.fixture(scope="module")
def engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, num_kv_tokens=4096, max_running_requests=4) as engine:
        yield engine


def both(engine: Engine, grammar: Any, sampling: SamplingParams) -> tuple[Any, Any, int, int]:
    """Results and steps with forced tokens appended, and decoded."""
    found = []
    for appends in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not appends:
                patch.setattr(HostAutomaton, "forced_run", lambda automaton, token: [])
            engine.flush_cache()
            before = engine._core.scheduler.counters.num_steps
            result = engine.generate("Data: ", sampling, grammar=grammar)
        found.append((result, engine._core.scheduler.counters.num_steps - before))
    engine.check_integrity()
    (first, steps), (second, steps_decoded) = found
    return first, second, steps, steps_decoded


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", json.dumps(SCHEMA)),
        ("regex", "(yes, this is so|no, that is wrong)\\.[0-9]{3} end"),
        ("choice", json.dumps(["an only choice"])),
    ],
)
def test_forced_tokens_are_the_same_appended_and_decoded(
    engine: Engine, kind: str, source: str, temperature: float
) -> None:
    grammar = grammar_of(engine, kind, source)
    sampling = SamplingParams(max_tokens=120, temperature=temperature, seed=5)
    first, second, steps, steps_decoded = both(engine, grammar, sampling)
    assert first.token_ids == second.token_ids
    assert (first.text, first.finish_reason, first.stop_match) == (second.text, second.finish_reason, second.stop_match)
    assert first.usage.completion_tokens == second.usage.completion_tokens
    assert steps < steps_decoded / 2


@pytest.mark.parametrize("max_tokens", [3, 5, 9, 14])
def test_a_budget_and_a_stop_string_end_inside_of_forced_tokens(engine: Engine, max_tokens: int) -> None:
    grammar = grammar_of(engine, "choice", json.dumps(["an only choice"]))
    for stop in ((), ("ly c",)):
        first, second, _, _ = both(engine, grammar, SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=stop))
        assert first.token_ids == second.token_ids
        assert (first.text, first.finish_reason) == (second.text, second.finish_reason)


def test_stop_tokens_end_inside_of_forced_tokens(engine: Engine) -> None:
    grammar = grammar_of(engine, "choice", json.dumps(["an only choice"]))
    sampling = SamplingParams(max_tokens=40, temperature=0.0, stop_token_ids=(ord("c"),))
    first, second, _, _ = both(engine, grammar, sampling)
    assert first.token_ids == second.token_ids
    assert first.text == second.text


def test_what_needs_an_opinion_on_every_token_is_decoded(engine: Engine) -> None:
    grammar = grammar_of(engine, "choice", json.dumps(["an only choice"]))
    first, second, steps, steps_decoded = both(
        engine, grammar, SamplingParams(max_tokens=40, temperature=0.0, logprobs=1)
    )
    assert first.token_ids == second.token_ids
    assert first.logprobs is not None
    assert len(first.logprobs) == len(first.token_ids)
    assert steps == steps_decoded


def test_single_forced_tokens_save_steps(engine: Engine) -> None:
    grammar = grammar_of(engine, "regex", "([0-9]-){20}")
    first, second, steps, steps_decoded = both(engine, grammar, SamplingParams(max_tokens=60, temperature=0.0))
    assert first.token_ids == second.token_ids
    assert steps < 0.7 * steps_decoded


@pytest.mark.model
def test_forced_tokens_are_the_same_on_a_real_model(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Exact products: with rounded ones, tokens computed together may differ from those decoded in a near tie.
    monkeypatch.setattr(CpuFeatures, "detect", lambda: CpuFeatures(bf16=False, int8=False, tiles=False))
    with Engine(str(smollm2_path), context_length=512) as engine:
        for kind, source in (("json_schema", json.dumps(SCHEMA)), ("regex", "Answer: (yes|no)\\. [0-9]{2} z{40}")):
            grammar = grammar_of(engine, kind, source)
            first, second, steps, steps_decoded = both(engine, grammar, SamplingParams(max_tokens=80, temperature=0.0))
            assert first.token_ids == second.token_ids
            assert steps <= steps_decoded
