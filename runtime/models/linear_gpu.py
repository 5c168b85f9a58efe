"""Passes over a finished decoder on a GPU, which replace the library's dense products.

`apply_card_table` gives small batches the kernels that were measured to be faster. For batch sizes that the table folds
it replaces whole layers: norm, activation and residual are then fused into the products. Other batch sizes stay with
the library. The table also says which kernels start early, and where the activation is part of the gate-up product of a
larger batch. `apply_batch_invariance` gives each row of a product the same bits in any batch (`--deterministic`); the
model runner does the rest of a deterministic engine: fixed attention splits and tiles, no tree attention.
Not here: the measurements (`kernels.card_table`), quantised weights, which have their own methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ramet.errors import ConfigError
from ramet.kernels.card_table import CardTable, Product
from ramet.kernels.layers.gemv import (
    GemvConfig,
    gemv_reference,
    gemv_silu_and_mul_reference,
    gemv_silu_and_mul_triton,
    gemv_triton,
)
from ramet.kernels.layers.matmul_invariant import gated_product_triton, matmul_invariant
from ramet.kernels.ops import EARLY_TRITON
from ramet.runtime.models.decoder import Decoder, ForwardContext, Layer
from ramet.runtime.models.layers import DecoderLayer, FeedForward, with_ops
from ramet.runtime.models.linear import Linear, PlainLinear


@dataclass(slots=True, eq=False)
class FoldedLayer:
    """A decoder layer whose norms, activation and adds are fused into its products, for batch sizes in `configs`.

    Its output is then `(x, None)`: x includes the residual. configs: those of qkv, o, gate_up, down by number of rows.
    """

    plain: DecoderLayer
    configs: Mapping[int, tuple[GemvConfig, GemvConfig, GemvConfig, GemvConfig]]

    def linears(self) -> tuple[Linear, ...]:
        return self.plain.linears()

    def __call__(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor | None]:
        cuts = self.configs.get(x.shape[0])
        if cuts is None:
            return self.plain(x, residual, context)
        assert residual is None, "all layers fold the same batches"
        layer, attention, feed_forward = self.plain, self.plain.attention, self.plain.feed_forward
        assert layer.feed_forward_norm is not None
        assert isinstance(feed_forward, FeedForward)
        qkv = product(x, weight_of(attention.qkv), attention.qkv.bias, None, layer.attention_norm, layer.eps, cuts[0])
        attended = attention.attend(qkv, context)
        x = product(attended, weight_of(attention.o), attention.o.bias, x, config=cuts[1])
        gated = gated_product(x, weight_of(feed_forward.gate_up), layer.feed_forward_norm, layer.eps, cuts[2])
        return product(gated, weight_of(feed_forward.down), feed_forward.down.bias, x, config=cuts[3]), None


def apply_batch_invariance(decoder: Decoder) -> Decoder:
    """Replace the products of `decoder` and return it. Raises ConfigError if its weights are quantised."""
    for linear in decoder.linears():
        method = linear.method
        if not isinstance(method, PlainLinear):
            raise ConfigError("--deterministic needs dense weights on a GPU; leave out --quantization")
        linear.method = PlainLinear(method.weight, matmul_invariant)
    return decoder


def apply_card_table(decoder: Decoder, table: CardTable, *, has_adapters: bool = False) -> Decoder:
    """Return a decoder that uses the table's kernels. It shares its weights with the given decoder.

    has_adapters: adapters will be added to its products, so nothing is folded behind one.
    """
    if table.early_launch:
        decoder = with_ops(decoder, EARLY_TRITON)
    for linear in decoder.linears():
        configs = configs_of(linear, table.products)
        if configs and isinstance(linear.method, PlainLinear):
            linear.method = PlainLinear(linear.method.weight, partial(small_batch_product, configs))
    layers = [folded(layer, table) if isinstance(layer, DecoderLayer) else layer for layer in decoder.layers]
    if not all(isinstance(layer, FoldedLayer) for layer in layers):
        layers = list(decoder.layers)
    if not has_adapters:
        layers = [with_gate(layer, table) for layer in layers]
    if all(layer is other for layer, other in zip(layers, decoder.layers, strict=True)):
        return decoder
    return dataclasses.replace(decoder, layers=layers)


def with_gate(layer: Layer, table: CardTable) -> Layer:
    """The layer with the activation in its gate-up product, for the batch sizes that the table has."""
    if isinstance(layer, FoldedLayer):
        plain = with_gate(layer.plain, table)
        assert isinstance(plain, DecoderLayer)
        return dataclasses.replace(layer, plain=plain)
    if not isinstance(layer, DecoderLayer) or not isinstance(layer.feed_forward, FeedForward):
        return layer
    linear, activation = layer.feed_forward.gate_up, layer.feed_forward.activation
    if (
        activation is not layer.ops.silu_and_mul
        or linear.bias is not None
        or not isinstance(linear.method, PlainLinear)
    ):
        return layer
    shape = linear.out_features // 2, linear.in_features, True
    tiles = {p.rows: config for p, config in table.gated.items() if (p.outputs, p.depth, p.is_gated) == shape}
    if not tiles:
        return layer
    product = partial(gate_in_product, tiles, activation, linear.method.product)
    gate_up = dataclasses.replace(linear, method=PlainLinear(linear.method.weight, product))
    feed_forward = dataclasses.replace(layer.feed_forward, gate_up=gate_up, activation=_as_it_is)
    return dataclasses.replace(layer, feed_forward=feed_forward)


def gate_in_product(
    tiles: Mapping[int, GemvConfig],
    activation: Callable[[Tensor], Tensor],
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The activated product [T, I], in one kernel for as many rows as `tiles` has one for, else in two."""
    rows = min((rows for rows in tiles if rows >= x.shape[0]), default=None)
    if rows is None or not x.is_cuda:
        return activation(product(x, weight, bias))
    return gated_product_triton(x, weight, tiles[rows])


