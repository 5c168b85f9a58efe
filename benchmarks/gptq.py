"""4-bit weights with a calibration: GPTQ, on a decoder of plain fp32 products.

A layer's matrices are rounded column by column. The error of each column is made up for by the columns that are still
to come, as far as the inputs of a calibration text allow. Layers are rounded in order, so each is calibrated with the
outputs of rounded ones. Columns with the largest inputs are rounded first (act order), but a group's columns lie side
by side and its range is found before (static groups), so the result loads as blocks.
Source: GPTQ, Frantar et al. 2022 (arXiv:2210.17323), section 3.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.linear import LinearMethod, PlainLinear
from ramet.runtime.models.linear_cpu import BlockLinear
from ramet.runtime.testing.bare_cache import BareCache

GROUP = 128  # columns of a scale; a divisor of it where a matrix has no whole groups
_BLOCK = 128  # columns whose errors reach the columns behind them at once
_DAMPING = 0.01  # of the mean diagonal


def group_of(num_columns: int) -> int:
    """The number of columns of a scale."""
    return math.gcd(GROUP, num_columns)


def ranges(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zero points [N, groups] of 4-bit groups: of 20 ranges, the one with the smallest squared error.

    importance: weight [K] of each column's error.
    """
    group = group_of(weight.shape[1])
    groups = weight.unflatten(1, (-1, group))
    cost = torch.ones(weight.shape[1]) if importance is None else importance
    cost = cost.view(-1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best_scale, best_zero, least = low, low, torch.full_like(low, torch.inf)
    for share in torch.linspace(0.62, 1.0, 20).tolist():
        scale = ((high - low) * share / 15).clamp(min=1e-6).half().float()
        zero = (-low * share / scale).round()
        error = ((rounded(groups, scale[..., None], zero[..., None]) - groups).square() * cost).sum(-1)
        is_better = error < least
        best_scale, best_zero = torch.where(is_better, scale, best_scale), torch.where(is_better, zero, best_zero)
        least = torch.minimum(error, least)
    return best_scale, best_zero


def rounded(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest of 16 values."""
    return ((weight / scale + zero).round().clamp(0, 15) - zero) * scale


def in_4_bits(weight: Tensor) -> Tensor:
    """Round a matrix to 4 bits without a calibration."""
    weight = weight.float()
    scale, zero = (part.repeat_interleave(group_of(weight.shape[1]), 1) for part in ranges(weight))
    return rounded(weight, scale, zero)


def in_4_bits_for(weight: Tensor, hessian: Tensor) -> Tensor:
    """Round a matrix [N, K] to 4 bits so that its products change little. hessian: the sum of x.T @ x, [K, K]."""
    diagonal = hessian.diagonal()
    hessian = hessian.double() + torch.eye(len(diagonal)) * (_DAMPING * diagonal.mean().double() + 1e-12)
    order = diagonal.argsort(descending=True)
    scale, zero = (part.repeat_interleave(group_of(weight.shape[1]), 1)[:, order] for part in ranges(weight, diagonal))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight[:, order].clone()
    for start in range(0, left.shape[1], _BLOCK):
        stop = min(start + _BLOCK, left.shape[1])
        errors = torch.empty(left.shape[0], stop - start)
        for column in range(start, stop):
            value = rounded(left[:, column], scale[:, column], zero[:, column])
            error = errors[:, column - start] = (left[:, column] - value) / factor[column, column]
            left[:, column + 1 : stop] -= torch.outer(error, factor[column, column + 1 : stop])
            left[:, column] = value
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return torch.empty_like(left).index_copy_(1, order, left)


@torch.inference_mode()
def calibrate(decoder: Decoder, windows: list[list[int]]) -> dict[str, Tensor]:
    """Round the matrices of a decoder's layers in place, for windows of equal length. Returns them by name."""
    cache = BareCache(decoder, 1, len(windows[0]))
    context = cache.context([], [(0, len(windows[0]))])  # each run of a layer writes its keys again
    inputs: list[tuple[Tensor, Tensor | None]] = [(decoder.embedding(torch.tensor(ids)), None) for ids in windows]
    found: dict[str, Tensor] = {}
    for layer in decoder.layers:
        linears = [(linear, linear.method) for linear in layer.linears()]
        hessians = [torch.zeros(linear.in_features, linear.in_features) for linear, _ in linears]
        for (linear, method), hessian in zip(linears, hessians, strict=True):
            linear.method = partial(_observed, method, hessian)
        for x, residual in inputs:
            layer(x, residual, context)
        for (linear, method), hessian in zip(linears, hessians, strict=True):
            weight = _weight(method)
            weight.copy_(in_4_bits_for(weight, hessian))
            linear.method = method
            sizes = [weight.shape[0] // len(linear.names)] * len(linear.names)
            if any("self_attn.k_proj" in name for name in linear.names):
                config = decoder.config
                sizes = [heads * config.head_dim for heads in (config.num_heads, *[config.num_kv_heads] * 2)]
            found |= dict(zip(linear.names, weight.split(sizes), strict=True))
        inputs = [layer(x, residual, context) for x, residual in inputs]
    return found


def _weight(method: LinearMethod) -> Tensor:
    """The fp32 matrix of a product, in its own memory."""
    assert isinstance(method, PlainLinear | BlockLinear), method
    weight = method.weight if isinstance(method, PlainLinear) else method.blocks
    assert weight.dtype is torch.float32, "a calibration begins with fp32 products"
    return weight


def _observed(method: LinearMethod, hessian: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    hessian.addmm_(x.T, x)
    return method(x, bias)
