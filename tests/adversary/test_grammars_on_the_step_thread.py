"""Requests whose grammars take long for a token: the engine's thread asks no grammar, and closings do not explode.

What a step waits for is bounded by runtime/constraints/turns.py, whatever the grammar: see test_turns.py. Here are the
requests that once made every other request wait.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from ramet.grammar import CompiledGrammar, Vocabulary, compile_constraint
from ramet.grammar.machine import frame
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.types import Grammar, SamplingParams

Json = Any  # a decoded JSON document
BYTES = ByteTokenizer()


def optional_properties(count: int) -> Json:
    return {"type": "object", "properties": {f"property_{i}": {"type": ["string", "integer"]} for i in range(count)}}


def required_properties(count: int) -> Json:
    schema = {**optional_properties(count), "additionalProperties": False}
    return {**schema, "required": list(schema["properties"])}


def nested_objects(depth: int) -> Json:
    schema: Json = {"type": "integer"}
    for i in range(depth):
        schema = {"type": "object", "properties": {f"k{i}": schema}, "required": [f"k{i}"]}
    return schema


ROWS = {
    "optional properties": ("json_schema", optional_properties(300)),
    "unique strings": (
        "json_schema",
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "minItems": 6},
    ),
    "nested objects": ("json_schema", nested_objects(60)),
    "ambiguous rules": ("cfg", 'start: e\ne: e e | e "a" | "a" e | "a"'),
}


def of_vocabulary(tokenizer: Any) -> Vocabulary:
    return Vocabulary(tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)


def compiled(kind: str, source: Json, words: Vocabulary) -> CompiledGrammar:
    return compile_constraint(kind, json.dumps(source) if kind == "json_schema" else source, words)


@pytest.fixture(scope="module")
def engine(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, num_kv_tokens=4096, max_running_requests=4) as engine:
        yield engine


class NotOnTheEnginesThread:
    """A grammar that may be asked by any thread but the engine's."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self.num_asked = 0

    def __getattr__(self, name: str) -> Any:
        assert threading.current_thread().name != "ramet-engine", name
        self.num_asked += 1
        return getattr(self._grammar, name)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("max_tokens", [3, 40])
def test_the_engines_thread_asks_no_grammar(engine: Engine, row: str, max_tokens: int) -> None:
    grammar = NotOnTheEnginesThread(compiled(*ROWS[row], of_vocabulary(engine.tokenizer)))
    params = SamplingParams(temperature=1.0, max_tokens=max_tokens, seed=3)
    first, second = (engine.submit(f"{i}", params, grammar=cast(Grammar, grammar)) for i in range(2))
    assert first.result(timeout_s=120).token_ids
    assert second.result(timeout_s=120).token_ids
    assert grammar.num_asked > 2


@pytest.mark.parametrize("text", [b'{"', b'{"prop', b'{"property_1": 1, "'])
def test_a_closing_searches_the_table_of_keys_as_often_for_many_keys_as_for_few(
    text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[str] = []

    def counted(name: str) -> None:
        search = getattr(frame, name)

        def count(*arguments: Any) -> None:
            searches.append(name)
            search(*arguments)

        monkeypatch.setattr(frame, name, count)

    counted("exit_ways")
    counted("exit_distances")
    found = []
    for count in (20, 200):
        grammar = compiled("json_schema", optional_properties(count), of_vocabulary(BYTES))
        state = grammar.advance_bytes(0, text)
        assert state is not None
        searches.clear()
        grammar.completion_bound(state)
        found.append(len(searches))
    assert found[0] == found[1] > 0


def test_a_closing_of_many_required_keys_writes_all_of_them() -> None:
    grammar = compiled("json_schema", required_properties(40), of_vocabulary(BYTES))
    state = grammar.advance_bytes(0, b'{"property_7": "x", "prop')
    assert state is not None
    rest = bytes(grammar.shortest_completion(state))
    assert grammar.completion_bound(state) == len(rest)
    assert sorted(json.loads(b'{"property_7": "x", "prop' + rest)) == sorted(f"property_{i}" for i in range(40))
