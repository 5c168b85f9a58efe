from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.errors import InvalidGrammar
from ramet.grammar.text.substring import substring_of


@given(st.text("abé€", min_size=1, max_size=30), st.lists(st.text("abé€", max_size=4), max_size=20))
def test_passages_are_the_substrings(text: str, others: list[str]) -> None:
    found = substring_of(text)
    for i in range(len(text)):
        for j in range(i + 1, len(text) + 1):
            assert found.accepts(text[i:j].encode())
    for other in others:
        assert found.accepts(other.encode()) == (other != "" and other in text)


@given(st.text("ab \n", max_size=20), st.lists(st.text("ab \n", max_size=6), max_size=20))
def test_passages_of_words_begin_and_end_with_whole_words(text: str, others: list[str]) -> None:
    words = [m.span() for m in re.finditer(r"\S+", text)]
    expected = {text[a:b] for i, (a, _) in enumerate(words) for _, b in words[i:]}
    if not expected:
        with pytest.raises(InvalidGrammar, match="no words"):
            substring_of(text, unit="words")
        return
    found = substring_of(text, unit="words")
    for candidate in (*expected, *others):
        assert found.accepts(candidate.encode()) == (candidate in expected)


def test_a_passage_does_not_begin_inside_a_character() -> None:
    assert not substring_of("é").accepts("é".encode()[1:])


@pytest.mark.parametrize("allow_empty", [False, True])
def test_the_empty_passage_is_an_option(allow_empty: bool) -> None:
    assert substring_of("ab", allow_empty=allow_empty).accepts(b"") == allow_empty


def test_states_grow_with_the_text_and_not_with_its_square() -> None:
    text = "abc" * 500 + "cba" * 500
    assert len(substring_of(text).rows) <= 2 * len(text)


def test_a_text_without_passages_is_refused() -> None:
    with pytest.raises(InvalidGrammar, match="no characters"):
        substring_of("")
