"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys

import ramet
import ramet.grammar


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
