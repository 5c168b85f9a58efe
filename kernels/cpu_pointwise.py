"""Norms, gated activations and rotary + cache write in fp32 on the CPU, compiled; prompts on torch's threads.

At batch 1 a torch call costs 2 to 5 us and these ops are two to ten calls each, once or more per layer; here each is
one call of about 2 us, and one pass over memory. Same results as the torch references in `norm.py`, `activation.py` and
`rope.py`, which dispatch to this module where `takes` says so. Not here: other dtypes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ramet.kernels.cpu_program import empty
from ramet.kernels.cpu_threads import (
    Kernel,
    bits_float,
    float_bits,
    inner,
    num_threads,
    thread_count,
    thread_index,
)
from ramet.kernels.cpu_vectors import float32_at, int32_at

# Below this many values a second thread costs more than it saves (about 5 us).
_PARALLEL_VALUES = 65_536


def takes(x: Tensor) -> bool:
    """True for a tensor that these functions handle."""
    return x.dtype is torch.float32 and x.device.type == "cpu" and x.is_contiguous()


def _threads(x: Tensor) -> int:
    return thread_count() if x.numel() >= _PARALLEL_VALUES else 1


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `norm.rms_norm`, for x [T, N] or any shape whose last axis is N."""
    out = empty(x.shape)
    size = x.shape[-1]
    addresses = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    _rms_norm_kernel(*addresses, x.numel() // size, size, float_bits(eps), threads=_threads(x))
    return out


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `norm.fused_add_rms_norm`; both inputs contiguous."""
    out, total = empty(x.shape), empty(x.shape)
    size = x.shape[-1]
    addresses = x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr()
    _add_rms_norm_kernel(*addresses, x.numel() // size, size, float_bits(eps), threads=_threads(x))
    return out, total


def gated_activation(gate_up: Tensor, is_gelu: bool) -> Tensor:
    """As `activation.silu_and_mul`, or `gelu_tanh_and_mul`, for gate_up [T, 2 * I]."""
    num_rows, double = gate_up.shape
    out = empty((num_rows, double // 2))
    addresses = gate_up.data_ptr(), out.data_ptr()
    _gated_kernel(*addresses, num_rows, double // 2, int(is_gelu), threads=_threads(gate_up))
    return out


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, V] with -inf where the packed mask, int32 [B, ceil(V / 32)] and contiguous, has no bit."""
    out = torch.empty_like(logits)
    addresses = logits.data_ptr(), mask.data_ptr(), out.data_ptr()
    _mask_kernel(*addresses, *logits.shape, mask.shape[1], threads=_threads(logits))
    return out


def rope_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """As `rope.rope_and_write_kv`; positions int32, heads contiguous in their token, caches contiguous."""
    num_tokens, num_heads, head_dim = q.shape
    out = empty((num_tokens, num_heads, head_dim))
    _rope_kernel(
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
        threads=_threads(q),
    )
    return out


def takes_rope(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, kv_slots: Tensor, k_cache: Tensor) -> bool:
    """True where `rope_and_write_kv` of this module applies."""
    head_dim = q.shape[2]
    return (
        q.dtype is torch.float32
        and q.device.type == "cpu"
        and positions.dtype is torch.int32
        and kv_slots.dtype is torch.int32
        and k_cache.dtype is torch.float32
        and k_cache.is_contiguous()
        and q.stride(2) == k.stride(2) == v.stride(2) == 1
        and q.stride(1) == k.stride(1) == v.stride(1) == head_dim
    )


# ---- Compiled part: addresses and sizes are integers ----


@inner
def exp32(x: Any) -> Any:  # Any: np.float32
    """exp in fp32 to about 3e-7 relative, written so that a loop over it is vectorised. Source: Cephes' expf."""
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
def _rms_norm(x: int, weight: int, out: int, num_rows: int, size: int, eps: float) -> None:
    source = carray(float32_at(x), (num_rows, size))
    target = carray(float32_at(out), (num_rows, size))
    scales = carray(float32_at(weight), (size,))
    for row in range(num_rows):
        _normalize(source[row], scales, target[row], eps)


@inner
def _normalize(source: Any, weight: Any, target: Any, eps: Any) -> None:  # Any: float32 arrays and a float32
    squares = np.float32(0.0)
    for i in range(len(source)):
        squares += source[i] * source[i]
    scale = np.float32(1.0) / np.sqrt(squares / np.float32(len(source)) + eps)
    for i in range(len(source)):
        target[i] = source[i] * scale * weight[i]


@inner
def _add_rms_norm(
    x: int, residual: int, weight: int, out: int, total: int, num_rows: int, size: int, eps: float
) -> None:
    left, right = carray(float32_at(x), (num_rows, size)), carray(float32_at(residual), (num_rows, size))
    sums, target = carray(float32_at(total), (num_rows, size)), carray(float32_at(out), (num_rows, size))
    scales = carray(float32_at(weight), (size,))
    for row in range(num_rows):
        for i in range(size):
            sums[row, i] = left[row, i] + right[row, i]
        _normalize(sums[row], scales, target[row], eps)


@inner
def _gated_activation(gate_up: int, out: int, num_rows: int, size: int, is_gelu: bool) -> None:
    source = carray(float32_at(gate_up), (num_rows, 2 * size))
    target = carray(float32_at(out), (num_rows, size))
    one = np.float32(1.0)
    for row in range(num_rows):
        if is_gelu:
            for i in range(size):
                gate = source[row, i]
                inner = np.float32(0.7978845608) * (gate + np.float32(0.044715) * gate * gate * gate)
                # 0.5 * (1 + tanh(y)) is the logistic function of 2 y
                target[row, i] = gate / (one + exp32(np.float32(-2.0) * inner)) * source[row, size + i]
        else:
            for i in range(size):
                gate = source[row, i]
                target[row, i] = gate / (one + exp32(-gate)) * source[row, size + i]


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
def _rope_and_write_kv(
    q: int,
    k: int,
    v: int,
    q_stride: int,
    k_stride: int,
    v_stride: int,
    cos: int,
    sin: int,
    positions: int,
    kv_slots: int,
    k_cache: int,
    v_cache: int,
    q_norm: int,
    k_norm: int,
    out: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    eps: Any,  # np.float32
) -> None:
    half = head_dim // 2
    position_of = carray(int32_at(positions), (num_tokens,))
    slot_of = carray(int32_at(kv_slots), (num_tokens,))
    q_weight = carray(float32_at(q_norm), (head_dim if q_norm else 0,))
    k_weight = carray(float32_at(k_norm), (head_dim if k_norm else 0,))
    for token in range(num_tokens):
        table = np.int64(position_of[token]) * half * 4
        c, s = carray(float32_at(cos + table), (half,)), carray(float32_at(sin + table), (half,))
        for head in range(num_heads):
            source = carray(float32_at(q + 4 * (token * q_stride + head * head_dim)), (head_dim,))
            target = carray(float32_at(out + 4 * (token * num_heads + head) * head_dim), (head_dim,))
            _rotate(source, target, c, s, q_weight, eps)
        page, offset = np.int64(slot_of[token]) // page_size, np.int64(slot_of[token]) % page_size
        for head in range(num_kv_heads):
            where = 4 * ((page * num_kv_heads + head) * page_size + offset) * head_dim
            key = carray(float32_at(k + 4 * (token * k_stride + head * head_dim)), (head_dim,))
            _rotate(key, carray(float32_at(k_cache + where), (head_dim,)), c, s, k_weight, eps)
            value = carray(float32_at(v + 4 * (token * v_stride + head * head_dim)), (head_dim,))
            target = carray(float32_at(v_cache + where), (head_dim,))
            for i in range(head_dim):
                target[i] = value[i]


# ---- The same on many threads: each takes neighbouring rows ----


@inner
def _share(num_rows: Any) -> Any:  # np.int64 and a pair of them
    index, count = np.int64(thread_index()), np.int64(num_threads())
    return num_rows * index // count, num_rows * (index + 1) // count


@Kernel
def _rms_norm_kernel(pointer: Any) -> None:  # Any: int64*
    a = carray(pointer, 6)
    low, high = _share(a[3])
    skip = low * a[4] * 4
    _rms_norm(a[0] + skip, a[1], a[2] + skip, high - low, a[4], bits_float(a[5]))


@Kernel
def _add_rms_norm_kernel(pointer: Any) -> None:  # Any: int64*
    a = carray(pointer, 8)
    low, high = _share(a[5])
    skip = low * a[6] * 4
    _add_rms_norm(a[0] + skip, a[1] + skip, a[2], a[3] + skip, a[4] + skip, high - low, a[6], bits_float(a[7]))


@Kernel
def _gated_kernel(pointer: Any) -> None:  # Any: int64*
    a = carray(pointer, 5)
    low, high = _share(a[2])
    skip = low * a[3] * 4
    _gated_activation(a[0] + 2 * skip, a[1] + skip, high - low, a[3], a[4] != 0)


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
    a = carray(pointer, 21)
    low, high = _share(a[15])
    _rope_and_write_kv(
        a[0] + low * a[3] * 4,
        a[1] + low * a[4] * 4,
        a[2] + low * a[5] * 4,
        a[3],
        a[4],
        a[5],
        a[6],
        a[7],
        a[8] + low * 4,
        a[9] + low * 4,
        a[10],
        a[11],
        a[12],
        a[13],
        a[14] + low * a[16] * a[18] * 4,
        high - low,
        a[16],
        a[17],
        a[18],
        a[19],
        bits_float(a[20]),
    )
