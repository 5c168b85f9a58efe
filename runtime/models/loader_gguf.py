"""Load a GGUF file's tensors as `Weights` under their Hugging Face names.

Tensors are memory-mapped. Access returns float32; `Weights.quantized` returns a quantised matrix as stored in the file.
llama.cpp's converter makes two changes that are undone here: it interleaves the two rotary halves of q and k in Llama
and Mistral, and it adds 1 to Gemma's norm weights.
Source: llama.cpp's convert_hf_to_gguf; the GGUF specification.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TypeVar

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ramet.errors import BrokenModelFile
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.families import family_named
from ramet.runtime.models.gguf_file import GgufEntry, GgufFile
from ramet.runtime.models.weights import Part, QuantizedReader, Reader, Weights, check_names, check_shapes

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
# Matrices of models whose files have one for several of ours, one behind another.
_FUSED_NAMES = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}
# One matrix of all experts, stacked.
_EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
_NORM_NAMES = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")  # in the order of `ModelConfig.norms`
_IGNORED = {"rope_freqs.weight"}  # read by the configuration
_LAYER = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_Number = TypeVar("_Number", np.float32, np.uint8)
_FLOAT_TYPES = ("F32", "F16", "BF16", "F64")


def load_gguf(file: GgufFile, config: ModelConfig) -> Weights:
    """Map the file's tensors. Names and shapes are checked now; bytes are read on access.

    Raises: BrokenModelFile naming the tensors that are missing, unknown, of a wrong shape or an unknown type.
    """
    norms = zip(_NORM_NAMES, config.norms, strict=True)
    layer_names = _LAYER_NAMES | {name: ours for name, ours in norms if ours is not None}
    if config.norms[1] is None and config.norms[2] is not None:  # the same norm, in files of Seed-OSS
        layer_names["post_attention_norm"] = config.norms[2]
    readers: dict[str, Reader] = {}
    quantized: dict[str, QuantizedReader] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in file.tensors.values():
        if tensor.name in _IGNORED:
            continue
        quantization = tensor.kind.name
        if quantization not in _FLOAT_TYPES and not _can_dequantise(tensor.kind):
            raise BrokenModelFile(
                f"{file.path}: {tensor.name} has the type {quantization}, which cannot be dequantised"
            )
        for name, entry in _own_tensors(tensor, layer_names, config):
            shapes[name] = entry.shape
            heads = _interleaved_heads(config, name)
            shift = -config.norm_offset if name.endswith("norm.weight") else 0.0
            readers[name] = partial(_dequantise, entry, heads, shift)
            if quantization not in _FLOAT_TYPES and len(entry.shape) == 2:
                quantized[name] = partial(as_stored, entry, heads)
    check_names(config, readers, file.path)
    check_shapes(config, shapes, file.path)
    return Weights(readers, quantized)


def _own_tensors(tensor: GgufEntry, layer_names: dict[str, str], config: ModelConfig) -> list[tuple[str, GgufEntry]]:
    """Our tensors that a stored one holds, by their Hugging Face names.

    An unknown tensor keeps its own name, so the check of names reports it.
    """
    if tensor.name in _GLOBAL_NAMES:
        return [(_GLOBAL_NAMES[tensor.name], tensor)]
    match = _LAYER.fullmatch(tensor.name)
    if match is None:
        return [(tensor.name, tensor)]
    prefix, shape = f"model.layers.{match[1]}", tensor.shape
    if match[2] in _EXPERT_NAMES and len(shape) == 3:
        name = _EXPERT_NAMES[match[2]]
        experts = [replace(tensor.rows(index, index + 1), shape=shape[1:]) for index in range(shape[0])]
        return [(f"{prefix}.mlp.experts.{index}.{name}.{match[3]}", entry) for index, entry in enumerate(experts)]
    if family_named(config.architecture).fused and match[2] in _FUSED_NAMES:
        heads, inner = (config.num_heads, config.num_kv_heads, config.num_kv_heads), config.intermediate_size
        sizes = [count * config.head_dim for count in heads] if match[2] == "attn_qkv" else [inner, inner]
        if shape[0] != sum(sizes):
            raise BrokenModelFile(f"{tensor.name} has {shape[0]} rows but the file's keys say {sum(sizes)}")
        names = [f"{prefix}.{layer_names[part]}.{match[3]}" for part in _FUSED_NAMES[match[2]]]
        ends = accumulate(sizes)
        return [(name, tensor.rows(end - size, end)) for name, size, end in zip(names, sizes, ends, strict=True)]
    if match[2] not in layer_names:
        return [(tensor.name, tensor)]
    if match[2] == "ffn_gate_inp_shexp" and len(shape) == 1:  # the converter leaves out axes of one
        tensor = replace(tensor, shape=(1, *shape))
    return [(f"{prefix}.{layer_names[match[2]]}.{match[3]}", tensor)]


def _interleaved_heads(config: ModelConfig, name: str) -> int:
    """Number of heads whose rows llama.cpp interleaved; 0 if it kept the order."""
    if not family_named(config.architecture).interleaves_heads:
        return 0
    if ".self_attn.q_proj." in name:
        return config.num_heads
    return config.num_kv_heads if ".self_attn.k_proj." in name else 0


def _split_halves(rows: NDArray[_Number], num_heads: int) -> NDArray[_Number]:
    """Undo the interleaving: within a head, rows (0, D/2, 1, D/2 + 1, ...) go back to (0, 1, ..., D - 1)."""
    if num_heads == 0:
        return rows
    half = rows.shape[0] // num_heads // 2
    grouped = rows.reshape(num_heads, half, 2, *rows.shape[1:])
    return np.ascontiguousarray(grouped.swapaxes(1, 2)).reshape(rows.shape)


def _cut(tensor: GgufEntry, heads: int, part: Part | None) -> tuple[GgufEntry, int] | None:
    """A part of a tensor and its number of interleaved heads; None if the part cuts through blocks."""
    if part is None:
        return tensor, heads
    if part.axis == 1:
        columns = tensor.columns(part.start, part.stop)
        return None if columns is None else (columns, heads)
    # A part of an interleaved matrix holds whole heads.
    return tensor.rows(part.start, part.stop), heads * (part.stop - part.start) // tensor.shape[0]


def _dequantise(tensor: GgufEntry, heads: int, shift: float, part: Part | None) -> Tensor:
    cut = _cut(tensor, heads, part)
    entry, heads = (tensor, heads) if cut is None else cut
    values = _split_halves(entry.dequantised(), heads)
    if shift:
        values += np.float32(shift)
    whole = torch.from_numpy(values)
    return whole if cut is not None or part is None else part.of(whole)


def as_stored(tensor: GgufEntry, heads: int, part: Part | None) -> GgufEntry | None:
    """A quantised matrix or a part of it; None if the part cuts through blocks. heads: those with interleaved rows."""
    cut = _cut(tensor, heads, part)
    if cut is None:
        return None
    entry, heads = cut
    # Blocks run along a row, so whole rows can change places.
    return replace(entry, stored=_split_halves(entry.by_row(), heads).reshape(-1))


def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, type_size), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    assert block_size > 1, kind
    return True
