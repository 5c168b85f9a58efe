"""Turn a batch of the scheduler into the device tensors of one step.

Token order in a step: decode rows first, one token each, then the extend rows' new tokens. The host does not know the
tokens of decode rows, because the step that samples them may still run: kernels read them from the slot tables.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ramet.kernels.slots.tables import SlotTables, scatter_rows, upload
from ramet.runtime.types import Batch, ScheduledSequence, Sequence, TokenIds


@dataclass(slots=True)
class ExtendArrays:
    """A step's extend rows, and the rows of the whole step that are sampled or scored: int32 arrays on the host.

    token_ids, positions, kv_slots [T_extend]; cu_seqlens [E + 1]; kv_lens, rows [E]. updates [U, 3]: changes of the
    slot tables (new sequences, pages, lengths). sample_index [R]: indices of the hidden states that are sampled, decode
    rows included; sample_rows [R]: their slots, several times where drafted tokens are verified; sample_positions [R]:
    the positions of the new tokens; sample_after [R]: the drafted token that a sampled one follows, or -1: a known one.
    score_index, score_targets [Q]: indices of the hidden states of scored positions, and the next tokens.
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    kv_slots: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    kv_lens: NDArray[np.int32]
    rows: NDArray[np.int32]
    updates: NDArray[np.int32]
    sample_index: NDArray[np.int32]
    sample_rows: NDArray[np.int32]
    sample_positions: NDArray[np.int32]
    sample_after: NDArray[np.int32]
    score_index: NDArray[np.int32]
    score_targets: NDArray[np.int32]

    @property
    def q_lens(self) -> NDArray[np.int32]:
        """Number of new tokens of each row, [E]."""
        return np.diff(self.cu_seqlens)

    def turns(self) -> list[NDArray[np.int32]]:
        """The turns in which a device samples where drafts are verified: of each sequence one position in a turn.

        Each is int32 [3, n]: the slots, the positions' indices among the R sampled ones, and their `sample_after`.
        """
        places = np.arange(len(self.sample_after))
        is_first = self.sample_after < 0
        turn_of = places - np.maximum.accumulate(np.where(is_first, places, 0))
        columns = np.stack([self.sample_rows, places.astype(np.int32), self.sample_after])
        return [columns[:, turn_of == turn] for turn in range(int(turn_of.max(initial=-1)) + 1)]


Edited = tuple[Sequence, int]
LastToken = tuple[int, int, int]  # a slot, its last token, and the number of tokens before it, which have KV


@dataclass(slots=True)
class Step:
    """A step on the host, before anything is sent to the device. Its arrays are all that a device needs.

    decode_rows, new_pages, kv_lens: int32 [B]: each decode row's slot, the page that it begins in this step (or 0), and
    its KV length after it. page_copies: int32 [C, 3]: copies to make before the step, (source, target, positions).
    extend: the rows with new tokens; None if all rows decode. num_verified: how many of these, the first ones, verify
    drafted tokens, each of which attends as a decode row does. uses_tree: decode rows share prefixes by the tree plan.
    logprob_rows: int32 [k], indices of the sampled positions that request log-probabilities; num_tops: how many of the
    most likely tokens they request at most. num_score_tops: the same of rows that are scored. needs_host: the host
    masks or edits rows, so no graph can sample them. masks: int32 [R, W], one for each sampled position, if the host
    masks some. edited: one entry for each sampled position, the sequence and the index of its next token if the host
    edits its logits, else None; `edited` itself is None if the host edits no row. adapters: int32 [T], each token's
    adapter, 0 for none; None if no token has one. pooled: as `gather_pooled` returns it.
    """

    decode_rows: NDArray[np.int32]
    new_pages: NDArray[np.int32]
    kv_lens: NDArray[np.int32]
    page_copies: NDArray[np.int32]
    extend: ExtendArrays | None
    uses_tree: bool
    logprob_rows: NDArray[np.int32]
    num_tops: int
    num_score_tops: int
    needs_host: bool
    pooled: NDArray[np.int32] | None = None
    adapters: NDArray[np.int32] | None = None
    num_verified: int = 0
    masks: NDArray[np.int32] | None = None
    edited: list[Edited | None] | None = None

    @property
    def num_decode(self) -> int:
        return len(self.decode_rows)


@dataclass(slots=True)
class ExtendInputs:
    """`ExtendArrays` on the device, without the updates and `sample_after`.

    token_ids, positions, kv_slots: int32 [T], also of the decode rows once `EagerSteps.send` has put these in front.
    """

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    cu_seqlens: Tensor
    kv_lens: Tensor
    rows: Tensor
    sample_index: Tensor
    sample_rows: Tensor
    sample_positions: Tensor
    score_index: Tensor
    score_targets: Tensor


def scored_range(item: ScheduledSequence) -> tuple[int, int]:
    """Token positions [first, last) that this item scores. The token at position p is predicted at p - 1."""
    request = item.sequence.request
    if request.score_from is None or request.pooling is not None:
        return 0, 0
    first = max(item.start + 1, request.score_from)
    return first, max(first, min(item.start + item.num_tokens + 1, request.num_prompt))


