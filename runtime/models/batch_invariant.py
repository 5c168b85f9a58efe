"""A pass over a finished decoder: products whose rows have the same bits in any batch (`--deterministic`).

The rest of a deterministic engine is the model runner's: fixed splits and tiles of attention, no tree attention. Norms,
activations and sampling work row by row anyway.
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
    """Replace the products of `decoder` and return it. Raises ConfigError where its weights are quantised."""
    for linear in decoder.linears():
        method = linear.method
        if not isinstance(method, PlainLinear):
            raise ConfigError("--deterministic needs dense weights on a GPU; leave out --quantization")
        linear.method = InvariantLinear(method.weight)
    return decoder
