"""`Decoder`: the one model of this runtime, a decoder-only transformer described by a `ModelConfig`.

Serves Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3 and Gemma 3: what differs between them is a field of the
configuration. Optimisations are passes over the finished object. Not here: how it is made of weights (`build.py`),
files (`load.py`), the KV cache, sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ramet.kernels.ops import Ops
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.context import ForwardContext
from ramet.runtime.models.layers import DecoderLayer
from ramet.runtime.models.linear import Embedding, Linear


class Layer(Protocol):
    """A decoder layer: its input is `x + residual` (`x` where there is no residual yet), and so is its output."""

    def __call__(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor | None]: ...


@dataclass(slots=True, eq=False)
class Decoder:
    """A finished model on one device. `dtype` is that of activations and of the KV cache."""

    config: ModelConfig
    ops: Ops
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
            return self.ops.rms_norm(x, self.final_norm, self.config.rms_norm_eps, None)
        return self.ops.fused_add_rms_norm(x, residual, self.final_norm, self.config.rms_norm_eps, None)[0]

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
