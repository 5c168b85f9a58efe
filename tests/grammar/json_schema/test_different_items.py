"""Arrays of many different items: masks, bounds and completions, against brute force and at a bounded cost."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from ramet.grammar import CompiledGrammar, Vocabulary, compile_grammar
from ramet.grammar.ir import JsonOptions, JsonSchema, Whitespace
from ramet.grammar.machine import bitmask, walker
from ramet.grammar.machine.automaton import Machine

PIECES = [b'",', b'", "', b"1,", b", ", b'"]', b"1, 2", b'a", "b', b"]", b'", {"a": "', b'"}, {}', b"}, {}]", b"2, 1]"]
TOKENS = [*(bytes((i,)) for i in range(256)), *PIECES, b""]
EOS = len(TOKENS) - 1
VOCABULARY = Vocabulary(TOKENS, [EOS], [EOS])
TYPICAL = b'0123456789ab",[]. -{}:'
CLOSED = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False}

U: dict[str, Any] = {"type": "array", "uniqueItems": True}
SCHEMAS: dict[str, Any] = {
    "integers": {**U, "items": {"type": "integer"}, "minItems": 6},
    "short strings": {**U, "items": {"type": "string", "maxLength": 2}, "minItems": 5},
    "a pattern": {**U, "items": {"type": "string", "pattern": "^[ab]+$"}, "minItems": 5},
    "five of six": {**U, "items": {"enum": [1, 2, 3, "a", "b", None]}, "minItems": 5},
    "a whole range": {**U, "items": {"type": "integer", "minimum": 1, "maximum": 5}, "minItems": 5},
    "steps": {**U, "items": {"type": "number", "multipleOf": 0.5, "minimum": -1}, "minItems": 4},
    "positions": {**U, "prefixItems": [{"type": "integer"}], "items": {"type": ["integer", "null"]}, "minItems": 4},
    "arrays": {**U, "items": {**U, "items": {"type": "integer"}, "minItems": 2}, "minItems": 2},
    "strings or closed objects": {**U, "items": {"anyOf": [{"type": "string"}, CLOSED]}, "minItems": 3},
    "closed objects or few arrays": {**U, "items": {"anyOf": [CLOSED, {"enum": [[], [1], [2]]}]}, "minItems": 3},
    "strings or two numbers": {**U, "items": {"anyOf": [{"type": "string"}, {"enum": [1, 2, 12]}]}, "minItems": 4},
    "either": {"oneOf": [{**U, "items": {"type": t}, "minItems": 3} for t in ("integer", "string")]},
    "some": {"anyOf": [{**U, "items": {"type": "integer"}, "minItems": n, "maxItems": n + 1} for n in (2, 4)]},
}


def compiled(schema: Any, whitespace: Whitespace = "model") -> CompiledGrammar:
    return compile_grammar(JsonSchema(schema, JsonOptions(whitespace)), VOCABULARY)


@pytest.mark.parametrize("name", SCHEMAS)
def test_everywhere_in_an_array_of_different_items_masks_and_completions_are_right(name: str) -> None:
    valid = jsonschema.Draft202012Validator(SCHEMAS[name])
    whitespaces: tuple[Whitespace, ...] = ("model", "any", "indent=2")
    for whitespace in whitespaces:
        grammar = compiled(SCHEMAS[name], whitespace)
        rng = random.Random(name + whitespace)
        state, text = 0, b""
        for _ in range(16):
            completion = grammar.shortest_completion(state)
            assert valid.is_valid(json.loads(text + b"".join(TOKENS[t] for t in completion))), text
            assert len(completion) <= grammar.completion_bound(state)
            end: int | None = state
            for token in completion:
                assert end is not None
                end = grammar.advance(end, token)
            assert end is not None
            assert grammar.is_accepting(end)
            allowed = grammar.allowed_tokens(state).tolist()
            for token in range(EOS):
                assert (grammar.advance(state, token) is not None) == (token in allowed), (text, TOKENS[token])
            token = rng.choice([t for t in allowed if t >= 256 or TOKENS[t] in TYPICAL] or allowed)
            if token == EOS:
                break
            after = grammar.advance(state, token)
            assert after is not None
            state, text = after, text + TOKENS[token]


@pytest.mark.parametrize("items", [{"type": "string"}, {"type": "integer"}, {"type": "string", "pattern": "^[a-z]+$"}])
def test_the_bound_of_many_different_items_makes_no_frames_for_each(items: Any) -> None:
    grammar = compiled({**U, "items": items, "minItems": 300})
    state: int | None = 0
    for number in range(20):
        assert state is not None
        before = len(grammar.machine.frames)
        assert grammar.completion_bound(state) > 2 * (300 - number)
        assert len(grammar.machine.frames) - before < 20
        value = number if items == {"type": "integer"} else "abcdefghijklmnopqrst"[number]
        state = grammar.advance_bytes(state, b"[" * (number == 0) + json.dumps(value).encode() + b", ")


def test_after_a_number_that_must_be_new_tokens_are_not_looked_at_one_by_one() -> None:
    words = [bytes((a, b)) for a in b"abcdefgh ,]" for b in range(97, 123)]
    vocabulary = Vocabulary([*TOKENS[:-1], *words, b""], [EOS + len(words)], [EOS + len(words)])
    schema = {**U, "items": {"type": "integer"}}
    grammar = compile_grammar(JsonSchema(schema, JsonOptions()), vocabulary)
    state = grammar.advance_bytes(0, b"[1, 2")
    assert state is not None
    frame = grammar.machine.frames[grammar.packed(state) >> 32]
    asked: list[int] = []
    resolve_text = frame.resolve_text

    def counting(exit_index: int, text: bytes, last: bytes) -> int:
        asked.append(exit_index)
        return resolve_text(exit_index, text, last)

    frame.resolve_text = counting  # type: ignore[method-assign]
    grammar.mask(state)
    assert 0 < len(asked) < 20


def test_in_a_string_that_must_be_new_no_token_is_run_alone_because_of_items_of_another_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grammar = compiled(SCHEMAS["strings or closed objects"])
    state = grammar.advance_bytes(0, b'["a", "b')
    assert state is not None
    run: list[bytes] = []
    run_all = Machine.run_all

    def noted(machine: Machine, packed: int, tokens: NDArray[np.int64], num_read: int = 0) -> NDArray[np.int64]:
        run.extend(TOKENS[t] for t in tokens.tolist())
        return run_all(machine, packed, tokens, num_read)

    monkeypatch.setattr(Machine, "run_all", noted)
    grammar.mask(state)
    assert sorted(set(run)) == [b'", {"a": "'], "such an object may be one that was there"


def test_a_string_with_a_pattern_walks_only_tokens_that_may_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = compiled({"type": "string", "pattern": "[0-9]{3}"})
    state = grammar.advance_bytes(0, b'"x12')
    assert state is not None
    sizes: list[int] = []
    walk = walker.walk_difference

    def noted(*arguments: Any) -> int:
        sizes.append(len(arguments[4]))  # the tokens of the trie
        return int(walk(*arguments))

    monkeypatch.setattr(walker, "walk_difference", noted)
    row = grammar.mask(state)
    assert sizes
    assert max(sizes) < 180, "most of the 268 tokens are plain text"
    for token, text in enumerate(TOKENS[:EOS]):
        assert bitmask.is_allowed(row, token) == (grammar.advance(state, token) is not None), text
