"""What importing Ramet does to the process of its user: waiting threads sleep soon, and garbage collection waits."""

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


@pytest.mark.parametrize("is_on", [True, False])
def test_loading_the_engines_code_collects_no_garbage_and_leaves_the_collector_as_it_was(is_on: bool) -> None:
    lines = ["import gc, ramet", "gc.disable()" if not is_on else "", "seen = []"]
    lines += ["gc.callbacks.append(lambda *told: seen.append(told))", "ramet.Engine"]
    code = "\n".join([*lines, "print(len(seen), gc.isenabled(), gc.get_freeze_count())"])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"0 {is_on} 0"
