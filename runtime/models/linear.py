"""Linear layers: `Linear` is the layer, a `LinearMethod` is how its product is computed.

A layer never asks which method it has: quantisation, adapters and tensor parallelism replace `Linear.method` in a pass
over a finished decoder (`for linear in decoder.linears(): ...`). Not here: the CPU's integer methods (`linear_cpu.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class LinearMethod(Protocol):
    """How `x @ weight.T` is computed."""

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return [T, out_features] for x [T, in_features], in x's dtype."""


@dataclass(slots=True, eq=False)
class PlainLinear:
    """A dense product in the model's dtype. weight: [out_features, in_features]."""

    weight: Tensor

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)


@dataclass(slots=True, eq=False)
class Linear:
    """A linear layer: name (of its first Hugging Face part), method, bias [out_features] or None."""

    name: str
    method: LinearMethod
    bias: Tensor | None
    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.method.apply(x, self.bias)
