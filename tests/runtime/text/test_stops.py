"""Where a text ends: strings and patterns are found however the text is cut, and only what may match is held back."""

from __future__ import annotations

import re
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramet.errors import InvalidRequest
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.text.detokenizer import Detokenizer
from ramet.runtime.text.stops import StopScanner, check_pattern

TOKEN_BYTES = ByteTokenizer().token_bytes
texts = st.text(alphabet="abcé🎉", max_size=40)
stop_lists = st.lists(st.text(alphabet="abcé🎉", min_size=1, max_size=4), min_size=1, max_size=4)
PATTERNS = (
    r"a+b",
    r"ab|ba+",
    r"[0-9]{2}a",
    r"b[^b]*b",
    r"(a|b)*1",
    r"a.?1|1{3}",
    r"(?i)AB",
    r"a*?b1",
    r"[\s\S]b",
    r"a(b(1a)?)?1",
)
pattern_lists = st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3)


def cut(items: str, borders: list[int]) -> list[str]:
    points = sorted({0, len(items), *(border % (len(items) + 1) for border in borders)})
    return [items[start:stop] for start, stop in pairwise(points)]


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
    scanner = StopScanner(stops)
    given_out = ""
    for piece in cut(text, borders):
        safe, _ = scanner.push(piece)
        given_out += safe
        assert scanner.num_kept == len(given_out)
    given_out += scanner.flush()
    assert (given_out, scanner.matched) == expected_scan(text, stops)


@given(texts, stop_lists)
def test_scanner_holds_back_only_what_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
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
    scanner = StopScanner(["\nUser:", "END"])
    assert scanner.push("hello\nUs") == ("hello", None)
    assert scanner.push("er: more") == ("", "\nUser:")
    assert scanner.push("even more") == ("", "\nUser:")
    assert scanner.flush("rest") == ""
    assert scanner.num_kept == 5


def test_a_false_start_is_given_out_when_it_is_refuted() -> None:
    scanner = StopScanner(["aab"])
    assert scanner.push("aaa") == ("a", None)
    assert scanner.push("c") == ("aac", None)
    assert scanner.push("aa") == ("", None)
    assert scanner.flush("!") == "aa!"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopScanner([""])


def test_a_scanner_tells_whether_a_text_ends_before_another_one_without_taking_them() -> None:
    scanner = StopScanner(["abc", "!"])
    assert scanner.push("xa") == ("x", None)
    assert scanner.ends_with("b", "c")
    assert scanner.ends_with("bd", "!")
    assert not scanner.ends_with("b", "")
    assert not scanner.ends_with("b", "d!"), "the stop string begins later"
    assert scanner.push("bd") == ("abd", None)
    assert (scanner.matched, scanner.num_kept) == (None, 4)


def test_cost_of_a_token_does_not_grow_with_the_text() -> None:
    """The next token's work depends on what is kept alone: whether the text is long or not, it is as large."""
    detokenizer, scanner = Detokenizer(TOKEN_BYTES), StopScanner(["a" * 50 + "b"], [r"[ab]{3,50}!"])
    kept = set()
    for num_tokens in range(1, 6001):
        scanner.push(detokenizer.push([ord("a")]))
        if num_tokens % 1000 == 0:
            kept.add(sum(held(part) for part in (detokenizer, scanner)))
    assert len(kept) == 1


def held(part: object) -> int:
    """Number of characters, bytes and items that an object's attributes hold."""
    names = [
        *getattr(part, "__dict__", ()),
        *(n for kind in type(part).__mro__ for n in getattr(kind, "__slots__", ())),
    ]
    values = [getattr(part, name) for name in names if not name.startswith("__")]
    return sum(len(value) for value in values if isinstance(value, str | bytes | bytearray | list | dict | set))


def search(text: str, stops: list[str], patterns: list[str]) -> tuple[str, str | None]:
    """By definition: the first character at which a match ends; the longest of those that end there."""
    every = {**{stop: re.escape(stop) for stop in stops}, **{pattern: pattern for pattern in patterns}}
    for end in range(1, len(text) + 1):
        for start in range(end):
            for name, pattern in every.items():
                if re.fullmatch(pattern, text[start:end]):
                    return text[:start], name
    return text, None


