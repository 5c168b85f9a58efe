"""`Decoder`: the one model of this runtime, a decoder-only transformer described by a `ModelConfig`.

It serves every family of `families.py`: their differences are fields of the configuration. Optimisations are passes
over the finished object. Not here: construction from weights (`build.py`), files (`load.py`), the KV cache, sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ramet.kernels.attention.decode import DecodeMetadata
from ramet.kernels.attention.extend import ExtendMetadata
from ramet.kernels.ops import Ops
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.linear import Embedding, Linear


@dataclass(slots=True)
class ForwardContext:
    """The inputs of a forward pass besides token ids. The model runner makes one for each step; decoders only read it.

    Tokens [0, num_decode) are decode rows, one token each; [extend_start, T) are extend rows.

    Padded decode rows may overlap extend rows. Extend attention then begins at the token that `extend` names, and
    overwrites their results.
    positions, kv_slots: int32 [T]. kv_caches: (k, v) of each layer, [N, K, P, D] in the model's dtype. `decode` is None
    exactly when `num_decode` is 0; `extend` is None exactly when there is no other token. noted: what layers note of
    each place in the cache, [N * P, hidden].
    """

    positions: Tensor
    kv_slots: Tensor
    num_decode: int
    decode: DecodeMetadata | None
    extend: ExtendMetadata | None
    kv_caches: list[tuple[Tensor, Tensor]]
    extend_start: int
    noted: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        assert (self.decode is None) == (self.num_decode == 0), "decode metadata exactly where there are decode rows"
        assert self.decode is not None or self.extend is not None, "a step without tokens"


class Layer(Protocol):
    """A decoder layer. Its input is `x + residual` (`x` if residual is None); its output is the sum of its results."""

    def __call__(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor | None]: ...

    def linears(self) -> tuple[Linear, ...]:
        """Its linear layers: qkv, o, gate_up, down."""


@dataclass(slots=True, eq=False)
class Decoder:
    """A finished model on one device. `dtype`: dtype of activations and of the KV cache.

    num_noted: hidden states that its layers note for each token, in `ForwardContext.noted`.
    """

    config: ModelConfig
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    embedding: Embedding
    layers: Sequence[Layer]
    final_norm: Tensor
    output: Linear
    num_noted: int = field(default=0, kw_only=True)

    def forward(self, token_ids: Tensor, context: ForwardContext) -> Tensor:
        """Run the tokens (int [T]) through all layers and write their KV. Returns [T, hidden] after the final norm."""
        return self.hidden(self.embedding(token_ids), context)

    def hidden(self, x: Tensor, context: ForwardContext) -> Tensor:
        """As `forward`, but from the tokens' embeddings [T, hidden]."""
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, context)
        if residual is None:
            return self.ops.rms_norm(x, self.final_norm, self.config.rms_norm_eps, None)
        return self.ops.fused_add_rms_norm(x, residual, self.final_norm, self.config.rms_norm_eps, None)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [R, V] in the model's dtype for the hidden states [R, hidden]."""
        return self.capped(self.output(hidden))

    def capped(self, logits: Tensor) -> Tensor:
        """Apply the model's logit scale and softcap to the output layer's logits."""
        cap, scale = self.config.logit_softcap, self.config.logit_scale
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def linears(self) -> Iterator[Linear]:
        """All linear layers, the output layer last. The `apply_*` passes iterate over them."""
        for layer in self.layers:
            yield from layer.linears()
        yield self.output
