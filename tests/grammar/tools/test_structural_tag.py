"""Structural tags: free text stays free, a trigger begins exactly one of its parts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ramet.errors import GrammarError, InvalidGrammar
from ramet.grammar import Matcher, Vocabulary, compile_constraint

BYTES = Vocabulary([bytes([value]) for value in range(256)] + [b""], frozenset({256}), frozenset({256}), 257)
NUMBER = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
LEGACY = {
    "type": "structural_tag",
    "triggers": ["<f=", "[["],
    "structures": [
        {"begin": "<f=add>", "schema": NUMBER, "end": "</f>"},
        {"begin": "<f=abs>", "schema": {"enum": [1, 2]}, "end": "</f>"},
        {"begin": "[[", "schema": {"type": "boolean"}, "end": "]]"},
    ],
}


def newer(**fields: Any) -> dict[str, Any]:
    content = {"type": "json_schema", "json_schema": {"type": "boolean"}}
    tags = [{"begin": "<b>", "content": content, "end": "</b>"}]
    return {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<b"], "tags": tags, **fields}}


def accepts(source: dict[str, Any], text: str) -> bool:
    matcher = Matcher(compile_constraint("structural_tag", json.dumps(source), BYTES))
    for byte in text.encode():
        if not int(matcher.mask()[byte // 32]) >> (byte % 32) & 1:
            return False
        matcher.advance(byte)
    return bool(int(matcher.mask()[8]) & 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("anything é < f= [ <f", True),
        ('a <f=add>{"x": 3}</f> b', True),
        ('<f=add>{"x": -1}</f><f=abs>2</f>[[true]] [ [', True),
        ("<f=abs>2", False),
        ("<f=abs>3", False),
        ("<f=", False),
        ("<f=gone>", False),
        ('<f=add>{"y"', False),
        ("[[1", False),
        ("[[[", False),
        ("[[false]]]]", True),
    ],
)
def test_texts_of_several_tags(text: str, expected: bool) -> None:
    assert accepts(LEGACY, text) is expected


def test_one_part_can_be_asked_for_and_can_end_the_text() -> None:
    for text in ("", "free"):
        assert accepts(newer(), text)
        assert not accepts(newer(at_least_one=True), text)
    for fields in ({}, {"at_least_one": True}):
        assert accepts(newer(**fields), "so: <b>true</b> and <b>false</b>!")
    for fields in ({"stop_after_first": True}, {"stop_after_first": True, "at_least_one": True}):
        assert accepts(newer(**fields), "so: <b>true</b>")
        assert not accepts(newer(**fields), "so: <b>true</b>!")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "must be an object"),
        ({"type": "other"}, "not 'other'"),
        ({"triggers": ["a"], "structures": [], "more": 1}, "no field 'more'"),
        ({"triggers": [], "structures": []}, "0 triggers"),
        ({"triggers": "a", "structures": []}, "'triggers' must be a list"),
        ({"triggers": ["a"], "structures": [{"begin": "b", "schema": {}, "end": ""}]}, "no trigger is the beginning"),
        ({"triggers": ["a", "b"], "structures": [{"begin": "a", "schema": {}, "end": ""}]}, "'b' begins no tag"),
        ({"triggers": ["a"], "structures": [{"begin": "a", "schema": 3, "end": ""}]}, "JSON schema"),
        (
            {
                "triggers": ["a", "ba"],
                "structures": [{"begin": "a", "schema": {}, "end": ""}, {"begin": "ba", "schema": {}, "end": ""}],
            },
            "'a' is part of",
        ),
        ({"triggers": ["a"], "structures": [{"begin": "a", "schema": {}, "end": "x"}] * 2}, "two tags begin"),
        (
            {
                "triggers": ["a"],
                "structures": [{"begin": "a", "schema": {}, "end": "x"}, {"begin": "ab", "schema": {}, "end": ""}],
            },
            "begins another",
        ),
        (newer(at_least_one=1), "true or false"),
        ({"type": "structural_tag", "format": {"type": "sequence"}}, "not 'sequence'"),
    ],
)
def test_what_is_wrong_is_said(source: Any, message: str) -> None:
    with pytest.raises(InvalidGrammar, match=message):
        compile_constraint("structural_tag", json.dumps(source), BYTES)


def test_a_schema_that_cannot_be_enforced_is_refused() -> None:
    source = {"triggers": ["a"], "structures": [{"begin": "a", "schema": {"type": "nonsense"}, "end": "x"}]}
    with pytest.raises(GrammarError):
        compile_constraint("structural_tag", source, BYTES)
