"""The penalties, biases and minimum lengths of sequences, applied by the device's edit tables or by the host.

A sequence gets a row of the edit tables when it joins a step. The steps themselves keep the row up to date, so such
sequences run in overlapped steps and graphs like all others. On a CPU, or if no row is free, the host edits the logits.
It needs the sequence's tokens for that, so a step with such rows is not overlapped. Not here: the formula of an edit
(`kernels/sampling/logit_edits.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ramet.kernels.sampling.logit_edits import (
    ENDS_TEXT,
    IN_PROMPT,
    PARAMETERS,
    EditTables,
    penalize_generated,
    penalize_repetition,
)
from ramet.kernels.slots.tables import float_bits, scatter_rows, upload
from ramet.runtime.types import Sequence

NUM_EDIT_ROWS = 64  # 1.5 MB each at a vocabulary of 128k


def apply_edits(logits: Tensor, rows: Seq[tuple[Sequence, int] | None]) -> Tensor:
    """Return edited fp32 logits [R, V]; the input is not changed. On a GPU, the host does not wait for it.

    rows: one for each row of logits, the sequence and the index of its next token, or None: no edits.

    Computes `edit_logits_reference` for the tokens that the sequences' edits touch, never for the whole vocabulary.
    """
    edits = _Edits()
    for line, row in enumerate(rows):
        if row is not None:
            edits.add(line, *row)
    edited = logits.to(torch.float32, copy=True)
    biased, ending, seen, generated = upload(edits.tables(), logits.device)

    def change(table: Tensor, edit: Callable[..., Tensor]) -> None:
        if len(table):
            where = table[:, 0].long(), table[:, 1].long()
            edited[where] = edit(edited[where], *table[:, 2:].view(torch.float32).unbind(1))

    change(biased, torch.add)
    change(ending, lambda x: torch.full_like(x, -torch.inf))
    change(seen, penalize_repetition)
    change(generated, penalize_generated)
    return edited


class _Edits:
    """The tokens that a step's edits touch. Each table is int32 [n, 2 + k]: a row of the logits, a token, the bits of k
    floats, for biases, for tokens that must not end the text yet, for those seen, and for those generated.
    """

    def __init__(self) -> None:
        self._tables: list[list[NDArray[np.int32]]] = [[np.zeros((0, 2 + count), np.int32)] for count in (1, 0, 1, 3)]

    def add(self, line: int, sequence: Sequence, position: int) -> None:
        """Note the edits of row `line`: of the sequence's token at `position`."""
        params, stop_ids = sequence.request.sampling, sequence.request.stop_ids
        output = sequence.tokens(sequence.request.num_prompt, position)
        if params.logit_bias:
            self._note(0, line, list(params.logit_bias), list(params.logit_bias.values()))
        if len(output) < params.min_tokens and stop_ids:
            self._note(1, line, sorted(stop_ids))
        if params.repetition_penalty != 1.0:
            self._note(2, line, np.unique(sequence.tokens(0, position)), params.repetition_penalty)
        if (params.frequency_penalty or params.presence_penalty) and len(output):
            ids, counts = np.unique(output, return_counts=True)
            self._note(3, line, ids, counts, params.frequency_penalty, params.presence_penalty)

    def _note(self, table: int, line: int, ids: ArrayLike, *values: ArrayLike) -> None:
        ids = np.asarray(ids, dtype=np.int32)
        block = np.empty((len(ids), 2 + len(values)), dtype=np.int32)
        block[:, 0], block[:, 1] = line, ids
        for column, value in enumerate(values, 2):
            block[:, column] = np.asarray(value, dtype=np.float32).view(np.int32)
        self._tables[table].append(block)

    def tables(self) -> list[NDArray[np.int32]]:
        return [np.concatenate(blocks) for blocks in self._tables]


class LogitEdits:
    """Owns the rows of the edit tables. Called by the engine's thread, in the order of the steps."""

    def __init__(self, tables: EditTables) -> None:
        self.tables = tables
        self._free = list(range(tables.num_rows, 0, -1))
        self._rows: dict[Sequence, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self, sequence: Sequence) -> bool:
        """Give the sequence a row unless it has one. Returns False if no row is left."""
        if sequence not in self._rows:
            if not self._free:
                return False
            self._rows[sequence] = self._free.pop()
        return True

    def row_of(self, sequence: Sequence) -> int:
        """The sequence's row; 0 if it has none."""
        return self._rows.get(sequence, 0)

    def release(self, sequence: Sequence) -> None:
        """Take the row back. This is safe: steps in flight that read it run before steps of its next owner."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            self._free.append(row)

    def fill(self, sequence: Sequence) -> None:
        """Write the row of a sequence that joins the next step. All its tokens so far must be known."""
        row = self._rows[sequence]
        tables, request = self.tables, sequence.request
        params, vocab_size = request.sampling, tables.words.shape[1]
        words = np.zeros(vocab_size, dtype=np.int32)
        if params.repetition_penalty != 1.0:
            words[sequence.tokens(0, request.num_prompt)] |= IN_PROMPT
        np.add.at(words, np.asarray(sequence.output_ids, dtype=np.int64), 1)
        if params.min_tokens:
            words[sorted(request.stop_ids)] |= np.int32(ENDS_TEXT)
        values = {
            "repetition": float_bits(params.repetition_penalty),
            "frequency": float_bits(params.frequency_penalty),
            "presence": float_bits(params.presence_penalty),
            "minimum": request.num_prompt + params.min_tokens,
        }
        bias = np.asarray(list(params.logit_bias.values()), dtype=np.float32).view(np.int32)
        updates = [
            _triples(row, np.asarray([PARAMETERS[name] for name in values]), np.asarray(list(values.values()))),
            _triples(row, np.flatnonzero(words), words[words != 0]),
            _triples(row, np.asarray(list(params.logit_bias), dtype=np.int64), bias),
        ]
        parameters, seen, biased = upload(updates, tables.words.device)
        tables.words[row].zero_()
        tables.bias[row].zero_()
        scatter_rows(parameters, tables.parameters)
        scatter_rows(seen, tables.words)
        scatter_rows(biased, tables.bias.view(torch.int32))


def _triples(row: int, columns: NDArray[np.int64], values: NDArray[np.int32]) -> NDArray[np.int32]:
    """(row, column, value) as `scatter_rows` takes them."""
    triples = np.empty((len(columns), 3), dtype=np.int32)
    triples[:, 0], triples[:, 1], triples[:, 2] = row, columns, values
    return triples
