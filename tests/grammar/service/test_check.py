from __future__ import annotations

import pytest

from ramet.errors import InvalidSchema
from ramet.grammar import compile_constraint
from ramet.grammar.service.check import byte_vocabulary, coverage, walk


def test_coverage_tells_assertions_from_annotations_and_what_is_unknown() -> None:
    found = coverage(
        {
            "title": "T",
            "type": "object",
            "properties": {"a": {"type": "integer", "x-note": 1}, "b": {"format": "phone"}, "c": {"format": "date"}},
        }
    )
    assert found.enforced == {"type": 2, "properties": 1, "format": 1}
    assert found.annotations == [("/", "title")]
    assert found.unknown == [("/properties/a", "x-note")]
    assert found.unknown_formats == [("/properties/b", "phone")]
    assert found.problems == []


def test_coverage_knows_what_a_draft_overlooks() -> None:
    beside = {"definitions": {"s": {}}, "properties": {"a": {"$ref": "#/definitions/s", "maxLength": 1}}}
    old = coverage({"$schema": "http://json-schema.org/draft-07/schema#", "unevaluatedProperties": False, **beside})
    assert old.hidden == [("/properties/a", "maxLength")]
    assert old.unknown == [("/", "unevaluatedProperties")]
    assert old.enforced == {"$ref": 1, "properties": 1}
    assert coverage(beside).enforced == {"$ref": 1, "properties": 1, "maxLength": 1}


DRAFT_4, DRAFT_7 = "http://json-schema.org/draft-04/schema#", "http://json-schema.org/draft-07/schema#"


@pytest.mark.parametrize("keyword", ["minContains", "maxContains", "$dynamicRef", "$recursiveRef", "unevaluatedItems"])
def test_coverage_does_not_count_a_keyword_of_a_later_draft_as_enforced(keyword: str) -> None:
    schema: dict[str, object] = {keyword: "#" if keyword.startswith("$") else 1}
    old = coverage({"$schema": DRAFT_7, **schema})
    assert old.enforced == {}
    assert old.unknown == [("/", keyword)]


def test_coverage_knows_that_a_reference_hides_draft_3_keywords_beside_it() -> None:
    beside = {"$ref": "#/definitions/s", "disallow": "null", "extends": {}}
    found = coverage({"$schema": DRAFT_4, "definitions": {"s": {}}, "items": beside})
    assert found.hidden == [("/items", "disallow"), ("/items", "extends")]


@pytest.mark.parametrize("value", [[], {}, 1, None])
def test_coverage_reads_a_format_that_is_no_string_as_unknown(value: object) -> None:
    assert coverage({"format": value}).unknown_formats == [("/", str(value))]


def test_coverage_lists_all_problems_and_does_not_count_them_as_enforced() -> None:
    found = coverage({"properties": {"a": {"pattern": "(?<=aa)b"}, "b": {"pattern": "(a+)\\1"}, "c": {"pattern": "c"}}})
    assert [p for p, _, _ in found.problems] == ["/properties/a", "/properties/b"]
    assert found.enforced["pattern"] == 1


def test_coverage_refuses_what_is_no_schema() -> None:
    with pytest.raises(InvalidSchema):
        coverage([])


@pytest.mark.parametrize(
    ("kind", "source", "text", "num_bytes", "allowed"),
    [
        ("choice", ["apple", "ant"], "axe", 1, ["'nt'", "'pple'"]),
        ("regex", "[a-c0-9]{2}é?", "ax", 1, ["[0-9 a-c]"]),
        ("regex", "ab?", "a", 1, ["'b'", "the end of the text"]),
        ("regex", "aé", "aè", 1, ["non-ASCII characters"]),
        ("json_schema", {"enum": [1, 23]}, "24", 1, ["'3'"]),
        ("cfg", 'start: "(" start ")" | "x"', "((x)", 4, ["')'"]),
        ("regex", "a", "ab", 1, ["the end of the text"]),
    ],
)
def test_walk_says_how_far_a_text_goes_and_what_was_allowed(
    kind: str, source: object, text: str, num_bytes: int, allowed: list[str]
) -> None:
    found = walk(compile_constraint(kind, source, byte_vocabulary()), text)
    assert found.num_bytes == num_bytes
    assert found.allowed == allowed
    assert found.is_accepted == (kind == "regex" and text == "a")


def test_many_continuations_are_cut_short() -> None:
    grammar = compile_constraint("choice", [f"{c}{c}" for c in "abcdefghijklmnopqrstuvwxyz"], byte_vocabulary())
    found = walk(grammar, "?")
    assert len(found.allowed) == 12
    assert found.allowed[-1] == "and 15 more"
