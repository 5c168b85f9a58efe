"""The rule of token healing: which last token of a prompt the model writes again."""

from __future__ import annotations

import pytest

from ramet.lang.graph.prompt_tokens import healing

TOKENS = [b"", b"a", b"ab", b"ab1", b" ", b" a", b"(", b"()", b"\n", b"\n\n", "é".encode()[:1], "é".encode(), b"x!"]
GIVEN_BACK = healing([*TOKENS, b"x", "\N{NO-BREAK SPACE}".encode(), b"c", "cé".encode()])


@pytest.mark.parametrize(
    ("text", "is_given_back"),
    [
        ("a", True),  # ab
        ("ab", True),  # ab1
        ("ab1", False),
        (" ", True),
        ("(", False),  # only a mark may follow in one token
        ("\n", True),
        ("\n\n", False),
        ("x", False),
        ("c", True),  # cé
        ("\N{NO-BREAK SPACE}", False),
        ("é", False),
    ],
)
def test_a_token_is_given_back_where_a_longer_one_goes_on(text: str, is_given_back: bool) -> None:
    tokens = [*TOKENS, b"x", "\N{NO-BREAK SPACE}".encode(), b"c", "cé".encode()]
    data = text.encode()
    assert GIVEN_BACK(tokens.index(data), 9) == (data if is_given_back else b"")


def test_special_tokens_half_characters_and_text_of_others_stay() -> None:
    assert GIVEN_BACK(0, 9) == b""
    assert GIVEN_BACK(TOKENS.index("é".encode()[:1]), 9) == b""
    assert GIVEN_BACK(TOKENS.index(b"ab"), 1) == b"", "its first letter is not the author's"
    assert GIVEN_BACK(TOKENS.index(b"ab"), 2) == b"ab"
