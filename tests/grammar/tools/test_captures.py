"""Captures of composed grammars, read from finished texts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramet.errors import InvalidGrammar
from ramet.grammar.tools.captures import CaptureReader
from ramet.grammar.tools.composed import Composed


def capture(name: str, of: Any, **more: Any) -> dict[str, Any]:
    return {"capture": name, "of": of, **more}


def read(source: Any, text: str) -> list[tuple[str, str]]:
    reader = CaptureReader(Composed.of(source))
    return [(one.name, text[one.begin : one.end]) for one in reader.read(text)]


WORD = {"regex": "[a-z]+"}
TAG = {"sequence": ["<", capture("tag", WORD), ">", capture("text", {"regex": "[^<]*"}), "</", WORD, ">"]}
SUM = {
    "start": {"rule": "sum"},
    "rules": {
        "sum": {"select": [{"rule": "term"}, {"sequence": [{"rule": "sum"}, "+", {"rule": "term"}]}]},
        "term": {"select": [capture("n", {"regex": "[0-9]+"}), {"sequence": ["(", {"rule": "sum"}, ")"]}]},
    },
}


@pytest.mark.parametrize(
    ("source", "text", "found"),
    [
        (capture("all", "é"), "é", [("all", "é")]),
        ({"repeat": TAG}, "<b>é!</b><i></i>", [("tag", "b"), ("text", "é!"), ("tag", "i"), ("text", "")]),
        (capture("o", {"sequence": ["(", capture("i", WORD), ")"]}), "(ab)", [("o", "(ab)"), ("i", "ab")]),
        (SUM, "1+(2+30)+4", [("n", "1"), ("n", "2"), ("n", "30"), ("n", "4")]),
        (
            {"sequence": ["é", capture("p", {"json_schema": True}), ";", capture("q", {"json_schema": {}})]},
            'é["é];", 1];12',
            [("p", '["é];", 1]'), ("q", "12")],
        ),
        ({"select": [capture("a", WORD), capture("b", {"regex": "[a-z0-9]+"})]}, "ab", [("a", "ab")]),
        ({"select": [capture("a", WORD), capture("b", {"regex": "[a-z0-9]+"})]}, "ab1", [("b", "ab1")]),
        ({"sequence": [capture("a", {"regex": "a*"}), capture("b", {"regex": "a*"})]}, "aa", [("a", "aa"), ("b", "")]),
        (
            {"select": [capture("a", {"repeat": {"sequence": [capture("n", "x")]}}), capture("b", {"regex": "x*"})]},
            "xx",
            [("a", "xx"), ("n", "x"), ("n", "x")],
        ),
        (
            {"start": {"rule": "s"}, "rules": {"s": {"select": [{"rule": "s"}, capture("n", WORD)]}}},
            "ab",
            [("n", "ab")],
        ),
        (
            {
                "start": {"rule": "s"},
                "rules": {"s": {"select": ["", {"sequence": [{"rule": "s"}, {"rule": "s"}]}, capture("n", "x")]}},
            },
            "xx",
            [("n", "x"), ("n", "x")],
        ),
        ({"repeat": capture("x", {"regex": "a?"}), "at_least": 2}, "aaa", [("x", "a")] * 3),
        ({"repeat": capture("x", {"regex": "a?"}), "at_least": 2}, "a", [("x", "a"), ("x", "")]),
        ({"repeat": capture("x", {"regex": "a?"})}, "", []),
        ({"repeat": capture("x", "a"), "at_least": 1, "at_most": 2}, "aa", [("x", "a")] * 2),
        (
            {"sequence": ["x", {"cfg": 'start: item+\nitem: "(" item ")" | /[a-z]/'}, capture("end", ".")]},
            "x((a))b.",
            [("end", ".")],
        ),
    ],
)  # fmt: skip
def test_captures_are_the_parts_of_the_text(source: Any, text: str, found: list[tuple[str, str]]) -> None:
    assert read(source, text) == found


NAMES = st.sampled_from(["p", "q", "r"])
LEAVES = st.sampled_from([("a", "a"), ("b", "b"), ("ab", "ab"), ({"regex": "a*b"}, "a*b")])


def pieces() -> st.SearchStrategy[tuple[Any, str]]:
    """Grammars with captures, and the same language as a pattern."""

    def joined(of: list[tuple[Any, str]]) -> tuple[Any, str]:
        return {"sequence": [node for node, _ in of]}, "".join(f"(?:{p})" for _, p in of)

    def one_of(of: list[tuple[Any, str]]) -> tuple[Any, str]:
        return {"select": [node for node, _ in of]}, "|".join(f"(?:{p})" for _, p in of)

    def extended(inner: st.SearchStrategy[tuple[Any, str]]) -> st.SearchStrategy[tuple[Any, str]]:
        return st.one_of(
            st.lists(inner, min_size=1, max_size=3).map(joined),
            st.lists(inner, min_size=1, max_size=3).map(one_of),
            st.tuples(inner, st.integers(0, 2)).map(
                lambda one: ({"repeat": one[0][0], "at_least": one[1]}, f"(?:{one[0][1]}){{{one[1]},}}")
            ),
            st.tuples(NAMES, inner).map(lambda one: (capture(one[0], one[1][0], list=True), one[1][1])),
        )

    return st.recursive(LEAVES, extended, max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(piece=pieces(), texts=st.lists(st.text(alphabet="ab", max_size=7), min_size=3, max_size=6))
def test_a_text_is_read_exactly_if_it_is_one_of_the_grammar(piece: tuple[Any, str], texts: list[str]) -> None:
    reader = CaptureReader(Composed.of(piece[0]))
    for text in texts:
        if re.fullmatch(piece[1], text) is None:
            with pytest.raises(ValueError, match="not one of its grammar"):
                reader.read(text)
            continue
        spans = [(one.begin, one.end) for one in reader.read(text)]
        assert all(0 <= begin <= end <= len(text) for begin, end in spans)
        for i, (begin, end) in enumerate(spans):  # each is inside of an earlier one, or after its end
            assert all(end <= other_end or begin >= other_end for _, other_end in spans[:i])
            assert all(begin >= other_begin for other_begin, _ in spans[:i])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text("abcé", min_size=1, max_size=4), st.integers(0, 99)), min_size=1, max_size=6))
def test_captures_equal_the_groups_of_a_pattern_that_is_not_ambiguous(rows: list[tuple[str, int]]) -> None:
    source = {
        "repeat": {
            "sequence": ["- ", capture("word", {"regex": "[a-cé]+"}, list=True), "=",
                         capture("n", {"regex": "[0-9]+"}, type="int", list=True), "\n"]
        },
        "at_least": 1,
    }  # fmt: skip
    text = "".join(f"- {word}={n}\n" for word, n in rows)
    groups = re.findall(r"- ([a-cé]+)=([0-9]+)\n", text)
    assert read(source, text) == [pair for word, n in groups for pair in (("word", word), ("n", n))]


def test_deep_recursion_and_long_texts_are_read() -> None:
    in_brackets = {"sequence": ["(", {"rule": "x"}, ")"]}
    nested = {"start": {"rule": "x"}, "rules": {"x": {"select": [capture("n", "1"), in_brackets]}}}
    assert read(nested, "(" * 3000 + "1" + ")" * 3000) == [("n", "1")]
    rest = {"repeat": {"sequence": [",", {"rule": "x"}]}, "at_most": 1}
    right = {"start": {"rule": "x"}, "rules": {"x": {"sequence": [capture("n", {"regex": "[0-9]"}), rest]}}}
    assert len(read(right, ",".join("123456789" * 60))) == 540
    assert len(read(SUM, "+".join(["12"] * 3000))) == 3000
    assert len(read({"repeat": TAG}, "<b>some text</b>" * 3000)) == 6000


def test_a_text_with_too_many_readings_is_an_error_and_not_a_stall() -> None:
    source = {"repeat": {"repeat": capture("x", {"regex": "a+"}), "at_least": 1}}
    with pytest.raises(ValueError, match="can be read in too many ways"):
        read(source, "a" * 4000)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (capture("", "a"), "a capture has a name"),
        ({"capture": "x"}, "a node `of`"),
        (capture("x", "a", type="date"), "the type of a capture is one of str"),
        (capture("x", "a", list=1), "`list`, which is true or false"),
        ({"sequence": [capture("x", "a"), capture("x", "b", type="int")]}, "the capture 'x' has two forms"),
        ({"not": capture("x", "a")}, "a capture can't stand inside of `all`, `not` or `until`"),
    ],
)
def test_a_wrong_capture_is_named(source: Any, message: str) -> None:
    with pytest.raises(InvalidGrammar, match=re.escape(message)):
        Composed.of(json.loads(json.dumps(source)))
