"""Token healing in programs: the model writes the end of a prompt again, and everything else counts as before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from ramet import Engine, function, gen
from ramet.grammar import CompiledGrammar
from ramet.lang.graph.ir import Constraint
from ramet.lang.graph.prompt_tokens import Piece
from ramet.runtime.models.description import GenerationDefaults
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.programs.engine import EngineRequest
from ramet.runtime.programs.executor import ProgramHost
from ramet.runtime.programs.model import ProgramModel
from ramet.runtime.programs.path import Path
from ramet.runtime.server.choices import heals
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.testing.dummy import dummy_decoder
from ramet.runtime.types import SamplingParams


class WordTokenizer(ByteTokenizer):
    """Bytes and a few words; the longest token comes first."""

    def __init__(self) -> None:
        super().__init__()
        first = len(self.token_bytes)
        letters = [bytes([letter]) for letter in range(ord("a"), ord("z") + 1)]
        words = [b" " + letter for letter in letters] + [b"on" + letter for letter in letters] + [b"on", b" 12", b"no"]
        self.token_bytes = [*self.token_bytes, *words]
        self.vocab_size = len(self.token_bytes)
        self._words = {word: first + index for index, word in enumerate(words)}

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = False, continues: bool = False
    ) -> list[int]:
        return self.split(text.encode())

    def split(self, text: bytes) -> list[int]:
        tokens, at = [], 0
        while at < len(text):
            size = next((size for size in (3, 2) if text[at : at + size] in self._words), 1)
            tokens.append(self._words.get(text[at : at + size], text[at]))
            at += size
        return tokens


@pytest.fixture(scope="module")
def engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    tokenizer = WordTokenizer()
    config = replace(tiny_model.config, vocab_size=tokenizer.vocab_size)
    model = LoadedModel("tiny-words", dummy_decoder(config, "cpu"), tokenizer, config, GenerationDefaults())
    with Engine(model, num_kv_tokens=4096, max_running_requests=8) as made:
        yield made


@pytest.fixture(scope="module")
def endings() -> dict[bool, str]:
    """Two prompts: one whose last token is given back, one whose last token stays."""
    return {True: "Say on", False: "Say onx"}


@function(temperature=0)
def write(s: Any, /, prompt: str, **options: Any) -> None:
    s += prompt
    s += gen("a", **options)
    s += "; "
    s += gen("b", max_tokens=3)


def test_the_first_token_begins_with_the_one_that_was_given_back(engine: Engine, endings: dict[bool, str]) -> None:
    prompt = endings[True]
    tokens = engine.tokenizer.encode(prompt)
    texts = engine.tokenizer.token_bytes
    state = write.run(prompt, backend=engine, max_tokens=5)
    usage = state.meta("a")["usage"]
    assert usage.prompt_tokens == len(tokens)
    assert usage.completion_tokens == 5, "the token written again is one of the prompt"
    assert state.text().startswith(prompt + str(state["a"]) + "; ")
    plain = engine.generate(tokens[:-1], SamplingParams(temperature=0, max_tokens=1))
    if texts[plain.token_ids[0]].startswith(texts[tokens[-1]]):
        assert state.text().startswith(engine.tokenizer.decode(tokens[:-1]) + plain.text)
    engine.check_integrity()


def test_a_token_that_stays_costs_nothing(engine: Engine, endings: dict[bool, str]) -> None:
    prompt = endings[False]
    state = write.run(prompt, backend=engine, max_tokens=5)
    plain = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=5))
    assert state["a"] == plain.text


@pytest.mark.parametrize(
    "options", [{"max_tokens": 1}, {"max_tokens": 4, "min_tokens": 3}, {"max_tokens": 6, "stop": "e"}]
)
def test_limits_hold_for_the_text_after_the_prompt(
    engine: Engine, endings: dict[bool, str], options: dict[str, Any]
) -> None:
    state = write.run(endings[True], backend=engine, **options)
    usage = state.meta("a")["usage"]
    assert options.get("min_tokens", 0) <= usage.completion_tokens <= options["max_tokens"]


def test_log_probabilities_are_those_of_the_text(engine: Engine, endings: dict[bool, str]) -> None:
    state = write.run(endings[True], backend=engine, max_tokens=4, logprobs=1)
    meta = state.meta("a")
    assert len(meta["logprobs"]) == len(meta["token_ids"]) <= 5
    texts = engine.tokenizer.token_bytes
    written = b"".join(texts[token] for token in meta["token_ids"]).decode(errors="replace")
    assert written.endswith(str(state["a"]))


def test_a_constraint_that_no_longer_token_can_begin_leaves_the_prompt_alone(
    engine: Engine, endings: dict[bool, str]
) -> None:
    state = write.run(endings[True], backend=engine, regex="[0-9]{2}#", max_tokens=8)
    assert len(str(state["a"])) == 3
    assert state.meta("a")["usage"].prompt_tokens == len(engine.tokenizer.encode(endings[True]))


def test_branches_and_retries_write_the_end_of_their_prompt_each(engine: Engine, endings: dict[bool, str]) -> None:
    @function
    def branches(s: Any) -> None:
        s += endings[True]
        forked = s.fork(3)
        for branch in forked:
            branch += gen("x", max_tokens=3, temperature=1, where=lambda text: len(text) > 0, retries=9)
        forked.join()

    first, again = (branches.run(backend=engine, seed=3).record.events for _ in range(2))
    assert {n: e.text for n, e in first.items()} == {n: e.text for n, e in again.items()}
    engine.check_integrity()


def test_a_chat_templates_text_is_no_authors_text(tiny_model: LoadedModel) -> None:
    encode = ProgramModel(tiny_model.tokenizer).encode_pieces
    path = Path().append("<|im_start|>user\n", is_markup=True)
    assert path.flush(encode).num_literal == 0
    assert path.append("Hi").append(" é").flush(encode).num_literal == 5
    assert path.append("Hi").append("<|im_end|>", is_markup=True).flush(encode).num_literal == 0
    assert path.flush(encode).extend([5]).num_literal == 0, "generated"
    assert Piece("x").is_markup is False


def test_the_plan_counts_what_a_run_with_given_back_tokens_measures(engine: Engine, endings: dict[bool, str]) -> None:
    plan = write.explain(endings[True], backend=engine, max_tokens=5)
    engine.flush_cache()
    state = write.run(endings[True], backend=engine, max_tokens=5)
    first, usage = plan.nodes[0], state.meta("a")["usage"]
    assert first.prompt.is_exact
    assert first.prompt.at_most == usage.prompt_tokens
    assert first.new.is_exact
    assert first.new.at_most == usage.computed_tokens
    for cost, name in zip(plan.nodes, "ab", strict=True):
        usage = state.meta(name)["usage"]
        assert cost.prompt.at_least <= usage.prompt_tokens <= cost.prompt.at_most
        assert cost.new.at_least <= usage.computed_tokens <= cost.new.at_most
        assert usage.completion_tokens <= cost.written.at_most


def test_a_text_without_a_program_is_healed_by_the_same_rule(engine: Engine) -> None:
    host = ProgramHost(engine)
    tokens = engine.tokenizer.encode("Say on")
    params = SamplingParams(max_tokens=4, temperature=0)
    request = host.healed(tokens, params, None)
    assert (request.prompt, request.sampling.max_tokens) == (tokens[:-1], 5)
    grammar = host.model.grammars.between(None, request.before, b"")
    assert grammar is not None
    result = engine.generate(request.prompt, request.sampling, grammar=grammar)
    assert engine.tokenizer.decode(result.token_ids) == engine.tokenizer.decode(tokens[-1:]) + result.text
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (len(tokens), len(result.token_ids) - 1)
    compiled = host.model.grammars.get(Constraint("regex", "[0-9]+")).result()
    assert host.healed(tokens, params, compiled) == EngineRequest(tokens, params), "no token goes on with a digit"
    assert host.healed(tokens[-1:], params, None) == EngineRequest(tokens[-1:], params), "a prompt needs a token"
    host.model.grammars.close()


def test_without_a_program_a_typed_value_may_begin_with_a_space_where_it_may_in_one(engine: Engine) -> None:
    host = ProgramHost(engine)
    params = SamplingParams(max_tokens=4, temperature=0)
    number = host.model.grammars.get(Constraint("regex", "[0-9]+")).result()
    spaced = host.model.grammars.get(Constraint("regex", " ?[0-9]+")).result()

    def lead(text: str, grammar: CompiledGrammar | None = number, *, is_typed: bool = True, **stops: Any) -> bytes:
        sampling = msgspec.structs.replace(params, **stops)
        return host.healed(engine.tokenizer.encode(text), sampling, grammar, is_typed=is_typed).lead

    assert lead("Age:") == lead("Age:", stop=("x",)) == b" "
    assert lead("Age (") == lead("Age: $") == lead("Age:", is_typed=False) == lead("Age:", None) == b""
    assert lead("Age:", spaced) == b"", "the grammar allows the space itself"
    assert lead("Age:", stop=(" x",)) == lead("Age:", stop_regex=("[a-z]",)) == b"", "the space may be a stop's"
    host.model.grammars.close()


@pytest.mark.parametrize(
    ("wanted", "is_text", "has_constraint", "has_logprobs", "is_healed"),
    [
        (None, True, True, False, True),
        (None, True, False, False, False),
        (None, False, True, False, False),
        (None, True, True, True, False),
        (True, False, False, False, True),
        (False, True, True, False, False),
    ],
)
def test_over_http_texts_with_a_constraint_are_healed_unless_the_body_says_otherwise(
    wanted: bool | None, is_text: bool, has_constraint: bool, has_logprobs: bool, is_healed: bool
) -> None:
    constraint = Constraint("regex", "a") if has_constraint else None
    assert heals(wanted, constraint, is_text=is_text, has_logprobs=has_logprobs) == is_healed
