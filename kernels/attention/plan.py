"""Decisions of an attention launch on the host: tile sizes by card and shape, the number of parts, tree or plain.

Measured tiles of a card's table (`AttentionTiles`) take precedence over the choices in this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

LOG2_E = 1.4426950408889634
PROGRAMS_PER_SM = 3  # programs of the decode kernel that an H100 processor holds at once with the tile below
FIXED_PARTS = 8  # of each row, if its bits must not depend on the batch
TREE_PROGRAMS_PER_SM = 1  # programs of the tree kernel that a plan aims at, per processor


@dataclass(frozen=True, slots=True)
class TileConfig:
    """One compiled variant of a kernel."""

    block_m: int  # query rows (tokens or members x heads of a KV head) of a program
    block_n: int  # keys of one step of its loop
    num_warps: int
    num_stages: int  # depth of the software pipeline; page ids take every other stage, so 5 loads two tiles ahead


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """The fastest tiles measured on a card, for head dim 128 in 16 bits. None: this module's choice."""

    extend: TileConfig | None = None  # of prompts that fill its rows
    decode: TileConfig | None = None  # but for its rows, which are the heads of a group
    tree: TileConfig | None = None
    tree_programs: int | None = None  # of the shared part that a plan aims at, per processor
    decode_programs: int | None = None  # that rows are cut for, per processor

    def fit(self, head_dim: int, dtype: torch.dtype) -> bool:
        return head_dim == 128 and dtype.itemsize == 2


def dot_precision(dtype: torch.dtype) -> str:
    """The input precision of matrix products in `dtype`. fp32 uses three tf32 products, which keep 22 of its 24 bits.

    ("ieee" leaves the matrix units: at head dim 128 the compiler then spills thousands of registers.)
    """
    return "tf32x3" if dtype == torch.float32 else "tf32"


def extend_config(head_dim: int, dtype: torch.dtype, num_rows: int, tiles: AttentionTiles | None = None) -> TileConfig:
    """Choose the tile of `attention_extend` for sequences of at most `num_rows` = tokens x (H / K) rows.

    There are two, which every start compiles: fewer than 64 rows would read the same keys, without Hopper's products.
    """
    if dtype == torch.float32:
        return TileConfig(32, 32, 4, 2)
    small = 64 if num_rows <= 64 else 128
    if tiles is not None and tiles.extend is not None and tiles.fit(head_dim, dtype) and small >= tiles.extend.block_m:
        return tiles.extend
    if head_dim > 128:
        return TileConfig(128, 32, 8, 3) if small == 128 else TileConfig(small, 32, 4, 3)
    if small < 128:
        return TileConfig(small, 64, 4, 5)
    return TileConfig(128, 64, 8, 5)


def decode_config(head_dim: int, dtype: torch.dtype, group: int, tiles: AttentionTiles | None = None) -> TileConfig:
    """Choose the tile of `attention_decode` for `group` = H / K query heads of a KV head."""
    block_m = max(16, 1 << (group - 1).bit_length())
    if dtype == torch.float32:
        return TileConfig(block_m, 32, 4, 2)
    if tiles is not None and tiles.decode is not None and tiles.fit(head_dim, dtype):
        return replace(tiles.decode, block_m=block_m)
    return TileConfig(block_m, 64 if head_dim <= 128 else 32, 4, 5)


