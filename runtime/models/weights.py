"""`Weights`: a model's tensors by their Hugging Face names, read on access.

The convention between loaders and the decoder:
- names as in a Hugging Face checkpoint of the text model: `model.embed_tokens.weight`,
  `model.layers.0.self_attn.q_proj.weight`, `model.norm.weight`, `lm_head.weight` (absent when embeddings are tied);
- CPU tensors in the dtype of the file (GGUF: float32, dequantised); rotary halves in the Hugging Face order;
- Gemma's norm weights as stored by Hugging Face (w - 1); the decoder adds `ModelConfig.norm_offset`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ramet.errors import BrokenModelFile
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.gguf_file import GgufEntry


@dataclass(frozen=True, slots=True)
class Part:
    """A range [start, stop) of a tensor's rows (axis 0) or columns (axis 1), followed by `padding` rows of zeros."""

    axis: int
    start: int
    stop: int
    padding: int = 0

    def of(self, tensor: Any) -> Tensor:  # Any: a tensor, or what safetensors reads parts of
        """Return the range without its padding."""
        part: Tensor = tensor[self.start : self.stop] if self.axis == 0 else tensor[:, self.start : self.stop]
        return part


# Read a tensor, or the range of a part of it. A quantised reader returns None if a range cuts through blocks.
Reader = Callable[[Part | None], Tensor]
QuantizedReader = Callable[[Part | None], GgufEntry | None]
# Read a matrix in FP8 and its scales, fp32 [rows] or [rows, groups of columns]. None if groups differ in size.
ScaledReader = Callable[[], tuple[Tensor, Tensor] | None]


