"""Root-mean-square norm, alone and fused with the residual add that precedes it.

    y = x / sqrt(mean(x^2) + eps) * weight          (mean over the last axis, in fp32)

Not here: Gemma's (1 + weight), which the loader folds into the weight; layer norm with a mean and a bias.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis of `x` [T, N] by `weight` [N]; computed in fp32, returned in x's dtype."""
    return rms_norm_reference(x, weight, eps)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `x` to `residual` (both [T, N]) and normalise the sum; return (normed, new_residual).

    The sum is rounded to the model dtype first, so that it equals an unfused add followed by `rms_norm`.
    """
    return fused_add_rms_norm_reference(x, residual, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Specification of `rms_norm` and its CPU path."""
    return F.rms_norm(x, weight.shape, weight, eps)


def fused_add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Specification of `fused_add_rms_norm` and its CPU path."""
    new_residual = x + residual
    return rms_norm_reference(new_residual, weight, eps), new_residual
