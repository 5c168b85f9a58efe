"""Few texts of a language, against all texts over its alphabet; and schemas for which finding them did not end."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.grammar import Vocabulary, compile_constraint
from ramet.grammar.json_schema.algebra.languages import Languages, few_texts

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b"<eos>"], [256], [256])
PARTS = st.sampled_from(["a", "b", "[ab]", "(a|bb)", "a*", "b+", "(ab)*", "[ab]{2}", "b?"])


@given(
    parts=st.lists(PARTS, min_size=1, max_size=4),
    low=st.integers(0, 3),
    high=st.integers(0, 6),
    limit=st.integers(1, 6),
)
def test_as_many_texts_are_found_as_there_are_or_as_are_wanted(
    parts: list[str], low: int, high: int, limit: int
) -> None:
    source = f"^{''.join(parts)}$"
    languages = Languages(1000)
    found = list(few_texts(languages.dfa(languages.add("pattern", source)), low, high, limit))
    texts = ("".join(text) for length in range(low, high + 1) for text in itertools.product("ab", repeat=length))
    matching = {text for text in texts if re.search(source, text)}
    assert len(found) == len(set(found)) == min(limit, len(matching))
    assert set(found) <= matching
    assert [len(text) for text in found] == sorted(len(text) for text in matching)[: len(found)]


@pytest.mark.parametrize("pattern", ["ba+$", "x[0-9]{3}y", "(?:b|c)a$"])
def test_a_pattern_and_an_excluded_text_are_compared_although_most_beginnings_lead_nowhere_soon(pattern: str) -> None:
    schema = {"type": "string", "pattern": pattern, "not": {"const": "h"}}
    grammar = compile_constraint("json_schema", json.dumps(schema), BYTES)
    text = bytes(grammar.shortest_completion(0)).decode()
    assert re.search(pattern, json.loads(text))
