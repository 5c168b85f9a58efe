"""Worker threads of compiled kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from ramet.kernels.cpu_threads import IS_PARALLEL, release_threads


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
