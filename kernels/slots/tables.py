# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Device slot tables, and the small kernels at the start and the end of a decode step that read and change them.

A running sequence owns a slot: one row of an int32 arena. With one arena, a join, a leave or a new page is a few
triples (row, column, value), and one launch writes them all. Floats are stored as their bits.

    columns   0 last_token   1 kv_len   2 grammar_state   3.. sampling values (`sample.GREEDY_SLOT`)   then
              seed_low, seed_high, error, close_at, end_token, edit_row   ..15 unused   16.. page table
    rows      0..S-1 slots; S the dummy slot of padded batch rows: kv_len 0, page 0, greedy

kv_len counts the tokens whose KV is in the cache. In a decode step the row's `last_token` gets position kv_len.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ramet.kernels.grammar.mask import Budgets
from ramet.kernels.sampling.logit_edits import EditTables
from ramet.kernels.sampling.sample import GREEDY_SLOT, GrammarTables, SamplingTables
from ramet.kernels.triton_support import cdiv, jit_any_value, tl

_BLOCK = 128
_ALIGN = 32  # int32 values: sections start on 128 bytes, so kernels compiled for aligned pointers serve every step

NUM_HEADER_COLUMNS = 16  # 64 bytes: one row's scalars are one cache line
_NAMES = (
    *("last_token", "kv_len", "grammar_state"),
    *GREEDY_SLOT,
    *("seed_low", "seed_high", "error", "close_at", "end_token", "edit_row"),
)
COLUMNS = {name: index for index, name in enumerate(_NAMES)}
FLOAT_COLUMNS = frozenset(name for name, value in GREEDY_SLOT.items() if isinstance(value, float))
_SAMPLING_COLUMNS = tuple(field.name for field in fields(SamplingTables) if field.name in COLUMNS)
assert len(COLUMNS) <= NUM_HEADER_COLUMNS


def column_bits(name: str, value: float) -> int:
    """Return the integer for the arena's column `name`: the value, or a float's bits as a signed integer."""
    return float_bits(value) if name in FLOAT_COLUMNS else int(value)


