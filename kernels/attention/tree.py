"""Tree attention for decode: keys that several running sequences share are read once for all of them.

Rows whose page lists begin with the same pages share their keys. A segment is a run of pages shared by the same set of
rows; one matrix product attends from the queries of all its members. The suffix of a row is the keys after its last
segment; it is attended row by row. The log-sum-exp merges the parts to exactly the softmax over the whole row:

    out = sum_i 2^(lse_i - lse) part_i,    lse = log2 sum_i 2^lse_i

`find_shared_segments` derives the segments from page tables. `plan_tree` cuts them into work items of about equal
length, in flat arrays. `TreePlan` holds these arrays on the device at fixed addresses, so a captured CUDA graph reads
every later plan. The kernel is in tree_triton.py. Positions of a row of length n:

    [0 .. kv_start) shared segments, one after another    [kv_start .. n) suffix; grows each step without a new plan

A plan is valid while the batch rows, their order and their shared pages stay the same. It never covers the last token.
Not here: sliding windows; the caller uses plain decode for them.
Source: cascade inference (FlashInfer, Ye et al. 2024), Hydragen (Juravsky et al. 2024) for the decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ramet.kernels.attention.plan import TileConfig, item_length

Int32 = NDArray[np.int32]
ITEM_FIELDS = 5  # representative row, first key, end of keys, first entry in `members`, number of members


@dataclass(frozen=True, slots=True)
class SharedSegment:
    """Keys at positions [start, end), whole pages, that all `member_rows` (batch rows) have in common."""

    representative_row: int  # the member whose page table is read
    start: int
    end: int
    member_rows: Int32


@dataclass(frozen=True, slots=True)
class TreeWork:
    """A plan on the host. An item attends from up to block_m // (H / K) members to one run of keys.

    Its results go to slots; the slots of batch row b are [slot_offsets[b], slot_offsets[b + 1]).
    """

    items: Int32  # [I, ITEM_FIELDS], longest first
    members: Int32  # [num_slots], batch row of each member of each item
    member_slots: Int32  # [num_slots], the slot of its result
    slot_offsets: Int32  # [B + 1]
    kv_starts: Int32  # [B], where each row's suffix begins


class TreePlan:
    """A plan on the device, in buffers that keep their addresses. Owned by the model runner.

    items int32 [max_items, ITEM_FIELDS], num_items int32 [1], members and member_slots int32 [max_slots],
    slot_offsets int32 [max_rows + 1], kv_starts int32 [max_rows]. Kernels run a fixed grid and stop at num_items.
    """

    def __init__(
        self,
        max_rows: int,
        config: TileConfig,
        device: torch.device,
        max_items: int = 128,
        max_slots: int = 4096,
        side_stream: torch.cuda.Stream | None = None,
    ) -> None:
        """Allocate. With `side_stream` the shared part runs in parallel to the suffixes, and a third kernel merges."""
        self.max_rows, self.max_items, self.max_slots = max_rows, max_items, max_slots
        self.config = config
        self.side_stream = side_stream
        sizes = [max_items * ITEM_FIELDS, 1, max_slots, max_slots, max_rows + 1, max_rows]
        self._offsets = np.concatenate([[0], np.cumsum([-(-n // 4) * 4 for n in sizes])])  # 16-byte aligned
        self._device = torch.zeros(int(self._offsets[-1]), dtype=torch.int32, device=device)
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(self._device.shape, dtype=torch.int32, pin_memory=is_cuda)
        self._copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        self._copied_once = False
        views = [self._device[int(a) : int(a) + n] for a, n in zip(self._offsets[:-1], sizes, strict=True)]
        self.items = views[0].view(max_items, ITEM_FIELDS)
        self.num_items, self.members, self.member_slots, self.slot_offsets, self.kv_starts = views[1:]

    def load(self, work: TreeWork | None) -> None:
        """Copy `work` to the device in one asynchronous transfer on the current stream; None makes every row plain.

        Waits only if the previous plan has not yet left the pinned buffer.
        """
        if self._copied is not None and self._copied_once:
            self._copied.synchronize()
        host = self._host.numpy()
        at = self._offsets
        if work is None:
            host[:] = 0
        else:
            num_rows = len(work.kv_starts)
            assert len(work.items) <= self.max_items
            assert len(work.members) <= self.max_slots
            assert num_rows <= self.max_rows
            host[at[0] : at[0] + work.items.size] = work.items.ravel()
            host[at[1]] = len(work.items)
            host[at[2] : at[2] + len(work.members)] = work.members
            host[at[3] : at[3] + len(work.members)] = work.member_slots
            # Rows beyond the plan pad the batch: no slots, no shared keys.
            host[at[4] : at[4] + self.max_rows + 1] = work.slot_offsets[-1]
            host[at[4] : at[4] + num_rows + 1] = work.slot_offsets
            host[at[5] : at[5] + self.max_rows] = 0
            host[at[5] : at[5] + num_rows] = work.kv_starts
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
            self._copied_once = True


def find_shared_segments(
    page_table: Int32, kv_lens: Int32, page_size: int, is_worth: Callable[[int, int], bool]
) -> list[SharedSegment]:
    """Find the segments that rows of `page_table` [B, W] (one per batch row) share, from the root down.

    `kv_lens` [B] counts the current token, whose page is never shared. A page id stands for the page's whole prefix, as
    in a radix cache: rows with the same page at the same index have the same pages before it. `is_worth(members,
    tokens)` decides on each segment; the keys of a rejected segment become part of the segments below it.
    """
    num_pages = np.maximum(kv_lens - 1, 0) // page_size
    rows = np.flatnonzero(num_pages > 0)
    depth = np.zeros(len(rows), dtype=np.int64)  # pages that the row's group has in common so far
    covered = np.zeros(len(rows), dtype=np.int64)  # of these, the first ones are in segments
    segments: list[SharedSegment] = []
    while len(rows) > 1:
        page = page_table[rows, depth]
        order = np.argsort(page, kind="stable")
        rows, depth, covered, page = rows[order], depth[order], covered[order], page[order]
        starts = np.flatnonzero(np.concatenate([[True], page[1:] != page[:-1]]))
        sizes = np.diff(starts, append=len(rows))
        if not (sizes > 1).any():
            break
        is_grouped = np.repeat(sizes > 1, sizes)
        rows, covered = rows[is_grouped], covered[is_grouped]
        sizes = sizes[sizes > 1]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        first = rows[starts]
        low, high = int(depth.min()), int(num_pages[rows].max())
        differs = page_table[rows, low:high] != np.repeat(page_table[first, low:high], sizes, axis=0)
        agreed = np.where(differs.any(1), differs.argmax(1) + low, high)
        common = np.minimum.reduceat(np.minimum(agreed, num_pages[rows]), starts)
        for index, (start, size, end) in enumerate(zip(starts.tolist(), sizes.tolist(), common.tolist(), strict=True)):
            begin = int(covered[start])
            if is_worth(size, (end - begin) * page_size):
                members = rows[start : start + size].astype(np.int32)
                segments.append(SharedSegment(int(first[index]), begin * page_size, end * page_size, members))
                covered[start : start + size] = end
        depth = np.repeat(common, sizes)
        is_longer = num_pages[rows] > depth
        rows, depth, covered = rows[is_longer], depth[is_longer], covered[is_longer]
    return segments


def plan_tree(
    segments: Sequence[SharedSegment],
    num_rows: int,
    group: int,
    num_kv_heads: int,
    config: TileConfig,
    target_programs: int,
    max_items: int = 128,
    max_slots: int = 4096,
) -> TreeWork | None:
    """Cut `segments` into about `target_programs` / K items of equal length; None if they do not fit the buffers.

    `group` = H / K; `target_programs` = TREE_PROGRAMS_PER_SM x processors of the card. The segments of a row must
    follow each other without a gap from position 0.
    """
    if not segments:
        return None
    per_tile = max(1, config.block_m // group)
    counts = [len(s.member_rows) for s in segments]
    tiles = [-(-n // per_tile) for n in counts]
    lengths = [s.end - s.start for s in segments]
    wanted = max(1, min(max_items, target_programs // num_kv_heads))
    chunk = item_length(list(zip(counts, lengths, strict=True)), per_tile, wanted, config.block_n)
    while True:
        steps = [_round_up(-(-n // -(-n // chunk)), config.block_n) for n in lengths]  # keys of each segment's items
        chunks = [-(-n // step) for n, step in zip(lengths, steps, strict=True)]
        num_items = sum(t * c for t, c in zip(tiles, chunks, strict=True))
        num_slots = sum(n * c for n, c in zip(counts, chunks, strict=True))
        if num_items <= max_items and num_slots <= max_slots:
            break
        if max(chunks) == 1:
            return None
        chunk = _round_up(chunk + chunk // 4, config.block_n)
    used = np.zeros(num_rows, dtype=np.int32)  # slots of each row
    kv_starts = np.zeros(num_rows, dtype=np.int32)
    for segment, num_chunks in zip(segments, chunks, strict=True):
        used[segment.member_rows] += num_chunks
        assert (kv_starts[segment.member_rows] == segment.start).all(), "segments of a row must follow each other"
        kv_starts[segment.member_rows] = segment.end
    slot_offsets = np.concatenate([[0], np.cumsum(used)]).astype(np.int32)
    next_slot = slot_offsets[:-1].copy()
    items, members, slots, filled = [], [], [], 0
    for segment, num_chunks, num_tiles, step in zip(segments, chunks, tiles, steps, strict=True):
        rows, count = segment.member_rows, len(segment.member_rows)
        first_key = segment.start + np.repeat(np.arange(num_chunks), num_tiles) * step
        tile_start = np.tile(np.arange(num_tiles) * per_tile, num_chunks)
        block = np.empty((num_chunks * num_tiles, ITEM_FIELDS), dtype=np.int32)
        block[:, 0] = segment.representative_row
        block[:, 1] = first_key
        block[:, 2] = np.minimum(first_key + step, segment.end)
        block[:, 3] = filled + np.repeat(np.arange(num_chunks), num_tiles) * count + tile_start
        block[:, 4] = np.minimum(per_tile, count - tile_start)
        items.append(block)
        members.append(np.tile(rows, num_chunks))
        slots.append((next_slot[rows] + np.arange(num_chunks)[:, None]).ravel())
        next_slot[rows] += num_chunks
        filled += count * num_chunks
    flat = np.concatenate(items)
    # Longest first, so that the last programs to start are short ones.
    order = np.argsort(flat[:, 1] - flat[:, 2], kind="stable")
    return TreeWork(
        flat[order],
        np.concatenate(members).astype(np.int32),
        np.concatenate(slots).astype(np.int32),
        slot_offsets,
        kv_starts,
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
