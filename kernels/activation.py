"""Gated activations of the feed-forward block: act(gate) * up, from one fused [T, 2 * I] product (gate first)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [T, I], for `gate_up` [T, 2 * I]."""
    return silu_and_mul_reference(gate_up)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """Return gelu(gate) * up, [T, I], with the tanh approximation of gelu, for `gate_up` [T, 2 * I]."""
    return gelu_tanh_and_mul_reference(gate_up)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """Specification of `silu_and_mul` and its CPU path."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh_and_mul_reference(gate_up: Tensor) -> Tensor:
    """Specification of `gelu_tanh_and_mul` and its CPU path."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)
