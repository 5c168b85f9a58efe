"""The device memory of the KV pages, and how many of them fit.

Not here: who owns a page (page_pool, radix_cache). Page 0 is nobody's: padded rows of a step write there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.errors import OutOfMemory
from ramet.runtime.config import EngineConfig
from ramet.runtime.models.config import ModelConfig


class KVCache:
    """Keys and values of every layer in one allocation `[L, 2, N, K, P, D]`; `layers[l]` is the pair of views."""

    def __init__(
        self, config: ModelConfig, num_pages: int, page_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        shape = (config.num_layers, 2, num_pages, config.num_kv_heads, page_size, config.head_dim)
        try:
            # Zeros, not empty: attention reads whole pages with weight 0 beyond the end, and 0 * nan is nan.
            self.storage: Tensor = torch.zeros(shape, device=device, dtype=dtype)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            size = num_pages * page_size * bytes_per_token(config, dtype)
            raise OutOfMemory(
                f"the KV pool of {num_pages * page_size:,} tokens needs {size / 2**30:.1f} GiB on {device}, "
                f"which it does not have; lower --num-kv-tokens or --mem-fraction-static"
            ) from error
        self.layers: list[tuple[Tensor, Tensor]] = [(layer[0], layer[1]) for layer in self.storage]

    @property
    def num_bytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token position takes in all layers."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize


def choose_num_pages(
    config: ModelConfig, engine: EngineConfig, *, device: torch.device, dtype: torch.dtype, peak_workspace_bytes: int
) -> int:
    """Pages that fit, page 0 included.

    On a GPU: `mem_fraction_static` of its memory, less what is allocated now (the weights), what others hold, and the
    measured peak of a step's workspace. On a CPU: `kv_cpu_bytes`.
    """
    per_page = bytes_per_token(config, dtype) * engine.page_size
    if engine.num_kv_tokens is not None:
        return -(-engine.num_kv_tokens // engine.page_size) + 1
    if device.type != "cuda":
        return max(engine.kv_cpu_bytes // per_page, 2) + 1
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allocated = torch.cuda.memory_allocated(device)
    used_by_others = total - free - reserved
    room = int(total * engine.mem_fraction_static) - used_by_others - allocated - peak_workspace_bytes
    if room < 64 * per_page:
        needed = (used_by_others + allocated + peak_workspace_bytes + 64 * per_page) / total
        way_out = (
            f"raise --mem-fraction-static from {engine.mem_fraction_static} to at least {needed + 0.005:.2f}"
            if needed < 0.98
            else "take a smaller model, a lower --chunked-prefill-size or a larger GPU"
        )
        raise OutOfMemory(
            f"no room for the KV pool: the GPU has {total / 2**30:.1f} GiB, weights take {allocated / 2**30:.1f}, "
            f"a step's workspace {peak_workspace_bytes / 2**30:.1f}, others {used_by_others / 2**30:.1f}; {way_out}"
        )
    return room // per_page + 1
