# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Penalties, biases and minimum lengths: their effect on logits, and their tables on the device.

Logits x of the next token become, in this order, in fp32 (repetition: Keskar et al. 2019, arXiv:1909.05858; the other
penalties: OpenAI's API reference; the order: vLLM's):

    bias         x + bias
    minimum      -inf for the tokens that would end the text, at positions below the minimum length
    repetition   tokens of prompt or output: x / r if x is positive, otherwise x * r
    frequency    x - f * (number of times that the token was generated)
    presence     x - p if the token was generated

`edit_logits_reference` is the specification of every form: the kernel, and the host's edits, which touch a few tokens
instead of the whole vocabulary. A slot's edits are a row of the tables; row 0 stands for none, and costs nothing. The
edited logits are a row of their own, which the sampler reads instead of the model's. Not here: which edits a request
has, which slot has which row, and the host (`runtime/steps/logit_edits.py`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ramet.kernels.triton_support import cdiv, jit, tl

IN_PROMPT = 1 << 30
ENDS_TEXT = -(1 << 31)
_COUNT = IN_PROMPT - 1
PARAMETERS = {"repetition": 0, "frequency": 1, "presence": 2, "minimum": 3}
_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class EditTables:
    """Rows of edits. slot_row: int32 [S + 1], each slot's row (0: none).

    words: int32 [R + 1, V]; bits 0..29: number of times that a token was generated; bit 30 (`IN_PROMPT`): it is in the
    prompt (set only if that matters); bit 31 (`ENDS_TEXT`): it is excluded below the minimum length. bias: fp32
    [R + 1, V]. parameters: int32 [R + 1, 4], columns as in `PARAMETERS`: the bits of three floats, and the first
    position at which the text may end. edited: fp32 [R + 1, V], written by `edit_logits`.
    """

    slot_row: Tensor
    words: Tensor
    bias: Tensor
    parameters: Tensor
    edited: Tensor

    @classmethod
    def create(cls, num_rows: int, vocab_size: int, device: torch.device | str = "cpu") -> EditTables:
        """Make tables without edits, not yet for any slots. They take 12 bytes per row and token."""

        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros((num_rows + 1, size), dtype=dtype, device=device)

        integers, floats = torch.int32, torch.float32
        return cls(
            zeros(1, integers)[:, 0],
            zeros(vocab_size, integers),
            zeros(vocab_size, floats),
            zeros(len(PARAMETERS), integers),
            zeros(vocab_size, floats),
        )

    def of_slots(self, slot_row: Tensor) -> EditTables:
        """The same tables for slots with these rows, int32 [S + 1]."""
        return dataclasses.replace(self, slot_row=slot_row)

    @property
    def num_rows(self) -> int:
        return self.words.shape[0] - 1


def penalize_repetition(x: Tensor, repetition: float | Tensor) -> Tensor:
    """Return the logits of tokens that are in the prompt or the output, fp32."""
    return torch.where(x > 0, x / repetition, x * repetition)


def penalize_generated(x: Tensor, counts: Tensor, frequency: float | Tensor, presence: float | Tensor) -> Tensor:
    """Return the logits of tokens that were generated `counts` times each (at least once), fp32."""
    return x - (frequency * counts + presence)


def edit_logits(logits: Tensor, tables: EditTables, rows: Tensor, positions: Tensor) -> None:
    """Write the edited logits of those rows of `logits` [B, V] whose slots have edits to `tables.edited`.

    rows: int32 [B], the slot of each row. positions: int32 [B], the next token's index in its sequence.
    """
    (edit_logits_triton if logits.is_cuda else edit_logits_reference)(logits, tables, rows, positions)


def count_tokens(tables: EditTables, rows: Tensor, tokens: Tensor) -> None:
    """Count a generated token (int [B]) for each of the slots `rows` (int32 [B]) that has edits."""
    (count_tokens_triton if rows.is_cuda else count_tokens_reference)(tables, rows, tokens)


def edit_logits_reference(logits: Tensor, tables: EditTables, rows: Tensor, positions: Tensor) -> None:
    """Specification of `edit_logits`, and of all edits."""
    for index, slot in enumerate(rows.tolist()):
        row = int(tables.slot_row[slot])
        if row == 0:
            continue
        words, parameters = tables.words[row], tables.parameters[row]
        repetition, frequency, presence = parameters[:3].view(torch.float32).tolist()
        counts = words & _COUNT
        x = logits[index].float() + tables.bias[row]
        if int(positions[index]) < int(parameters[PARAMETERS["minimum"]]):
            x = x.masked_fill(words < 0, float("-inf"))
        seen = (words & (IN_PROMPT | _COUNT)) != 0
        x = torch.where(seen, penalize_repetition(x, repetition), x)
        tables.edited[row] = torch.where(counts > 0, penalize_generated(x, counts, frequency, presence), x)


def count_tokens_reference(tables: EditTables, rows: Tensor, tokens: Tensor) -> None:
    """Specification of `count_tokens`."""
    for slot, token in zip(rows.tolist(), tokens.tolist(), strict=True):
        row = int(tables.slot_row[slot])
        if row:
            tables.words[row, token] += 1


def edit_logits_triton(logits: Tensor, tables: EditTables, rows: Tensor, positions: Tensor) -> None:
    """Launch the kernel of `edit_logits`; may be part of a CUDA graph."""
    num_rows, vocab_size = logits.shape
    if num_rows:
        _edit_kernel[(num_rows, cdiv(vocab_size, _CHUNK))](
            logits,
            logits.stride(0),
            rows,
            positions,
            tables.slot_row,
            tables.slot_row.stride(0),
            tables.words,
            tables.bias,
            tables.parameters,
            tables.edited,
            tables.words.stride(0),
            vocab_size,
            CHUNK=_CHUNK,
            num_warps=8,
        )


def count_tokens_triton(tables: EditTables, rows: Tensor, tokens: Tensor) -> None:
    """Launch the kernel of `count_tokens`; may be part of a CUDA graph."""
    if len(rows):
        _count_kernel[(len(rows),)](
            rows,
            tokens,
            tables.slot_row,
            tables.slot_row.stride(0),
            tables.words,
            tables.words.stride(0),
            num_warps=1,
        )


@jit
def _edit_kernel(
    logits_ptr, logits_stride, rows_ptr, positions_ptr, slot_row_ptr, slot_stride, words_ptr, bias_ptr, parameters_ptr,
    edited_ptr, table_stride, vocab_size, CHUNK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    slot = tl.load(rows_ptr + index).to(tl.int64)
    row = tl.load(slot_row_ptr + slot * slot_stride).to(tl.int64)
    if row == 0:
        return
    repetition = tl.load(parameters_ptr + row * 4).to(tl.float32, bitcast=True)
    frequency = tl.load(parameters_ptr + row * 4 + 1).to(tl.float32, bitcast=True)
    presence = tl.load(parameters_ptr + row * 4 + 2).to(tl.float32, bitcast=True)
    is_short = tl.load(positions_ptr + index) < tl.load(parameters_ptr + row * 4 + 3)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab_size
    words = tl.load(words_ptr + row * table_stride + token, mask=inside, other=0)
    x = tl.load(logits_ptr + index.to(tl.int64) * logits_stride + token, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + row * table_stride + token, mask=inside, other=0.0)
    x = tl.where((words < 0) & is_short, float("-inf"), x)
    count = words & 0x3FFFFFFF
    x = tl.where((words & 0x7FFFFFFF) != 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
    x = tl.where(count > 0, x - (frequency * count.to(tl.float32) + presence), x)
    tl.store(edited_ptr + row * table_stride + token, x, mask=inside)


@jit
def _count_kernel(rows_ptr, tokens_ptr, slot_row_ptr, slot_stride, words_ptr, words_stride):
    index = tl.program_id(0)
    slot = tl.load(rows_ptr + index).to(tl.int64)
    row = tl.load(slot_row_ptr + slot * slot_stride).to(tl.int64)
    if row != 0:
        word_ptr = words_ptr + row * words_stride + tl.load(tokens_ptr + index)
        tl.store(word_ptr, tl.load(word_ptr) + 1)
