"""Products in FP8 (e4m3): weights with one scale for each output feature, activations with one for each token.

On a GPU, torch's scaled product computes them on the card's FP8 units. On a CPU the same rounded numbers are multiplied
in fp32: a reference, by which the quality on a card is measured without one. Where a file has scales for blocks of
columns, activations are not rounded, and a kernel multiplies 16-bit numbers (`matmul_invariant.py`). Token table,
output layer, norms, biases and the routers of experts keep the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.kernels.layers.matmul_invariant import matmul_invariant
from ramet.kernels.layers.quantize_fp8 import quantize_fp8
from ramet.runtime.models.linear import LinearMethod, PlainLinear, Storage

_GROUP = 64  # columns with a scale of their own must be a multiple of this for the kernel
_WHOLE = 16  # rows and columns of a matrix must be multiples of this for torch's scaled product
_KEPT = (".mlp.gate.weight", ".shared_expert_gate.weight")  # routers: a token's experts hang on small differences


def has_fp8_products(device: torch.device) -> bool:
    """Return whether a GPU multiplies FP8 numbers: Ada, Hopper and later."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


@dataclass(slots=True, eq=False)
class Fp8Linear:
    """A product with FP8 weights. weight: e4m3 [N, K]; scale: fp32 [N], or [N, G] of G groups of columns."""

    weight: Tensor
    scale: Tensor

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.scale.ndim == 2:
            return matmul_invariant(x, self.weight, bias, self.scale)
        values, scale = quantize_fp8(x)
        if x.is_cuda:
            # By rows and columns, the library has results in bfloat16 alone.
            scales = scale, self.scale.unsqueeze(0)
            out = torch._scaled_mm(values, self.weight.t(), *scales, out_dtype=torch.bfloat16).to(x.dtype)
        else:
            out = (F.linear(values.float(), self.weight.float()) * scale * self.scale).to(x.dtype)
        return out if bias is None else out + bias


@dataclass(slots=True, eq=False)
class Fp8Storage(Storage):
    """Matrices of layers in FP8, everything else in one dtype. What a file holds in FP8 is not rounded again.

    In a file with FP8 matrices, those that it holds in 16 bits stay so.
    """

    def matrix(self, names: Sequence[str]) -> LinearMethod:
        held = self.weights.fp8_names
        is_wanted = ".layers." in names[0] and not names[0].endswith(_KEPT)
        if not is_wanted or (held and not held.issuperset(names)):
            return PlainLinear(self.dense(names))
        stored = [self.weights.scaled(name) for name in names] if held else []
        known = [part for part in stored if part is not None]
        if known and len(known) == len(names):
            weight, scale = (torch.cat([part[i] for part in known]).to(self.device).contiguous() for i in (0, 1))
            is_whole = _fits(weight) if scale.ndim == 1 else weight.shape[1] // scale.shape[1] % _GROUP == 0
            if is_whole:
                return Fp8Linear(weight, scale)
        dense = self.dense(names)
        if not _fits(dense):
            return PlainLinear(dense)
        values, scales = quantize_fp8(dense)
        return Fp8Linear(values, scales.reshape(-1))


def _fits(weight: Tensor) -> bool:
    return all(size % _WHOLE == 0 for size in weight.shape)
