"""Strings of limited length and language, laid out in layers: the same language as the product of the two."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from ramet.errors import GrammarError
from ramet.grammar import CompiledGrammar, Vocabulary, compile_grammar
from ramet.grammar.ir import JsonOptions, JsonSchema
from ramet.grammar.json_schema.frames import lengths

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b""], [256])

SPECS: list[Any] = [
    {"pattern": "^(ab)*$", "minLength": 3, "maxLength": 9},
    {"pattern": "^[a-c]+(-[a-c]+)*$", "maxLength": 12},
    {"pattern": "b", "minLength": 4, "maxLength": 6},
    {"pattern": "^é+|^\\u2028", "maxLength": 5},
    {"anyOf": [{"maxLength": 2}, {"pattern": "^ab", "maxLength": 7}, {"enum": ["abcabcabc", "c"]}]},
    {"pattern": "^[ab]*$", "maxLength": 4, "not": {"enum": ["ab", "b"]}},
    {"not": {"pattern": "^a", "maxLength": 3}, "maxLength": 8},
    {"pattern": "^(a|bb)*$", "minLength": 5},
    {"allOf": [{"pattern": "a$"}, {"pattern": "^b"}], "minLength": 3, "maxLength": 3},
]


def compiled(schema: Any) -> CompiledGrammar:
    return compile_grammar(JsonSchema(schema, JsonOptions(whitespace="compact")), BYTES)


def accepts(grammar: CompiledGrammar, value: Any) -> bool:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=random.random() < 0.3).encode()
    state = grammar.advance_bytes(0, text)
    return state is not None and grammar.is_accepting(state)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("num_content", [1, 8, 512])
def test_layers_give_the_language_of_the_product(monkeypatch: pytest.MonkeyPatch, spec: Any, num_content: int) -> None:
    schema = {"type": "string", **spec}
    product = compiled(schema)
    rng = random.Random(3)
    texts = ["".join(rng.choices("aabbc-é\u2028", k=rng.randrange(12))) for _ in range(200)] + [
        "ab" * 3,
        "bca",
        "abcabcabc",
        "aabba",
    ]
    expected = [accepts(product, t) for t in texts]
    monkeypatch.setattr(lengths, "MAX_PRODUCT", 0)
    monkeypatch.setattr(lengths, "MAX_CONTENT", num_content)
    layered = compiled(schema)
    assert [accepts(layered, t) for t in texts] == expected
    assert any(expected)
    unique = compiled({"type": "array", "items": schema, "uniqueItems": True})
    good = list(dict.fromkeys(t for t, e in zip(texts, expected, strict=True) if e))[:6]
    assert accepts(unique, good)
    assert not accepts(unique, [*good, good[0]])


@pytest.mark.parametrize("spec", SPECS)
def test_from_every_prefix_a_text_can_be_closed(monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    monkeypatch.setattr(lengths, "MAX_PRODUCT", 0)
    monkeypatch.setattr(lengths, "MAX_CONTENT", 8)
    grammar = compiled({"type": "array", "items": {"type": "string", **spec}, "minItems": 2})
    for seed in range(20):
        rng, state = random.Random(seed), 0
        for _ in range(rng.randrange(30)):
            allowed = [t for t in grammar.allowed_tokens(state).tolist() if t != 256]
            if not allowed:
                break
            state = grammar.advance(state, rng.choice(allowed))  # type: ignore[assignment]
        for token in grammar.shortest_completion(state):
            state = grammar.advance(state, token)  # type: ignore[assignment]
        assert grammar.is_accepting(state)


def test_long_limits_cost_what_the_pattern_costs() -> None:
    schema = {"type": "string", "format": "uri", "maxLength": 65_535}
    grammar = compiled(schema)
    assert accepts(grammar, "http://a.b/" + "c" * 60_000)
    assert not accepts(grammar, "http://a.b/" + "c" * 65_535)
    assert grammar.machine.pool_used < 1_000_000


def test_equal_long_strings_are_not_unique() -> None:
    for items in ({"type": "string", "maxLength": 200}, {"type": "string", "pattern": "^[a-z]*$", "maxLength": 9000}):
        grammar = compiled({"type": "array", "items": items, "uniqueItems": True})
        for n in (62, 63, 64, 130):
            one, other = "a" * n + "b", "a" * n + "c"
            assert accepts(grammar, [one, other])
            assert not accepts(grammar, [one, other, one])


@pytest.mark.parametrize("limits", [{"minLength": 4, "maxLength": 90}, {}])
def test_many_patterns_of_which_one_is_enough_are_no_product(limits: dict[str, int]) -> None:
    found = ["ab1", "b12", "bc1", "c12", "ca1", "a12", "ac", "a2", "a1"]
    found += ["1.*2", "2.*1", "^....$", "b.*c", "c.*b", r"\d\d", "a.*b.*a"]
    schema = {"type": "string", "pattern": "[aA][12].*[zZ]", **limits, "anyOf": [{"pattern": p} for p in found]}
    grammar, valid, rng = compiled(schema), jsonschema.Draft202012Validator(schema), random.Random(3)
    seen = set()
    for _ in range(400):
        text = "".join(rng.choices("abcA12Zz _", k=rng.randrange(3, 9)))
        seen.add(valid.is_valid(text))
        assert accepts(grammar, text) == valid.is_valid(text), text
    assert seen == {False, True}


def test_lengths_that_a_language_lacks_are_contradictory() -> None:
    for schema in (
        {"type": "string", "format": "hostname", "minLength": 254},
        {"type": "string", "pattern": "^(ab)*$", "minLength": 5001, "maxLength": 5001},
    ):
        with pytest.raises(GrammarError, match="contradictory"):
            compiled(schema)


@pytest.mark.parametrize(
    ("name", "shortest"), [("hostname", 1), ("idn-hostname", 1), ("email", 3), ("idn-email", 3), ("uri", 2)]
)
def test_a_string_before_others_is_closed_as_soon_as_it_can_be(name: str, shortest: int) -> None:
    fields = {"name": {"type": "string", "format": name}, "list": {"type": "array", "minItems": 9}}
    schema = {"type": "object", "properties": fields, "required": ["name", "list"], "additionalProperties": False}
    grammar = compiled(schema)
    for begin in ("", '{"name":"', '{"list":[1,2,3,4,5,6,7,8,9],"name":"a'):
        state = grammar.advance_bytes(0, begin.encode())
        assert state is not None
        text = begin.encode() + bytes(grammar.shortest_completion(state))
        assert len(json.loads(text)["name"]) <= shortest + 3, text