def _as_it_is(x: Tensor) -> Tensor:
    return x


def configs_of(linear: Linear, products: Mapping[Product, GemvConfig]) -> dict[int, GemvConfig]:
    """The table's configurations for a layer, by number of rows."""
    return {
        p.rows: config
        for p, config in products.items()
        if (p.outputs, p.depth, p.is_gated) == (linear.out_features, linear.in_features, False)
    }


def folded(layer: DecoderLayer, table: CardTable) -> DecoderLayer | FoldedLayer:
    """The layer with folded products if the table has all four for some batch size; else the layer itself."""
    feed_forward, linears = layer.feed_forward, layer.linears()
    norms = [layer.attention_norm, layer.attention_out_norm, layer.feed_forward_norm, layer.feed_forward_out_norm]
    if [norm is not None for norm in norms] != [True, False, True, False] or layer.residual_scale != 1.0:
        return layer
    if not isinstance(feed_forward, FeedForward):
        return layer
    if feed_forward.activation is not layer.ops.silu_and_mul or feed_forward.gate_up.bias is not None:
        return layer
    if not all(isinstance(linear.method, PlainLinear) for linear in linears):
        return layer
    configs = {}
    for rows in table.folded_rows:
        wanted = [
            Product(rows, linear.out_features // (2 if i == 2 else 1), linear.in_features, i == 2)
            for i, linear in enumerate(linears)
        ]
        found = [table.folded.get(p) for p in wanted]
        cuts = tuple(config for config in found if config is not None)
        if len(cuts) == 4:
            configs[rows] = cuts
    return FoldedLayer(layer, configs) if configs else layer


def weight_of(linear: Linear) -> Tensor:
    method = linear.method
    assert isinstance(method, PlainLinear)
    return method.weight


def small_batch_product(configs: Mapping[int, GemvConfig], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel with the configuration for this number of rows, where there is one; else the library's product."""
    config = configs.get(x.shape[0])
    return F.linear(x, weight, bias) if config is None else product(x, weight, bias, config=config)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    config: GemvConfig | None = None,
) -> Tensor:
    """Compute `gemv_reference`; on a GPU by its kernel with this `config`."""
    if x.is_cuda:
        return gemv_triton(x, weight, bias, residual, norm_weight, eps, config)
    return gemv_reference(x, weight, bias, residual, norm_weight, eps)


def gated_product(x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float, config: GemvConfig) -> Tensor:
    """Compute `gemv_silu_and_mul_reference`; on a GPU by its kernel with this `config`."""
    if x.is_cuda:
        return gemv_silu_and_mul_triton(x, weight, norm_weight, eps, config)
    return gemv_silu_and_mul_reference(x, weight, norm_weight, eps)
