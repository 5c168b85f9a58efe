"""Plan tree attention, which reads a prefix shared by a group of decode rows once.

The plan changes only when the rows change: generated tokens make the rows' suffixes longer and need no new plan.
Not here: the kernels and the arithmetic of plans (`kernels.attention.tree`), the cost model (`kernels.attention.plan`).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ramet.kernels.attention.plan import (
    TREE_PROGRAMS_PER_SM,
    AttentionTiles,
    TreeCostModel,
    TreeCosts,
    tree_config,
)
from ramet.kernels.attention.tree import TreePlan, TreeWork, find_shared_segments, plan_tree
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.types import ScheduledSequence, Sequence


class TreePlanner:
    """Keeps one `TreePlan` up to date. Owner: the model runner."""

    def __init__(
        self,
        model: ModelConfig,
        page_size: int,
        max_rows: int,
        *,
        mode: Literal["auto", "on"],
        num_sms: int,
        device: torch.device,
        dtype: torch.dtype,
        costs: TreeCosts | None = None,
        tiles: AttentionTiles | None = None,
    ) -> None:
        """costs, tiles: measured on this GPU; None takes cautious defaults."""
        self._group = model.num_heads // model.num_kv_heads
        self._num_kv_heads = model.num_kv_heads
        self._page_size = page_size
        self._mode = mode
        programs = None if tiles is None else tiles.tree_programs
        self._target_programs = (programs or TREE_PROGRAMS_PER_SM) * num_sms
        self._config = tree_config(model.head_dim, dtype, self._group, tiles)
        self._costs = TreeCostModel(
            model.num_heads,
            model.num_kv_heads,
            model.head_dim,
            self._config,
            costs,
            element_bytes=dtype.itemsize,
            target_programs=self._target_programs,
        )
        # The rows' page lists themselves: a list only grows at its end, and a preempted sequence gets another one.
        self._rows: tuple[list[int], ...] = ()
        # Lists of those rows' pages, and the shared ones as an array: a plan of 256 rows converts only the new rows'.
        self._pages: dict[Sequence, tuple[list[int], NDArray[np.int32]]] = {}
        self._is_used = False
        self.plan = TreePlan(max_rows, self._config, device)
        self.work: TreeWork | None = None  # the plan on the host
        self.num_plans = 0

    def update(self, items: tuple[ScheduledSequence, ...]) -> TreePlan | None:
        """Return the plan for these decode rows in this order, or None if plain attention is as fast."""
        rows = tuple([item.sequence.page_ids for item in items])
        if rows != self._rows:
            self._rows = rows
            self._is_used = self._make(items)
        return self.plan if self._is_used else None

    def _make(self, items: tuple[ScheduledSequence, ...]) -> bool:
        page_table, kv_lens = self._shared_pages(items)
        if len(items) < 2 or not page_table.shape[1]:
            return False
        is_worth = self._costs.is_worth if self._mode == "auto" else _always
        segments = find_shared_segments(page_table, kv_lens, self._page_size, is_worth)
        if not segments:
            return False
        if self._mode == "auto":
            sizes = [(len(s.member_rows), s.end - s.start) for s in segments]
            shared = sum(members * tokens for members, tokens in sizes)
            if not self._costs.should_use_tree(sizes, sum(item.start + 1 for item in items) - shared):
                return False
        plan = self.plan
        work = plan_tree(
            segments,
            len(items),
            self._group,
            self._num_kv_heads,
            self._config,
            self._target_programs,
            plan.max_items,
            plan.max_slots,
        )
        if work is None:
            return False
        self.load(work)
        return True

    def load(self, work: TreeWork) -> None:
        """Take a plan that this planner, or that of the first rank, has made."""
        self.plan.load(work)
        self.work = work
        self.num_plans += 1

    def _shared_pages(self, items: tuple[ScheduledSequence, ...]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Pages [B, W] of each row that the radix tree owns, padded with 0, and the KV lengths [B] within them."""
        known, self._pages = self._pages, {}
        counts = [item.sequence.num_shared_pages for item in items]
        pages = np.zeros((len(items), max(counts, default=0)), dtype=np.int32)
        for row, item, count in zip(pages, items, counts, strict=True):
            sequence = item.sequence
            own = known.get(sequence)
            if own is None or own[0] is not sequence.page_ids or len(own[1]) < count:
                own = sequence.page_ids, np.asarray(sequence.page_ids[:count], dtype=np.int32)
            self._pages[sequence] = own
            row[:count] = own[1][:count]
        lens = [min(item.start, count * self._page_size) + 1 for item, count in zip(items, counts, strict=True)]
        return pages, np.asarray(lens, dtype=np.int32)


def _always(num_members: int, num_tokens: int) -> bool:
    return num_members > 1 and num_tokens > 0
