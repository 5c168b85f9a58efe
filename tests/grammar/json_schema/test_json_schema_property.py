"""Random schemas: the compiled grammar and an independent validator agree; masks equal brute force; no dead ends."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import jsonschema
import numpy as np
from hypothesis import HealthCheck, assume, given, settings

from ramet.errors import GrammarError
from ramet.grammar import CompiledGrammar, Matcher, Vocabulary, compile_grammar
from ramet.grammar.ir import JsonOptions, JsonSchema

PIECES = [
    *(b'{"', b'":', b'": "', b'","', b'"}', b"},", b"[]", b'":[', b'a":', b'a"', b"true", b"ab", b"10", b", ", b": "),
    *(b'"a"', b'"b":', "é".encode(), b"\\u00", b'\\"', b'b","a', b'"a":1,"a', b"null,", b"]}", b"1.0", b"abab", b' "'),
]
VOCABULARY = Vocabulary(
    [*(bytes((i,)) for i in range(256)), *PIECES, b"<eos>"], [256 + len(PIECES)], [256 + len(PIECES)]
)
BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b"<eos>"], [256], [256])

keys = st.sampled_from(["a", "b", "ab", "é", 'q"'])
scalars = st.sampled_from([None, True, False, 0, 1, 2, -1, 10, 1.5, "", "a", "b", "ab", "abab", 'é"', "10"])
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=6)
counts = st.integers(0, 3)
numbers = st.sampled_from([-1, 0, 1, 2, 1.5, 10])
# `.` and `$` treat line ends differently in ECMA-262 (ours) and Python (the validator's): left out where it could show
patterns = st.sampled_from(["a", "^a", "b$", "^[ab]*$", "^(?!a)", "^[ab]{1,2}$", "[^a]"])


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    maps = st.dictionaries(keys, inner, max_size=3)
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", ["object", "null"]]),
            "properties": maps,
            "required": st.lists(keys, unique=True, max_size=2),
            "additionalProperties": inner,
            "patternProperties": st.dictionaries(patterns, inner, max_size=2),
            "propertyNames": st.sampled_from([{"maxLength": 1}, {"pattern": "^a"}, {"enum": ["a", "b"]}]),
            "minProperties": counts,
            "maxProperties": counts,
            "dependentRequired": st.dictionaries(keys, st.lists(keys, max_size=2, unique=True), max_size=2),
            "dependentSchemas": st.dictionaries(keys, inner, max_size=1),
        },
    )


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.just("array"),
            "items": inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "minItems": counts,
            "maxItems": counts,
            "contains": inner,
            "maxContains": counts,
            "uniqueItems": st.booleans(),
        },
    )


plain = st.one_of(
    st.booleans(),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["string", "integer", "number", "null", "boolean", "object", "array"])}
    ),
    st.fixed_dictionaries({"enum": st.lists(values, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"const": values}),
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["integer", "number"]),
            "minimum": numbers,
            "maximum": numbers,
            "exclusiveMaximum": numbers,
            "multipleOf": st.sampled_from([1, 2, 5]),
        },
    ),
    st.fixed_dictionaries(
        {}, optional={"type": st.just("string"), "minLength": counts, "maxLength": counts, "pattern": patterns}
    ),
)


def combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        objects(inner),
        arrays(inner),
        st.fixed_dictionaries(
            {},
            optional={
                "anyOf": several,
                "oneOf": several,
                "allOf": several,
                "not": inner,
                "if": inner,
                "then": inner,
                "else": inner,
                "unevaluatedProperties": st.just(False),
                "properties": st.dictionaries(keys, inner, max_size=2),
            },
        ),
    )


schemas = st.recursive(plain, combined, max_leaves=5)
few = st.sampled_from([True, {"enum": [1, "a"]}, {"type": "boolean"}, {"type": "string"}, {"pattern": "^[ab]$"}, {}])
items = st.recursive(
    few,
    lambda inner: st.one_of(
        objects(inner).map(lambda s: {"type": "object", "additionalProperties": False, **s}),
        arrays(inner).map(lambda s: {"type": "array", "maxItems": 2, **s}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=2, max_size=2)}),
    ),
    max_leaves=3,
)
distinct = arrays(items).map(lambda s: {**s, "type": "array", "uniqueItems": True})
distinct |= st.lists(distinct, min_size=2, max_size=2).map(lambda s: {"oneOf": s})
relaxed = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


def compiled(schema: Any, vocabulary: Vocabulary) -> CompiledGrammar:
    """The grammar; examples that are contradictory or too large are not of interest."""
    try:
        return compile_grammar(JsonSchema(schema, JsonOptions(whitespace="any")), vocabulary)
    except GrammarError:
        assume(False)
        raise


def is_valid(schema: Any, value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def accepts(grammar: CompiledGrammar, text: bytes) -> bool:
    state = grammar.advance_bytes(0, text)
    return state is not None and grammar.is_accepting(state)


@relaxed
@given(schemas | distinct, st.lists(values, min_size=3, max_size=8))
def test_a_value_is_accepted_exactly_when_it_validates(schema: Any, instances: list[Any]) -> None:
    try:
        grammar = compile_grammar(JsonSchema(schema, JsonOptions(whitespace="any")), BYTES)
    except GrammarError as error:
        if "contradictory" in str(error):
            assert not any(is_valid(schema, value) for value in instances)
        return
    for value in instances:
        wanted = is_valid(schema, value)
        for text in (json.dumps(value), json.dumps(value, separators=(",", ":"), ensure_ascii=False)):
            assert accepts(grammar, text.encode()) == wanted, (schema, text, wanted)


@relaxed
@given(schemas | distinct, st.data())
def test_random_walks_never_end_dead_and_their_texts_validate(schema: Any, data: st.DataObject) -> None:
    grammar = compiled(schema, VOCABULARY)
    state, text = 0, b""
    for _ in range(data.draw(st.integers(0, 12), label="steps")):
        allowed = [t for t in grammar.allowed_tokens(state).tolist() if t not in VOCABULARY.eos_ids]
        if not allowed:
            assert grammar.is_accepting(state), text
            break
        token = data.draw(st.sampled_from(allowed), label="token")
        following = grammar.advance(state, token)
        assert following is not None, (text, VOCABULARY.token_bytes[token])
        state, text = following, text + VOCABULARY.token_bytes[token]
    for token in grammar.shortest_completion(state):
        following = grammar.advance(state, token)
        assert following is not None, (text, VOCABULARY.token_bytes[token])
        state, text = following, text + VOCABULARY.token_bytes[token]
    assert grammar.is_accepting(state), text
    value = json.loads(text)
    assert is_valid(schema, value), (schema, text)


def test_an_item_that_another_contains_forbids_is_still_worth_writing() -> None:
    """It looked cheaper to put off the one item that is needed, at every item: the text was never closed."""
    arrays = {"type": "array", "maxItems": 2}
    schema = {
        "oneOf": [
            {"type": "array", "uniqueItems": True, "contains": arrays},
            {"type": "array", "uniqueItems": True, "contains": {**arrays, "items": {"enum": [1, "a"]}}},
        ]
    }
    grammar = compiled(schema, VOCABULARY)
    begun = b'[{"a'
    state = grammar.advance_bytes(0, begun)
    assert state is not None
    text = begun + b"".join(VOCABULARY.token_bytes[token] for token in grammar.shortest_completion(state))
    assert is_valid(schema, json.loads(text)), text
    assert len(text) < 40


@relaxed
@given(schemas | distinct, values, st.data())
def test_masks_equal_brute_force_along_any_split(schema: Any, value: Any, data: st.DataObject) -> None:
    grammar = compiled(schema, VOCABULARY)
    text = json.dumps(value, ensure_ascii=False).encode()
    matcher, position = Matcher(grammar), 0
    while True:
        allowed = set(grammar.allowed_tokens(matcher.state).tolist())
        brute = {t for t in range(256 + len(PIECES)) if grammar.advance(matcher.state, t) is not None}
        if matcher.is_accepting:
            brute.add(VOCABULARY.eos_ids[0])
        assert allowed == brute, (schema, text[:position], [VOCABULARY.token_bytes[t] for t in allowed ^ brute])
        if position == len(text):
            break
        fitting = [t for t in brute if t < 256 + len(PIECES) and text.startswith(VOCABULARY.token_bytes[t], position)]
        if not fitting:
            break
        token = data.draw(st.sampled_from(sorted(fitting)), label="token")
        assert matcher.advance(token)
        position += len(VOCABULARY.token_bytes[token])
    assert (position == len(text) and matcher.is_accepting) == is_valid(schema, value), (schema, text, position)


@relaxed
@given(schemas, st.data())
def test_rollback_and_fork_give_the_same_masks(schema: Any, data: st.DataObject) -> None:
    grammar = compiled(schema, VOCABULARY)
    matcher, masks = Matcher(grammar), []
    for _ in range(6):
        allowed = [t for t in grammar.allowed_tokens(matcher.state).tolist() if t not in VOCABULARY.eos_ids]
        if not allowed:
            break
        masks.append(matcher.mask().copy())
        assert matcher.advance(data.draw(st.sampled_from(allowed)))
    for i in range(len(masks) - 1, -1, -1):
        matcher.rollback(1)
        assert np.array_equal(matcher.mask(), masks[i])
        assert np.array_equal(matcher.fork().mask(), masks[i])
