"""`Decoder`: the one model of this runtime, a decoder-only transformer described by a `ModelConfig`.

Serves Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3 and Gemma 3: what differs between them is a field of the
configuration. Not here: files (`load.py`), the KV cache, sampling. `build_decoder` turns weights into a decoder;
optimisations are passes over the finished object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from ramet.kernels.layers.activation import gelu_tanh_and_mul, silu_and_mul
from ramet.kernels.layers.norm import fused_add_rms_norm, rms_norm
from ramet.runtime.models.config import ModelConfig, Rope
from ramet.runtime.models.context import ForwardContext
from ramet.runtime.models.layers import Attention, DecoderLayer, FeedForward, RotaryTable
from ramet.runtime.models.linear import Embedding, Linear, PlainStorage, Storage

ACTIVATIONS = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}


class Layer(Protocol):
    """A decoder layer: its input is `x + residual` (`x` where there is no residual yet), and so is its output."""

    def __call__(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor | None]: ...


@dataclass(slots=True, eq=False)
class Decoder:
    """A finished model on one device. `dtype` is that of activations and of the KV cache."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    embedding: Embedding
    layers: Sequence[Layer]
    final_norm: Tensor
    output: Linear

    def forward(self, token_ids: Tensor, context: ForwardContext) -> Tensor:
        """Run the tokens (int [T]) through all layers, writing their KV; returns [T, hidden] after the final norm."""
        return self.hidden(self.embedding(token_ids), context)

    def hidden(self, x: Tensor, context: ForwardContext) -> Tensor:
        """As `forward`, from the tokens' embeddings [T, hidden]."""
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, context)
        if residual is None:
            return rms_norm(x, self.final_norm, self.config.rms_norm_eps)
        return fused_add_rms_norm(x, residual, self.final_norm, self.config.rms_norm_eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] in the model's dtype for the rows [R, hidden] that somebody wants to sample from."""
        return self.capped(self.output(hidden))

    def capped(self, logits: Tensor) -> Tensor:
        """Logits as the model means them, from those of the output layer."""
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, the output layer last: what `apply_*` passes walk over."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer), "passes over linear layers come before those over layers"
            yield from (layer.attention.qkv, layer.attention.o, layer.feed_forward.gate_up, layer.feed_forward.down)
        yield self.output


def build_decoder(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device | str,
    dtype: torch.dtype | Literal["auto"] = "auto",
    quantization: str | None = None,
) -> Decoder:
    """Make a decoder from tensors under Hugging Face names (see `weights.py`).

    dtype "auto" is bfloat16 on a GPU. On a CPU it is float32 with weights held as the file has them (GGUF blocks or 16
    bits), which is both the fastest and the most faithful (see `linear_cpu.py`). quantization (CPU): "int8" or "int4"
    rounds weights to blocks of 32; "gguf" insists on the file's own blocks.
    Raises: ConfigError.
    """
    device = torch.device(device)
    if quantization is not None or (dtype == "auto" and device.type == "cpu"):
        # These compile CPU code: not needed for a GPU.
        from ramet.runtime.models.bf16_activations import apply_bf16_activations
        from ramet.runtime.models.linear_cpu import block_storage

        storage = block_storage(weights, device, dtype, quantization)
        decoder = _Builder(config, storage).build()
        return apply_bf16_activations(decoder) if storage.features.tiles else decoder
    return _Builder(config, PlainStorage(weights, device, torch.bfloat16 if dtype == "auto" else dtype)).build()


@dataclass(slots=True)
class _Builder:
    config: ModelConfig
    storage: Storage
    rotary_tables: dict[Rope, RotaryTable] = field(default_factory=dict)

    def build(self) -> Decoder:
        config, storage = self.config, self.storage
        embedding, tied = storage.embedding("model.embed_tokens.weight", config.embedding_scale)
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        head = tied if config.tie_word_embeddings else storage.matrix([name])
        return Decoder(
            config=config,
            device=storage.device,
            dtype=storage.dtype,
            embedding=embedding,
            layers=[self.layer(index) for index in range(config.num_layers)],
            final_norm=self.norm("model.norm"),
            output=Linear((name,), head, None, config.hidden_size, config.vocab_size),
        )

    def layer(self, index: int) -> DecoderLayer:
        config, prefix = self.config, f"model.layers.{index}."
        inner, hidden = config.intermediate_size, config.hidden_size
        gemma = config.feed_forward_norms
        mlp = prefix + "mlp."
        return DecoderLayer(
            attention=self.attention(index, prefix + "self_attn."),
            feed_forward=FeedForward(
                self.linear([mlp + "gate_proj", mlp + "up_proj"], hidden, 2 * inner, config.mlp_bias),
                self.linear([mlp + "down_proj"], inner, hidden, config.mlp_bias),
                ACTIVATIONS[config.activation],
            ),
            attention_norm=self.norm(prefix + "input_layernorm"),
            # Gemma calls this norm by another name, and gives Llama's name for it to another norm.
            feed_forward_norm=self.norm(prefix + ("pre_feedforward" if gemma else "post_attention") + "_layernorm"),
            attention_out_norm=self.norm(prefix + "post_attention_layernorm") if gemma else None,
            feed_forward_out_norm=self.norm(prefix + "post_feedforward_layernorm") if gemma else None,
            eps=config.rms_norm_eps,
        )

    def attention(self, index: int, prefix: str) -> Attention:
        config = self.config
        query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = [prefix + part for part in ("q_proj", "k_proj", "v_proj")]
        return Attention(
            layer=index,
            qkv=self.linear(parts, config.hidden_size, query + 2 * key_value, config.qkv_bias),
            o=self.linear([prefix + "o_proj"], query, config.hidden_size, config.o_bias),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rotary=self.rotary(config.layer_rope(index)),
            scale=config.attention_scale,
            window=config.window(index),
            q_norm=self.norm(prefix + "q_norm") if config.qk_norm else None,
            k_norm=self.norm(prefix + "k_norm") if config.qk_norm else None,
            eps=config.rms_norm_eps,
        )

    def rotary(self, rope: Rope) -> RotaryTable:
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
