"""Linear layers and token embeddings. `Linear` is the layer; its `LinearMethod` computes the product.

A layer does not depend on its method: quantisation, adapters and tensor parallelism replace `Linear.method` in a pass
over a finished decoder (`for linear in decoder.linears(): ...`). A `Storage` chooses the first methods when the weights
are read. Not here: weights in blocks on the CPU (`linear_cpu.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.runtime.models.weights import Weights

# A way to compute `x @ weight.T + bias`, for x [T, in_features] and bias [out_features] or None, in x's dtype.
LinearMethod = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(slots=True, eq=False)
class PlainLinear:
    """A dense product in the model's dtype. weight: [out_features, in_features]. product: as torch's `linear`."""

    weight: Tensor
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.product(x, self.weight, bias)


@dataclass(slots=True, eq=False)
class Linear:
    """A linear layer. `names`: the checkpoint matrices stacked in it by output rows. bias: [out_features] or None."""

    names: tuple[str, ...]
    method: LinearMethod
    bias: Tensor | None
    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.method(x, self.bias)


# Token ids (int [T]) to the decoder's input [T, hidden].
Embedding = Callable[[Tensor], Tensor]


def embed(weight: Tensor, scale: float, token_ids: Tensor) -> Tensor:
    """Rows of a dense table [V, hidden], times `scale`."""
    rows = F.embedding(token_ids, weight)
    return rows if scale == 1.0 else rows * scale


@dataclass(slots=True, eq=False)
class Storage:
    """How a model's weights are held on the device: here, everything in one dtype; subclasses hold matrices otherwise.

    dtype: of activations, norms, biases and the KV cache. It reads one tensor at a time, so the host has no second copy
    of the model.
    """

    weights: Weights
    device: torch.device
    dtype: torch.dtype

    def vector(self, name: str, offset: float = 0.0) -> Tensor:
        """A norm weight or a bias; `offset` is added before it is rounded to the model's dtype."""
        return (self.weights[name].float() + offset).to(self.device, self.dtype)

    def matrix(self, names: Sequence[str]) -> LinearMethod:
        """The product with the matrices `names`, stacked by output rows."""
        return PlainLinear(self.dense(names))

    def dense(self, names: Sequence[str]) -> Tensor:
        """The matrices `names`, stacked by rows."""
        parts = [self._load(name) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def embedding(self, name: str, scale: float) -> tuple[Embedding, LinearMethod]:
        """The look-up in the token table, and the product with it (for tied output layers), on the same memory.

        scale: rounded to the model's dtype, as Gemma was trained.
        """
        weight = self._load(name)
        return partial(embed, weight, torch.tensor(scale, dtype=self.dtype).item()), PlainLinear(weight)

    def _load(self, name: str) -> Tensor:
        return self.weights[name].to(self.device, self.dtype).contiguous()