def choose_num_parts(num_kv_heads: int, num_sms: int, programs_per_sm: int = PROGRAMS_PER_SM) -> int:
    """Choose into how many parts `attention_decode` cuts the keys of all rows together: enough programs to keep every
    processor loading.

    Of many long rows each stays whole, but one that is far longer than the others does not.
    """
    return max(1, programs_per_sm * num_sms // num_kv_heads)


def tree_config(head_dim: int, dtype: torch.dtype, group: int, tiles: AttentionTiles | None = None) -> TileConfig:
    """Choose the tile of tree attention's shared part."""
    rows_of_member = 1 << (group - 1).bit_length()  # a tile holds at least one member
    if tiles is not None and tiles.tree is not None and tiles.fit(head_dim, dtype):
        return replace(tiles.tree, block_m=max(tiles.tree.block_m, rows_of_member))
    block_m = max(128, rows_of_member)
    if dtype == torch.float32:
        return TileConfig(max(32, rows_of_member), 32 if head_dim <= 128 else 16, 4, 2)
    return TileConfig(block_m, 64, 8, 5) if head_dim <= 128 else TileConfig(block_m, 32, 8, 3)


@dataclass(frozen=True, slots=True)
class TreeCosts:
    """Rates that decide between plain and tree attention. The defaults are cautious guesses; measure a card's rates
    with benchmarks/bench_attention.py.
    """

    plain_bandwidth: float = 2.7e12  # bytes/s that plain decode reads
    tree_bandwidth: float = 2.0e12  # bytes/s that the shared part reads, each segment once per tile of members
    tree_rate: float = 3.0e14  # flop/s of the shared part, padded rows counted
    part_bandwidth: float = 2.0e12  # bytes/s of fp32 parts, written once and read once
    fixed_s: float = 8e-6  # one more kernel, its start and its tail
    # bytes/s of the card's L2 cache, for parts that fit `l2_bytes` and for all but the first tile of members, which
    # reads a segment shortly before; None: both at memory's rates.
    l2_bandwidth: float | None = None
    l2_bytes: int = 24 << 20


def item_length(sizes: Sequence[tuple[int, int]], members_per_tile: int, num_items: int, block_n: int) -> int:
    """Keys of an item of a plan that cuts segments (members, tokens) into about `num_items` of equal length."""
    total = sum(-(-members // members_per_tile) * tokens for members, tokens in sizes)
    return max(1, -(-total // (num_items * block_n))) * block_n


class TreeCostModel:
    """Predicts one layer's decode attention, plain or with shared segments."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        config: TileConfig,
        costs: TreeCosts | None = None,
        *,
        element_bytes: int = 2,
        target_programs: int = 132,
    ) -> None:
        """element_bytes: of the cache. target_programs: those that a plan of the shared part aims at."""
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.config = config
        self.costs = costs or TreeCosts()
        self._token_bytes = 2 * num_kv_heads * head_dim * element_bytes  # of a position's key and value
        self._num_items = max(1, target_programs // num_kv_heads)
        self._members_per_tile = max(1, config.block_m // (num_heads // num_kv_heads))

    def plain_s(self, num_members: int, num_tokens: int) -> float:
        """Time if every member reads the segment by itself."""
        return num_members * num_tokens * self._token_bytes / self.costs.plain_bandwidth

    def tree_s(self, sizes: Sequence[tuple[int, int]]) -> float:
        """Time of segments (members, tokens) in one tree plan, without the plan's fixed cost."""
        costs, config = self.costs, self.config
        length = item_length(sizes, self._members_per_tile, self._num_items, config.block_n)
        total_s, part_bytes = 0.0, 0
        for num_members, num_tokens in sizes:
            tiles = -(-num_members // self._members_per_tile)
            flops = 4.0 * tiles * config.block_m * self.num_kv_heads * self.head_dim * num_tokens
            read = num_tokens * self._token_bytes
            again = costs.tree_bandwidth if costs.l2_bandwidth is None else costs.l2_bandwidth
            total_s += max(flops / costs.tree_rate, read / costs.tree_bandwidth + (tiles - 1) * read / again)
            part_bytes += num_members * -(-num_tokens // length) * self.num_heads * (self.head_dim + 1) * 4
        rate = costs.part_bandwidth
        if costs.l2_bandwidth is not None and part_bytes <= costs.l2_bytes:
            rate = costs.l2_bandwidth
        return total_s + 2 * part_bytes / rate

    def is_worth(self, num_members: int, num_tokens: int) -> bool:
        """Return True if one more segment in an existing plan saves time; for `find_shared_segments`."""
        return self.tree_s([(num_members, num_tokens)]) < self.plain_s(num_members, num_tokens)

    def should_use_tree(self, segments: Sequence[tuple[int, int]], num_suffix_tokens: int) -> bool:
        """Return True if a plan with these segments (members, tokens) beats plain decode beyond the model's error.

        The `num_suffix_tokens` of all rows cost the same in both. A gain below 2 % of the whole is ignored.
        """
        plain = sum(self.plain_s(n, tokens) for n, tokens in segments)
        tree = self.tree_s(segments) + self.costs.fixed_s
        return plain - tree > 0.02 * (plain + self.plain_s(1, num_suffix_tokens))
