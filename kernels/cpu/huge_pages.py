"""Memory for weights that a CPU reads completely in every step, in the system's huge pages if it has them.

Separate tensors of some 100 KB would lie in pages of 4 KB, whose address translation takes as long as reading some of
the weights. Here tensors lie one after another in chunks that are large enough for pages of 2 MB.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK_BYTES = 32 << 20  # numpy asks the system for huge pages from 4 MB on; what isn't used takes no memory
_ALIGNMENT = 64  # bytes of a vector and of a cache line


class HugePages:
    """Chunks of memory that are filled with tensors. A chunk lives as long as any tensor in it."""

    def __init__(self) -> None:
        self._chunk = np.zeros(0, np.uint8)
        self._used = 0

    def move(self, tensor: Tensor) -> Tensor:
        """Return a copy of a contiguous uint8 tensor in a chunk."""
        size = tensor.numel()
        begin = self._used + -(self._chunk.ctypes.data + self._used) % _ALIGNMENT
        if begin + size > len(self._chunk):
            self._chunk = np.zeros(max(size + _ALIGNMENT, _CHUNK_BYTES), np.uint8)
            begin = -self._chunk.ctypes.data % _ALIGNMENT
        self._used = begin + size
        return torch.from_numpy(self._chunk[begin : self._used]).view(tensor.shape).copy_(tensor)