@given(
    st.text(alphabet="ab1\n", max_size=14),
    st.lists(st.text(alphabet="ab1", min_size=1, max_size=3), max_size=2),
    pattern_lists,
    st.lists(st.integers(0, 100), max_size=6),
)
def test_patterns_and_strings_are_found_as_a_search_of_every_beginning_finds_them(
    text: str, stops: list[str], patterns: list[str], borders: list[int]
) -> None:
    scanner = StopScanner(stops, patterns)
    given_out = "".join(scanner.push(piece)[0] for piece in cut(text, borders)) + scanner.flush()
    expected, name = search(text, stops, patterns)
    assert given_out == expected
    assert (scanner.matched is None) == (name is None)
    if scanner.matched is not None and scanner.matched in patterns:
        assert any(re.fullmatch(scanner.matched, text[len(expected) : end]) for end in range(len(text) + 1))


ENDINGS = ["".join(letters) for count in range(5) for letters in product("ab1", repeat=count)]


@given(st.text(alphabet="ab1", max_size=8), st.sampled_from(PATTERNS))
def test_what_is_held_back_may_become_a_match_and_nothing_else_is(text: str, pattern: str) -> None:
    scanner = StopScanner([], [pattern])
    given_out = ""
    for count, character in enumerate(text, 1):
        safe, matched = scanner.push(character)
        if matched is not None:
            return
        given_out += safe
        tails = [text[start:count] for start in range(count + 1)]
        may_match = (t for t in tails if not t or any(re.fullmatch(pattern, t + ending) for ending in ENDINGS))
        assert text[len(given_out) : count] == next(may_match)


def test_of_a_pattern_the_earliest_end_counts_and_then_the_earliest_beginning() -> None:
    scanner = StopScanner([], [r"\d+px"])
    assert scanner.push("width: 12") == ("width: ", None)
    assert scanner.push("0") == ("", None)
    assert scanner.push("px wide") == ("", r"\d+px")
    assert scanner.num_kept == len("width: ")
    refuted = StopScanner([], [r"\d+px"])
    assert refuted.push("12") == ("", None)
    assert refuted.push(" o'clock") == ("12 o'clock", None)
    assert refuted.flush() == ""


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(unclosed", "does not parse"),
        ("x*", "matches an empty text"),
        ("", "matches an empty text"),
        ("^a", "looks beyond"),
        ("a$", "looks beyond"),
        (r"\ba", "around the match"),
        (r"a\b", "around the match"),
        ("a(?!b)", "around the match"),
        ("a(?=b)", "looks beyond"),
        ("(?<=a)b", "lookbehind"),
        (r"(a+)\1", "back reference to the group 1, which has more than 256 texts"),
        ("a{300}", "more than 256 automaton states"),
        ("(a|b)*a(a|b){12}", "more than 256 automaton states"),
        ("(?:(?:(?:a?){50}){50}){50}", "more than 2,000 parts"),
        ("(?:ab|c){9}(x{100}){1,99}", "more than 2,000 parts"),
    ],
)
def test_a_pattern_by_which_no_text_can_end_is_refused_with_the_reason(pattern: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        check_pattern(pattern)
    assert caught.value.param == "stop_regex"


def test_the_matches_that_have_begun_are_never_more_than_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the worst text for a pattern, a character costs one step for each of its states, however long the text is."""
    from ramet.grammar.regular.dfas import Dfa

    steps, step = [0], Dfa.step

    def counted(dfa: Dfa, state: int, symbol: int) -> int:
        steps[0] += 1
        return step(dfa, state, symbol)

    scanner = StopScanner([], ["[ab]{1,100}c"])
    monkeypatch.setattr(Dfa, "step", counted)
    for _ in range(20):
        before = steps[0]
        scanner.push("ab" * 50)
        assert steps[0] - before <= 100 * 102
