"""Attention plans of a step: the location of each row's keys, the parts they are cut into, and shared prefixes.

A plan is made once for each step or graph, and every layer of the decoder runs it. The kernels and their tiles are in
`kernels/attention/`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.extend import ExtendMetadata
from ramet.kernels.attention.plan import FIXED_PARTS, PROGRAMS_PER_SM, AttentionTiles, choose_num_parts
from ramet.kernels.attention.tree import TreePlan
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.decoder import ForwardContext
from ramet.runtime.steps.cuda_graph import VERIFIED_TOKENS
from ramet.runtime.steps.inputs import ExtendArrays, ExtendInputs
from ramet.runtime.steps.kv_cache import KVCache
from ramet.runtime.steps.slots import RunningSlots
from ramet.runtime.steps.tree_planner import TreePlanner

_ANY_LENGTH = 1 << 20  # as the longest of a launch: attention takes the tile of long prompts


class AttentionPlans:
    """Makes the plans of one engine's steps, over its KV pages and slots."""

    def __init__(
        self,
        model: ModelConfig,
        kv_cache: KVCache,
        slots: RunningSlots,
        *,
        max_kv_len: int,
        num_sms: int | None,
        tree: TreePlanner | None,
        is_deterministic: bool,
        tiles: AttentionTiles | None,
    ) -> None:
        """num_sms: processors of the GPU, None on a CPU. is_deterministic: a row's bits must not depend on others.

        tiles: attention tiles measured on this GPU.
        """
        assert tree is None or not is_deterministic, "what a group shares changes the order of summation"
        self.tree = tree
        self._num_kv_heads = model.num_kv_heads
        self._kv_cache = kv_cache
        self._page_table = slots.tables.page_table
        self._max_kv_len = max_kv_len
        self._is_deterministic = is_deterministic
        self._tiles = tiles
        programs = PROGRAMS_PER_SM
        if tiles is not None and tiles.fit(model.head_dim, kv_cache.storage.dtype):
            programs = tiles.decode_programs or programs
        self._num_parts = FIXED_PARTS
        if not is_deterministic:
            self._num_parts = choose_num_parts(model.num_kv_heads, num_sms or 1, programs)
        self._merge_counters: Tensor | None = None
        if num_sms is not None:
            num_counters = max(slots.num_slots, VERIFIED_TOKENS[-1]) * model.num_kv_heads
            self._merge_counters = torch.zeros(num_counters, dtype=torch.int32, device=kv_cache.storage.device)

    @property
    def page_size(self) -> int:
        return self._kv_cache.page_size

    def shared(self, *, uses_tree: bool) -> TreePlan | None:
        """The plan for prefixes that decode rows share, whose buffers later plans overwrite; None: plain attention."""
        return self.tree.plan if uses_tree and self.tree is not None else None

    def decode(
        self, rows: Tensor, kv_lens: Tensor, tree: TreePlan | None = None, kv_lens_host: list[int] | None = None
    ) -> DecodeMetadata:
        """The plan of decode rows. rows, kv_lens: int32 [B]; the host may not know the lengths."""
        counters = self._merge_counters
        if counters is not None and rows.numel() * self._num_kv_heads > counters.numel():
            counters = None  # a test's drafts; their parts are merged by a second kernel
        return DecodeMetadata(
            kv_lens,
            rows,
            self._page_table,
            self._num_parts,
            self._is_deterministic,
            tree,
            kv_lens_host,
            counters,
            self._tiles,
        )

    def extend(self, sent: ExtendInputs, arrays: ExtendArrays, num_verified: int) -> ExtendMetadata:
        """The plan of rows with new tokens, without the first `num_verified`."""
        q_lens, kv_lens = arrays.q_lens[num_verified:].tolist(), arrays.kv_lens[num_verified:].tolist()
        cu_seqlens = sent.cu_seqlens[num_verified:]
        return ExtendMetadata(
            cu_seqlens_q=cu_seqlens - cu_seqlens[0] if num_verified else cu_seqlens,
            kv_lens=sent.kv_lens[num_verified:],
            rows=sent.rows[num_verified:],
            page_table=self._page_table,
            max_seqlen_q=_ANY_LENGTH if self._is_deterministic else max(q_lens),
            max_kv_len=max(kv_lens),
            q_lens_host=q_lens,
            kv_lens_host=kv_lens,
            tiles=self._tiles,
        )

    def extend_in_graph(self, cu_seqlens: Tensor, kv_lens: Tensor, rows: Tensor, num_tokens: int) -> ExtendMetadata:
        """The plan of every replay of a graph that holds `num_tokens` tokens."""
        return ExtendMetadata(
            cu_seqlens_q=cu_seqlens,
            kv_lens=kv_lens,
            rows=rows,
            page_table=self._page_table,
            max_seqlen_q=_ANY_LENGTH if self._is_deterministic else num_tokens,
            max_kv_len=self._max_kv_len,
            tiles=self._tiles,
        )

    def context(
        self,
        positions: Tensor,
        kv_slots: Tensor,
        decode: DecodeMetadata | None,
        extend: ExtendMetadata | None = None,
        extend_start: int | None = None,
    ) -> ForwardContext:
        """The decoder's context of a step. extend_start: index of the first extend token; None: after decode rows."""
        num_decode = 0 if decode is None else decode.rows.numel()
        start = num_decode if extend_start is None else extend_start
        caches, noted = self._kv_cache.layers, self._kv_cache.noted
        return ForwardContext(positions, kv_slots, num_decode, decode, extend, caches, start, noted)
