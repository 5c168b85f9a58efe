"""`build_decoder`: make a decoder from weights, with the ops and products of its device."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ramet.errors import ConfigError
from ramet.kernels.cpu.ops import cpu_ops
from ramet.kernels.cpu.program import KernelStream
from ramet.kernels.ops import REFERENCE, TRITON, Ops
from ramet.kernels.triton_support import use_device
from ramet.runtime.models.config import Experts, ModelConfig, Rope
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.layers import (
    Attention,
    DecoderLayer,
    FeedForward,
    RotaryTable,
    SparseFeedForward,
    with_ops,
)
from ramet.runtime.models.linear import Linear, Storage
from ramet.runtime.models.linear_cpu import apply_tiles, block_storage
from ramet.runtime.models.linear_fp8 import Fp8Storage, has_fp8_products
from ramet.runtime.models.weights import Weights


def build_decoder(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device | str,
    dtype: torch.dtype | Literal["auto"] = "auto",
    quantization: str | None = None,
    ops: Ops | None = None,
) -> Decoder:
    """Make a decoder from tensors under Hugging Face names (see `weights.py`).

    dtype "auto" is bfloat16 on a GPU. On a CPU it is float32 with weights kept as in the file (GGUF blocks or 16 bits),
    which is both the fastest and the most faithful choice (see `linear_cpu.py`). quantization (CPU): "int8" or "int4"
    rounds weights to blocks of 32; "gguf" requires the file's own blocks. quantization "fp8" rounds weights and
    activations (see `linear_fp8.py`); on a GPU it is the default for files in FP8. ops: None takes the device's ops.
    Raises: ConfigError.
    """
    device = torch.device(device)
    use_device(device)  # a kernel rounds weights to FP8
    if not isinstance(weights, Weights):
        weights = Weights.from_tensors(weights)
    if device.type == "cpu":
        return _build_on_cpu(config, weights, device, dtype, quantization, ops)
    if not config.runs_on_gpus:
        raise ConfigError(
            f"Ramet's layers of {config.architecture} run on the CPU only; on {device.type}, transformers runs them: "
            "--model-impl transformers"
        )
    if quantization not in (None, "fp8"):
        raise ConfigError(
            f"quantization {quantization!r} runs on the CPU only; use fp8 or leave it out on {device.type}"
        )
    is_fp8 = (quantization == "fp8" or bool(weights.fp8_names)) and has_fp8_products(device)
    if quantization == "fp8" and not is_fp8:
        raise ConfigError(
            f"quantization is 'fp8' but {device} has no FP8 products (compute capability 8.9 or later); leave it out"
        )
    storage = (Fp8Storage if is_fp8 else Storage)(weights, device, torch.bfloat16 if dtype == "auto" else dtype)
    return _Builder(config, storage, ops or (TRITON if device.type == "cuda" else REFERENCE)).build()


def apply_fp8_cache(decoder: Decoder) -> Decoder:
    """Return a decoder for a KV cache in FP8. Kernels of a GPU take any cache; on a CPU the references do, slowly."""
    if decoder.device.type == "cuda":
        return decoder
    ops = dataclasses.replace(
        decoder.ops,
        rope_and_write_kv=REFERENCE.rope_and_write_kv,
        attention_decode=REFERENCE.attention_decode,
        attention_extend=REFERENCE.attention_extend,
        make_record=None,
    )
    return with_ops(decoder, ops)


def _build_on_cpu(
    config: ModelConfig,
    weights: Weights,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    quantization: str | None,
    ops: Ops | None,
) -> Decoder:
    """Build for the CPU. This is the only place where a model meets the code that is compiled for the CPU."""
    stream = KernelStream()
    if quantization == "fp8":
        storage: Storage = Fp8Storage(weights, device, torch.float32 if dtype == "auto" else dtype)
    elif quantization is None and isinstance(dtype, torch.dtype) and dtype is not torch.float32:
        storage = Storage(weights, device, dtype)
    else:
        storage = block_storage(weights, device, dtype, quantization, stream)
    chosen = ops or cpu_ops(stream, storage.dtype, config.head_dim)
    if config.experts is not None:
        chosen = dataclasses.replace(chosen, make_record=None)  # the host reads which experts compute
    decoder = _Builder(config, storage, chosen).build()
    return apply_tiles(decoder) if ops is None else decoder


@dataclass(slots=True)
class _Builder:
    config: ModelConfig
    storage: Storage
    ops: Ops
    rotary_tables: dict[Rope | None, RotaryTable] = field(default_factory=dict)

    def build(self) -> Decoder:
        config, storage = self.config, self.storage
        embedding, tied = storage.embedding("model.embed_tokens.weight", config.embedding_scale)
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        head = tied if config.tie_word_embeddings else storage.matrix([name])
        return Decoder(
            config=config,
            ops=self.ops,
            device=storage.device,
            dtype=storage.dtype,
            embedding=embedding,
            layers=[self.layer(index) for index in range(config.num_layers)],
            final_norm=self.norm("model.norm"),
            output=Linear((name,), head, None, config.hidden_size, config.vocab_size),
        )

    def layer(self, index: int) -> DecoderLayer:
        config, prefix = self.config, f"model.layers.{index}."
        norms = [None if name is None else self.norm(prefix + name) for name in config.norms]
        return DecoderLayer(
            ops=self.ops,
            attention=self.attention(index, prefix + "self_attn."),
            feed_forward=self.feed_forward(config.layer_experts(index), prefix + "mlp."),
            attention_norm=norms[0],
            attention_out_norm=norms[1],
            feed_forward_norm=norms[2],
            feed_forward_out_norm=norms[3],
            eps=config.rms_norm_eps,
            residual_scale=config.residual_scale,
        )

    def feed_forward(self, experts: Experts | None, prefix: str) -> FeedForward | SparseFeedForward:
        if experts is None:
            return self.block(prefix, self.config.intermediate_size)
        hidden, shared = self.config.hidden_size, experts.shared_size
        return SparseFeedForward(
            self.linear([prefix + "gate"], hidden, experts.count, False),
            [self.block(f"{prefix}experts.{index}.", experts.size) for index in range(experts.count)],
            experts.per_token,
            experts.is_normalised,
            self.block(prefix + "shared_expert.", shared) if shared else None,
            self.linear([prefix + "shared_expert_gate"], hidden, 1, False) if shared else None,
        )

    def block(self, prefix: str, inner: int) -> FeedForward:
        config = self.config
        activations = {"silu": self.ops.silu_and_mul, "gelu_tanh": self.ops.gelu_tanh_and_mul}
        parts = [prefix + "gate_proj", prefix + "up_proj"]
        return FeedForward(
            self.linear(parts, config.hidden_size, 2 * inner, config.mlp_bias),
            self.linear([prefix + "down_proj"], inner, config.hidden_size, config.mlp_bias),
            activations[config.activation],
        )

    def attention(self, index: int, prefix: str) -> Attention:
        config = self.config
        query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = [prefix + part for part in ("q_proj", "k_proj", "v_proj")]
        return Attention(
            ops=self.ops,
            layer=index,
            qkv=self.linear(parts, config.hidden_size, query + 2 * key_value, config.qkv_bias),
            o=self.linear([prefix + "o_proj"], query, config.hidden_size, config.o_bias),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rotary=self.rotary(config.layer_rope(index)),
            scale=config.attention_scale,
            window=config.window(index),
            softcap=config.attention_softcap,
            q_norm=self.norm(prefix + "q_norm") if config.qk_norm is not None else None,
            k_norm=self.norm(prefix + "k_norm") if config.qk_norm is not None else None,
            eps=config.rms_norm_eps,
        )

    def rotary(self, rope: Rope | None) -> RotaryTable:
        if rope not in self.rotary_tables:
            config = self.config
            table = RotaryTable.build(rope, config.head_dim, config.max_position_embeddings, self.storage.device)
            self.rotary_tables[rope] = table
        return self.rotary_tables[rope]

    def linear(self, parts: list[str], in_features: int, out_features: int, has_bias: bool) -> Linear:
        names = tuple(f"{part}.weight" for part in parts)
        bias = torch.cat([self.storage.vector(f"{part}.bias") for part in parts]) if has_bias else None
        return Linear(names, self.storage.matrix(names), bias, in_features, out_features)

    def norm(self, name: str) -> Tensor:
        return self.storage.vector(f"{name}.weight", self.config.norm_offset)
