"""Decoders with small-batch products: the numbers of the plain one, taken only for the batches that a table names."""

from __future__ import annotations

import dataclasses
from queue import Queue

import pytest
import torch
import torch.nn.functional as F

from ramet.kernels.card_table import CardTable, Product
from ramet.kernels.layers.gemv import GemvConfig, gemv_reference
from ramet.runtime.engine.engine import Engine
from ramet.runtime.handle import RequestHandle
from ramet.runtime.models import linear_gpu
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.layers import DecoderLayer, FeedForward
from ramet.runtime.models.linear import PlainLinear
from ramet.runtime.models.linear_gpu import FoldedLayer, apply_card_table
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.testing.dummy import tiny_model
from ramet.runtime.types import RequestOutput, SamplingParams

CUT = GemvConfig("dot", 16, 32, 2, 2)


def products_of(decoder: Decoder, rows: int, *, is_folded: bool) -> dict[Product, GemvConfig]:
    found = {}
    for linear in decoder.linears():
        gated = is_folded and linear.names[0].endswith("gate_proj.weight")
        found[Product(rows, linear.out_features // (2 if gated else 1), linear.in_features, gated)] = CUT
    return found


def generate(model: LoadedModel, count: int) -> list[tuple[int, ...]]:
    """The tokens of `count` requests that decode together: all are added between two steps of the engine."""
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    added: Queue[list[RequestHandle]] = Queue()
    with Engine(model, num_kv_tokens=2048, max_running_requests=4) as engine:

        def add_all(_: RequestOutput) -> None:  # called once, on the engine's thread
            added.put([engine.submit(f"prompt {i}", sampling) for i in range(count)])

        engine.submit("first", SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), on_output=add_all)
        return [tuple(handle.result(timeout_s=60).token_ids) for handle in added.get(timeout=60)]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product that did not go to the library."""
    rows: list[int] = []

    def note(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        rows.append(x.shape[0])
        return gemv_reference(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(linear_gpu, "gemv_reference", note)
    return rows


def test_products_of_the_table_replace_those_of_the_library(counted: list[int]) -> None:
    expected = generate(tiny_model(), 3)
    model = tiny_model()
    table = CardTable("x", products=products_of(model.decoder, 3, is_folded=False))
    changed = dataclasses.replace(model, decoder=apply_card_table(model.decoder, table))
    assert generate(changed, 3) == expected
    assert set(counted) == {3}


def test_folded_layers_give_the_same_tokens(counted: list[int]) -> None:
    expected = generate(tiny_model(), 3)
    model = tiny_model()
    folded = products_of(model.decoder, 3, is_folded=True) | products_of(model.decoder, 1, is_folded=True)
    table = CardTable("x", folded=folded, folded_rows=frozenset({1, 3}))
    changed = dataclasses.replace(model, decoder=apply_card_table(model.decoder, table))
    assert all(isinstance(layer, FoldedLayer) for layer in changed.decoder.layers)
    assert generate(changed, 3) == expected
    assert set(counted) == {3}


def test_a_table_of_other_shapes_changes_nothing() -> None:
    model = tiny_model()
    table = CardTable("x", {Product(1, 7, 7): CUT}, {Product(1, 7, 7): CUT}, frozenset({1}))
    decoder = apply_card_table(model.decoder, table)
    assert decoder is model.decoder
    methods = [linear.method for linear in decoder.linears()]
    assert all(isinstance(method, PlainLinear) and method.product is F.linear for method in methods)


def feed_forward_of(decoder: Decoder) -> FeedForward:
    layer = decoder.layers[0]
    assert isinstance(layer, DecoderLayer)
    assert isinstance(layer.feed_forward, FeedForward)
    return layer.feed_forward


def test_activations_are_folded_into_products_of_the_batches_that_a_table_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tile serves batches up to its rows; a larger batch, and a decoder that takes adapters, have both kernels."""
    plain = tiny_model().decoder
    feed_forward = feed_forward_of(plain)
    x = torch.randn(9, feed_forward.gate_up.in_features)
    shape = feed_forward.gate_up.out_features // 2, feed_forward.gate_up.in_features
    tiles = {Product(rows, *shape, True): dataclasses.replace(CUT, block_n=rows) for rows in (4, 8)}
    table = CardTable("any", gated=tiles)
    fused = feed_forward_of(apply_card_table(plain, table))
    assert torch.equal(fused(x), feed_forward(x))
    used: list[tuple[int, int]] = []

    def note(x: torch.Tensor, weight: torch.Tensor, config: GemvConfig) -> torch.Tensor:
        used.append((x.shape[0], config.block_n))
        return feed_forward.activation(F.linear(x, weight))

    monkeypatch.setattr(linear_gpu, "gated_product_triton", note)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for rows in (1, 4, 5, 8, 9):
        assert torch.equal(
            fused.activation(fused.gate_up(x[:rows])), feed_forward.activation(feed_forward.gate_up(x[:rows]))
        )
    assert used == [(1, 4), (4, 4), (5, 8), (8, 8)]
    adapted = feed_forward_of(apply_card_table(plain, table, has_adapters=True))
    assert adapted.gate_up is feed_forward.gate_up
