"""Grammars composed of texts, patterns and JSON schemas."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import GrammarError, GrammarTooLarge, InvalidGrammar, InvalidRegex, InvalidSchema
from ramet.grammar import CompiledGrammar
from ramet.grammar.service.check import byte_vocabulary
from ramet.grammar.service.sources import compile_constraint

ROW = {"sequence": ["- ", {"regex": "[a-z]+"}, "\n"]}
SUM = {
    "start": {"rule": "sum"},
    "rules": {
        "sum": {"select": [{"rule": "term"}, {"sequence": [{"rule": "sum"}, "+", {"rule": "term"}]}]},
        "term": {"select": [{"regex": "[0-9é]+"}, {"sequence": ["(", {"rule": "sum"}, ")"]}]},
    },
}
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


def compiled(source: Any) -> CompiledGrammar:
    return compile_constraint("grammar", json.dumps(source), byte_vocabulary())


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    state = grammar.advance_bytes(0, text.encode())
    return state is not None and grammar.is_accepting(state)


@pytest.mark.parametrize(
    ("source", "fine", "wrong"),
    [
        ("a{b}é", ["a{b}é"], ["", "a"]),
        ({"repeat": ROW, "at_least": 1, "at_most": 2}, ["- a\n", "- a\n- bc\n"], ["", "- a", "- a\n- b\n- c\n"]),
        ({"repeat": {"choices": ["a", "bb"]}}, ["", "abb", "aaa"], ["b"]),
        ({"sequence": ["no: ", {"substring_of": "it is too late"}]}, ["no: is too", "no: it is"], ["no"]),
        ({"all": [{"regex": "[a-c]*"}, {"not": {"regex": ".*ab.*"}}]}, ["", "ba", "cb"], ["ab", "cab"]),
        ({"all": []}, ["", "anything\n"], []),
        ({"number": {"minimum": -1.5, "maximum": 12}}, ["-1.5", " 007 ", "+12", "12.0", "-0"], ["13", "-1.6", "1e1"]),
        ({"number": {}}, ["-123.25"], ["x"]),
        ({"until": ["ab"], "of": {"regex": "[abc]{2,3}"}}, ["ca", "caab", "cccab!"], ["c", "cab", "aab"]),
        (SUM, ["1", "1+(2+é)", "(((1)))+2+3"], ["", "1+", "(1", "1)"]),
        (
            {"start": {"sequence": ["<", {"rule": "p"}, ">"]}, "rules": {"p": {"repeat": "p"}}},
            ["<>", "<pp>"],
            ["p"],
        ),
        ({"sequence": ["at ", {"json_schema": {"type": "string"}}, "."]}, ['at "x".', 'at "\\n.".'], ["at x."]),
        (
            {"repeat": {"select": [{"json_schema": {"type": "integer"}}, ", "]}, "at_most": 3},
            ["1, 2", "", ", , 12"],
            ["1, x"],
        ),
    ],
)  # fmt: skip
def test_a_composed_grammar_has_the_texts_of_its_parts(source: Any, fine: list[str], wrong: list[str]) -> None:
    grammar = compiled(source)
    for text in fine:
        assert accepts(grammar, text), text
    for text in wrong:
        assert not accepts(grammar, text), text


def pieces() -> st.SearchStrategy[tuple[Any, str]]:
    """Grammars, and the same language as a pattern."""

    def extended(inner: st.SearchStrategy[tuple[Any, str]]) -> st.SearchStrategy[tuple[Any, str]]:
        lists = st.lists(inner, min_size=1, max_size=3)
        counts = st.tuples(inner, st.integers(0, 2), st.none() | st.integers(0, 2))
        return st.one_of(
            lists.map(lambda of: ({"sequence": [node for node, _ in of]}, "".join(f"(?:{p})" for _, p in of))),
            lists.map(lambda of: ({"select": [node for node, _ in of]}, "|".join(f"(?:{p})" for _, p in of))),
            counts.map(
                lambda one: (
                    {"repeat": one[0][0], "at_least": one[1], "at_most": None if one[2] is None else one[1] + one[2]},
                    f"(?:{one[0][1]}){{{one[1]},{'' if one[2] is None else one[1] + one[2]}}}",
                )
            ),
        )

    return st.recursive(st.sampled_from([(text, text) for text in ("a", "b", "ab")]), extended, max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(piece=pieces(), texts=st.lists(st.text(alphabet="ab", max_size=6), min_size=3, max_size=6))
def test_a_composed_grammar_equals_the_pattern_of_the_same_form(piece: tuple[Any, str], texts: list[str]) -> None:
    grammar = compiled(piece[0])
    for text in texts:
        assert accepts(grammar, text) == (re.fullmatch(piece[1], text) is not None)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, InvalidGrammar, "start: a node is a text or an object, not 3"),
        ({"sequence": ["a", {"regexp": "b"}]}, InvalidGrammar, r"sequence\[1\]: a node has one of the fields"),
        ({"sequence": "ab"}, InvalidGrammar, "sequence must be a list, not 'ab'"),
        ({"regex": "a", "choices": ["b"]}, InvalidGrammar, "field 'choices' does not stand beside regex"),
        ({"regex": "("}, InvalidRegex, "position 0"),
        ({"choices": []}, InvalidGrammar, "choices must be a list of texts"),
        ({"repeat": "a", "at_least": 3, "at_most": 2}, InvalidGrammar, "at_least is 3, but at_most is 2"),
        ({"repeat": "a", "at_most": 10**6}, InvalidGrammar, "at_most must be an integer in"),
        ({"repeat": "a", "at_least": True}, InvalidGrammar, "at_least must be an integer"),
        ({"number": {"minimum": "1"}}, InvalidGrammar, "minimum must be a number, not '1'"),
        ({"until": [""], "of": "a"}, InvalidGrammar, "until must be a list of texts"),
        ({"until": ["a"]}, InvalidGrammar, "until must be a list of texts"),
        ({"rule": "x"}, InvalidGrammar, "there is no rule 'x'; rules are none"),
        ({"start": "a", "rules": {"": "b"}}, InvalidGrammar, "rules must be an object"),
        ({"start": "a", "rule": {}}, InvalidGrammar, "field 'rule' does not stand beside"),
        ({"not": {"json_schema": True}}, InvalidGrammar, "a JSON value can't stand inside"),
        ({"start": {"not": {"rule": "a"}}, "rules": {"a": "b"}}, InvalidGrammar, "a rule can't stand inside"),
        ({"json_schema": 3}, InvalidGrammar, "json_schema must be an object"),
        ({"json_schema": {"type": "x"}}, InvalidSchema, "type"),
        ({"select": [{"json_schema": True}, {"json_schema": POINT}]}, InvalidGrammar, "make them one value of a union"),
        ({"select": [{"json_schema": POINT}, "{x}"]}, InvalidGrammar, "can begin alike"),
        ({"sequence": [{"json_schema": {"type": "integer"}}, "5"]}, InvalidGrammar, "can go on with"),
        ({"start": {"rule": "a"}, "rules": {"a": {"sequence": ["(", {"rule": "a"}, {"json_schema": True}]}}},
         InvalidGrammar, "can't stand in a grammar with recursive rules"),
        ({"select": []}, GrammarError, "contradictory"),
        ({"start": {"rule": "a"}, "rules": {"a": {"sequence": ["(", {"rule": "a"}]}}}, GrammarError, "contradictory"),
        ("\ud800", InvalidGrammar, "lone surrogate"),
        ({"sequence": ["a"] * 30_000}, GrammarTooLarge, "more than 20,000 nodes"),
        ({"all": [{"regex": "(?s:.){1,9000}"}, {"regex": "[ab]*a[ab]{9}"}]}, GrammarTooLarge, "states"),
    ],
)  # fmt: skip
def test_a_wrong_grammar_is_an_error_that_names_the_place(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compiled(source)


def test_a_grammar_that_is_nested_too_deeply_is_a_typed_error() -> None:
    source: Any = "a"
    for _ in range(5000):
        source = {"sequence": [source]}
    with pytest.raises(GrammarTooLarge):
        compile_constraint("grammar", source, byte_vocabulary())
