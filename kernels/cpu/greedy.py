"""Greedy tokens on the CPU, compiled: each row's largest allowed logit in one pass over the row and its mask.

The tokens equal those of `sample_reference`, which needs a dozen torch calls, and a copy of the logits for a masked
row. `sample` falls back to the reference for rows with random sampling, and if a largest logit is not finite or is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from torch import Tensor

from ramet.kernels.cpu.pointwise import mask_logits
from ramet.kernels.cpu.threads import Kernel, bits_float, float_bits, inner, num_threads, thread_count, thread_index
from ramet.kernels.cpu.vectors import float32_at, int32_at, intrinsic
from ramet.kernels.sampling.sample import GREEDY_TEMPERATURE, SamplingTables, sample_reference

_LOWEST = -(2**31)
_INFINITY = 0x7F800000  # its bits, and its key
_PART = 1024  # logits: the largest one is looked for again in its part alone


def sample(
    logits: Tensor,
    tables: SamplingTables,
    rows: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Choose tokens as `sample_reference` does."""
    size = logits.shape[1] if vocab_size is None else vocab_size
    takes_mask = logits.dtype is torch.float32 and (mask is None or mask.is_contiguous()) and tables.edits is None
    is_plain = tables.grammar is None and rows.dtype is torch.int32 and rows.is_contiguous()
    if takes_mask and is_plain and logits.is_contiguous():
        tokens = greedy_tokens(logits, tables, rows, mask, size, GREEDY_TEMPERATURE)
        if tokens is not None:
            return tokens if out is None else out.copy_(tokens)
    if takes_mask and mask is not None and logits[:, :size].is_contiguous():
        logits, mask = mask_logits(logits[:, :size], mask), None
    return sample_reference(logits, tables, rows, positions, mask, out, size)


def greedy_tokens(
    logits: Tensor, tables: SamplingTables, rows: Tensor, mask: Tensor | None, vocab_size: int, greedy_below: float
) -> Tensor | None:
    """Tokens int32 [B] if all rows are greedy; None if a row is not greedy, has no finite logit, or has NaN.

    greedy_below: rows with a temperature up to this one are greedy.
    """
    num_rows, width = logits.shape
    temperature, top_k = tables.temperature, tables.top_k
    out = torch.empty(num_rows, dtype=torch.int32)
    _greedy_kernel(
        logits.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        rows.data_ptr(),
        temperature.data_ptr(),
        top_k.data_ptr(),
        out.data_ptr(),
        num_rows,
        width,
        vocab_size,
        0 if mask is None else mask.shape[1],
        temperature.stride(0),
        top_k.stride(0),
        float_bits(greedy_below),
        threads=min(num_rows, thread_count()),
    )
    return None if -1 in out.tolist() else out


# ---- Compiled part: addresses and sizes are integers ----


@intrinsic
def _largest_key(typing_context: Any, logits: Any, words: Any, num_words: Any) -> Any:
    """The largest key of 32 * num_words logits whose bit in `words` is set (0: all). Arguments are addresses.

    A key is a float's bits as an integer in the order of floats. NaN is above infinity or below its negative.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        logits, words, num_words = arguments
        lanes, i16, i32, i64 = ir.VectorType(ir.IntType(32), 16), ir.IntType(16), ir.IntType(32), ir.IntType(64)
        lowest = ir.Constant(lanes, [_LOWEST] * 16)
        best = cgutils.alloca_once_value(builder, lowest)
        is_masked = builder.icmp_unsigned("!=", words, i64(0))
        bits_of = cgutils.alloca_once_value(builder, i32(-1))
        with cgutils.for_range(builder, num_words) as loop:
            with builder.if_then(is_masked):
                where = builder.add(words, builder.mul(loop.index, i64(4)))
                builder.store(builder.load(builder.inttoptr(where, i32.as_pointer())), bits_of)
            bits = builder.load(bits_of)
            with builder.if_then(builder.icmp_unsigned("!=", bits, i32(0))):
                for half in range(2):
                    where = builder.add(logits, builder.add(builder.mul(loop.index, i64(128)), i64(64 * half)))
                    raw = builder.load(builder.inttoptr(where, lanes.as_pointer()), align=4)
                    sign = builder.ashr(raw, ir.Constant(lanes, [31] * 16))
                    key = builder.xor(raw, builder.and_(sign, ir.Constant(lanes, [0x7FFFFFFF] * 16)))
                    allowed = builder.trunc(builder.lshr(bits, i32(16 * half)), i16)
                    key = builder.select(builder.bitcast(allowed, ir.VectorType(ir.IntType(1), 16)), key, lowest)
                    current = builder.load(best)
                    builder.store(builder.select(builder.icmp_signed(">", key, current), key, current), best)
        kind = ir.FunctionType(i32, [lanes])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.smax.v16i32")
        return builder.call(function, [builder.load(best)])

    return types.int32(types.int64, types.int64, types.int64), emit


@inner
def _key(bits: Any) -> Any:  # np.int32
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@inner
def _is_allowed(words: Any, token: Any) -> Any:  # address and np.int64
    return words == 0 or (carray(int32_at(words + 4 * (token >> 5)), (1,))[0] >> np.int32(token & 31)) & np.int32(1)


@inner
def _greedy_token(logits: Any, words: Any, size: Any) -> Any:  # addresses and np.int64 -> np.int32
    """Index of the first largest logit; -1 if that is not finite, or zero (zeros have two keys)."""
    keys = carray(int32_at(logits), (size,))
    best, begin = np.int32(_LOWEST), np.int64(0)
    for first in range(0, size, _PART):
        num_whole = min(size - first, _PART) >> 5
        found = _largest_key(logits + 4 * first, words + (first >> 3) if words else 0, num_whole)
        for token in range(first + 32 * num_whole, min(size, first + _PART)):
            if _is_allowed(words, token):
                found = max(found, _key(keys[token]))
        if found > best:
            best, begin = found, np.int64(first)
    if best >= np.int32(_INFINITY) or best <= np.int32(_LOWEST + 0x7FFFFF) or best == 0 or best == -1:
        return np.int32(-1)
    for token in range(begin, size):
        if _key(keys[token]) == best and _is_allowed(words, token):
            return np.int32(token)
    return np.int32(-1)


@Kernel
def _greedy_kernel(pointer: Any) -> None:  # Any: int64*
    """Each thread takes neighbouring rows."""
    a = carray(pointer, 13)
    num_rows, width, size, num_words = a[6], a[7], a[8], a[9]
    slots, out = carray(int32_at(a[2]), (num_rows,)), carray(int32_at(a[5]), (num_rows,))
    index, count = np.int64(thread_index()), np.int64(num_threads())
    for row in range(num_rows * index // count, num_rows * (index + 1) // count):
        slot = np.int64(slots[row])
        temperature = carray(float32_at(a[3] + 4 * slot * a[10]), (1,))[0]
        top_k = carray(int32_at(a[4] + 4 * slot * a[11]), (1,))[0]
        out[row] = -1
        if not temperature > bits_float(a[12]) or top_k == 1:
            words = a[1] + 4 * row * num_words if a[1] else 0
            out[row] = _greedy_token(a[0] + 4 * row * width, words, size)