class Weights(Mapping[str, Tensor]):
    """Tensors by name. Every access reads (and dequantises) again, so callers keep the tensors that they need."""

    def __init__(
        self,
        readers: Mapping[str, Reader],
        quantized: Mapping[str, QuantizedReader] | None = None,
        parts: Mapping[str, Part] | None = None,
        scaled: Mapping[str, ScaledReader] | None = None,
        on_read: Callable[[str], None] = lambda name: None,
    ) -> None:
        """parts: of these tensors only a part is read. on_read: is called with a tensor's name before each reading."""
        self._on_read = on_read
        self._readers = dict(readers)
        self._quantized = dict(quantized or {})
        self._scaled = dict(scaled or {})
        self._parts = dict(parts or {})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Weights:
        """Wrap tensors that are already in memory."""

        def reader(name: str) -> Reader:
            return lambda part: tensors[name] if part is None else part.of(tensors[name])

        return cls({name: reader(name) for name in tensors})

    def cut(self, parts: Mapping[str, Part]) -> Weights:
        """The same weights, but only these parts of these tensors. Nothing else of them is read from files."""
        return Weights(self._readers, self._quantized, parts, self._scaled, self._on_read)

    def watched(self, on_read: Callable[[str], None]) -> Weights:
        """The same weights, which call `on_read` with a tensor's name before each reading."""
        return Weights(self._readers, self._quantized, self._parts, self._scaled, on_read)

    def __getitem__(self, name: str) -> Tensor:
        part = self._parts.get(name)
        self._on_read(name)
        tensor = self._readers[name](part)
        if part is None or not part.padding:
            return tensor
        return torch.cat((tensor, tensor.new_zeros((part.padding, *tensor.shape[1:]))))

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def quantized(self, name: str) -> GgufEntry | None:
        """The quantised matrix as stored in the file, with the rows in Hugging Face order.

        It is None if it is missing or stored in a floating-point type, or if the tensor's part begins or ends inside
        blocks.
        """
        self._on_read(name)
        reader, part = self._quantized.get(name), self._parts.get(name)
        found = None if reader is None else reader(part)
        if found is None or part is None or not part.padding:
            return found
        # Blocks of zeros with the scale 0.
        zeros = np.zeros(part.padding * found.by_row().shape[1], dtype=np.uint8)
        shape = (found.shape[0] + part.padding, found.shape[1])
        return replace(found, stored=np.concatenate((found.stored, zeros)), shape=shape)

    @property
    def fp8_names(self) -> frozenset[str]:
        """The matrices that the file holds in FP8."""
        return frozenset(self._scaled)

    def scaled(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A matrix in FP8 as stored in the file, and its scales, fp32 [rows] or [rows, groups of columns].

        It is None if groups differ in size, or if the tensor's part begins or ends inside one.
        """
        self._on_read(name)
        found, part = self._scaled[name](), self._parts.get(name)
        if found is None or part is None:
            return found
        weight, scale = found
        assert not part.padding, "only the token table is padded"
        if part.axis == 0 or scale.ndim == 1:
            return part.of(weight), part.of(scale) if part.axis == 0 else scale
        group = weight.shape[1] // scale.shape[1]
        if part.start % group or part.stop % group:
            return None
        return part.of(weight), scale[:, part.start // group : part.stop // group]


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the decoder reads for this configuration, with its shape."""
    hidden, head = config.hidden_size, config.head_dim
    query, key_value = config.num_heads * head, config.num_kv_heads * head
    attention = {
        "self_attn.q_proj": (query, hidden, config.qkv_bias),
        "self_attn.k_proj": (key_value, hidden, config.qkv_bias),
        "self_attn.v_proj": (key_value, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, query, config.o_bias),
    }
    norms = {name: hidden for name in config.norms if name is not None}
    if config.qk_norm is not None:
        is_whole = config.qk_norm == "all"
        norms |= {"self_attn.q_norm": query if is_whole else head, "self_attn.k_norm": key_value if is_whole else head}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, size in norms.items():
            shapes[f"{prefix}{name}.weight"] = (size,)
        for name, (num_rows, num_columns, has_bias) in (attention | _feed_forward(config, layer)).items():
            shapes[f"{prefix}{name}.weight"] = (num_rows, num_columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (num_rows,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _feed_forward(config: ModelConfig, layer: int) -> dict[str, tuple[int, int, bool]]:
    """(rows, columns, has a bias) of each matrix of a layer's feed-forward block or experts."""
    hidden, experts = config.hidden_size, config.layer_experts(layer)

    def block(prefix: str, inner: int) -> dict[str, tuple[int, int, bool]]:
        bias = config.mlp_bias
        inward = {prefix + name: (inner, hidden, bias) for name in ("gate_proj", "up_proj")}
        return inward | {prefix + "down_proj": (hidden, inner, bias)}

    if experts is None:
        return block("mlp.", config.intermediate_size)
    found = {"mlp.gate": (experts.count, hidden, False)}
    for index in range(experts.count):
        found |= block(f"mlp.experts.{index}.", experts.size)
    if experts.shared_size:
        found |= block("mlp.shared_expert.", experts.shared_size) | {"mlp.shared_expert_gate": (1, hidden, False)}
    return found


def check_names(config: ModelConfig, names: Iterable[str], source: Path) -> None:
    """Raise BrokenModelFile naming the tensors that `source` lacks, or has in addition to `expected_tensors`."""
    expected, found = expected_tensors(config), set(names)
    missing = [name for name in expected if name not in found]
    unknown = sorted(found - expected.keys())
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} tensors are unknown to a {config.architecture} model: {_some(unknown)}")
    if problems:
        raise BrokenModelFile(f"{source}: {'; '.join(problems)}")


def check_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Raise BrokenModelFile naming the tensors whose shape differs from the configuration's."""
    expected = expected_tensors(config)
    wrong = [
        f"{name} is {list(shape)} but must be {list(expected[name])}"
        for name, shape in shapes.items()
        if name in expected and tuple(shape) != expected[name]
    ]
    if wrong:
        raise BrokenModelFile(f"{source}: {len(wrong)} tensors do not fit the configuration: {_some(wrong)}")


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
