"""The public names of the package."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ramet
import ramet.grammar
from ramet.errors import EXTRAS


def test_public_names_all_have_a_home() -> None:
    names = dir(ramet)
    assert {"Engine", "SamplingParams", "function", "gen", "select"} <= set(names)
    for name in names:
        assert getattr(ramet, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(ramet, "generate_everything")


def test_importing_ramet_and_its_language_loads_no_torch() -> None:
    code = (
        "import sys; import ramet; from ramet import function, gen, select, MockBackend; MockBackend(); "
        "heavy = {'torch', 'transformers', 'pydantic', 'numba'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_process_that_speaks_http_loads_neither_torch_nor_a_compiler() -> None:
    code = (
        "import sys; import ramet.runtime.server.app, ramet.lang.explain.plan, ramet.cli.main; "
        "heavy = {'torch', 'triton', 'transformers', 'numba'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_the_grammar_package_have_a_home() -> None:
    assert {"CompiledGrammar", "Vocabulary", "compile_constraint"} <= set(dir(ramet.grammar))
    for name in dir(ramet.grammar):
        assert getattr(ramet.grammar, name) is not None
    assert not hasattr(ramet.grammar, "compile_everything")


WITHOUT_EXTRAS = """
import sys
from ramet.errors import EXTRAS

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {module for names in EXTRAS.values() for module in names} - ALLOWED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ALLOWED = set()
sys.meta_path.insert(0, Hidden())
"""


def run_without_extras(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has only what `pip install ramet` brings."""
    return subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS + code], capture_output=True, text=True, check=False)


def test_programs_run_on_a_script_without_any_extra() -> None:
    code = """
from typing import Literal
import pydantic
from ramet import MockBackend, OpenAI, Remote, function, gen, select, use_backend

class Trip(pydantic.BaseModel):
    city: str
    days: int

@function
def plan(s):
    with s.user():
        s += "Where to?"
    with s.assistant():
        branches = s.fork(2)
        for branch in branches:
            branch += gen("days", int, regex="[1-9]")
        branches.join()
        s += gen("trip", Trip) + select("best", ["sea", "hills"]) + gen("code", regex="[a-z]{3}")

state = plan.run(backend=MockBackend(["2", "3", '{"city": "Rome", "days": 5}', "abc"]))
assert state["days"] == [2, 3], state["days"]
assert state["trip"] == Trip(city="Rome", days=5)
assert state["code"] == "abc"
with use_backend(MockBackend()):
    assert plan.explain().nodes
Remote("http://127.0.0.1:1"), OpenAI("http://127.0.0.1:1/v1")
assert not {"torch", "numba"} & set(sys.modules)
"""
    done = run_without_extras(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import ramet; ramet.Engine", "pip install 'ramet[cpu]'"),
        ("from ramet.lang.backends.default import choose_backend; choose_backend()", "pip install 'ramet[cpu]'"),
        ("from ramet.cli.main import main; sys.exit(main(['serve', 'smollm2-135m']))", "pip install 'ramet[server]'"),
        ("from ramet.cli.main import main; sys.exit(main(['bench', 'smollm2-135m']))", "pip install 'ramet[cpu]'"),
        ("from ramet.cli.main import main; sys.exit(main(['doctor']))", "pip install 'ramet[cpu]'"),
    ],
)
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(code: str, said: str) -> None:
    done = run_without_extras(code)
    assert done.returncode
    assert said in done.stderr + done.stdout


def test_every_package_of_an_extra_is_named_by_the_module_that_it_brings() -> None:
    declared = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        names = {re.split(r"[^A-Za-z0-9_-]", one)[0] for one in declared[extra]} - {"ramet"}
        assert {name.replace("-", "_").replace("pyzmq", "zmq") for name in names} == set(modules), extra
