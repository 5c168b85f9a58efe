"""Text that comes piece by piece equals the text of the whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.detokenizer import Detokenizer, count_kept_tokens

TOKEN_BYTES = [bytes([value]) for value in range(256)] + [b"", "né".encode(), "🎉".encode()[:2], "🎉".encode()[2:]]
token_lists = st.lists(st.integers(0, len(TOKEN_BYTES) - 1), max_size=40)


@given(token_lists, st.integers(1, 5))
def test_pieces_add_up_to_the_whole_decode(tokens: list[int], step: int) -> None:
    detokenizer = Detokenizer(TOKEN_BYTES)
    text = "".join(detokenizer.push(tokens[i : i + step]) for i in range(0, len(tokens), step)) + detokenizer.flush()
    assert text == b"".join(TOKEN_BYTES[token] for token in tokens).decode("utf-8", errors="replace")


@given(st.text(max_size=40))
def test_no_piece_of_valid_text_is_ever_broken(text: str) -> None:
    detokenizer = Detokenizer(TOKEN_BYTES)
    given_out = ""
    for byte in text.encode():
        given_out += detokenizer.push([byte])
        assert text.startswith(given_out)
    assert given_out == text
    assert detokenizer.flush() == ""


def test_a_character_that_was_cut_off_becomes_one_replacement() -> None:
    detokenizer = Detokenizer(TOKEN_BYTES)
    assert detokenizer.push("ab🎉".encode()[:-1]) == "ab"
    assert detokenizer.flush() == "�"
    assert detokenizer.flush() == ""
    assert detokenizer.push(b"x") == "x"


def test_special_tokens_have_no_text_and_do_not_disturb_a_character() -> None:
    tokenizer = ByteTokenizer()
    first, second = "é".encode()
    detokenizer = Detokenizer(tokenizer.token_bytes)
    assert [detokenizer.push([token]) for token in (first, 257, second)] == ["", "", "é"]


def test_kept_tokens_are_those_wholly_inside_the_text() -> None:
    tokens = [257, 256, ord("x"), 258, 259]  # né, special, x, and two halves of a character
    assert count_kept_tokens(TOKEN_BYTES, tokens, "néx🎉") == 5
    assert count_kept_tokens(TOKEN_BYTES, tokens, "néx") == 3
    assert count_kept_tokens(TOKEN_BYTES, tokens, "né") == 1
    assert count_kept_tokens(TOKEN_BYTES, tokens, "n") == 0
    assert count_kept_tokens(TOKEN_BYTES, tokens, "") == 0


def test_bytes_that_may_be_no_text_are_held_back_until_the_next_call() -> None:
    detokenizer = Detokenizer(TOKEN_BYTES)
    assert detokenizer.push(b"34 y", 2) == "34"
    assert detokenizer.push(b"a", 0) == " ya"
    assert detokenizer.push(b"b ye", 3) == "b"
    assert detokenizer.flush(2) == " "
    assert detokenizer.push(b"new", 1) == "ne"
    assert detokenizer.flush() == "w"
