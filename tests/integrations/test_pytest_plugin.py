"""The plugin as a project's tests use it."""

from __future__ import annotations

import pytest

pytest_plugins = "pytester"

PROGRAM = """
from ramet import State, function, gen

@function(max_tokens=20, temperature=0)
def greet(s: State, name: str) -> None:
    s += f"Hello, {name}! " + gen("answer")

def test_it_greets(scripted, program_snapshot):
    scripted({"Ann": "Good day."})
    state = greet.run("Ann")
    assert state["answer"] == "Good day."
    program_snapshot(state)
    program_snapshot(greet.run("Ann"))
"""
PLUGIN = ("-p", "no:cacheprovider")  # Ramet's is loaded by its entry point


def test_a_run_is_kept_and_compared(pytester: pytest.Pytester) -> None:
    file = pytester.makepyfile(test_greet=PROGRAM)
    first = pytester.runpytest_subprocess(*PLUGIN)
    first.assert_outcomes(failed=1)
    first.stdout.fnmatch_lines(["*does not exist; look at what the program does*--ramet-update*"])
    pytester.runpytest_subprocess(*PLUGIN, "--ramet-update").assert_outcomes(passed=1)
    kept = sorted(path.name for path in (pytester.path / "__ramet__").iterdir())
    assert kept == ["test_greet.test_it_greets.2.json", "test_greet.test_it_greets.json"]
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)
    file.write_text(file.read_text().replace("Hello, {name}!", "Good morning, {name}!"))
    changed = pytester.runpytest_subprocess(*PLUGIN)
    changed.assert_outcomes(failed=1)
    changed.stdout.fnmatch_lines(["*the program does something else now*", "*-*Hello, Ann*", "*+*Good morning, Ann*"])


def test_the_backend_is_strict_and_the_tests_own(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_strict=PROGRAM.replace("program_snapshot(state)", "").replace(
            'program_snapshot(greet.run("Ann"))', 'assert greet.run("Bob", failures="keep").error() is not None'
        )
    )
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)
