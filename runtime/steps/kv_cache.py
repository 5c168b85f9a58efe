"""The device memory of the KV pages.

Page 0 has no owner: padded rows of a step write there. Not here: the owners of pages (page_pool, radix_cache), the
number of pages that fit (memory).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ramet.errors import OutOfMemory
from ramet.kernels.layers.kv_fp8 import FP8, cell_bytes, values_of
from ramet.kernels.slots.copy_pages import copy_pages
from ramet.runtime.models.config import ModelConfig


class KVCache:
    """Keys and values of every layer in one allocation `[L, 2, N, K, P, D]`; `layers[l]` is the pair of views.

    In FP8 the allocation is uint8 [L, 2, N, K, 1, P * (D + 1)]: the scales of a head's page follow its values.
    `noted`: hidden states that layers note of each position, [N * P, hidden] each, copied with its page.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        noted: Sequence[torch.dtype] = (),
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        shape = (config.num_layers, 2, num_pages, config.num_kv_heads, page_size, config.head_dim)
        is_fp8 = dtype is FP8
        if is_fp8:
            shape = (*shape[:4], 1, page_size * cell_bytes(config.head_dim, dtype))
        try:
            # Zeros, not empty: attention reads whole pages with weight 0 beyond the end, and 0 * nan is nan.
            self.storage: Tensor = _zeros(shape, device, torch.uint8 if is_fp8 else dtype)
            self.noted = [_zeros((num_pages * page_size, config.hidden_size), device, kept) for kept in noted]
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            size = num_pages * page_size * bytes_per_token(config, dtype)
            raise OutOfMemory(
                f"the KV pool of {num_pages * page_size:,} tokens needs {size / 2**30:.1f} GiB on {device}, "
                f"which it does not have; lower --num-kv-tokens or --mem-fraction-static"
            ) from error
        values = values_of(self.storage.squeeze(4), page_size) if is_fp8 else self.storage
        self.layers: list[tuple[Tensor, Tensor]] = [(layer[0], layer[1]) for layer in values]
        row_bytes = self.storage.shape[-1] * self.storage.element_size()  # pages move as integers, whatever they hold
        self._raw = self.storage.view(torch.int32 if row_bytes % 4 == 0 else torch.uint8)

    def copy_pages(self, source: Tensor, target: Tensor, num_tokens: Tensor) -> None:
        """Copy the first positions of pages in every layer, int32 [C] each; in FP8, whole pages."""
        is_whole = self.storage.shape[4] == 1
        copy_pages(self.storage, source, target, num_tokens.clamp(max=1) if is_whole else num_tokens)
        for noted in self.noted:
            copy_pages(noted.view(1, 1, self.num_pages, 1, self.page_size, -1), source, target, num_tokens)

    @property
    def num_bytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()

    @property
    def page_bytes(self) -> int:
        return self.num_bytes // self.num_pages

    def read(self, page_ids: list[int]) -> Tensor:
        """Copy pages, from any thread. Returns uint8 `[n * page_bytes]` on the cache's device."""
        chosen = torch.tensor(page_ids, dtype=torch.int64).to(self._raw.device, non_blocking=True)
        return self._raw.index_select(2, chosen).view(-1).view(torch.uint8)

    def write(self, page_ids: list[int], pages: Tensor) -> None:
        """Overwrite pages with what `read` returned, uint8 `[n * page_bytes]` on the cache's device."""
        chosen = torch.tensor(page_ids, dtype=torch.int64).to(self._raw.device, non_blocking=True)
        shape = (*self._raw.shape[:2], len(page_ids), *self._raw.shape[3:])
        self._raw.index_copy_(2, chosen, pages.view(self._raw.dtype).view(shape))


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """As torch.zeros. On a CPU the system provides zeroed memory at first access: 2 GiB start 1 s faster."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(num_bytes + _ALIGNMENT, dtype=np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[begin : begin + num_bytes]).view(dtype).view(shape)


_ALIGNMENT = 64  # bytes of a vector: one that crosses cache lines takes two loads


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token position in all layers."""
    return config.num_layers * 2 * config.num_kv_heads * cell_bytes(config.head_dim, dtype)
