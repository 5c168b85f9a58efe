"""Every kernel compiles for an H100, on any machine, within its registers and shared memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ramet.kernels.attention.plan import PROGRAMS_PER_SM
from ramet.kernels.triton_support import HAS_TRITON

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile_kernels.py"
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


COMPILE_TWO = """
import json, threading
import torch
from compile_kernels import OfflineDriver
from triton import compiler
from triton.runtime import driver
from ramet.kernels.layers import activation
from ramet.kernels.triton_support import compiling

driver.set_active(OfflineDriver(90))
kernel, threads, both = activation._gated_kernel, set(), threading.Barrier(2)
compile_it = compiler.compile

def note(*args, **options):
    threads.add(threading.current_thread().name)
    both.wait()
    return compile_it(*args, **options)

compiler.compile = note
with compiling(2):
    for rows in (64, 64, 2048):
        activation.silu_and_mul_triton(torch.empty(rows, 512, dtype=torch.bfloat16, device="meta"))
print(json.dumps({"threads": sorted(threads), "ready": len(kernel.device_caches[0][0])}))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])},
    )


def compile_kernels(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(str(SCRIPT), *arguments)


def test_a_kernel_is_compiled_and_its_resources_are_reported() -> None:
    done = compile_kernels("--only", "scatter_rows")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "_scatter_kernel" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 variants, 0 bad ones in use"


def test_kernels_that_were_compiled_in_another_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a machine with a card gets them: without the forms that a launch does not need. Nothing new is written."""
    there, here = tmp_path / "there", tmp_path / "here"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(there))
    assert compile_kernels("--only", "scatter_rows").returncode == 0
    shutil.copytree(there, here, ignore=shutil.ignore_patterns("*.ttir", "*.ttgir", "*.llir", "*.source"))
    shutil.rmtree(there)
    before = {path.name for path in here.glob("*/*")}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(here))
    assert compile_kernels("--adopt", str(here)).returncode == 0
    done = compile_kernels("--only", "scatter_rows")
    assert done.returncode == 0, done.stdout + done.stderr
    assert before == {path.name for path in here.glob("*/*")}


def test_kernels_compile_on_other_threads_and_nothing_is_launched() -> None:
    """A launch would need a card. All are ready at the end, and what a compiler says is raised there."""
    done = run("-c", COMPILE_TWO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == {"threads": ["ThreadPoolExecutor-0_0", "ThreadPoolExecutor-0_1"], "ready": 2}


def test_pages_are_copied_in_wide_accesses() -> None:
    done = compile_kernels("--only", "copy_pages", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    (variant,) = json.loads(done.stdout.splitlines()[-1])["variants"]
    assert variant["narrow"] == 0


def test_attention_uses_the_matrix_units_and_merges_in_order() -> None:
    """Hopper's products where a tile has 64 rows, copies of 16 bytes, and parts that are read behind the counter."""
    done = compile_kernels("--only", "llama-8b extend 64x64 w4 s5 window None,llama-8b decode B=64", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["variants"]
    for variant in found:
        counts = variant["instructions"]
        assert counts.get("cp.async.cg", 0) > 0 or variant["kernel"] == "_merge_kernel", variant
        assert "ld.global.nc" not in counts, "what others write in the same launch is never read as constant"
        if variant["kernel"] == "_extend_kernel":
            assert counts["wgmma.mma_async"] > 0, variant
            assert "mma.sync" not in counts, variant
        elif variant["kernel"] == "_decode_kernel":
            assert variant["blocks"] >= PROGRAMS_PER_SM, variant
        if variant["kernel"] == "_decode_kernel" and "by another kernel" not in variant["case"]:
            assert counts["atom.global.gpu.acq_rel"] == 1, variant
            assert counts["ld.global.cg"] > 0, variant
    assert {variant["kernel"] for variant in found} == {"_extend_kernel", "_decode_kernel", "_merge_kernel"}


def test_attention_reads_a_cache_in_fp8_as_wide_as_any_other() -> None:
    """Values 16 bytes at a time, page ids in words, all ahead, scales too in decode; no conversion takes two steps."""
    cases = "llama-8b extend 64x64 w4 s5 window None fp8,llama-8b decode B=16 window None fp8,llama-8b tree fp8"
    done = compile_kernels("--only", cases, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["variants"]
    assert {variant["kernel"] for variant in found} == {"_extend_kernel", "_decode_kernel", "_tree_kernel"}
    for variant in found:
        counts = variant["instructions"]
        assert counts["cp.async.cg"] > 0, variant
        assert counts["cp.async 4"] > 0, variant
        assert not {"cp.async 8", "cvt.bf16.f16"} & set(counts), variant
        assert variant["narrow"] == 0 or variant["kernel"] != "_decode_kernel", variant


def test_kernels_that_are_launched_early_wait_before_they_read_what_others_write() -> None:
    """A norm reads its weight before, which nobody writes: 4,096 values in two loads of eight for each thread."""
    done = compile_kernels("--candidates", "--only", "early llama-8b,try gemv dot 16x256 s4 w4 early", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["variants"]
    before = {(variant["kernel"], variant["before_wait"]) for variant in found}
    quiet = ("_gated_kernel", "_rope_kernel", "_decode_kernel", "_tree_kernel", "_extend_kernel", "_dot_kernel")
    assert before == {("_rms_norm_kernel", 2), *((name, 0) for name in quiet)}


@pytest.mark.slow
def test_no_configuration_in_use_spills_or_needs_too_much_shared_memory() -> None:
    done = compile_kernels()
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "BAD" in line) + done.stderr
