"""Heads that draft from a model's own hidden states: EAGLE-3's, and a layer of multi-token prediction (MTP).

A head is one layer. For a token t it takes what the model made of the text up to t (the features), and the embedding of
token t + 1, and predicts token t + 2. What it makes of a drafted token then stands for the features of that.

    EAGLE-3   features: a product of the hidden states after three layers; attention reads [embedding, features], normed
    MTP       features: the last hidden states, normed; the layer's input: a product of [embedding, features], normed

It is a decoder of one layer that drafts as a small model does (`draft_model`), with pages, slots and steps of its own.
Position p of its sequences has token p + 1. The model's layers note their results while they run (`TappedLayer`), a row
for each place of the KV cache, so on a CPU the model's steps are not recorded programs. They are brought to the head's
places (`Features`) before it reads known tokens; what it makes of a token, it writes itself to the place of the next.
Pages that come from another engine have no features, and drafts there are poor. Not here: whether asking pays
(`speculation`).

Source: EAGLE-3, Li et al. 2025 (arXiv:2503.01840); MTP: DeepSeek-V3 (arXiv:2412.19437), section 2.2. Tensors are named
as in SpecForge's and DeepSeek's files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import linear

from ramet.errors import BrokenModelFile, ConfigError
from ramet.kernels.ops import REFERENCE, Ops
from ramet.kernels.slots.tables import upload
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.decoder import Decoder, ForwardContext, Layer
from ramet.runtime.models.json_file import read_json
from ramet.runtime.models.layers import Attention, FeedForward, RotaryTable
from ramet.runtime.models.linear import Linear, PlainLinear, embed
from ramet.runtime.steps.kv_cache import KVCache
from ramet.runtime.types import ScheduledSequence, Sequence

_EAGLE = "LlamaForCausalLMEagle3"


@dataclass(slots=True, eq=False)
class TappedLayer:
    """A layer that notes its results, [T, hidden], at the places of its tokens. index: of the notes in the cache."""

    layer: Layer
    index: int

    def __call__(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor | None]:
        x, residual = self.layer(x, residual, context)
        context.noted[self.index][context.kv_slots.long()] = x if residual is None else x + residual
        return x, residual

    def linears(self) -> tuple[Linear, ...]:
        return self.layer.linears()


def tapped(decoder: Decoder, before: Seq[int]) -> Decoder:
    """The decoder, with notes of the hidden states before these layers (the number of layers: at the end)."""
    layers = list(decoder.layers)
    for index, number in enumerate(before):
        layers[number - 1] = TappedLayer(layers[number - 1], index)
    return dataclasses.replace(decoder, layers=layers, num_noted=len(before))


@dataclass(slots=True, eq=False)
class HeadLayer:
    """A head's layer. Its input is the embedding of the next token; the features are noted at its place.

    mix: MTP's product of [embedding, features], and `input_norm` of its result; None in EAGLE-3. Norms: [hidden].
    """

    ops: Ops
    embedding_norm: Tensor
    features_norm: Tensor
    mix: Linear | None
    input_norm: Tensor | None
    attention: Attention
    feed_forward_norm: Tensor
    feed_forward: FeedForward
    eps: float

    def __call__(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        assert residual is None, "the only layer"
        noted, norm = context.noted[0], self.ops.rms_norm
        features = noted.index_select(0, context.kv_slots)
        normed = norm(x, self.embedding_norm, self.eps, None), norm(features, self.features_norm, self.eps, None)
        pair = torch.cat(normed, dim=-1)
        if self.mix is None or self.input_norm is None:
            given, residual = pair, features
        else:
            mixed = self.mix(pair)
            given, residual = norm(mixed, self.input_norm, self.eps, None), mixed
        attended = self.attention(given, context)
        inner, residual = self.ops.fused_add_rms_norm(attended, residual, self.feed_forward_norm, self.eps, None)
        x = self.feed_forward(inner)
        _note_next(noted, x + residual, context)
        return x, residual

    def linears(self) -> tuple[Linear, ...]:
        mix = () if self.mix is None else (self.mix,)
        return (*mix, self.attention.qkv, self.attention.o, *self.feed_forward.linears())


def _note_next(noted: Tensor, hidden: Tensor, context: ForwardContext) -> None:
    """Note the results of each sequence's last token, of `hidden` [T, hidden], at the place of the one behind it."""
    page_size = context.kv_caches[0][0].shape[2]
    decode, extend = context.decode, context.extend
    if decode is not None:
        places = _places(decode.rows, decode.kv_lens, decode.page_table, page_size)
        noted[places] = hidden[: context.num_decode]
    if extend is not None:
        last = (context.extend_start + extend.cu_seqlens_q[1:] - 1).clamp(min=0)
        places = _places(extend.rows, extend.kv_lens, extend.page_table, page_size)
        noted[places] = hidden.index_select(0, last)


