"""Products on the CPU with weights in blocks of 32: a GGUF file's blocks, blocks rounded by Ramet, 16 or 32 bits.

Quantised weights have fast products, if the CPU has the instructions. Activations are rounded to int8 in groups of 32,
as in llama.cpp (`kernels/cpu/block_int8.py`). Where the CPU has AMX, oneDNN computes prompts in bfloat16 instead, with
a dequantised copy in its own layout. Without AMX that is slower: on an AMD EPYC it had 0.64 to 0.86 of int8's speed,
for 65 to 1,000 tokens and matrices from 576 x 3,072 to 4,096 x 14,336. On other CPUs, and for few tokens with 16-bit
weights, a product decodes its weights in registers (`kernels/cpu/block_linear.py`); it is as exact as an fp32 product
with the dequantised weights. The same kernel multiplies few tokens with fp32 weights, and torch many. Only a product's
inputs (and oneDNN's output) are rounded: the residual, norms, attention and the KV cache stay in fp32.

SmolLM2 on 1,000 tokens of prose and licence against exact products: int8 has the same best token at 95.9 % of
positions (KL 0.0036, perplexity 33.3), bfloat16 at 96.5 % (0.0010, 33.4; exact 33.4). On 8,000 tokens of licences
perplexities are 18.49, 18.47 and, exact, 18.45. CPU time of a step at batch 1 on
an Intel Xeon (Emerald Rapids): exact 20.9 ms, int8 13.8. Whole steps: `benchmarks/bench_cpu.py`.

`apply_tiles` is a pass over a finished decoder: on CPUs with AMX, layers with bfloat16 products keep their results in
bfloat16, which saves conversions to fp32 and back. Attention of new tokens multiplies bfloat16 tiles. The residual, the
KV cache, softmax and sums stay in fp32; steps of few tokens and models with fp32 weights are unchanged. CPU time of
1,000 new tokens of SmolLM2-135M, one thread of an Intel Xeon (Emerald Rapids): 421 ms with this pass, 848 ms without.
Whole engine, wall time on two threads: 252 and 439 ms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.errors import ConfigError
from ramet.kernels.cpu import block_int8
from ramet.kernels.cpu.amx import has_tiles
from ramet.kernels.cpu.attention_extend_amx import with_bf16_queries
from ramet.kernels.cpu.block_linear import FORMATS, block_linear, dequantize, quantize
from ramet.kernels.cpu.huge_pages import HugePages
from ramet.kernels.cpu.int8 import has_int8_products
from ramet.kernels.cpu.program import KernelStream
from ramet.runtime.models.decoder import Decoder, Layer
from ramet.runtime.models.layers import DecoderLayer
from ramet.runtime.models.linear import Embedding, LinearMethod, PlainLinear, Storage, embed
from ramet.runtime.models.weights import Weights

_MAX_EXACT_TOKENS = 4  # above, a bfloat16 product is faster
_MAX_FP32_TOKENS = 32  # what a recorded step has; up to 8, MKL takes 1.5 to 4 times as long on an AMD EPYC
_MAX_INT8_TOKENS = 32  # with AMX, bfloat16 takes a third less time for 48 tokens, but a sixth more for 16
_PLAIN = ("BF16", "F32")  # numbers, not blocks
QUANTIZATIONS = {"int8": "Q8_0", "int4": "Q4_1", "gguf": None}


@dataclass(frozen=True, slots=True)
class CpuFeatures:
    """The CPU's native multiplications: bfloat16 (by oneDNN), groups of bytes, and tiles of bfloat16 (AMX)."""

    bf16: bool
    int8: bool
    tiles: bool

    @classmethod
    def detect(cls) -> CpuFeatures:
        """Detect the features of this machine."""
        bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()
        return cls(bf16, has_int8_products(), bf16 and has_tiles())


@dataclass(slots=True, eq=False)
class BlockLinear:
    """A product with weights in blocks: `few` computes up to `max_few` tokens in fp32, `many` computes more.

    `many` also accepts and returns bfloat16 if it rounds to it.

    `blocks`: what `few` reads, in `block_format` or packed from it (`block_int8.pack`).
    """

    block_format: str
    blocks: Tensor
    few: LinearMethod
    max_few: int
    many: LinearMethod

    @property
    def rounds(self) -> bool:
        """Whether products of many tokens round to bfloat16."""
        return self.many is not self.few and self.block_format != "F32"

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        is_few = x.shape[0] <= self.max_few and x.dtype is torch.float32
        return (self.few if is_few else self.many)(x, bias)


def exact_product(stream: KernelStream, blocks: Tensor, block_format: str) -> LinearMethod:
    """The product with a file's own blocks, decoded in registers."""
    return lambda x, bias: block_linear(stream, x, blocks, block_format, blocks.shape[0], bias)


def int8_product(stream: KernelStream, packed: Tensor) -> LinearMethod:
    """The product with blocks laid out for integer instructions (see `block_int8.pack`)."""
    return lambda x, bias: block_int8.block_int8_linear(stream, x, packed, bias)


def bf16_product(weight: Tensor) -> LinearMethod:
    """The product with bfloat16 weights [N, K]."""
    return lambda x, bias: _finish(F.linear(x.to(torch.bfloat16), weight), bias, x.dtype)


def onednn_product(weight: Tensor) -> LinearMethod:
    """The product with a bfloat16 matrix [N, K], reordered to oneDNN's own layout for any number of tokens."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), packed, None, "none", [], "")
        return _finish(out, bias, x.dtype)

    return product


def _finish(out: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Add a bias in fp32, return `dtype`."""
    return out.to(dtype) if bias is None else out.float().add_(bias).to(dtype)


