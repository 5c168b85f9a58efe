"""Compiled norms, gated activations, rotary embedding with cache write, and adapters on the CPU.

At batch 1 a torch call costs 2 to 5 us, and each of these ops needs two to ten calls, once or more per layer. Here each
op is one call of about 2 us and one pass over memory; large batches use torch's threads. Results equal the torch
references in `norm.py`, `activation.py`, `rope.py` and `adapters.py`. Arithmetic is in fp32. Inputs and outputs of
products may be bfloat16; weights, residual and caches are fp32. Tensors are contiguous. Not here: other dtypes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ramet.kernels.cpu.bf16 import narrow, uint16_at, widen
from ramet.kernels.cpu.program import KernelStream
from ramet.kernels.cpu.threads import (
    Kernel,
    barrier,
    bits_float,
    float_bits,
    inner,
    num_threads,
    thread_count,
    thread_index,
)
from ramet.kernels.cpu.vectors import float32_at, int32_at
from ramet.kernels.layers.adapters import AdapterTable, add_adapters_reference

# Below this many values a second thread costs more than it saves (about 5 us).
_PARALLEL_VALUES = 65_536


def _threads(x: Tensor) -> int:
    return thread_count() if x.numel() >= _PARALLEL_VALUES else 1


def _kinds(*tensors: Tensor) -> int:
    """Bit i: tensor i is in bfloat16."""
    return sum((tensor.dtype is torch.bfloat16) << i for i, tensor in enumerate(tensors))


def rms_norm(stream: KernelStream, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """As `norm.rms_norm_reference`, for x [T, N] or any shape whose last axis is N."""
    x = x.contiguous()
    out = stream.empty(x.shape, dtype or x.dtype)
    size = x.shape[-1]
    addresses = x.data_ptr(), 0, weight.data_ptr(), out.data_ptr(), 0
    sizes = x.numel() // size, size, float_bits(eps), _kinds(x, out)
    stream.launch(_rms_norm_kernel, *addresses, *sizes, threads=_threads(x))
    return out


def fused_add_rms_norm(
    stream: KernelStream, x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """As `norm.fused_add_rms_norm_reference`, with an fp32 residual."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = stream.empty(x.shape, dtype or residual.dtype), stream.empty(x.shape)
    size = x.shape[-1]
    addresses = x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr()
    sizes = x.numel() // size, size, float_bits(eps), _kinds(x, out)
    stream.launch(_rms_norm_kernel, *addresses, *sizes, threads=_threads(x))
    return out, total


