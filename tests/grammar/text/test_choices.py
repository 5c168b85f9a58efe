from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.errors import InvalidGrammar
from ramet.grammar.text.choices import choices


@given(st.lists(st.text("abé€", max_size=5), min_size=1, max_size=20), st.lists(st.text("abé€", max_size=5)))
def test_accepts_the_choices_and_nothing_else(texts: list[str], others: list[str]) -> None:
    found = choices(texts)
    for text in (*texts, *others):
        assert found.accepts(text.encode()) == (text in texts)


def test_equal_endings_are_shared() -> None:
    assert len(choices([f"{i:05d} items in the cart" for i in range(1000)]).rows) < 40


@pytest.mark.parametrize(
    ("texts", "message"), [([], "empty"), ([1], "a choice is a str, not int"), (["\ud800"], "surrogate")]
)
def test_bad_lists_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(InvalidGrammar, match=message):
        choices(texts)
