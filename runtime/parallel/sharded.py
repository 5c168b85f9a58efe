"""`apply_tensor_parallel`: a pass that makes the decoders of all ranks one model.

Each rank's decoder is built from its `Share`. This pass adds what crosses ranks: a sum after the products whose inputs
are divided (o and down) and after the embedding, and a gathering of the logits. Heads, activations and norms need
nothing. So a layer has two sums, as in Megatron-LM. All ranks have all logits, but only the first one samples.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

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


def summed_product(part: LinearMethod, group: Group, x: Tensor, bias: Tensor | None) -> Tensor:
    """A product whose input features are divided among the ranks. The bias is added once, after the sum."""
    out = group.sum(part(x, None))
    return out if bias is None else (out + bias).to(out.dtype)


def gathered_product(part: LinearMethod, group: Group, num_columns: int, x: Tensor, bias: Tensor | None) -> Tensor:
    """A product whose output features are divided among the ranks. `num_columns`: all of them, without padding."""
    return group.gather(part(x, bias), num_columns)


def summed_embedding(part: Embedding, group: Group, first: int, num_rows: int, token_ids: Tensor) -> Tensor:
    """Token rows [first, first + num_rows) of the table; a sum adds the other ranks' rows."""
    own = token_ids - first
    is_foreign = (own < 0) | (own >= num_rows)
    rows = part(own.clamp(0, num_rows - 1))
    return group.sum(rows.masked_fill(is_foreign.unsqueeze(1), 0.0))


def apply_tensor_parallel(decoder: Decoder, group: Group, vocab_size: int) -> Decoder:
    """Return a decoder that computes the whole model together with the other ranks. It shares the part's weights.

    decoder: this rank's part (see `share.py`). vocab_size: that of the whole model. The result's configuration has the
    heads of this rank, so its KV pages hold only these, and the whole vocabulary.
    """
    *inner, output = decoder.linears()
    for linear in inner:
        name = linear.names[0]
        if name.endswith(("o_proj.weight", "mlp.down_proj.weight")):
            linear.method = partial(summed_product, linear.method, group)
    num_rows = decoder.config.vocab_size
    ops = dataclasses.replace(decoder.ops, make_record=None)  # collectives are no kernels that can be recorded
    return dataclasses.replace(
        decoder,
        config=dataclasses.replace(decoder.config, vocab_size=vocab_size),
        layers=[_with_summed_experts(layer, group) for layer in decoder.layers],
        ops=ops if group.rank == 0 else dataclasses.replace(ops, sample=_leave_to_the_first_rank),
        embedding=partial(summed_embedding, decoder.embedding, group, group.rank * num_rows, num_rows),
        output=dataclasses.replace(output, method=partial(gathered_product, output.method, group, vocab_size)),
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
