"""`apply_tensor_parallel`: a pass that makes the decoders of all ranks one model.

Each rank's decoder is built from its `Share`. This pass adds what crosses ranks: a sum after the products whose inputs
are divided (o and down) and after the embedding, and a gathering of the logits. Heads, activations and norms need
nothing. So a layer has two sums, as in Megatron-LM. All ranks have all logits, but only the first one samples.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from ramet.kernels.sampling.sample import SamplingTables
from ramet.runtime.models.decoder import Decoder, Layer
from ramet.runtime.models.layers import DecoderLayer, SparseFeedForward
from ramet.runtime.models.linear import Embedding, LinearMethod
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.parallel.group import Group
from ramet.runtime.parallel.ranks import FirstRank


@dataclass(frozen=True, slots=True, eq=False)
class SharedModel(LoadedModel):
    """The first rank's part, ready to run together with the others. `config` is that of the whole model."""

    peers: FirstRank
    group: Group


@dataclass(slots=True, eq=False)
class SummedLinear:
    """A product whose input features are divided among the ranks. The bias is added once, after the sum."""

    part: LinearMethod
    group: Group

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = self.group.sum(self.part.apply(x, None))
        return out if bias is None else (out + bias).to(out.dtype)


@dataclass(slots=True, eq=False)
class GatheredLinear:
    """A product whose output features are divided among the ranks. `num_columns`: all of them, without padding."""

    part: LinearMethod
    group: Group
    num_columns: int

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.group.gather(self.part.apply(x, bias), self.num_columns)


@dataclass(slots=True, eq=False)
class SummedEmbedding:
    """Token rows [first, first + num_rows) of the table; a sum adds the other ranks' rows."""

    part: Embedding
    group: Group
    first: int
    num_rows: int

    def __call__(self, token_ids: Tensor) -> Tensor:
        own = token_ids - self.first
        is_foreign = (own < 0) | (own >= self.num_rows)
        rows = self.part(own.clamp(0, self.num_rows - 1))
        return self.group.sum(rows.masked_fill(is_foreign.unsqueeze(1), 0.0))


def apply_tensor_parallel(decoder: Decoder, group: Group, vocab_size: int) -> Decoder:
    """Return a decoder that computes the whole model together with the other ranks. It shares the part's weights.

    decoder: this rank's part (see `share.py`). vocab_size: that of the whole model. The result's configuration has the
    heads of this rank, so its KV pages hold only these, and the whole vocabulary.
    """
    *inner, output = decoder.linears()
    for linear in inner:
        name = linear.names[0]
        if name.endswith(("o_proj.weight", "mlp.down_proj.weight")):
            linear.method = SummedLinear(linear.method, group)
    num_rows = decoder.config.vocab_size
    ops = dataclasses.replace(decoder.ops, make_record=None)  # collectives are no kernels that can be recorded
    return dataclasses.replace(
        decoder,
        config=dataclasses.replace(decoder.config, vocab_size=vocab_size),
        layers=[_with_summed_experts(layer, group) for layer in decoder.layers],
        ops=ops if group.rank == 0 else dataclasses.replace(ops, sample=_leave_to_the_first_rank),
        embedding=SummedEmbedding(decoder.embedding, group, group.rank * num_rows, num_rows),
        output=dataclasses.replace(output, method=GatheredLinear(output.method, group, vocab_size)),
    )


def _with_summed_experts(layer: Layer, group: Group) -> Layer:
    """Sum a token's experts over the ranks once, after all of them: each rank has a part of every expert."""
    if not isinstance(layer, DecoderLayer) or not isinstance(layer.feed_forward, SparseFeedForward):
        return layer
    return dataclasses.replace(layer, feed_forward=dataclasses.replace(layer.feed_forward, combine=group.sum))


def _leave_to_the_first_rank(
    logits: Tensor, tables: SamplingTables, slots: Tensor, positions: Tensor, mask: Tensor | None, out: Tensor | None
) -> Tensor:
    return slots if out is None else out
