"""Weights in blocks of 32 on the CPU: GGUF's own, or rounded by us, or 16-bit ones; activations stay in fp32.

For up to 4 tokens a product decodes its weights in registers (`kernels/block_linear.py`), and is as exact as an fp32
product with the dequantised weights. For more it is a bfloat16 product by oneDNN with a dequantised copy in oneDNN's
own layout, where the CPU has such instructions (2 more bytes a weight); else the same kernel. Rounding to bfloat16 is
then confined to a product's inputs and output: the residual, norms, attention and the KV cache stay in fp32.

Measured on an AMD EPYC (Zen 4, AVX512-BF16), one thread, [3072, 576], us for 1 / 4 / 8 / 32 tokens: Q4_1 blocks 115 /
199 / 322 / 1,280; oneDNN - / 90 / 150 / 520; torch's own bfloat16 product 139 / 171 / 230 / 620; fp32 142 / 369 / 605 /
1,800. Whole steps: `benchmarks/bench_cpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.errors import ConfigError
from ramet.kernels.block_linear import FORMATS, block_linear, dequantize, quantize
from ramet.runtime.models.linear import Embedding, LinearMethod, PlainEmbedding, PlainLinear
from ramet.runtime.models.weights import Weights

# From 5 tokens on the bfloat16 product is at least twice as fast; below, exactness and fewer bytes read win.
_MAX_BLOCK_TOKENS = 4
QUANTIZATIONS = {"int8": "Q8_0", "int4": "Q4_1", "gguf": None}


# x bfloat16 [T, K] -> bfloat16 [T, N]
DenseProduct = Callable[[Tensor], Tensor]


@dataclass(slots=True, eq=False)
class BlockLinear:
    """A product with weights in blocks. `dense`: the product for many tokens, or None: blocks always."""

    blocks: Tensor
    block_format: str
    num_rows: int
    dense: DenseProduct | None

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.dense is None or x.shape[0] <= _MAX_BLOCK_TOKENS:
            return block_linear(x, self.blocks, self.block_format, self.num_rows, bias)
        out = self.dense(x.to(torch.bfloat16)).float()
        return out if bias is None else out.add_(bias)


@dataclass(slots=True, eq=False)
class OneDnnProduct:
    """A bfloat16 product with weights in oneDNN's own layout (opaque: made by `pack`)."""

    packed: Tensor

    @classmethod
    def pack(cls, weight: Tensor) -> OneDnnProduct:
        """Reorder a bfloat16 [N, K]; the layout serves every number of tokens."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight, None))

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return out


@dataclass(slots=True, eq=False)
class BlockEmbedding:
    """Rows of a token table in blocks, dequantised when they are looked up."""

    blocks: Tensor
    block_format: str
    scale: float

    def __call__(self, token_ids: Tensor) -> Tensor:
        rows = dequantize(self.blocks.index_select(0, token_ids), self.block_format)
        return rows if self.scale == 1.0 else rows * self.scale


@dataclass(slots=True, eq=False)
class BlockStorage:
    """Weights in `block_format`, or, where that is None, as the file has them. Vectors and activations are fp32."""

    weights: Mapping[str, Tensor]
    block_format: str | None
    must_be_quantized: bool  # refuse matrices that the file doesn't hold in blocks we know
    has_bf16: bool  # the CPU multiplies bfloat16 natively
    device: torch.device
    dtype: torch.dtype

    def vector(self, name: str, offset: float = 0.0) -> Tensor:
        return self.weights[name].float() + offset

    def matrix(self, names: Sequence[str]) -> LinearMethod:
        held = self._hold(names)
        return PlainLinear(held) if isinstance(held, Tensor) else held

    def embedding(self, name: str, scale: float) -> tuple[Embedding, LinearMethod]:
        held = self._hold([name])
        if isinstance(held, Tensor):
            return PlainEmbedding(held, scale), PlainLinear(held)
        return BlockEmbedding(held.blocks, held.block_format, scale), held

    def _hold(self, names: Sequence[str]) -> BlockLinear | Tensor:
        """Blocks where that is possible, else fp32."""
        if self.block_format is None:
            stored = self._stored_blocks(names)
            if stored is not None:
                return stored
            if self.must_be_quantized:
                raise ConfigError(
                    f"quantization is 'gguf' but {names[0]} is not stored in blocks of type "
                    f"{', '.join(name for name in FORMATS if name != 'BF16')}; use int8 or int4, or leave it out"
                )
        parts = [self.weights[name] for name in names]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        is_original = self.block_format is None and weight.dtype is torch.float32 and not self._is_quantized(names[0])
        if weight.shape[1] % 32 or is_original:
            return weight.float().contiguous()
        block_format = self.block_format or "BF16"
        return self._blocks(quantize(weight, block_format), block_format, weight.shape[0])

    def _stored_blocks(self, names: Sequence[str]) -> BlockLinear | None:
        if not isinstance(self.weights, Weights):
            return None
        tensors = [self.weights.quantized(name) for name in names]
        formats = {None if tensor is None else tensor.quantization for tensor in tensors}
        block_format = formats.pop()
        if formats or block_format not in FORMATS or block_format == "BF16":
            return None
        rows = torch.cat([torch.from_numpy(tensor.rows.copy()) for tensor in tensors if tensor is not None])
        return self._blocks(rows, block_format, rows.shape[0])

    def _is_quantized(self, name: str) -> bool:
        return isinstance(self.weights, Weights) and self.weights.quantized(name) is not None

    def _blocks(self, blocks: Tensor, block_format: str, num_rows: int) -> BlockLinear:
        dense: DenseProduct | None = None
        if self.has_bf16 and block_format == "BF16":
            dense = partial(F.linear, weight=blocks)  # in the same memory: a second copy would double the model
        elif self.has_bf16:
            dense = OneDnnProduct.pack(dequantize(blocks, block_format).to(torch.bfloat16))
        return BlockLinear(blocks, block_format, num_rows, dense)


def block_storage(
    weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | str, quantization: str | None
) -> BlockStorage:
    """Check what was asked for. Raises: ConfigError."""
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization is {quantization!r} but must be one of {', '.join(QUANTIZATIONS)}, or None")
    if device.type != "cpu":
        raise ConfigError(f"quantization {quantization!r} runs on the CPU only; leave it out on {device.type}")
    if dtype not in ("auto", torch.float32):
        raise ConfigError(f"quantization {quantization!r} computes in float32; dtype is {dtype}, make it auto")
    return BlockStorage(
        weights,
        None if quantization is None else QUANTIZATIONS[quantization],
        quantization == "gguf",
        _has_bf16(),
        device,
        torch.float32,
    )


def _has_bf16() -> bool:
    """True where oneDNN multiplies bfloat16 with the CPU's own instructions."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()