def _places(rows: Tensor, positions: Tensor, page_table: Tensor, page_size: int) -> Tensor:
    """Places int64 [n] of positions in the cache. One behind a slot's last page is not read, so any place will do."""
    pages = (positions // page_size).clamp(max=page_table.shape[1] - 1)
    return page_table[rows.long(), pages.long()].long() * page_size + positions % page_size


@dataclass(slots=True, eq=False)
class Features:
    """Brings what a model noted of known tokens to the places of its head. combine: makes the features of the notes."""

    model: KVCache
    head: KVCache
    combine: Callable[[Tensor], Tensor]

    def bring(self, rows: Seq[tuple[Sequence, ScheduledSequence]]) -> None:
        """rows: the model's sequences, and the head's tokens that are computed next."""
        pairs = [(_places_of(s, item, self.model), _places_of(item.sequence, item, self.head)) for s, item in rows]
        given = [np.concatenate(places) for places in zip(*pairs, strict=True)]
        source, target = upload(given, self.head.storage.device)
        noted = torch.cat([part.index_select(0, source) for part in self.model.noted], dim=-1)
        self.head.noted[0][target.long()] = self.combine(noted)


def _places_of(sequence: Sequence, item: ScheduledSequence, cache: KVCache) -> NDArray[np.int32]:
    positions = np.arange(item.start, item.start + item.num_tokens, dtype=np.int32)
    pages = np.asarray(sequence.page_ids, dtype=np.int32)
    return pages[positions // cache.page_size] * cache.page_size + positions % cache.page_size


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A head as its files have it. decoder: its layer. before: the model's layers before which it reads, see `tapped`.

    combine: makes features [T, hidden] of the hidden states there, side by side.
    """

    decoder: Decoder
    before: tuple[int, ...]
    combine: Callable[[Tensor], Tensor]


def has_head(folder: Path, model: str) -> bool:
    """Whether a folder holds an EAGLE-3 head, or is the model's own and holds an MTP layer."""
    if not (folder / "config.json").is_file():
        return False
    fields = read_json(folder / "config.json")
    is_own = Path(model).is_dir() and folder.resolve() == Path(model).resolve()
    return _EAGLE in (fields.get("architectures") or ()) or (is_own and bool(fields.get("num_nextn_predict_layers")))


def load_head(folder: Path, decoder: Decoder) -> Head:
    """Load the head of a folder for which `has_head` is true.

    Raises: BrokenModelFile; ConfigError naming what does not fit the model.
    """
    fields, target = read_json(folder / "config.json"), decoder.config
    is_eagle = _EAGLE in (fields.get("architectures") or ())
    config = config_from_hf({**fields, "architectures": ["LlamaForCausalLM"]}) if is_eagle else target
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  a file of tensors is no mapping
                    short = _short_name(name, is_eagle=is_eagle, layer=target.num_layers)
                    if short is not None:
                        found[short] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise BrokenModelFile(f"{path} cannot be read: {error}") from error
    needed, optional = head_shapes(config, target, found.get("d2t"), is_eagle=is_eagle)
    missing, shapes = sorted(needed.keys() - found.keys()), needed | optional
    problems = [f"missing {', '.join(missing[:5])}"] if missing else []
    unknown = sorted(found.keys() - shapes.keys())
    problems += [f"not read: {', '.join(unknown[:5])}"] if unknown else []
    pairs = [(name, list(found[name].shape), list(shape)) for name, shape in shapes.items() if name in found]
    problems += [f"{name} is {shape}, not {right}" for name, shape, right in pairs if shape != right][:5]
    offsets = found.get("d2t")
    if offsets is not None and offsets.ndim == 1 and len(offsets):
        tokens = offsets.long() + torch.arange(len(offsets))
        if int(tokens.min()) < 0 or int(tokens.max()) >= target.vocab_size:
            problems.append(f"d2t leads to tokens beyond the model's {target.vocab_size:,}")
    before, read = _layers_read(target.num_layers, is_eagle=is_eagle), fields.get("eagle_config") or fields
    given = read.get("eagle_aux_hidden_state_layer_ids") if is_eagle else None
    # Files number the layers whose results are read, or the layers behind these.
    if given and tuple(given) not in (before, tuple(number - 1 for number in before)):
        problems.append(f"it reads layers {given}, and Ramet those before {list(before)}")
    if is_eagle and (target.num_layers < 6 or fields.get("norm_before_residual")):
        problems.append("norm_before_residual, and models of fewer than six layers, are not supported")
    if target.norm_offset:
        problems.append("the model's norms have an offset")
    if problems:
        raise ConfigError(f"the head in {folder} does not fit {target.architecture}: {'; '.join(problems)}")
    tensors = {name: tensor.to(decoder.device, decoder.dtype) for name, tensor in found.items() if name != "d2t"}
    can_draft = None if offsets is None else (offsets.long() + torch.arange(len(offsets))).to(decoder.device)
    return make_head(tensors, can_draft, config, decoder)


def make_head(of: dict[str, Tensor], tokens: Tensor | None, config: ModelConfig, model: Decoder) -> Head:
    """Make a head of tensors by their short names, see `head_shapes`.

    tokens: those of the model that it can draft, int64; None: all. config: of its layer.
    """
    before = _layers_read(model.config.num_layers, is_eagle="fc" in of)
    return Head(_head_decoder(of, tokens, config, model), before, _combining(of, model))


def _combining(of: dict[str, Tensor], decoder: Decoder) -> Callable[[Tensor], Tensor]:
    if "fc" in of:
        return partial(linear, weight=of["fc"])
    return lambda hidden: decoder.ops.rms_norm(hidden, decoder.final_norm, decoder.config.rms_norm_eps, None)


def _head_decoder(of: dict[str, Tensor], tokens: Tensor | None, config: ModelConfig, model: Decoder) -> Decoder:
    """The decoder of one layer. Arguments as those of `make_head`."""
    hidden, vocab_size = model.config.hidden_size, model.config.vocab_size
    is_eagle = "fc" in of
    config = dataclasses.replace(
        config, num_layers=1, vocab_size=vocab_size, sliding_layers=(), unrotated_layers=(), dense_layers=()
    )
    eps = config.rms_norm_eps
    # On a CPU, its steps are no recorded programs, as those of the model are not.
    is_same = model.device.type == "cuda" or config.head_dim == model.config.head_dim
    ops = dataclasses.replace(model.ops if is_same else REFERENCE, make_record=None)

    def product(*names: str) -> Linear:
        weight = torch.cat([of[name] for name in names])
        biases = [of.get(f"{name}.bias", weight.new_zeros(len(of[name]))) for name in names]
        has_bias = any(f"{name}.bias" in of for name in names)
        return Linear(names, PlainLinear(weight), torch.cat(biases) if has_bias else None, weight.shape[1], len(weight))

    norms = [of.get(f"self_attn.{name}_norm") for name in "qk"]
    if any(norm is not None for norm in norms):
        norms = [torch.ones_like(of["norm"][: config.head_dim]) if norm is None else norm for norm in norms]
    attention = Attention(
        ops,
        layer=0,
        qkv=product(*(f"self_attn.{name}_proj" for name in "qkv")),
        o=product("self_attn.o_proj"),
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rotary=RotaryTable.build(config.rope, config.head_dim, config.max_position_embeddings, model.device),
        scale=config.head_dim**-0.5,
        window=None,
        softcap=None,
        q_norm=norms[0],
        k_norm=norms[1],
        eps=eps,
    )
    layer = HeadLayer(
        ops,
        of["input_layernorm" if is_eagle else "enorm"],
        of["hidden_norm" if is_eagle else "hnorm"],
        None if is_eagle else product("eh_proj"),
        None if is_eagle else of["input_layernorm"],
        attention,
        of["post_attention_layernorm"],
        FeedForward(product("mlp.gate_proj", "mlp.up_proj"), product("mlp.down_proj"), ops.silu_and_mul),
        eps,
    )
    output = dataclasses.replace(model.output)
    if "lm_head" in of:
        weight = of["lm_head"]
        method = PlainLinear(weight) if tokens is None else partial(_spread, weight, tokens, vocab_size)
        output = Linear(("lm_head",), method, None, hidden, vocab_size)
    embedding = partial(embed, of["embed_tokens"], 1.0) if "embed_tokens" in of else model.embedding
    return Decoder(config, ops, model.device, model.dtype, embedding, [layer], of["norm"], output, num_noted=1)


def _spread(weight: Tensor, tokens: Tensor, vocab_size: int, x: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [R, V] of a head that can draft some tokens only, int64."""
    logits = linear(x, weight, bias)
    return logits.new_full((len(x), vocab_size), -torch.inf).index_copy_(1, tokens, logits)


def _layers_read(num_layers: int, *, is_eagle: bool) -> tuple[int, ...]:
    """The layers before which a head reads the hidden states. EAGLE-3: early, in the middle, late; MTP: the end."""
    return (2, num_layers // 2, num_layers - 3) if is_eagle else (num_layers,)


def head_shapes(
    config: ModelConfig, target: ModelConfig, offsets: Tensor | None, *, is_eagle: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of the tensors that a head must have, and of those that it may have."""
    hidden, head, inner = target.hidden_size, config.head_dim, config.intermediate_size
    rows = {"q": config.num_heads * head, "k": config.num_kv_heads * head, "v": config.num_kv_heads * head}
    vocab = target.vocab_size if offsets is None else len(offsets)
    matrices = {f"self_attn.{name}_proj": (size, 2 * hidden if is_eagle else hidden) for name, size in rows.items()}
    matrices |= {"self_attn.o_proj": (hidden, rows["q"]), "mlp.down_proj": (hidden, inner)}
    matrices |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, hidden))
    matrices |= {"fc": (hidden, 3 * hidden)} if is_eagle else {"eh_proj": (hidden, 2 * hidden)}
    norms = ("hidden_norm",) if is_eagle else ("enorm", "hnorm")
    vectors = dict.fromkeys((*norms, "norm", "input_layernorm", "post_attention_layernorm"), (hidden,))
    may = {"embed_tokens": (target.vocab_size, hidden), "lm_head": (vocab, hidden)}
    biases = {f"self_attn.{name}_proj.bias": (size,) for name, size in rows.items()}
    more = {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,), **({"d2t": (vocab,)} if is_eagle else {})}
    return {**matrices, **vectors}, {**may, **biases, **more}


def _short_name(name: str, *, is_eagle: bool, layer: int) -> str | None:
    """A tensor's name in its layer; None if it is no part of the head. Biases keep their ending."""
    prefix = "midlayer." if is_eagle else f"model.layers.{layer}."
    if name == "t2d" or not (is_eagle or name.startswith(prefix)):
        return None
    short = name.removeprefix(prefix).removesuffix(".weight")
    return {"shared_head.norm": "norm", "shared_head.head": "lm_head"}.get(short, short)
