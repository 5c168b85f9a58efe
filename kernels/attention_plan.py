"""Tile sizes of the attention kernels by card and shape, and how far to split keys: what a launch decides on the host.

The choices are to be what benchmarks/bench_attention.py finds fastest on an H100; other cards use the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LOG2_E = 1.4426950408889634
PROGRAMS_PER_SM = 3  # programs of the decode kernel that an H100 processor holds at once with the tile below
MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class TileConfig:
    """One compiled variant of a kernel."""

    block_m: int  # query rows (tokens or members x heads of a KV head) of a program
    block_n: int  # keys of one step of its loop
    num_warps: int
    num_stages: int  # depth of the software pipeline


def dot_precision(dtype: torch.dtype) -> str:
    """How matrix products of `dtype` round their inputs: fp32 stays fp32, not tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def extend_config(head_dim: int, dtype: torch.dtype, num_rows: int) -> TileConfig:
    """Choose the tile of `attention_extend` for sequences of at most `num_rows` = tokens x (H / K) rows."""
    if dtype == torch.float32:
        return TileConfig(32, 32, 4, 2)
    small = max(16, min(128, 1 << (num_rows - 1).bit_length()))
    if head_dim > 128:
        return TileConfig(min(small, 64), 64, 4, 2)
    if small < 128:
        return TileConfig(small, 64, 4, 3)
    return TileConfig(128, 128 if head_dim <= 64 else 64, 8, 3)


def decode_config(head_dim: int, dtype: torch.dtype, group: int) -> TileConfig:
    """Choose the tile of `attention_decode` for `group` = H / K query heads of a KV head."""
    block_m = max(16, 1 << (group - 1).bit_length())
    if dtype == torch.float32:
        return TileConfig(block_m, 32, 4, 2)
    return TileConfig(block_m, 64 if head_dim <= 128 else 32, 4, 3)


def choose_num_splits(batch: int, num_kv_heads: int, max_kv_len: int, num_sms: int) -> int:
    """Choose how many parts `attention_decode` splits each row into: enough programs to keep every processor loading.

    A row shorter than splits x 64 keys uses fewer; `max_kv_len` is the longest the rows can become (the context when a
    graph is captured).
    """
    wanted = -(-PROGRAMS_PER_SM * num_sms // max(1, batch * num_kv_heads))
    return max(1, min(wanted, -(-max_kv_len // 64), MAX_SPLITS))
