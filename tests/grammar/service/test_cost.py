from __future__ import annotations

import json

import pytest

from ramet.grammar.service.cost import expected_s

SMALL = [
    ("json_schema", '{"type": "integer"}'),
    ("json_schema", json.dumps({"properties": {f"p{i}": {"type": "string", "maxLength": 4000} for i in range(50)}})),
    ("regex", r"\d{3}-\d{4}"),
    ("choice", '["yes", "no"]'),
    ("unknown", "?"),
]
LARGE = [
    ("regex", "(?:(?!foo|bar|baz).){0,2000}"),
    ("regex", "((a{1,50}b){1,50}c){1,20}"),
    ("regex", "(a{1000}){1000}"),
    ("json_schema", json.dumps({"pattern": "^(?:(?!foo|bar|baz).){0,2000}$"})),
    ("json_schema", json.dumps({"patternProperties": {"^(?:(?!foo).){0,2000}$": {}}})),
    ("json_schema", json.dumps({"uniqueItems": True, "minItems": 5000, "items": {"type": "string"}})),
    ("substring", "a" * 100_000),
]


def test_large_sources_are_told_from_small_ones() -> None:
    assert max(expected_s(kind, text) for kind, text in SMALL) < 0.025
    assert min(expected_s(kind, text) for kind, text in LARGE) > 0.4


ODD = ["", "\\", "[", "[^", "(" * 1000, ")" * 1000, "{" * 100, "{9}", "{,}", "a{" + "9" * 5000 + "}", "a{1,2}{3}" * 500]
ODD += ["(?=" * 500, "[" * 200_000, '"pattern":"' * 100_000, "\ud800{7}", '{"minItems": ' + "9" * 5000]


@pytest.mark.parametrize("text", ODD)
def test_any_text_has_a_finite_cost(text: str) -> None:
    for kind in ("regex", "json_schema", "cfg", "nonsense"):
        assert 0 < expected_s(kind, text) < 1e7


def test_a_repetition_counts_for_what_it_repeats() -> None:
    once, often = expected_s("regex", "(abc)"), expected_s("regex", "(abc){100}")
    assert 10 < often / once < 100
    assert expected_s("regex", "(abc){100,200}") > expected_s("regex", "(abc){100}")
    assert expected_s("regex", "((a){50}){50}") > expected_s("regex", "(a){50}(a){50}")
