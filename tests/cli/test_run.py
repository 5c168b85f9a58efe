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
    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["run", str(file), "--mock", *arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return run


def test_a_program_runs_and_its_text_is_shown_with_what_it_returned(run: Run) -> None:
    status, out, _ = run("--program", "colours", "--arg", "name=7", "--arg", "count=3")
    assert status == 0
    shown = out.splitlines()
    assert shown[:4] == ["user:", "For 7: 3.", "assistant:", "Colour: blue"]
    assert [line for line in shown if line.startswith("──")] == [f"── branch {i} of 3 ──" for i in (1, 2, 3)]
    assert "result 4" in out
    assert 'colour " blue"' in out
    assert "from the cache" in shown[-1]


def test_json_has_result_variables_and_tokens_and_nothing_else(run: Run) -> None:
    status, out, _ = run("--program", "colours", "--arguments", '{"name": "Ann"}', "--json", "--seed", "3")
    assert status == 0
    found = json.loads(out)
    assert found["result"] == 3
    assert found["variables"]["colour"] == " blue"
    assert found["tokens"]["written"] > 0


def test_types_of_the_file_are_found_and_written_as_json(run: Run) -> None:
    status, out, _ = run("--program", "person", "--json")
    assert status == 0
    assert isinstance(json.loads(out)["variables"]["person"]["age"], int)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has 3 programs (colours, person, broken); choose one with --program"),
        (["--program", "nothing"], "has no program 'nothing'; it has colours, person, broken"),
        (["--program", "colours"], "colours needs name: --arg name=..."),
        (["--program", "colours", "--arg", "size=3"], "colours has no parameter 'size'; it has name, count"),
        (["--program", "colours", "--arg", "name"], "--arg 'name' is no NAME=VALUE"),
        (["--program", "colours", "--arguments", "[1]"], "must be a JSON object"),
        (["--program", "colours", "--arguments", "{"], "--arguments is not JSON"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], message: str, run: Run) -> None:
    status, out, err = run(*arguments)
    assert status == 1
    assert out == ""
    assert message in err


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
    assert main(["run", str(file), "--program", "person", "--backend", "gpu-box"]) == 1
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
        arguments = ["--program", "colours", "--arg", "name=Ann", "--json"]
        assert main(["run", str(file), "--backend", url, *arguments]) == 0
        there = json.loads(capsys.readouterr().out)
    assert main(["run", str(file), "--model", "tiny-random", *arguments]) == 0
    here = json.loads(capsys.readouterr().out)
    assert here["variables"] == there["variables"]
    assert here["tokens"] == there["tokens"]
