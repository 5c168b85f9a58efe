"""The parts of a decoder layer: rotary tables, attention, feed-forward, and the layer itself.

Each layer launches in each step: norm, qkv product, rope + cache write, attention, o product, add + norm, gate-up
product, activation, down product. The residual is passed beside the branch output, so every add is fused into the norm
that follows it. All of it can be captured in a CUDA graph: no host synchronisation, no data-dependent shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ramet.kernels.attention.decode import attention_decode_reference
from ramet.kernels.attention.extend import attention_extend_reference
from ramet.kernels.ops import Ops
from ramet.runtime.models.config import Rope
from ramet.runtime.models.decoder import Decoder, ForwardContext, Layer
from ramet.runtime.models.linear import Linear


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTable:
    """cos and sin of every position: fp32 [max_positions, D / 2]. Shared by the layers of one kind."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, rope: Rope | None, head_dim: int, max_positions: int, device: torch.device) -> RotaryTable:
        """Compute the table. Angles are in fp64, because fp32 loses 0.004 rad at position 100,000. None: all are 0."""
        inverse, magnitude = torch.zeros(head_dim // 2, device=device, dtype=torch.float64), 1.0
        if rope is not None:
            inverse = torch.from_numpy(rope.inverse_frequencies(head_dim)).to(device)
            magnitude = 1.0 if rope.scaling is None else rope.scaling.magnitude
        angles = torch.outer(torch.arange(max_positions, device=device, dtype=torch.float64), inverse)
        return cls((angles.cos() * magnitude).float(), (angles.sin() * magnitude).float())


@dataclass(slots=True, eq=False)
class Attention:
    """Self-attention of one layer over the paged cache."""

    ops: Ops
    layer: int
    qkv: Linear
    o: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotaryTable
    scale: float
    window: int | None
    softcap: float | None
    q_norm: Tensor | None  # [D]; over all heads [H * D]
    k_norm: Tensor | None  # [D]; over all heads [K * D]
    eps: float

    def __call__(self, x: Tensor, context: ForwardContext) -> Tensor:
        """Write this step's keys and values to the cache and attend; x and result are [T, hidden]."""
        return self.o(self.attend(self.qkv(x), context))

    def attend(self, qkv: Tensor, context: ForwardContext) -> Tensor:
        """The part between the products: from qkv [T, (H + 2 K) * D] to the heads' outputs [T, H * D]."""
        heads = qkv.view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        k_cache, v_cache = context.kv_caches[self.layer]
        q_norm, k_norm = self.q_norm, self.k_norm
        if q_norm is not None and k_norm is not None and q_norm.numel() != self.head_dim:
            q, k, q_norm, k_norm = self._normed_whole(q, q_norm), self._normed_whole(k, k_norm), None, None
        q = self.ops.rope_and_write_kv(
            q,
            k,
            v,
            self.rotary.cos,
            self.rotary.sin,
            context.positions,
            context.kv_slots,
            k_cache,
            v_cache,
            q_norm,
            k_norm,
            self.eps,
        )
        out = attend_over_cache(self.ops, q, (k_cache, v_cache), context, self.scale, self.window, self.softcap)
        return out.view(-1, self.num_heads * self.head_dim)

    def _normed_whole(self, x: Tensor, weight: Tensor) -> Tensor:
        """Normalise all heads of a token together: x [T, heads, D]."""
        return self.ops.rms_norm(x.reshape(-1, weight.numel()), weight, self.eps, None).view(x.shape)


def attend_over_cache(
    ops: Ops,
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    context: ForwardContext,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> Tensor:
    """Attend from `q` [T, H, D] over a layer's caches, which already hold this step's keys and values.

    softcap: a cap on scores, which the references alone have.
    """
    attend_decode, attend_extend = ops.attention_decode, ops.attention_extend
    if softcap is not None:
        attend_decode = partial(attention_decode_reference, softcap=softcap)
        attend_extend = partial(attention_extend_reference, softcap=softcap)
    decode, extend = context.decode, context.extend
    if decode is not None and extend is None:
        return attend_decode(q, *caches, decode, scale, window, None)
    if decode is None:
        assert extend is not None
        return attend_extend(q, *caches, extend, scale, window, None)
    assert extend is not None
    out = torch.empty_like(q)
    num_decode, start = context.num_decode, context.extend_start
    attend_decode(q[:num_decode], *caches, decode, scale, window, out[:num_decode])
    attend_extend(q[start:], *caches, extend, scale, window, out[start:])
    return out


@dataclass(slots=True, eq=False)
class FeedForward:
    """Gated feed-forward block: down(act(gate) * up)."""

    gate_up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]  # [T, 2 * I], gate first -> [T, I]

    def linears(self) -> tuple[Linear, ...]:
        return self.gate_up, self.down

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate_up(x)))


