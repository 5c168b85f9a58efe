"""Text that comes piece by piece equals the text of the whole."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.detokenizer import Detokenizer, StopStringScanner, count_kept_tokens

TOKEN_BYTES = [bytes([value]) for value in range(256)] + [b"", "né".encode(), "🎉".encode()[:2], "🎉".encode()[2:]]
token_lists = st.lists(st.integers(0, len(TOKEN_BYTES) - 1), max_size=40)
texts = st.text(alphabet="abcé🎉", max_size=40)
stop_lists = st.lists(st.text(alphabet="abcé🎉", min_size=1, max_size=4), min_size=1, max_size=4)


def cut(items: str, borders: list[int]) -> list[str]:
    points = sorted({0, len(items), *(border % (len(items) + 1) for border in borders)})
    return [items[start:stop] for start, stop in pairwise(points)]


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


def expected_scan(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: the first character at which any stop string ends; the longest of those that end there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(texts, stop_lists, st.lists(st.integers(0, 100), max_size=8))
def test_scanner_equals_a_search_of_the_whole_however_the_text_is_cut(
    text: str, stops: list[str], borders: list[int]
) -> None:
    scanner = StopStringScanner(stops)
    given_out = ""
    for piece in cut(text, borders):
        safe, _ = scanner.push(piece)
        given_out += safe
        assert scanner.num_kept == len(given_out)
    given_out += scanner.flush()
    assert (given_out, scanner.matched) == expected_scan(text, stops)


@given(texts, stop_lists)
def test_scanner_holds_back_only_what_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    scanner = StopStringScanner(stops)
    given_out = ""
    for count, character in enumerate(text, start=1):
        safe, matched = scanner.push(character)
        if matched is not None:
            return
        given_out += safe
        held = text[len(given_out) : count]
        tails = [text[start:count] for start in range(count + 1)]
        assert held == next(tail for tail in tails if not tail or any(stop.startswith(tail) for stop in stops))


def test_a_stop_string_across_pushes_is_reported_once_and_ends_the_text() -> None:
    scanner = StopStringScanner(["\nUser:", "END"])
    assert scanner.push("hello\nUs") == ("hello", None)
    assert scanner.push("er: more") == ("", "\nUser:")
    assert scanner.push("even more") == ("", "\nUser:")
    assert scanner.flush("rest") == ""
    assert scanner.num_kept == 5


def test_a_false_start_is_given_out_when_it_is_refuted() -> None:
    scanner = StopStringScanner(["aab"])
    assert scanner.push("aaa") == ("a", None)
    assert scanner.push("c") == ("aac", None)
    assert scanner.push("aa") == ("", None)
    assert scanner.flush("!") == "aa!"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStringScanner([""])


def test_kept_tokens_are_those_wholly_inside_the_text() -> None:
    tokens = [257, 256, ord("x"), 258, 259]  # né, special, x, and two halves of a character
    assert count_kept_tokens(TOKEN_BYTES, tokens, "néx🎉") == 5
    assert count_kept_tokens(TOKEN_BYTES, tokens, "néx") == 3
    assert count_kept_tokens(TOKEN_BYTES, tokens, "né") == 1
    assert count_kept_tokens(TOKEN_BYTES, tokens, "n") == 0
    assert count_kept_tokens(TOKEN_BYTES, tokens, "") == 0


def test_cost_of_a_token_does_not_grow_with_the_text() -> None:
    detokenizer, scanner = Detokenizer(TOKEN_BYTES), StopStringScanner(["a" * 50 + "b"])
    seconds = []
    for _ in range(6):
        start_s = time.perf_counter()
        for _ in range(5_000):
            scanner.push(detokenizer.push([ord("a")]))
        seconds.append(time.perf_counter() - start_s)
    # Work that grows with the text would take eleven times as long in the last block as in the first.
    assert min(seconds[3:]) < 4 * min(seconds[:3])


def test_bytes_that_may_be_no_text_are_held_back_until_the_next_call() -> None:
    detokenizer = Detokenizer(TOKEN_BYTES)
    assert detokenizer.push(b"34 y", 2) == "34"
    assert detokenizer.push(b"a", 0) == " ya"
    assert detokenizer.push(b"b ye", 3) == "b"
    assert detokenizer.flush(2) == " "
    assert detokenizer.push(b"new", 1) == "ne"
    assert detokenizer.flush() == "w"


def test_a_scanner_tells_whether_a_text_ends_before_another_one_without_taking_them() -> None:
    scanner = StopStringScanner(["abc", "!"])
    assert scanner.push("xa") == ("x", None)
    assert scanner.ends_with("b", "c")
    assert scanner.ends_with("bd", "!")
    assert not scanner.ends_with("b", "")
    assert not scanner.ends_with("b", "d!"), "the stop string begins later"
    assert scanner.push("bd") == ("abd", None)
    assert (scanner.matched, scanner.num_kept) == (None, 4)
