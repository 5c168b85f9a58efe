"""Every kernel compiles for an H100, on any machine, within its registers and shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ramet.kernels.triton_support import HAS_TRITON

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile_kernels.py"
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def compile_kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )


def test_a_kernel_is_compiled_and_its_resources_are_reported() -> None:
    done = compile_kernels("--only", "scatter_rows")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_scatter_kernel" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 variants, 0 bad ones in use"


def test_pages_are_copied_in_wide_accesses() -> None:
    done = compile_kernels("--only", "copy_pages", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (variant,) = json.loads(done.stdout.splitlines()[-1])["variants"]
    assert variant["narrow"] == 0


@pytest.mark.slow
def test_no_configuration_in_use_spills_or_needs_too_much_shared_memory() -> None:
    done = compile_kernels()
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "BAD" in line) + done.stderr
