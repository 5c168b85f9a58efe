"""The host's view of the slots, and the updates that send new sequences, pages and lengths to the device tables.

The tables themselves are `kernels.slots.tables.SlotTables`. They are never rebuilt: a step sends one list of changes,
each a triple (row, column, value). Owner: the model runner.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray

from ramet.kernels.sampling.sample import GREEDY_SLOT, split_seed
from ramet.kernels.slots.tables import COLUMNS, NUM_HEADER_COLUMNS, SlotTables, column_bits
from ramet.runtime.types import ScheduledSequence, Sequence


class RunningSlots:
    """Host side of the slot tables: the owner of each slot, and the number of its pages that the device knows."""

    def __init__(self, num_slots: int, max_pages: int, *, device: torch.device) -> None:
        self.tables = SlotTables.create(num_slots, max_pages, device)
        self.num_slots = num_slots
        self.owners: list[Sequence | None] = [None] * num_slots
        self._known_pages = [0] * num_slots

    @property
    def dummy(self) -> int:
        return self.num_slots

    def joins(self, item: ScheduledSequence) -> bool:
        """Return True if an extend row is its sequence's first since admission. Its slot must then be filled anew.

        After a preemption a sequence may get the same slot with other pages.
        """
        slot = item.sequence.slot
        assert slot is not None
        return self.owners[slot] is not item.sequence or item.start == item.sequence.num_cached

    def extend_updates(
        self, items: Seq[ScheduledSequence], grammar_states: Seq[int], edit_rows: Seq[int]
    ) -> NDArray[np.int32]:
        """Triples int32 [R, 3] for extend rows: parameters of sequences that join, new pages, lengths.

        grammar_states: the automaton's state after the tokens of each item that samples once (0: unconstrained); some
        of them the device may not have sampled. edit_rows: each item's row of the edit tables (0: none).
        """
        triples: list[tuple[int, int, int]] = []
        blocks: list[NDArray[np.int32]] = []
        for item, state, edit_row in zip(items, grammar_states, edit_rows, strict=True):
            sequence = item.sequence
            slot = sequence.slot
            assert slot is not None
            if self.joins(item):
                self.owners[slot] = sequence
                self._known_pages[slot] = 0
                triples.extend(_join_triples(sequence, slot, state, edit_row))
            elif item.num_samples == 1:
                triples.append((slot, COLUMNS["grammar_state"], state))
            known, pages = self._known_pages[slot], sequence.page_ids
            if len(pages) > known:
                block = np.empty((len(pages) - known, 3), dtype=np.int32)
                block[:, 0] = slot
                block[:, 1] = np.arange(known, len(pages), dtype=np.int32) + NUM_HEADER_COLUMNS
                block[:, 2] = pages[known:]
                blocks.append(block)
                self._known_pages[slot] = len(pages)
            # The commit after sampling adds the row's one: the column counts tokens with KV, as for decode rows. Where
            # drafts are verified, the host writes it once it knows them (`ModelRunner.store_last`).
            kv_len = item.start + item.num_tokens - (1 if item.num_samples else 0)
            triples.append((slot, COLUMNS["kv_len"], kv_len))
        return np.concatenate([np.asarray(triples, dtype=np.int32), *blocks])


def _join_triples(sequence: Sequence, slot: int, state: int, edit_row: int) -> list[tuple[int, int, int]]:
    request = sequence.request
    params = request.sampling
    low, high = split_seed(request.seed)
    values = {
        "grammar_state": state,
        "edit_row": edit_row,
        "seed_low": low,
        "seed_high": high,
        "error": 0,
        # Constrained texts are finished within max_tokens, with an end token if the request has any.
        "close_at": 0 if request.grammar is None else request.num_prompt + request.max_tokens,
        "end_token": 0 if request.end_token is None else 1 + request.end_token,
    }
    triples = [(slot, COLUMNS[name], value) for name, value in values.items()]
    triples += [(slot, COLUMNS[name], column_bits(name, getattr(params, name))) for name in GREEDY_SLOT]
    return triples
