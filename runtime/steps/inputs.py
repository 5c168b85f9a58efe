"""From a batch of the scheduler to the device tensors of one step.

Token order in a step: decode rows first, one token each, then the extend rows' new tokens. Tokens of decode rows are
not known to the host (the step that samples them may still run): kernels fetch them from the slot tables.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ramet.kernels.attention.extend import ExtendMetadata
from ramet.kernels.slots.tables import scatter_rows
from ramet.runtime.steps.slots import RunningSlots, upload
from ramet.runtime.types import Batch, ScheduledSequence, TokenIds


@dataclass(slots=True)
class ExtendArrays:
    """A step's extend rows on the host, int32 arrays; which rows of the whole step are sampled or scored.

    token_ids, positions, kv_slots [T_extend]; cu_seqlens [E + 1]; kv_lens, rows [E]. updates [U, 3]: what joins, pages
    and lengths change in the slot tables. sample_index [R]: rows of the step's hidden states that are sampled, decode
    rows included; sample_rows [R]: their slots; sample_positions [R]: the position of the new token.
    score_index, score_targets [Q]: hidden states and next tokens of scoring requests.
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
    score_index: NDArray[np.int32]
    score_targets: NDArray[np.int32]


@dataclass(slots=True)
class ExtendInputs:
    """`ExtendArrays` on the device; score_index and score_targets are None where nothing is scored."""

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    metadata: ExtendMetadata
    sample_index: Tensor
    sample_rows: Tensor
    sample_positions: Tensor
    score_index: Tensor | None
    score_targets: Tensor | None


def new_pages_of(items: tuple[ScheduledSequence, ...], page_size: int) -> NDArray[np.int32]:
    """The page that each decode row starts in this step, or 0."""
    return np.fromiter(
        (0 if item.start % page_size else item.sequence.page_ids[item.start // page_size] for item in items),
        dtype=np.int32,
        count=len(items),
    )


def decode_rows_of(items: tuple[ScheduledSequence, ...]) -> NDArray[np.int32]:
    """The slot of each decode row."""
    return np.fromiter((item.sequence.slot for item in items), dtype=np.int32, count=len(items))


def scored_range(item: ScheduledSequence) -> tuple[int, int]:
    """Token positions [first, last) whose log-probabilities this item yields: position p is predicted by p - 1."""
    request = item.sequence.request
    if request.score_from is None:
        return 0, 0
    first = max(item.start + 1, request.score_from)
    return first, max(first, min(item.start + item.num_tokens + 1, request.num_prompt))


def gather_extend(
    batch: Batch, slots: RunningSlots, grammar_states: Seq[int], edit_rows: Seq[int], page_size: int
) -> ExtendArrays:
    """Gather the extend rows of `batch`; their joins, pages and lengths count as known to the device from now on.

    grammar_states, edit_rows: each extend row's automaton state, and its row of the edit tables.
    """
    items = batch.items[batch.num_decode :]
    tokens: list[TokenIds] = []
    positions: list[NDArray[np.int32]] = []
    kv_slots: list[NDArray[np.int32]] = []
    rows, q_lens, kv_lens = [], [], []
    decode_items = batch.items[: batch.num_decode]
    sample_index = list(range(batch.num_decode))
    sample_rows = [item.sequence.slot for item in decode_items]
    sample_positions = [item.start + 1 for item in decode_items]
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
        if item.samples:
            sample_index.append(offset + item.num_tokens - 1)
            sample_rows.append(sequence.slot)
            sample_positions.append(end)
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
        updates=slots.extend_updates(items, grammar_states, edit_rows),
        sample_index=np.asarray(sample_index, dtype=np.int32),
        sample_rows=np.asarray(sample_rows, dtype=np.int32),
        sample_positions=np.asarray(sample_positions, dtype=np.int32),
        score_index=np.concatenate(score_index),
        score_targets=np.concatenate(score_targets),
    )


def upload_extend(arrays: ExtendArrays, slots: RunningSlots, device: torch.device) -> ExtendInputs:
    """Send the rows to the device in one transfer, and write their updates to the slot tables."""
    parts = upload([getattr(arrays, f.name) for f in fields(arrays)], device)
    named = dict(zip((f.name for f in fields(arrays)), parts, strict=True))
    scatter_rows(named["updates"], slots.tables.arena)
    q_lens, kv_lens = np.diff(arrays.cu_seqlens).tolist(), arrays.kv_lens.tolist()
    metadata = ExtendMetadata(
        cu_seqlens_q=named["cu_seqlens"],
        kv_lens=named["kv_lens"],
        rows=named["rows"],
        page_table=slots.tables.page_table,
        max_seqlen_q=max(q_lens),
        max_kv_len=max(kv_lens),
        q_lens_host=q_lens,
        kv_lens_host=kv_lens,
    )
    has_scores = len(arrays.score_index) > 0
    return ExtendInputs(
        token_ids=named["token_ids"],
        positions=named["positions"],
        kv_slots=named["kv_slots"],
        metadata=metadata,
        sample_index=named["sample_index"],
        sample_rows=named["sample_rows"],
        sample_positions=named["sample_positions"],
        score_index=named["score_index"] if has_scores else None,
        score_targets=named["score_targets"] if has_scores else None,
    )