def embed_blocks(blocks: Tensor, block_format: str, scale: float, token_ids: Tensor) -> Tensor:
    """As `embed`, of a table in blocks, whose rows are dequantised."""
    rows = dequantize(blocks.index_select(0, token_ids), block_format)
    return rows if scale == 1.0 else rows * scale


@dataclass(slots=True, eq=False)
class BlockStorage(Storage):
    """Holds matrices in `block_format`, or as stored in the file if that is None. Vectors and activations are fp32."""

    block_format: str | None
    must_be_quantized: bool  # refuse matrices that the file does not hold in a supported block format
    features: CpuFeatures
    stream: KernelStream
    memory: HugePages = field(default_factory=HugePages)  # memory of the weights that every decode step reads

    def matrix(self, names: Sequence[str]) -> LinearMethod:
        held = self._hold(names)
        return PlainLinear(held) if isinstance(held, Tensor) else self._product(*held)

    def embedding(self, name: str, scale: float) -> tuple[Embedding, LinearMethod]:
        held = self._hold([name])
        if isinstance(held, Tensor):
            return partial(embed, held, scale), PlainLinear(held)
        return partial(embed_blocks, *held, scale), self._product(*held)

    def _hold(self, names: Sequence[str]) -> tuple[Tensor, str] | Tensor:
        """The matrices in blocks of a format if possible, else in fp32."""
        if self.block_format is None:
            stored = self._stored_blocks(names)
            if stored is not None:
                return stored
            if self.must_be_quantized:
                raise ConfigError(
                    f"quantization is 'gguf' but {names[0]} is not stored in blocks of type "
                    f"{', '.join(name for name in FORMATS if name not in _PLAIN)}; use int8 or int4, or leave it out"
                )
        parts = [self.weights[name] for name in names]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        is_stored = self.weights.quantized(names[0]) is not None
        is_original = self.block_format is None and weight.dtype is torch.float32 and not is_stored
        if weight.shape[1] % 32:
            return weight.float().contiguous()
        block_format = self.block_format or ("F32" if is_original else "BF16")
        return quantize(weight, block_format), block_format

    def _stored_blocks(self, names: Sequence[str]) -> tuple[Tensor, str] | None:
        tensors = [self.weights.quantized(name) for name in names]
        formats = {None if tensor is None else tensor.kind.name for tensor in tensors}
        block_format = formats.pop()
        if formats or block_format not in FORMATS or block_format in _PLAIN:
            return None
        return torch.cat(
            [torch.from_numpy(tensor.by_row().copy()) for tensor in tensors if tensor is not None]
        ), block_format

    def _product(self, blocks: Tensor, block_format: str) -> BlockLinear:
        """The fastest products on this CPU. The blocks are freed if no product reads them."""
        if block_format == "F32":
            exact = exact_product(self.stream, blocks, block_format)
            return BlockLinear(block_format, blocks, exact, _MAX_FP32_TOKENS, PlainLinear(blocks))
        rounds = self.features.bf16
        if self.features.int8 and block_int8.takes(block_format, blocks.shape[0]):
            packed = self.memory.move(block_int8.pack(blocks, block_format, blocks.shape[0]))
            few, max_few, rounds = int8_product(self.stream, packed), _MAX_INT8_TOKENS, self.features.tiles
        else:
            packed, few, max_few = blocks, exact_product(self.stream, blocks, block_format), _MAX_EXACT_TOKENS
        many = self._bf16_product(blocks, block_format) if rounds else few
        return BlockLinear(block_format, packed, few, max_few, many)

    def _bf16_product(self, blocks: Tensor, block_format: str) -> LinearMethod:
        if block_format == "BF16":
            return bf16_product(blocks)  # in the same memory: a second copy would double the model
        return onednn_product(dequantize(blocks, block_format).to(torch.bfloat16))


def block_storage(
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype | str,
    quantization: str | None,
    stream: KernelStream,
) -> BlockStorage:
    """Check the requested dtype and quantisation, and make the storage. Raises: ConfigError."""
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization is {quantization!r} but must be one of {', '.join(QUANTIZATIONS)}, or None")
    if dtype not in ("auto", torch.float32):
        raise ConfigError(f"quantization {quantization!r} computes in float32; dtype is {dtype}, make it auto")
    stored = None if dtype == "auto" else "F32"
    return BlockStorage(
        weights,
        device,
        torch.float32,
        stored if quantization is None else QUANTIZATIONS[quantization],
        quantization == "gguf",
        CpuFeatures.detect(),
        stream,
    )


def apply_tiles(decoder: Decoder) -> Decoder:
    """Return a decoder that rounds between products. On a CPU without AMX, return the given decoder."""
    return round_layers(decoder) if has_tiles() else decoder


def round_layers(decoder: Decoder) -> Decoder:
    """Return a decoder in which every layer rounds if all its products do, on any CPU."""
    return dataclasses.replace(decoder, layers=[_rounding(layer) for layer in decoder.layers])


def _rounding(layer: Layer) -> Layer:
    assert isinstance(layer, DecoderLayer), "passes over products come before those over layers"
    attention, linears = layer.attention, layer.linears()
    methods = [linear.method for linear in linears if isinstance(linear.method, BlockLinear)]
    if len(methods) < len(linears) or not all(method.rounds for method in methods):
        return layer
    ops = with_bf16_queries(layer.ops)
    limit = max(method.max_few for method in methods)
    return dataclasses.replace(layer, ops=ops, attention=dataclasses.replace(attention, ops=ops), rounds_above=limit)
