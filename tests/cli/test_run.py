"""`ramet run`: a file's program, its arguments, its text as it comes, and what is wrong in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ramet.cli.main import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "programs"

FILE = """
from dataclasses import dataclass

from ramet import State, function, gen, select

SCRIPT = {"Colour:": " blue", "Two:": " second", "Age:": "41"}


@dataclass
class Person:
    age: int


@function(temperature=0)
def colours(s: State, name: str, count: int = 2) -> int:
    with s.user():
        s += f"For {name}: {count}."
    with s.assistant():
        s += "Colour:" + gen("colour", stop=".")
        branches = s.fork(count)
        branches += lambda i: f"\\\\nWay {i}: " + select("pick", ["a", "b"])
        branches.join()
    return count + 1


@function
def person(s: State) -> None:
    s += "Age:" + gen("person", Person)


@function
def broken(s: State) -> None:
    s += "x" + gen("x") + str(1 / 0)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_programs.py"
    path.write_text(FILE)
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(file: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str, program: str = "") -> tuple[int, str, str]:
        status = main(["run", f"{file}:{program}" if program else str(file), "--mock", *arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return run


def test_a_program_runs_and_its_text_is_shown_with_what_it_returned(run: Run) -> None:
    status, out, _ = run("name=7", "count=3", program="colours")
    assert status == 0
    shown = out.splitlines()
    assert shown[:4] == ["user:", "For 7: 3.", "assistant:", "Colour: blue"]
    assert [line for line in shown if line.startswith("──")] == [f"── branch {i} of 3 ──" for i in (1, 2, 3)]
    assert "result 4" in out
    assert 'colour " blue"' in out
    assert "from the cache" in shown[-1]


def test_json_has_result_variables_and_tokens_and_nothing_else(run: Run) -> None:
    status, out, _ = run("--arguments", '{"name": "Ann"}', "--json", "--seed", "3", program="colours")
    assert status == 0
    found = json.loads(out)
    assert found["result"] == 3
    assert found["variables"]["colour"] == " blue"
    assert found["tokens"]["written"] > 0


def test_types_of_the_file_are_found_and_written_as_json(run: Run) -> None:
    status, out, _ = run("--json", program="person")
    assert status == 0
    assert isinstance(json.loads(out)["variables"]["person"]["age"], int)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("", [], "has 3 programs (colours, person, broken); choose one: "),
        ("nothing", [], "has no program 'nothing'; it has colours, person, broken"),
        ("colours", [], "colours needs name: name=..."),
        ("colours", ["size=3"], "colours has no parameter 'size'; it has name, count"),
        ("colours", ["name"], "'name' is no NAME=VALUE"),
        ("colours", ["name=Ann", "count=many"], "count is 'many': Input should be a valid integer"),
        ("colours", ["--arguments", "[1]"], "must be a JSON object"),
        ("colours", ["--arguments", "{"], "--arguments is '{', which is not JSON"),
        (
            "colours",
            ["--arg", "name=[1]"],
            "is 'name=[1]', which is not JSON: Expecting value: line 1 column 1 (char 0); NAME",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(program: str, arguments: list[str], message: str, run: Run) -> None:
    status, out, err = run(*arguments, program=program)
    assert status == 1
    assert out == ""
    assert message in err


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf", "soon"])
def test_a_timeout_must_be_a_number_of_seconds(seconds: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("name=Ann", "--timeout", seconds, program="colours")
    assert "--timeout" in capsys.readouterr().err


def test_arguments_are_values_of_their_parameters_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "typed.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom ramet import State, function\n"
        "@dataclass\nclass Town:\n    name: str\n    size: int\n"
        "@function\ndef visit(s: State, towns: list[Town], by: str, more=None):\n"
        "    s += f'{towns[0].name} by {by}'\n    return [type(towns[0]).__name__, by, more]\n"
    )
    given = ['towns=[{"name": "Rome", "size": 3}]', "by=7", "more=[1]"]
    assert main(["run", str(path), "--mock", "--json", *given]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == ["Town", "7", [1]]
    assert main(["run", str(path), "--mock", 'towns=[{"name": "Rome", "size": "big"}]', "by=7"]) == 1
    assert "towns[0]['size'] is 'big': Input should be a valid integer" in capsys.readouterr().err


def test_an_error_of_the_program_is_shown_with_its_own_lines_alone(file: Path, run: Run) -> None:
    status, _, err = run(program="broken")
    assert status == 1
    assert "ZeroDivisionError" in err
    assert str(file) in err
    assert "ramet/lang" not in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from ramet import gen\nx = 1 / 0\n", "broken.py:2 can't be loaded: ZeroDivisionError"),
        ("def f(:\n", "broken.py:1 can't be loaded: SyntaxError"),
        ("x = 1\n", "has no program; mark a function with @function"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert main(["run", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.py")]) == 1
    assert "is no file" in capsys.readouterr().err


def test_a_backend_that_is_not_there_is_an_error(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", f"{file}:person", "--backend", "gpu-box"]) == 1
    assert "must be an http:// address" in capsys.readouterr().err


def test_an_example_runs_with_its_own_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(EXAMPLES / "chain_of_thought.py"), "--mock"]) == 0
    out = capsys.readouterr().out
    assert "3 times 12 is 36." in out
    assert "answer 36" in out


@contextmanager
def served() -> Iterator[str]:
    """`ramet serve` of a tiny model, as a process of its own."""
    import subprocess
    import sys
    import tempfile
    import time

    with tempfile.NamedTemporaryFile("r") as log:
        command = [sys.executable, "-m", "ramet.cli", "serve", "tiny-random", "--port", "0", "--device", "cpu"]
        with open(log.name, "wb") as output:
            process: Any = subprocess.Popen([*command, "--num-kv-tokens", "8192"], stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 90
            text = ""
            while " at http://" not in text:
                assert process.poll() is None, text
                assert time.monotonic() < deadline, text
                time.sleep(0.1)
                text = Path(log.name).read_text()
            yield "http://" + text.split(" at http://", 1)[1].split()[0]
        finally:
            process.terminate()
            process.wait(30)


def test_a_program_runs_on_a_server_of_another_process(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served() as url:
        arguments = ["name=Ann", "--json"]
        assert main(["run", f"{file}:colours", "--backend", url, *arguments]) == 0
        there = json.loads(capsys.readouterr().out)
    assert main(["run", f"{file}:colours", "--model", "tiny-random", *arguments]) == 0
    here = json.loads(capsys.readouterr().out)
    assert here["variables"] == there["variables"]
    assert here["tokens"] == there["tokens"]
