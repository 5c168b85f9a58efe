"""`ramet grammar check`, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ramet.cli.main import main

PERSON = {
    "title": "Person",
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["grammar", "check", *arguments])
    return status, capsys.readouterr().out


@pytest.fixture
def person(tmp_path: Path) -> str:
    path = tmp_path / "person.json"
    path.write_text(json.dumps(PERSON))
    return str(path)


def test_says_what_is_enforced_and_accepts_what_fits(person: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = check(capsys, person, '{"name": "A", "age": 3}')
    assert status == 0
    assert "type × 3" in out
    assert "title at /" in out
    assert "accepted" in out
    assert " ms for a byte vocabulary" in out


def test_a_caret_shows_where_an_instance_is_refused(person: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = check(capsys, person, '{"name": "A", "age": "3"}')
    assert status == 1
    lines = out.splitlines()
    caret = next(i for i, line in enumerate(lines) if line.strip() == "^")
    assert lines[caret - 1][lines[caret].index("^") :] == '"3"}'
    assert "[1-9]" in lines[caret + 1]


def test_instances_can_be_files_and_walked_as_they_are(
    person: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "instance.json"
    path.write_text('{ "name": "A" }\n')
    assert check(capsys, person, str(path))[0] == 0
    status, out = check(capsys, "--raw", person, str(path))
    assert status == 1
    assert "character 1\n" in out


def test_a_text_that_ends_too_early_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.lark"
    path.write_text('start: "(" start ")" | "x"\n')
    status, out = check(capsys, str(path), "((x)", "(x)")
    assert status == 1
    assert "it ends too early" in out
    assert "allowed there: ')'" in out
    assert out.count("accepted") == 1


def test_what_cannot_be_enforced_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.json"
    path.write_text('{"properties": {"a": {"pattern": "(?<=aa)b"}}}')
    status, out = check(capsys, str(path), "{}")
    assert status == 1
    assert "/properties/a" in out
    assert "lookbehind" in out
    status, out = check(capsys, "--on-unsupported", "validate", str(path), '{"a": "b"}')
    assert status == 0
    assert "/properties/a" in out
    assert "accepted" in out


@pytest.mark.parametrize(
    ("content", "message"), [('{"type": "wrong"}', "/type"), ("{", "not JSON"), (None, "cannot read")]
)
def test_bad_sources_fail_with_a_message(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    assert main(["grammar", "check", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_a_schema_may_be_given_itself_and_instances_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    status, out = check(capsys, '{"type": "integer"}', "5", '"[bold]x"', '"' + "y" * 50 + '"')
    assert status == 1
    assert "accepted      5" in out
    assert 'refused       "[bold]x": character 0' in out
    assert f'refused       "{"y" * 36}...: character 0' in out


def test_files_that_cannot_be_read_are_told_apart(
    tmp_path: Path, person: str, capsys: pytest.CaptureFixture[str]
) -> None:
    deep, binary = tmp_path / "deep.json", tmp_path / "binary.json"
    deep.write_text("[" * 100_000)
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, message in (
        ((str(deep),), "nested too deeply"),
        ((str(binary),), "cannot read"),
        ((person, str(binary)), "cannot read"),
        ((str(tmp_path / "none.json"),), "cannot read"),
    ):
        assert main(["grammar", "check", *arguments]) == 1
        captured = capsys.readouterr()
        assert message in captured.out + captured.err
    status, out = check(capsys, person, str(deep))
    assert status == 1
    assert "not JSON" in out


def test_instances_may_stand_behind_options(person: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(capsys, person, "--order", "any", '{"name": "A"}', "--raw", '{"name": "B"}')[0] == 0
    with pytest.raises(SystemExit):
        check(capsys, person, "--raw", "{}", "--wrong")


def test_says_which_objects_are_closed_and_why_a_valid_instance_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    item = {"type": "object", "properties": {"c": {"type": "integer"}}}
    schema = json.dumps({"type": "object", "properties": {"a": item, "b": {"type": "object"}}})
    status, out = check(capsys, schema, '{"b": {"x": 1}}')
    assert status == 0
    assert "only declared properties at /, /properties/a;" in out
    for instance in ('{"b": {}, "a": {}}', '{"a": {"d": 1}}', '{"a": {"c": 1.0}}'):
        status, out = check(capsys, schema, instance)
        assert status == 1
        assert "the schema allows it" in out, instance
    assert "the schema allows it" not in check(capsys, schema, '{"a": 1}')[1]
    status, out = check(capsys, schema, "--additional-properties", "schema", '{"a": {"c": 1, "d": 1}, "e": 1}')
    assert status == 0
    assert "closed" not in out


@pytest.mark.parametrize("whitespace", ["model", "compact", "any", "indent=0", "indent=4"])
def test_instances_are_read_in_the_layout_that_is_asked_for(
    whitespace: str, person: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(capsys, person, "--whitespace", whitespace, '{"name": "A", "age": 3}')[0] == 0


def test_a_text_is_told_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grammar", "check", "[a-z]+", "abc", "--kind", "regex"]) == 0
    assert "accepted" in capsys.readouterr().out
    file = tmp_path / "words.regex"
    file.write_text("[0-9]+\n")
    assert main(["grammar", "check", str(file), "123", "--kind", "regex"]) == 0, "a file with this name comes first"
    capsys.readouterr()
    assert main(["grammar", "check", "[a-z]+", "abc"]) == 1
    error = capsys.readouterr().err
    assert "cannot read [a-z]+: it is no file" in error, "brackets are no colours"
    assert "--kind regex" in error
