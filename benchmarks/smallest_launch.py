"""Launch one small kernel, by itself and in a CUDA graph: seconds after which a machine that cannot do it has said so.
Then the card's own ceilings: a large copy (bytes read and written), and a large product in bf16.

    python benchmarks/smallest_launch.py [OUT.jsonl]

Not here: whether kernels are right (`bench_kernels.py --sections check`).
"""

from __future__ import annotations

import platform
import statistics
import sys
from collections.abc import Callable

import torch
import triton
from json_line import commit, print_record

from ramet.kernels.slots.tables import scatter_rows
from ramet.runtime.steps.cuda_graph import cuda_capture

COPIED = 4 << 30  # bytes
SIDE = 8192


def main() -> None:
    device = torch.device("cuda")
    updates = torch.tensor([[0, 1, 7], [2, 0, 9], [-1, 0, 5]], dtype=torch.int32, device=device)
    table = torch.zeros(3, 2, dtype=torch.int32, device=device)
    expected = [[0, 7], [0, 0], [9, 0]]
    scatter_rows(updates, table)
    assert table.tolist() == expected, table.tolist()
    replay = cuda_capture(device)(lambda: scatter_rows(updates, table))
    table.zero_()
    replay()
    assert table.tolist() == expected, table.tolist()
    facts = {
        "benchmark": "gpu-card", "device": torch.cuda.get_device_name(), "commit": commit(),
        "facts": {
            "copy_tb_s": round(2 * COPIED / seconds(copy_of_bytes()) / 1e12, 2),
            "product_tflops": round(2 * SIDE**3 / seconds(large_product()) / 1e12),
            "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip
    print_record(facts, sys.argv[1] if sys.argv[1:] else None)


def copy_of_bytes() -> Callable[[], object]:
    source, target = (torch.empty(COPIED, dtype=torch.uint8, device="cuda") for _ in range(2))
    return lambda: target.copy_(source)


def large_product() -> Callable[[], object]:
    a, b = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return lambda: torch.mm(a, b)


def seconds(run: Callable[[], object]) -> float:
    """The median of ten runs, after two."""
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
