"""Threads that wait for others sleep soon, unless the user says otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ramet.openmp_waits import SPIN_COUNT, limit_spinning


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": str(SPIN_COUNT)}),
        ({"HOME": "/"}, {"HOME": "/", "GOMP_SPINCOUNT": str(SPIN_COUNT)}),
        ({"GOMP_SPINCOUNT": "30000"}, {"GOMP_SPINCOUNT": "30000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_spinning_is_limited_unless_the_user_has_decided(given: dict[str, str], expected: dict[str, str]) -> None:
    limit_spinning(given)
    assert given == expected


def test_importing_ramet_sets_the_limit_before_torch_is_loaded() -> None:
    code = "import os, sys, ramet; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={}, check=True)
    assert found.stdout.split() == [str(SPIN_COUNT), "False"]