def gated_activation(stream: KernelStream, gate_up: Tensor, *, is_gelu: bool) -> Tensor:
    """As `activation.silu_and_mul_reference`, or `gelu_tanh_and_mul_reference`, for gate_up [T, 2 * I]."""
    gate_up = gate_up.contiguous()
    num_rows, double = gate_up.shape
    out = stream.empty((num_rows, double // 2), gate_up.dtype)
    addresses = gate_up.data_ptr(), out.data_ptr()
    sizes = num_rows, double // 2, int(is_gelu), _kinds(out)
    stream.launch(_gated_kernel, *addresses, *sizes, threads=_threads(gate_up))
    return out


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Return logits [B, V] with -inf for tokens whose bit in the contiguous mask, int32 [B, ceil(V / 32)], is 0."""
    assert logits.dtype is torch.float32
    out = torch.empty_like(logits)
    addresses = logits.data_ptr(), mask.data_ptr(), out.data_ptr()
    _mask_kernel(*addresses, *logits.shape, mask.shape[1], threads=_threads(logits))
    return out


def rope_and_write_kv(
    stream: KernelStream,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """As `rope.rope_and_write_kv_reference`. positions are int32; a token's heads and the caches are contiguous."""
    num_tokens, num_heads, head_dim = q.shape
    assert positions.dtype is kv_slots.dtype is torch.int32, (positions.dtype, kv_slots.dtype)
    assert k_cache.dtype is torch.float32, k_cache.dtype
    assert all(x.stride(2) == 1 and x.stride(1) == head_dim for x in (q, k, v)), "heads of a token lie side by side"
    out = stream.empty((num_tokens, num_heads, head_dim), q.dtype)
    stream.launch(
        _rope_kernel,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        cos.data_ptr(),
        sin.data_ptr(),
        positions.data_ptr(),
        kv_slots.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        0 if q_norm_weight is None else q_norm_weight.data_ptr(),
        0 if k_norm_weight is None else k_norm_weight.data_ptr(),
        out.data_ptr(),
        num_tokens,
        num_heads,
        k.shape[1],
        head_dim,
        k_cache.shape[2],
        float_bits(eps),
        _kinds(q),
        threads=_threads(q),
    )
    return out


def add_adapters(stream: KernelStream, out: Tensor, x: Tensor, table: AdapterTable, chosen: Tensor) -> Tensor:
    """As `adapters.add_adapters_reference`, for fp32; other dtypes are the reference's."""
    if x.dtype is not torch.float32 or table.a.dtype is not torch.float32:
        return add_adapters_reference(out, x, table, chosen)
    x = x.contiguous()
    assert out.is_contiguous(), out.stride()
    (num_tokens, width), (_, num_outputs, rank) = x.shape, table.b.shape
    low = stream.empty((num_tokens, table.num_parts, rank))
    inner_bounds = (*table.bounds[1:-1], num_outputs, num_outputs)[:2]
    stream.launch(
        _adapters_kernel,
        x.data_ptr(),
        table.a.data_ptr(),
        table.b.data_ptr(),
        table.ranks.data_ptr(),
        chosen.data_ptr(),
        low.data_ptr(),
        out.data_ptr(),
        num_tokens,
        width,
        num_outputs,
        table.num_parts,
        rank,
        *inner_bounds,
        threads=thread_count() if num_tokens * rank * (width + num_outputs) >= _PARALLEL_VALUES else 1,
    )
    return out


# ---- Compiled part: addresses and sizes are integers ----


@inner
def exp32(x: Any) -> Any:  # Any: np.float32
    """exp in fp32 with a relative error of about 3e-7. A loop over it is vectorised. Source: Cephes' expf."""
    # Comparisons and a truncation, because calls of min, max and floor would stop the vectoriser (3 ns a value).
    x = x if x > np.float32(-87.0) else np.float32(-87.0)
    x = x if x < np.float32(88.0) else np.float32(88.0)
    n = np.int32(x * np.float32(1.44269504) + np.float32(128.5)) - np.int32(128)  # nearest: the sum is positive
    r = x - np.float32(n) * np.float32(0.693147181)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    power = np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * power


@inner
def _floats(address: int, size: int) -> Any:
    return carray(float32_at(address), (size,))


@inner
def _widen_row(address: int, row: Any) -> None:  # Any: float32 array
    source = carray(uint16_at(address), (len(row),))
    for i in range(len(row)):
        row[i] = widen(source[i])


@inner
def _narrow_row(row: Any, address: int) -> None:  # Any: float32 array
    target = carray(uint16_at(address), (len(row),))
    for i in range(len(row)):
        target[i] = narrow(row[i], target[i])


@inner
def _normalize(source: Any, weight: Any, target: Any, eps: Any) -> None:  # Any: float32 arrays and a float32
    squares = np.float32(0.0)
    for i in range(len(source)):
        squares += source[i] * source[i]
    scale = np.float32(1.0) / np.sqrt(squares / np.float32(len(source)) + eps)
    for i in range(len(source)):
        target[i] = source[i] * scale * weight[i]


@inner
def _norm_rows(
    x: int, residual: int, weight: int, out: int, total: int, low: int, high: int, size: int, eps: Any, kinds: int
) -> None:  # Any: np.float32
    """Normalise rows [low, high). If `residual` is not 0, its rows are added first, and the sum goes to `total`."""
    line = np.empty(size, np.float32)  # a row that lies in memory as bfloat16
    x_bytes, out_bytes = 2 if kinds & 1 else 4, 2 if kinds & 2 else 4
    for row in range(low, high):
        source_at, target_at = x + row * size * x_bytes, out + row * size * out_bytes
        if kinds & 1:
            _widen_row(source_at, line)
            source_at = line.ctypes.data
        if residual != 0:
            left, right = _floats(source_at, size), _floats(residual + row * size * 4, size)
            source_at = total + row * size * 4
            sums = _floats(source_at, size)
            for i in range(size):
                sums[i] = left[i] + right[i]
        target = _floats(line.ctypes.data if kinds & 2 else target_at, size)
        _normalize(_floats(source_at, size), _floats(weight, size), target, eps)
        if kinds & 2:
            _narrow_row(target, target_at)


@inner
def _gated_activation(source: Any, target: Any, is_gelu: bool) -> None:  # Any: arrays of rows
    size, one = target.shape[1], np.float32(1.0)
    for row in range(len(source)):
        if is_gelu:
            for i in range(size):
                gate = widen(source[row, i])
                inner = np.float32(0.7978845608) * (gate + np.float32(0.044715) * gate * gate * gate)
                # 0.5 * (1 + tanh(y)) is the logistic function of 2 y
                activated = gate / (one + exp32(np.float32(-2.0) * inner))
                target[row, i] = narrow(activated * widen(source[row, size + i]), target[row, i])
        else:
            for i in range(size):
                gate = widen(source[row, i])
                activated = gate / (one + exp32(-gate))
                target[row, i] = narrow(activated * widen(source[row, size + i]), target[row, i])


@inner
def _rotate(source: Any, target: Any, cos: Any, sin: Any, weight: Any, eps: Any) -> None:  # Any: float32 arrays
    """Normalise one head by `weight` (empty: not at all), then rotate it."""
    half = len(source) // 2
    if len(weight) > 0:
        _normalize(source, weight, target, eps)
    else:
        for i in range(2 * half):
            target[i] = source[i]
    for i in range(half):
        first, second = target[i], target[half + i]
        target[i] = first * cos[i] - second * sin[i]
        target[half + i] = second * cos[i] + first * sin[i]


@inner
def _rope_and_write_kv(a: Any, low: int, high: int) -> None:  # Any: int64 array of the kernel
    """Tokens [low, high)."""
    num_heads, num_kv_heads, head_dim, page_size = a[16], a[17], a[18], a[19]
    eps, half, is_half = bits_float(a[20]), head_dim // 2, a[21] != 0
    size = 2 if is_half else 4  # bytes of a value
    position_of, slot_of = carray(int32_at(a[8]), (high,)), carray(int32_at(a[9]), (high,))
    q_weight, k_weight = _floats(a[12], head_dim if a[12] else 0), _floats(a[13], head_dim if a[13] else 0)
    before, after = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)  # of a head in bfloat16
    for token in range(low, high):
        table = np.int64(position_of[token]) * half * 4
        c, s = _floats(a[6] + table, half), _floats(a[7] + table, half)
        page, offset = np.int64(slot_of[token]) // page_size, np.int64(slot_of[token]) % page_size
        for head in range(num_heads + num_kv_heads):
            kv_head, is_q = head - num_heads, head < num_heads
            where = 4 * ((page * num_kv_heads + kv_head) * page_size + offset) * head_dim
            source_at = a[1] + size * (token * a[4] + kv_head * head_dim)
            target_at = a[10] + where
            if is_q:
                source_at = a[0] + size * (token * a[3] + head * head_dim)
                target_at = a[14] + size * (token * num_heads + head) * head_dim
            if is_half:
                _widen_row(source_at, before)
                source_at = before.ctypes.data
            target = _floats(after.ctypes.data if is_half and is_q else target_at, head_dim)
            _rotate(_floats(source_at, head_dim), target, c, s, q_weight if is_q else k_weight, eps)
            if is_half and is_q:
                _narrow_row(target, target_at)
            elif not is_q:
                value_at, value = a[2] + size * (token * a[5] + kv_head * head_dim), _floats(a[11] + where, head_dim)
                if is_half:
                    _widen_row(value_at, value)
                else:
                    given = _floats(value_at, head_dim)
                    for i in range(head_dim):
                        value[i] = given[i]


# ---- The same on many threads: each takes neighbouring rows ----


@inner
def _share(num_rows: Any) -> Any:  # np.int64 and a pair of them
    index, count = np.int64(thread_index()), np.int64(num_threads())
    return num_rows * index // count, num_rows * (index + 1) // count


@inner
def _float_rows(address: int, low: int, high: int, size: int) -> Any:
    """Rows [low, high) of fp32."""
    return carray(float32_at(address + low * size * 4), (high - low, size))


@inner
def _half_rows(address: int, low: int, high: int, size: int) -> Any:
    """Rows [low, high) of bfloat16."""
    return carray(uint16_at(address + low * size * 2), (high - low, size))


@Kernel
def _rms_norm_kernel(pointer: Any) -> None:  # Any: int64*
    a = carray(pointer, 9)
    low, high = _share(a[5])
    _norm_rows(a[0], a[1], a[2], a[3], a[4], low, high, a[6], bits_float(a[7]), a[8])


@Kernel
def _gated_kernel(pointer: Any) -> None:  # Any: int64*
    a = carray(pointer, 6)
    low, high = _share(a[2])
    size, is_gelu = a[3], a[4] != 0
    if a[5] == 0:
        _gated_activation(_float_rows(a[0], low, high, 2 * size), _float_rows(a[1], low, high, size), is_gelu)
    else:
        _gated_activation(_half_rows(a[0], low, high, 2 * size), _half_rows(a[1], low, high, size), is_gelu)


@Kernel
def _mask_kernel(pointer: Any) -> None:  # Any: int64*
    """Each thread takes neighbouring words of the mask."""
    a = carray(pointer, 6)
    num_rows, size, num_words = a[3], a[4], a[5]
    source = carray(float32_at(a[0]), (num_rows * size,))
    words = carray(int32_at(a[1]), (num_rows * num_words,))
    target = carray(float32_at(a[2]), (num_rows * size,))
    low, high = _share(num_rows * num_words)
    for k in range(low, high):
        bits, first = words[k], k % num_words * 32
        begin = k // num_words * size + first
        for j in range(min(size - first, 32)):
            is_allowed = (bits >> np.int32(j)) & np.int32(1)
            target[begin + j] = source[begin + j] if is_allowed else np.float32(-np.inf)


@Kernel
def _rope_kernel(pointer: Any) -> None:  # Any: int64*
    low, high = _share(carray(pointer, 22)[15])
    _rope_and_write_kv(carray(pointer, 22), low, high)


@Kernel
def _adapters_kernel(pointer: Any) -> None:  # Any: int64*
    """Products with A are divided among the threads by their sums, then products with B by outputs."""
    a = carray(pointer, 14)
    index, count = thread_index(), num_threads()
    num_tokens, width, num_outputs, num_parts, size = a[7], a[8], a[9], a[10], a[11]
    chosen = carray(int32_at(a[4]), (num_tokens,))
    low = _floats(a[5], num_tokens * num_parts * size)
    for item in range(len(low) * index // count, len(low) * (index + 1) // count):
        token, part = item // (num_parts * size), item // size % num_parts
        pair = chosen[token] * num_parts + part
        if chosen[token] == 0 or item % size >= carray(int32_at(a[3] + 4 * pair), (1,))[0]:
            continue
        row = _floats(a[1] + (pair * size + item % size) * width * 4, width)
        low[item] = _dot(row, _floats(a[0] + token * width * 4, width))
    barrier()
    for token in range(num_tokens):
        if chosen[token] == 0:
            continue
        for part in range(num_parts):
            rank = carray(int32_at(a[3] + 4 * (chosen[token] * num_parts + part)), (1,))[0]
            begin, end = 0 if part == 0 else a[11 + part], num_outputs if part == 2 else a[12 + part]
            first = max(begin, num_outputs * index // count)
            stop = min(end, num_outputs * (index + 1) // count)
            inner_sums = low[(token * num_parts + part) * size : (token * num_parts + part) * size + rank]
            for output in range(first, stop):
                row = _floats(a[2] + (chosen[token] * num_outputs + output) * size * 4, rank)
                _floats(a[6] + (token * num_outputs + output) * 4, 1)[0] += _dot(row, inner_sums)


@inner
def _dot(x: Any, y: Any) -> Any:  # Any: float32 arrays of equal length
    total = np.float32(0.0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total
