"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys

import ramet


def test_public_names_are_sorted_and_all_have_a_home() -> None:
    assert ramet.__all__ == sorted(set(ramet.__all__))
    assert set(ramet.__all__) == set(ramet._HOMES)
    for name in ramet.__all__:
        assert getattr(ramet, name) is not None
    assert set(ramet.__all__) <= set(dir(ramet))


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(ramet, "generate_everything")


def test_importing_ramet_and_its_language_loads_no_torch() -> None:
    code = (
        "import sys; import ramet; from ramet import function, gen, select, MockBackend; MockBackend(); "
        "heavy = {'torch', 'transformers', 'pydantic', 'numba'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