@dataclass(slots=True, eq=False)
class SparseFeedForward:
    """A mixture of experts: the sum of each token's best experts, weighted by the softmax of the router's logits.

    The host reads which experts are chosen, so a step with experts is not recorded. shared_gate: the sigmoid of this
    product is the weight of `shared`, which computes every token. combine: follows the sum, such as a sum over ranks.
    Source: Mixtral (arXiv:2401.04088); Qwen2-MoE for the shared expert.
    """

    router: Linear
    experts: Sequence[FeedForward]
    per_token: int
    is_normalised: bool
    shared: FeedForward | None
    shared_gate: Linear | None
    combine: Callable[[Tensor], Tensor] | None = None

    def linears(self) -> tuple[Linear, ...]:
        shared = () if self.shared is None or self.shared_gate is None else (*self.shared.linears(), self.shared_gate)
        return (self.router, *(linear for expert in self.experts for linear in expert.linears()), *shared)

    def __call__(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(torch.softmax(self.router(x).float(), dim=-1), self.per_token, dim=-1)
        if self.is_normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in torch.unique(
            chosen
        ).tolist():  # in ascending order, so a token's sum does not depend on the others
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            out.index_add_(0, tokens, self.experts[expert](x[tokens]).float() * weights[tokens, places, None])
        if self.shared is not None and self.shared_gate is not None:
            out += torch.sigmoid(self.shared_gate(x).float()) * self.shared(x).float()
        result = out.to(x.dtype)
        return result if self.combine is None else self.combine(result)


def with_ops(decoder: Decoder, ops: Ops) -> Decoder:
    """Return the decoder with other ops in all its dense layers. It shares its weights with the given one."""
    activations = {decoder.ops.silu_and_mul: ops.silu_and_mul, decoder.ops.gelu_tanh_and_mul: ops.gelu_tanh_and_mul}
    layers: list[Layer] = []
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        feed_forward = layer.feed_forward
        if isinstance(feed_forward, FeedForward):
            activation = activations[feed_forward.activation]
            feed_forward = dataclasses.replace(feed_forward, activation=activation)
        attention = dataclasses.replace(layer.attention, ops=ops)
        layers.append(dataclasses.replace(layer, ops=ops, attention=attention, feed_forward=feed_forward))
    return dataclasses.replace(decoder, ops=ops, layers=layers)


@dataclass(slots=True, eq=False)
class DecoderLayer:
    """Attention and feed-forward with their norms (weights [hidden]), as in `ModelConfig.norms`.

    Most models normalise a block's input, Gemma 3 also its output before it is added, OLMo 2 only that. rounds_above:
    in steps of more tokens, products and attention read and write bfloat16 beside an fp32 residual; None: in no step.
    residual_scale multiplies both blocks' outputs.
    """

    ops: Ops
    attention: Attention
    feed_forward: FeedForward | SparseFeedForward
    attention_norm: Tensor | None
    attention_out_norm: Tensor | None
    feed_forward_norm: Tensor | None
    feed_forward_out_norm: Tensor | None
    eps: float
    residual_scale: float = 1.0
    rounds_above: int | None = None

    def linears(self) -> tuple[Linear, ...]:
        return self.attention.qkv, self.attention.o, *self.feed_forward.linears()

    def __call__(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Run the layer. Its input is `x + residual`, and its output is the sum of the two results. All [T, hidden]."""
        is_rounded = self.rounds_above is not None and x.shape[0] > self.rounds_above
        dtype = torch.bfloat16 if is_rounded else None
        normed, residual = self._added(x, residual, self.attention_norm, dtype)
        x = self._finished(self.attention(normed, context), self.attention_out_norm, residual)
        normed, residual = self._added(x, residual, self.feed_forward_norm, dtype)
        x = self._finished(self.feed_forward(normed), self.feed_forward_out_norm, residual)
        return x, residual

    def _added(
        self, x: Tensor, residual: Tensor | None, norm: Tensor | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Return the input of a block in `dtype` (None: the residual's), and the residual with `x` added."""
        if norm is None:
            total = x if residual is None else (x + residual).to(residual.dtype)
            return total.to(dtype or total.dtype), total
        if residual is None:
            return self.ops.rms_norm(x, norm, self.eps, dtype), x
        return self.ops.fused_add_rms_norm(x, residual, norm, self.eps, dtype)

    def _finished(self, x: Tensor, norm: Tensor | None, residual: Tensor) -> Tensor:
        """A block's output as it is added to the residual."""
        if norm is not None:
            x = self.ops.rms_norm(x, norm, self.eps, residual.dtype)
        return x if self.residual_scale == 1.0 else x * self.residual_scale
