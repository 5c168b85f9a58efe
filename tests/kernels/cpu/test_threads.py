"""Worker threads of compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ramet.kernels.cpu.threads import IS_PARALLEL, release_threads

ATTEND = """
import torch
from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.cpu import attention
from ramet.kernels.cpu.program import KernelStream
torch.manual_seed(0)
k, v, q = torch.randn(8, 3, 16, 64), torch.randn(8, 3, 16, 64), torch.randn(1, 9, 64)
lens, rows, pages = (torch.tensor(x, dtype=torch.int32) for x in ([100], [0], [list(range(1, 8))]))
out = attention.attention_decode(KernelStream(), q, k, v, DecodeMetadata(lens, rows, pages), 0.125)
print(attention._decode_kernel.was_on_disk, out.numpy().tobytes().hex())
"""


def test_a_process_that_compiles_computes_the_bits_of_one_that_loads(tmp_path: Path) -> None:
    def run() -> list[str]:
        command = [sys.executable, "-c", ATTEND]
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return done.stdout.split()

    compiled, loaded = run(), run()
    assert (compiled[0], loaded[0]) == ("False", "True")
    assert compiled[1] == loaded[1]


@pytest.mark.skipif(sys.platform != "linux" or not IS_PARALLEL, reason="counts threads in /proc, needs an OpenMP")
def test_released_workers_end_and_come_back() -> None:
    def count() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    x = torch.linspace(0, 1, 1 << 20)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected, busy = x.exp(), count()
        release_threads()
        assert count() == busy - 1
        assert torch.get_num_threads() == 2
        assert torch.equal(x.exp(), expected)
        assert count() == busy
    finally:
        torch.set_num_threads(before)