def float_bits(value: float) -> int:
    """Return the bits of a value as fp32, as a signed integer."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


@dataclass(frozen=True, slots=True)
class SlotTables:
    """The arena, int32 [S + 1, 16 + max_pages], and views of its columns. Changed by steps and updates."""

    arena: Tensor

    @classmethod
    def create(cls, num_slots: int, max_pages: int, device: torch.device | str = "cpu") -> SlotTables:
        """Make empty tables: every slot greedy, unconstrained, without tokens."""
        arena = torch.zeros(num_slots + 1, NUM_HEADER_COLUMNS + max_pages, dtype=torch.int32, device=device)
        for name, value in GREEDY_SLOT.items():
            arena[:, COLUMNS[name]] = column_bits(name, value)
        return cls(arena)

    def column(self, name: str) -> Tensor:
        """Return the view [S + 1] of one column, as fp32 if it holds floats."""
        view = self.arena[:, COLUMNS[name]]
        return view.view(torch.float32) if name in FLOAT_COLUMNS else view

    @property
    def num_slots(self) -> int:
        return self.arena.shape[0] - 1

    @property
    def last_token(self) -> Tensor:
        return self.column("last_token")

    @property
    def kv_len(self) -> Tensor:
        return self.column("kv_len")

    @property
    def grammar_state(self) -> Tensor:
        return self.column("grammar_state")

    def budgets(self, positions: Tensor) -> Budgets:
        """Return the budgets of the slots' constrained texts. positions: int32 [B], those of the sampled tokens."""
        return Budgets(positions, self.column("close_at"), self.column("end_token"))

    @property
    def page_table(self) -> Tensor:
        """int32 [S + 1, max_pages], rows strided by the arena's width."""
        return self.arena[:, NUM_HEADER_COLUMNS:]

    def sampling(
        self, mask_index: Tensor | None = None, mask_rows: Tensor | None = None, edits: EditTables | None = None
    ) -> SamplingTables:
        """Return the sampling view of the arena, with a grammar arena's masks and with edits if given."""
        grammar = None
        if mask_index is not None and mask_rows is not None:
            grammar = GrammarTables(self.grammar_state, mask_index, mask_rows)
        return SamplingTables(
            **{name: self.column(name) for name in _SAMPLING_COLUMNS},
            grammar=grammar,
            edits=None if edits is None else edits.of_slots(self.column("edit_row")),
        )


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Static buffers of one batch bucket, int32 [B] each. `prepare_decode` writes them; the decode step reads them."""

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    kv_lens: Tensor

    @classmethod
    def create(cls, batch_size: int, device: torch.device | str = "cpu") -> DecodeInputs:
        return cls(*(torch.zeros(batch_size, dtype=torch.int32, device=device) for _ in range(4)))


def prepare_decode(
    rows: Tensor,
    new_page: Tensor,
    tables: SlotTables,
    page_size: int,
    out: DecodeInputs,
    *,
    fills_padding: bool = True,
) -> None:
    """Write a decode step's inputs: token, position, cache slot, and KV length including this token.

    rows: int32 [B], slots, padded by the dummy slot S. new_page: int32 [B], the page to enter into the row's page table
    at kv_len // page_size, 0 for none; the rest of `tables` is only read. Padded rows get token 0, position 0, slot 0
    and length 1; without `fills_padding`, only the length. Rows other than the dummy appear once. The buffers of `out`,
    except kv_lens, may be longer than B.
    """
    run = prepare_decode_triton if rows.is_cuda else prepare_decode_reference
    columns = tables.last_token, tables.kv_len, tables.page_table
    run(rows, new_page, *columns, page_size, out, fills_padding=fills_padding)


def commit_decode(
    rows: Tensor, next_tokens: Tensor, last_token: Tensor, kv_len: Tensor, num_computed: Tensor | None = None
) -> None:
    """Store the sampled tokens, int [B], as their slots' last tokens, and count the computed tokens.

    num_computed: int32 [B], tokens that got KV in the step (default: one each). The dummy slot never changes.
    """
    run = commit_decode_triton if rows.is_cuda else commit_decode_reference
    run(rows, next_tokens, last_token, kv_len, num_computed)


def upload(sections: Sequence[NDArray[np.int32]], device: torch.device) -> list[Tensor]:
    """Copy int32 arrays to the device in one asynchronous transfer. Returns one view for each array.

    On a CPU nothing is copied: the result shares the arrays' memory, so nobody may change them afterwards.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(section)) for section in sections]
    starts, total = [], 0
    for section in sections:
        starts.append(total)
        total += -(-section.size // _ALIGN) * _ALIGN
    packed = np.zeros(max(total, 1), dtype=np.int32)
    for start, section in zip(starts, sections, strict=True):
        packed[start : start + section.size] = section.reshape(-1)
    tensor = torch.from_numpy(packed).pin_memory().to(device, non_blocking=True)
    return [
        tensor[start : start + section.size].view(section.shape)
        for start, section in zip(starts, sections, strict=True)
    ]


def scatter_rows(updates: Tensor, table: Tensor) -> None:
    """Write triples (row, column, value), int32 [R, 3], into an int32 table [rows, columns]. Skips negative rows.

    Targets are distinct. A buffer of fixed size, padded with rows of -1, may be part of a CUDA graph.
    """
    (scatter_rows_triton if table.is_cuda else scatter_rows_reference)(updates, table)


def pack_updates(updates: Sequence[tuple[int, int, int]], capacity: int) -> Tensor:
    """Return triples as a host tensor int32 [capacity, 3], padded with rows of -1.

    Raises:
        ValueError: more updates than the capacity.
    """
    if len(updates) > capacity:
        raise ValueError(f"{len(updates)} updates do not fit a buffer of {capacity}; split them into several launches")
    packed = torch.full((capacity, 3), -1, dtype=torch.int32)
    if updates:
        packed[: len(updates)] = torch.tensor(updates, dtype=torch.int32)
    return packed


def prepare_decode_reference(
    rows: Tensor,
    new_page: Tensor,
    last_token: Tensor,
    kv_len: Tensor,
    page_table: Tensor,
    page_size: int,
    out: DecodeInputs,
    *,
    fills_padding: bool = True,
) -> None:
    """Specification of `prepare_decode` and its CPU path."""
    slots = rows.long()
    is_real = slots != last_token.shape[0] - 1
    length = kv_len[slots] * is_real
    page_index = (length // page_size).long()
    has_new_page = is_real & (new_page != 0)
    page_table[slots[has_new_page], page_index[has_new_page]] = new_page[has_new_page]
    kv_slots = page_table[slots, page_index] * page_size + length % page_size
    for target, value in (
        (out.token_ids, last_token[slots]),
        (out.positions, length),
        (out.kv_slots, kv_slots),
    ):
        head = target[: len(rows)]
        head.copy_(value * is_real if fills_padding else torch.where(is_real, value, head))
    out.kv_lens.copy_(length + 1)


def commit_decode_reference(
    rows: Tensor, next_tokens: Tensor, last_token: Tensor, kv_len: Tensor, num_computed: Tensor | None = None
) -> None:
    """Specification of `commit_decode` and its CPU path."""
    is_real = rows != last_token.shape[0] - 1
    slots = rows[is_real].long()
    last_token[slots] = next_tokens[is_real].to(last_token.dtype)
    kv_len[slots] += 1 if num_computed is None else num_computed[is_real]


def scatter_rows_reference(updates: Tensor, table: Tensor) -> None:
    """Specification of `scatter_rows` and its CPU path."""
    kept = updates[updates[:, 0] >= 0]
    table[kept[:, 0].long(), kept[:, 1].long()] = kept[:, 2]


def prepare_decode_triton(
    rows: Tensor,
    new_page: Tensor,
    last_token: Tensor,
    kv_len: Tensor,
    page_table: Tensor,
    page_size: int,
    out: DecodeInputs,
    *,
    fills_padding: bool = True,
) -> None:
    """Launch the kernel of `prepare_decode`: one program per 128 rows."""
    _prepare_kernel[(cdiv(len(rows), _BLOCK),)](
        rows,
        new_page,
        last_token,
        kv_len,
        page_table,
        out.token_ids,
        out.positions,
        out.kv_slots,
        out.kv_lens,
        last_token.stride(0),
        kv_len.stride(0),
        page_table.stride(0),
        len(rows),
        last_token.shape[0] - 1,
        FILLS_PADDING=fills_padding,
        P=page_size,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def commit_decode_triton(
    rows: Tensor, next_tokens: Tensor, last_token: Tensor, kv_len: Tensor, num_computed: Tensor | None = None
) -> None:
    """Launch the kernel of `commit_decode`."""
    _commit_kernel[(cdiv(len(rows), _BLOCK),)](
        rows,
        next_tokens,
        last_token,
        kv_len,
        num_computed,
        last_token.stride(0),
        kv_len.stride(0),
        len(rows),
        last_token.shape[0] - 1,
        HAS_COUNTS=num_computed is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def scatter_rows_triton(updates: Tensor, table: Tensor) -> None:
    """Launch the kernel of `scatter_rows`."""
    num_updates = updates.shape[0]
    if num_updates:
        _scatter_kernel[(cdiv(num_updates, _BLOCK),)](
            updates, table, table.stride(0), table.stride(1), num_updates, BLOCK=_BLOCK, num_warps=4
        )


@jit_any_value("num_rows")
def _prepare_kernel(
    rows_ptr, new_page_ptr, token_ptr, length_ptr, pages_ptr, out_token_ptr, out_position_ptr, out_slot_ptr,
    out_length_ptr, token_stride, length_stride, pages_stride, num_rows, dummy, FILLS_PADDING: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_rows
    row = tl.load(rows_ptr + index, mask=inside, other=dummy)
    is_real = inside & (row != dummy)
    row = row.to(tl.int64)
    token = tl.load(token_ptr + row * token_stride, mask=is_real, other=0)
    length = tl.load(length_ptr + row * length_stride, mask=is_real, other=0)
    new_page = tl.load(new_page_ptr + index, mask=is_real, other=0)
    entry = pages_ptr + row * pages_stride + length // P
    has_new_page = new_page != 0
    page = tl.load(entry, mask=is_real & (new_page == 0), other=0)
    page = tl.where(has_new_page, new_page, page)
    tl.store(entry, new_page, mask=has_new_page)
    written = inside if FILLS_PADDING else is_real
    tl.store(out_token_ptr + index, token, mask=written)
    tl.store(out_position_ptr + index, length, mask=written)
    tl.store(out_slot_ptr + index, page * P + tl.where(is_real, length % P, 0), mask=written)
    tl.store(out_length_ptr + index, length + 1, mask=inside)


@jit_any_value("num_rows")
def _commit_kernel(
    rows_ptr, next_ptr, token_ptr, length_ptr, counts_ptr, token_stride, length_stride, num_rows, dummy,
    HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_rows
    row = tl.load(rows_ptr + index, mask=inside, other=dummy)
    is_real = inside & (row != dummy)
    row = row.to(tl.int64)
    token = tl.load(next_ptr + index, mask=is_real, other=0).to(tl.int32)
    count = tl.full((BLOCK,), 1, tl.int32)
    if HAS_COUNTS:
        count = tl.load(counts_ptr + index, mask=is_real, other=0)
    length = tl.load(length_ptr + row * length_stride, mask=is_real, other=0)
    tl.store(token_ptr + row * token_stride, token, mask=is_real)
    tl.store(length_ptr + row * length_stride, length + count, mask=is_real)


@jit_any_value("num_updates", "row_stride", "column_stride")
def _scatter_kernel(updates_ptr, table_ptr, row_stride, column_stride, num_updates, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_updates
    row = tl.load(updates_ptr + index * 3, mask=inside, other=-1).to(tl.int64)
    column = tl.load(updates_ptr + index * 3 + 1, mask=inside, other=0)
    value = tl.load(updates_ptr + index * 3 + 2, mask=inside, other=0)
    tl.store(table_ptr + row * row_stride + column * column_stride, value, mask=inside & (row >= 0))
