"""Threads that wait for others sleep soon, unless the user says otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000 None False"),
        ({"GOMP_SPINCOUNT": "30000"}, "30000 None False"),
        ({"OMP_WAIT_POLICY": "active"}, "None active False"),
    ],
)
def test_spinning_is_limited_before_torch_is_loaded_unless_the_user_has_decided(
    given: dict[str, str], expected: str
) -> None:
    names = "os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules"
    command = [sys.executable, "-c", f"import os, sys, ramet; print({names})"]
    found = subprocess.run(command, capture_output=True, text=True, env=given, check=True)
    assert found.stdout.strip() == expected
