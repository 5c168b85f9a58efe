"""`Decoder`: the one model of this runtime, a decoder-only transformer described by a `ModelConfig`.

Serves Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3 and Gemma 3: what differs between them is a field of the
configuration. Not here: files (`load.py`), the KV cache, sampling. `build_decoder` turns weights into a decoder;
optimisations are passes over the finished object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ramet.kernels.activation import gelu_tanh_and_mul, silu_and_mul
from ramet.kernels.norm import fused_add_rms_norm
from ramet.runtime.models.config import ModelConfig, Rope
from ramet.runtime.models.context import ForwardContext
from ramet.runtime.models.layers import Attention, DecoderLayer, FeedForward, RotaryTable
from ramet.runtime.models.linear import Linear, PlainLinear

ACTIVATIONS = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}


@dataclass(slots=True, eq=False)
class Decoder:
    """A finished model on one device.

    `embedding` is [V, hidden]; a tied output layer shares it. `embedding_scale` is rounded to the model's dtype.
    """

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    embedding: Tensor
    embedding_scale: float
    layers: list[DecoderLayer]
    final_norm: Tensor
    output: Linear

    def forward(self, token_ids: Tensor, context: ForwardContext) -> Tensor:
        """Run the tokens (int [T]) through all layers, writing their KV; returns [T, hidden] after the final norm."""
        x = F.embedding(token_ids, self.embedding)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, context)
        assert residual is not None
        return fused_add_rms_norm(x, residual, self.final_norm, self.config.rms_norm_eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [R, V] in the model's dtype for the rows [R, hidden] that somebody wants to sample from."""
        logits = self.output(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def linears(self) -> Iterator[Linear]:
        """Every linear layer, the output layer last: what `apply_*` passes walk over."""
        for layer in self.layers:
            yield from (layer.attention.qkv, layer.attention.o, layer.feed_forward.gate_up, layer.feed_forward.down)
        yield self.output


def build_decoder(
    config: ModelConfig, weights: Mapping[str, Tensor], *, device: torch.device | str, dtype: torch.dtype
) -> Decoder:
    """Make a decoder from tensors under Hugging Face names (see `weights.py`), converted to `dtype` on `device`.

    Reads one tensor at a time, so the host holds no second copy of the model.
    """
    return _Builder(config, weights, torch.device(device), dtype).build()


@dataclass(slots=True)
class _Builder:
    config: ModelConfig
    weights: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype
    rotary_tables: dict[Rope, RotaryTable] = field(default_factory=dict)

    def build(self) -> Decoder:
        config = self.config
        embedding = self.tensor("model.embed_tokens.weight")
        tied = config.tie_word_embeddings
        head = embedding if tied else self.tensor("lm_head.weight")
        return Decoder(
            config=config,
            device=self.device,
            dtype=self.dtype,
            embedding=embedding,
            embedding_scale=torch.tensor(config.embedding_scale, dtype=self.dtype).item(),
            layers=[self.layer(index) for index in range(config.num_layers)],
            final_norm=self.norm("model.norm"),
            output=Linear("lm_head", PlainLinear(head), None, config.hidden_size, config.vocab_size),
        )

    def layer(self, index: int) -> DecoderLayer:
        config, prefix = self.config, f"model.layers.{index}."
        gemma = config.feed_forward_norms
        return DecoderLayer(
            attention=self.attention(index, prefix + "self_attn."),
            feed_forward=FeedForward(
                self.linear(prefix + "mlp.", ("gate_proj", "up_proj"), config.mlp_bias),
                self.linear(prefix + "mlp.", ("down_proj",), config.mlp_bias),
                ACTIVATIONS[config.activation],
            ),
            attention_norm=self.norm(prefix + "input_layernorm"),
            # Gemma calls this norm by another name, and gives Llama's name for it to another norm.
            feed_forward_norm=self.norm(
                prefix + ("pre_feedforward_layernorm" if gemma else "post_attention_layernorm")
            ),
            attention_out_norm=self.norm(prefix + "post_attention_layernorm") if gemma else None,
            feed_forward_out_norm=self.norm(prefix + "post_feedforward_layernorm") if gemma else None,
            eps=config.rms_norm_eps,
        )

    def attention(self, index: int, prefix: str) -> Attention:
        config = self.config
        return Attention(
            layer=index,
            qkv=self.linear(prefix, ("q_proj", "k_proj", "v_proj"), config.qkv_bias),
            o=self.linear(prefix, ("o_proj",), config.o_bias),
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
            table = RotaryTable.build(rope, config.head_dim, config.max_position_embeddings, self.device)
            self.rotary_tables[rope] = table
        return self.rotary_tables[rope]

    def linear(self, prefix: str, parts: tuple[str, ...], has_bias: bool) -> Linear:
        """One layer of several checkpoint matrices, stacked by output rows."""
        weight = self.stack([f"{prefix}{part}.weight" for part in parts])
        bias = self.stack([f"{prefix}{part}.bias" for part in parts]) if has_bias else None
        return Linear(prefix + parts[0], PlainLinear(weight), bias, weight.shape[1], weight.shape[0])

    def stack(self, names: list[str]) -> Tensor:
        tensors = [self.tensor(name) for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def norm(self, name: str) -> Tensor:
        """A norm's weight, with Gemma's offset folded in before it is rounded to the model's dtype."""
        weight = self.weights[f"{name}.weight"].float() + self.config.norm_offset
        return weight.to(self.device, self.dtype)

    def tensor(self, name: str) -> Tensor:
        return self.weights[name].to(self.device, self.dtype).contiguous()
