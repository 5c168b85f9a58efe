"""A pass over a finished decoder: each row of a product has the same bits in any batch (`--deterministic`).

The model runner does the rest of a deterministic engine: fixed attention splits and tiles, no tree attention. Norms,
activations and sampling work row by row in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ramet.errors import ConfigError
from ramet.kernels.layers.matmul_invariant import matmul_invariant
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.linear import PlainLinear


@dataclass(slots=True, eq=False)
class InvariantLinear:
    """A dense product in one tile shape. weight: [out_features, in_features]."""

    weight: Tensor

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return matmul_invariant(x, self.weight, bias)


def apply_batch_invariance(decoder: Decoder) -> Decoder:
    """Replace the products of `decoder` and return it. Raises ConfigError if its weights are quantised."""
    for linear in decoder.linears():
        method = linear.method
        if not isinstance(method, PlainLinear):
            raise ConfigError("--deterministic needs dense weights on a GPU; leave out --quantization")
        linear.method = InvariantLinear(method.weight)
    return decoder
