"""Launch one small kernel, by itself and in a CUDA graph: seconds after which a machine that cannot do it has said so.

    python benchmarks/smallest_launch.py

Not here: whether kernels are right (`bench_kernels.py --sections check`).
"""

from __future__ import annotations

import torch
import triton

from ramet.kernels.slots.tables import scatter_rows
from ramet.runtime.steps.cuda_graph import cuda_capture


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
    print(f"{torch.cuda.get_device_name()}: torch {torch.__version__}, triton {triton.__version__} launch kernels")


if __name__ == "__main__":
    main()
