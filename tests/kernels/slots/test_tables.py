"""Slot tables and the decode step's prologue and epilogue."""

from __future__ import annotations

import pytest
import torch

from ramet.kernels.slots import tables as step_inputs
from ramet.kernels.slots.tables import (
    COLUMNS,
    NUM_HEADER_COLUMNS,
    DecodeInputs,
    SlotTables,
    column_bits,
    pack_updates,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["reference", "triton"]


def make_slots() -> SlotTables:
    """Three slots with lengths 5, 8 and 0, pages of 4 tokens."""
    slots = SlotTables.create(3, 6, DEVICE)
    slots.last_token[:3] = torch.tensor([11, 22, 33], dtype=torch.int32, device=DEVICE)
    slots.kv_len[:3] = torch.tensor([5, 8, 0], dtype=torch.int32, device=DEVICE)
    slots.page_table[0, :2] = torch.tensor([7, 9], dtype=torch.int32, device=DEVICE)
    slots.page_table[1, :2] = torch.tensor([3, 4], dtype=torch.int32, device=DEVICE)
    return slots


@pytest.mark.parametrize("kind", KINDS)
def test_prepare_writes_inputs_enters_new_pages_and_leaves_padding_alone(kind: str) -> None:
    slots = make_slots()
    out = DecodeInputs.create(5, DEVICE)
    rows = torch.tensor([1, 3, 0, 2, 3], dtype=torch.int32, device=DEVICE)
    new_page = torch.tensor([6, 0, 0, 8, 0], dtype=torch.int32, device=DEVICE)
    prepare_decode = getattr(step_inputs, f"prepare_decode_{kind}")
    prepare_decode(rows, new_page, slots.last_token, slots.kv_len, slots.page_table, 4, out)
    assert out.token_ids.tolist() == [22, 0, 11, 33, 0]
    assert out.positions.tolist() == [8, 0, 5, 0, 0]
    assert out.kv_slots.tolist() == [24, 0, 37, 32, 0]
    assert out.kv_lens.tolist() == [9, 1, 6, 1, 1]
    assert slots.page_table[1].tolist() == [3, 4, 6, 0, 0, 0]
    assert slots.page_table[2].tolist() == [8, 0, 0, 0, 0, 0]
    assert not slots.page_table[3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_prepare_may_leave_what_stands_behind_its_rows(kind: str) -> None:
    """In a step with prompts, new tokens stand where padded rows would."""
    slots = make_slots()
    tokens, positions, kv_slots = (torch.full((6,), value, dtype=torch.int32, device=DEVICE) for value in (70, 71, 72))
    out = DecodeInputs(tokens, positions, kv_slots, torch.zeros(4, dtype=torch.int32, device=DEVICE))
    rows = torch.tensor([1, 0, 3, 3], dtype=torch.int32, device=DEVICE)
    new_page = torch.tensor([6, 0, 0, 0], dtype=torch.int32, device=DEVICE)
    prepare_decode = getattr(step_inputs, f"prepare_decode_{kind}")
    columns = slots.last_token, slots.kv_len, slots.page_table
    prepare_decode(rows, new_page, *columns, 4, out, fills_padding=False)
    assert out.token_ids.tolist() == [22, 11, 70, 70, 70, 70]
    assert out.positions.tolist() == [8, 5, 71, 71, 71, 71]
    assert out.kv_slots.tolist() == [24, 37, 72, 72, 72, 72]
    assert out.kv_lens.tolist() == [9, 6, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_commit_stores_tokens_and_counts_but_never_for_the_dummy_slot(kind: str) -> None:
    commit_decode = getattr(step_inputs, f"commit_decode_{kind}")
    slots = make_slots()
    rows = torch.tensor([2, 0, 3, 3], dtype=torch.int32, device=DEVICE)
    commit_decode(rows, torch.tensor([100, 101, 102, 103], device=DEVICE), slots.last_token, slots.kv_len)
    assert slots.last_token.tolist() == [101, 22, 100, 0]
    assert slots.kv_len.tolist() == [6, 8, 1, 0]
    num_computed = torch.tensor([4, 0, 9, 9], dtype=torch.int32, device=DEVICE)
    commit_decode(rows, torch.tensor([1, 2, 3, 4], device=DEVICE), slots.last_token, slots.kv_len, num_computed)
    assert slots.kv_len.tolist() == [6, 8, 5, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_scatter_writes_integers_and_float_bits_in_one_buffer(kind: str) -> None:
    slots = make_slots()
    updates = [
        (1, COLUMNS["temperature"], column_bits("temperature", 0.7)),
        (1, COLUMNS["top_p"], column_bits("top_p", 0.9)),
        (1, NUM_HEADER_COLUMNS + 5, 42),
        (0, COLUMNS["kv_len"], 0),
    ]
    scatter_rows = getattr(step_inputs, f"scatter_rows_{kind}")
    scatter_rows(pack_updates(updates, 8).to(DEVICE), slots.arena)
    sampling = slots.sampling()
    assert sampling.temperature[1] == torch.tensor(0.7, device=DEVICE)
    assert sampling.top_p.tolist() == pytest.approx([1.0, 0.9, 1.0, 1.0])
    assert slots.page_table[1, 5] == 42
    assert slots.kv_len.tolist() == [0, 8, 0, 0]


def test_too_many_updates_are_refused() -> None:
    with pytest.raises(ValueError, match="2 updates do not fit a buffer of 1"):
        pack_updates([(0, 0, 0), (0, 1, 0)], 1)
