"""Numbers with a divisor that has too many remainders for an automaton: the same answers as an automaton gives."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from ramet.grammar import Vocabulary, compile_grammar
from ramet.grammar.ir import JsonOptions, JsonSchema
from ramet.grammar.regular import numbers as numeric
from ramet.grammar.regular.numbers import Numbers

TOKENS = [*(bytes((i,)) for i in range(256)), *(str(i).encode() for i in range(10, 60)), b"1,", b".0", b""]
EOS = len(TOKENS) - 1
VOCABULARY = Vocabulary(TOKENS, [EOS], [EOS])

SCHEMAS: dict[str, Any] = {
    "a number": {"type": "number", "multipleOf": 0.123456789},
    "an integer": {"type": "integer", "multipleOf": 0.123456789},
    "many divisors": {"type": "integer", "allOf": [{"multipleOf": p} for p in (2, 3, 5, 7, 11, 13)]},
    "bounds": {"type": "integer", "multipleOf": 1000003, "minimum": -5000000, "maximum": 10**12},
    "a small range": {"type": "number", "multipleOf": 0.123456789, "exclusiveMinimum": 0, "maximum": 0.3},
    "a power of two": {"type": "integer", "multipleOf": 1099511627776},
    "not all multiples": {"type": "integer", "multipleOf": 1000003, "not": {"multipleOf": 7}},
    "not zero": {"type": "integer", "multipleOf": 1000003, "not": {"const": 0}},
}


def random_numbers(rng: random.Random) -> Numbers | None:
    divisor = Fraction(rng.choice((7, 12, 25, 130, 37, 600, 45)), rng.choice((1, 1, 10, 4, 100)))
    others = {(Fraction(rng.choice((2, 3, 5))), False)} if rng.random() < 0.3 else set()
    numbers = Numbers(
        low=rng.choice((None, None, Fraction(rng.randint(-300, 300), rng.choice((1, 4))))),
        high=rng.choice((None, None, Fraction(rng.randint(-300, 900)))),
        integer=rng.choice((None, None, True)),
        multiples=frozenset({(divisor, True), *others}),
        excluded=frozenset(rng.choice(([], [Fraction(0)], [divisor, -divisor, 3 * divisor]))),
        plain=rng.choice((None, None, True)),
    )
    is_open = rng.random() < 0.5
    return numeric.simplify(
        replace(numbers, low_open=is_open and numbers.low is not None, high_open=is_open and numbers.high is not None)
    )


def random_text(rng: random.Random) -> str:
    text = ""
    for _ in range(rng.randint(0, 7)):
        symbols = numeric.symbols_after(text)
        text += "0" if "0" in symbols and rng.random() < 0.2 else rng.choice(symbols)
    return text


@pytest.mark.parametrize("seed", range(120))
def test_texts_and_their_beginnings_are_judged_as_by_an_automaton(seed: int) -> None:
    rng = random.Random(seed)
    numbers = random_numbers(rng)
    if numbers is None or numbers.finite is not None or not any(must for _, must in numbers.multiples):
        return
    automaton = numeric.automaton(numbers)
    for _ in range(60):
        text = random_text(rng)
        state = 0
        for char in text:
            state = automaton.step(state, ord(char)) if state >= 0 else -1
        completion = numeric.completion(numbers, text)
        assert numeric.is_text_of(numbers, text) == (state >= 0 and bool(automaton.accepting[state])), text
        assert numeric.may_go_on(numbers, text) == (completion is not None) == (state >= 0), text
        if completion is not None:
            assert automaton.accepts(map(ord, text + completion))


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_large_divisor_is_exact_in_masks_and_completions(name: str) -> None:
    schema = SCHEMAS[name]
    grammar = compile_grammar(JsonSchema(schema, JsonOptions()), VOCABULARY)
    divisors = [s["multipleOf"] for s in (schema, *schema.get("allOf", ())) if "multipleOf" in s]
    for seed in range(4):
        rng = random.Random(seed)
        state, text = 0, b""
        for _ in range(14):
            completion = grammar.shortest_completion(state)
            assert len(completion) <= grammar.completion_bound(state)
            value = Fraction(json.loads(text + b"".join(TOKENS[t] for t in completion), parse_float=Decimal))
            assert all(value % Fraction(Decimal(repr(d))) == 0 for d in divisors)
            assert schema.get("minimum", value) <= value <= schema.get("maximum", value)
            allowed = grammar.allowed_tokens(state).tolist()
            for token in range(EOS):
                assert (grammar.advance(state, token) is not None) == (token in allowed), (text, TOKENS[token])
            token = rng.choice(allowed)
            if token == EOS:
                break
            after = grammar.advance(state, token)
            assert after is not None
            state, text = after, text + TOKENS[token]


def test_an_empty_set_of_a_large_divisor_is_seen() -> None:
    numbers = Numbers(
        Fraction(1), high=Fraction(1000002), integer=True, multiples=frozenset({(Fraction(1000003), True)})
    )
    assert numeric.simplify(numbers) is None
    assert numeric.simplify(replace(numbers, high=Fraction(1000003))) is not None
