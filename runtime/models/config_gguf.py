"""Read a `ModelConfig` from a GGUF file's metadata and tensor list.

Source for the key names, and for rules that the metadata does not state: llama.cpp's model loader and converter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ramet.errors import BrokenModelFile, UnsupportedArchitecture
from ramet.runtime.models.config import (
    ModelConfig,
    Rope,
    RopeScaling,
    check_size,
)
from ramet.runtime.models.families import family_of_gguf

if TYPE_CHECKING:
    from ramet.runtime.models.gguf_file import GgufEntry, GgufFile


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Read GGUF metadata. Missing facts (biases, tied embeddings, vocabulary size) are derived from the tensors.

    Raises: UnsupportedArchitecture; BrokenModelFile naming a missing key.
    """
    read = file.metadata.get
    family = family_of_gguf(read("general.architecture"))
    architecture = family.name
    tensors = file.tensors

    def value(key: str, default: Any = None) -> Any:  # metadata value
        found = read(f"{architecture}.{key}", default)
        if found is None:
            raise BrokenModelFile(f"the GGUF file lacks the key {architecture}.{key}")
        return found

    if value("expert_count", 0):
        raise UnsupportedArchitecture(f"mixture-of-experts models ({value('expert_count')} experts) are not supported")
    if "token_embd.weight" not in tensors:
        raise BrokenModelFile("the GGUF file lacks the tensor token_embd.weight")
    hidden_size, num_layers, num_heads = value("embedding_length"), value("block_count"), value("attention.head_count")
    for name, size in (("num_layers", num_layers), ("num_heads", num_heads), ("hidden_size", hidden_size)):
        check_size(name, size)
    head_dim = value("attention.key_length", hidden_size // num_heads)
    is_gemma = family.is_gemma
    window = read(f"{architecture}.attention.sliding_window")
    pattern = _gguf_sliding_layers(read(f"{architecture}.attention.sliding_window_pattern"), num_layers, is_gemma)
    rope = _gguf_rope(value, tensors, 1_000_000.0 if is_gemma else 10_000.0)
    # llama.cpp's rule: only the 27B Gemma 3 scales by hidden / heads; all others by the head dimension.
    scale_dim = hidden_size // num_heads if is_gemma and num_layers == 62 else head_dim
    eos = [read(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=value("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=value("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=int(tensors["token_embd.weight"].shape[0]),
        rms_norm_eps=float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32: 1e-5 again
        max_position_embeddings=value("context_length"),
        rope=rope,
        local_rope=Rope(float(value("rope.freq_base_swa", 10_000.0))) if is_gemma else rope,
        attention_scale=float(scale_dim) ** -0.5,
        sliding_window=window if window and any(pattern) else None,
        sliding_layers=pattern if window else (),
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        activation="gelu_tanh" if is_gemma else "silu",
        embedding_scale=math.sqrt(hidden_size) if is_gemma else 1.0,
        norm_offset=1.0 if is_gemma else 0.0,
        feed_forward_norms=is_gemma,
        logit_softcap=read(f"{architecture}.final_logit_softcapping"),
        bos_id=read("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(int(token) for token in eos if token is not None)),
        pad_id=read("tokenizer.ggml.padding_token_id"),
    )


def _gguf_sliding_layers(stored: object, num_layers: int, is_gemma: bool) -> tuple[bool, ...]:
    if isinstance(stored, list):
        return tuple(bool(item) for item in stored)
    period = stored if isinstance(stored, int) and not isinstance(stored, bool) else 6
    if period < 1:
        raise BrokenModelFile(f"attention.sliding_window_pattern is {period} but must be at least 1")
    return tuple((layer + 1) % period != 0 if is_gemma else True for layer in range(num_layers))


def _gguf_rope(value: Callable[..., Any], tensors: Mapping[str, GgufEntry], default_theta: float) -> Rope:
    theta = float(value("rope.freq_base", default_theta))
    kind = value("rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:  # llama.cpp bakes Llama 3's ramp into a tensor of divisors
        divisors = tensors["rope_freqs.weight"].dequantised().reshape(-1)
        return Rope(theta, RopeScaling("divisors", divisors=tuple(map(float, divisors))))
    if kind == "linear":
        return Rope(theta, RopeScaling("linear", factor=float(value("rope.scaling.factor"))))
    if kind != "none":
        raise UnsupportedArchitecture(f"rope scaling of type {kind!r} is not supported; supported: none, linear")
    return Rope(theta)