def gather_extend(batch: Batch, updates: NDArray[np.int32], page_size: int) -> ExtendArrays:
    """Gather the extend rows of `batch`. updates: their changes of the slot tables."""
    items = batch.items[batch.num_decode :]
    tokens: list[TokenIds] = []
    positions: list[NDArray[np.int32]] = []
    kv_slots: list[NDArray[np.int32]] = []
    rows, q_lens, kv_lens = [], [], []
    decode_items = batch.items[: batch.num_decode]
    sample_index = list(range(batch.num_decode))
    sample_rows = [item.sequence.slot for item in decode_items]
    sample_positions = [item.start + 1 for item in decode_items]
    sample_after = [-1] * batch.num_decode
    none = np.zeros(0, dtype=np.int32)
    score_index: list[NDArray[np.int32]] = [none]
    score_targets: list[TokenIds] = [none]
    offset = batch.num_decode
    for item in items:
        sequence, end = item.sequence, item.start + item.num_tokens
        own = np.asarray(sequence.page_ids, dtype=np.int32)
        where = np.arange(item.start, end, dtype=np.int32)
        tokens.append(sequence.tokens(item.start, end))
        positions.append(where)
        kv_slots.append(own[where // page_size] * page_size + where % page_size)
        rows.append(sequence.slot)
        q_lens.append(item.num_tokens)
        kv_lens.append(end)
        for back in range(item.num_samples - 1, -1, -1):
            sample_index.append(offset + item.num_tokens - 1 - back)
            sample_rows.append(sequence.slot)
            sample_positions.append(end - back)
        if item.num_samples:
            sample_after += [-1, *sequence.draft_ids[: item.num_samples - 1]]
        first, last = scored_range(item)
        if last > first:
            score_index.append(np.arange(first, last, dtype=np.int32) - 1 - item.start + offset)
            score_targets.append(sequence.tokens(first, last))
        offset += item.num_tokens
    return ExtendArrays(
        token_ids=np.concatenate(tokens),
        positions=np.concatenate(positions),
        kv_slots=np.concatenate(kv_slots),
        cu_seqlens=np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
        kv_lens=np.asarray(kv_lens, dtype=np.int32),
        rows=np.asarray(rows, dtype=np.int32),
        updates=updates,
        sample_index=np.asarray(sample_index, dtype=np.int32),
        sample_rows=np.asarray(sample_rows, dtype=np.int32),
        sample_positions=np.asarray(sample_positions, dtype=np.int32),
        sample_after=np.asarray(sample_after, dtype=np.int32),
        score_index=np.concatenate(score_index),
        score_targets=np.concatenate(score_targets),
    )


def gather_decode(items: Seq[ScheduledSequence], page_size: int) -> tuple[NDArray[np.int32], ...]:
    """The slots of decode rows, the pages that they begin (or 0), and their KV lengths after the step: int32 [B]."""
    slots = (item.sequence.slot for item in items)
    begun = (0 if item.start % page_size else item.sequence.page_ids[item.start // page_size] for item in items)
    kv_lens = (item.start + 1 for item in items)
    return tuple(np.fromiter(values, dtype=np.int32, count=len(items)) for values in (slots, begun, kv_lens))


def gather_logprobs(items: Seq[ScheduledSequence]) -> tuple[NDArray[np.int32], int]:
    """The sampled positions that request log-probabilities, int32 [k], and the most tokens that one requests."""
    wanted = [item.sequence.request.sampling.logprobs for item in items for _ in range(item.num_samples)]
    rows = [row for row, count in enumerate(wanted) if count is not None]
    return np.asarray(rows, dtype=np.int32), max((count or 0 for count in wanted), default=0)


def pooled_range(item: ScheduledSequence) -> tuple[int, int]:
    """Positions [first, last) whose hidden states this item adds to its request's vector."""
    request, end = item.sequence.request, item.start + item.num_tokens
    if request.pooling == "mean":
        return item.start, end
    wanted = {"last": request.num_prompt - 1, "cls": 0}.get(request.pooling or "", -1)
    return (wanted, wanted + 1) if item.start <= wanted < end else (0, 0)


def gather_pooled(batch: Batch) -> NDArray[np.int32] | None:
    """Where a step's hidden states are pooled: int32 [k, 2], ranges [first, last) of its tokens. None: nowhere."""
    found, offset = list[tuple[int, int]](), batch.num_decode
    for item in batch.items[batch.num_decode :]:
        if item.sequence.request.pooling is not None:
            first, last = pooled_range(item)
            if last > first:
                found.append((first - item.start + offset, last - item.start + offset))
        offset += item.num_tokens
    return np.asarray(found, dtype=np.int32) if found else None


def gather_adapters(items: Seq[ScheduledSequence]) -> NDArray[np.int32] | None:
    """The adapters of a step's tokens, int32 [T], 0 for none; None if no token has one."""
    adapters = [item.sequence.request.adapter for item in items]
    if all(adapter is None for adapter in adapters):
        return None
    indices = np.asarray([0 if adapter is None else adapter.index for adapter in adapters], dtype=np.int32)
    return np.repeat(indices, [item.num_tokens for item in items])


def most_tops(items: Seq[ScheduledSequence]) -> int:
    """The largest number of likeliest tokens that a scoring row requests."""
    scoring = (item.sequence.request for item in items if item.sequence.request.score_from is not None)
    return max((request.sampling.logprobs or 0 for request in scoring), default=0)


def upload_extend(arrays: ExtendArrays, tables: SlotTables, device: torch.device) -> ExtendInputs:
    """Send the rows to the device in one transfer, and write their updates to the slot tables."""
    names = [field.name for field in fields(ExtendArrays)]
    sent = dict(zip(names, upload(attrgetter(*names)(arrays), device), strict=True))
    scatter_rows(sent.pop("updates"), tables.arena)
    del sent["sample_after"]
    return ExtendInputs(**sent)
