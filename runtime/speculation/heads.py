"""Heads that draft from a model's own hidden states: EAGLE-3's, and a layer of multi-token prediction (MTP).

A head is one layer. For a token t it takes what the model made of the text up to t (the features), and the embedding of
token t + 1, and predicts token t + 2. What it makes of a drafted token then stands for the features of that.

    EAGLE-3   features: a product of the hidden states after three layers; attention reads [embedding, features], normed
    MTP       features: the last hidden states, normed; the layer's input: a product of [embedding, features], normed

The model's layers note their results while they run (`TappedLayer`), a row for each token's place in the KV cache; so
its steps are not recorded programs. The head's own keys and values belong to sequences: a cached prefix is read again.
Pages that come from another engine have no features, and drafts there are poor. Not here: whether asking pays
(`speculation`).

Source: EAGLE-3, Li et al. 2025 (arXiv:2503.01840); MTP: DeepSeek-V3 (arXiv:2412.19437), section 2.2. Tensors are named
as in SpecForge's and DeepSeek's files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from ramet.errors import BrokenModelFile, ConfigError
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.decoder import Decoder, ForwardContext, Layer
from ramet.runtime.models.json_file import read_json
from ramet.runtime.models.layers import RotaryTable
from ramet.runtime.models.linear import Linear
from ramet.runtime.steps.kv_cache import KVCache
from ramet.runtime.types import Sequence

_EAGLE = "LlamaForCausalLMEagle3"
_MOST_NEW = 256  # tokens that are new to the head, in one draft of all sequences
_MOST_KEPT = 65_536  # tokens of all sequences whose keys and values are kept


@dataclass(slots=True, eq=False)
class TappedLayer:
    """A layer that notes its results, [T, hidden], at the places of its tokens in the KV cache."""

    layer: Layer
    noted: Tensor  # [places, hidden]

    def __call__(self, x: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor | None]:
        x, residual = self.layer(x, residual, context)
        self.noted[context.kv_slots.long()] = x if residual is None else x + residual
        return x, residual

    def linears(self) -> tuple[Linear, ...]:
        return self.layer.linears()


class DraftHead:
    """Drafts by a head, greedily. Owner: `Speculation`.

    tensors: by their names in the layer; `fc` (EAGLE-3) or `eh_proj` (MTP) says which kind it is.
    """

    def __init__(self, tensors: dict[str, Tensor], config: ModelConfig, decoder: Decoder) -> None:
        """config: the head's attention and sizes. decoder: the model's; `self.decoder` must run in its place."""
        self._page_size = 0
        self._is_eagle = "fc" in tensors
        self._tensors = {name: tensor.to(decoder.device, decoder.dtype) for name, tensor in tensors.items()}
        self._offsets = tensors.get("d2t")  # of a drafted token to that of the model, int64
        self._config = config
        self._rotary = RotaryTable.build(config.rope, config.head_dim, config.max_position_embeddings, decoder.device)
        num_layers, layers = decoder.config.num_layers, list(decoder.layers)
        before = _layers_read(num_layers, is_eagle=self._is_eagle)
        self._noted = [torch.zeros(0, device=decoder.device, dtype=decoder.dtype) for _ in before]
        for number, noted in zip(before, self._noted, strict=True):
            layers[number - 1] = TappedLayer(layers[number - 1], noted)
        self.decoder = dataclasses.replace(decoder, layers=layers)
        self._past: dict[Sequence, tuple[Tensor, Tensor]] = {}  # keys and values of pairs, [T, heads, D]

    def make_room(self, cache: KVCache) -> None:
        """Make room for the hidden states of all tokens in the model's KV cache, one (MTP) or three (EAGLE-3) for each.

        Before its first step.
        """
        self._page_size = cache.page_size
        shape = cache.num_pages, cache.page_size, self.decoder.config.hidden_size
        for noted in self._noted:
            noted.resize_(shape[0] * shape[1], shape[2]).zero_()
            cache.beside.append(noted.view(1, 1, shape[0], 1, *shape[1:]))

    @property
    def num_sequences(self) -> int:
        """How many sequences it keeps keys and values for."""
        return len(self._past)

    @torch.inference_mode()
    def draft(self, sequences: Seq[Sequence], count: int) -> dict[Sequence, list[int]]:
        """Return `count` tokens that may follow the known ones. Prompts are read in parts: some may have none yet."""
        room, found = _MOST_NEW, dict[Sequence, list[int]]()
        for sequence in sequences:
            past = self._past.get(sequence)
            start, end = 0 if past is None else len(past[0]), sequence.num_tokens - 1
            num_new = min(end - start, room)
            num_kept = sum(len(keys) for keys, _ in self._past.values())
            if num_new <= 0 or end + count > len(self._rotary.cos) or num_kept + num_new > _MOST_KEPT:
                continue
            room -= num_new
            features = self._features(sequence, start, start + num_new)
            tokens = torch.from_numpy(sequence.tokens(start + 1, start + num_new + 1).copy())
            hidden, past = self._forward(features, tokens, start, past)
            self._past[sequence] = past
            if start + num_new == end:
                found[sequence] = self._go_on(hidden[-1:], end, past, count)
        return found

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence. Does nothing if it is unknown."""
        self._past.pop(sequence, None)

    def _go_on(self, hidden: Tensor, position: int, past: tuple[Tensor, Tensor], count: int) -> list[int]:
        """Draft tokens one after another, the first from `hidden` [1, hidden]. position: of the next pair."""
        drafted: list[int] = []
        for number in range(count):
            if number:
                hidden, past = self._forward(hidden, torch.tensor(drafted[-1:]), position + number - 1, past)
            token = int(self._logits(hidden).argmax())
            drafted.append(token if self._offsets is None else token + int(self._offsets[token]))
        return drafted

    def _features(self, sequence: Sequence, start: int, end: int) -> Tensor:
        """The features of tokens [start, end), [T, hidden]."""
        positions, page_size = torch.arange(start, end), self._page_size
        places = torch.tensor(sequence.page_ids)[positions // page_size] * page_size + positions % page_size
        noted = torch.cat([part[places] for part in self._noted], dim=-1)
        if self._is_eagle:
            return linear(noted, self._tensors["fc"])
        return self._normed(noted, self.decoder.final_norm)

    def _forward(
        self, features: Tensor, tokens: Tensor, start: int, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the layer on pairs of features [T, hidden] and the tokens after them [T], from position `start` on.

        Returns its results [T, hidden], and the keys and values with those of `past`.
        """
        of, config = self._tensors, self._config
        embedding = of.get("embed_tokens")
        embedded = self.decoder.embedding(tokens) if embedding is None else embedding[tokens]
        if self._is_eagle:
            residual = features
            pair = self._normed(embedded, of["input_layernorm"]), self._normed(features, of["hidden_norm"])
            x = torch.cat(pair, dim=-1)
        else:
            pair = self._normed(embedded, of["enorm"]), self._normed(features, of["hnorm"])
            residual = linear(torch.cat(pair, dim=-1), of["eh_proj"])
            x = self._normed(residual, of["input_layernorm"])
        parts = []
        for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
            part = linear(x, of[f"self_attn.{name}_proj"], of.get(f"self_attn.{name}_proj.bias"))
            part = part.view(len(x), heads, config.head_dim)
            norm = of.get(f"self_attn.{name}_norm")
            part = part if norm is None else self._normed(part, norm)
            parts.append(part if name == "v" else self._rotated(part, start))
        q, k, v = parts
        if past is not None:
            k, v = torch.cat((past[0], k)), torch.cat((past[1], v))
        is_seen = torch.arange(len(k)) <= torch.arange(len(k) - len(q), len(k))[:, None]
        group = config.num_heads // config.num_kv_heads
        q, keys, values = (part.transpose(0, 1) for part in (q, *(p.repeat_interleave(group, 1) for p in (k, v))))
        attended = scaled_dot_product_attention(q, keys, values, attn_mask=is_seen).transpose(0, 1)
        x = residual + linear(attended.reshape(len(x), -1), of["self_attn.o_proj"])
        normed = self._normed(x, of["post_attention_layernorm"])
        inner = silu(linear(normed, of["mlp.gate_proj"])) * linear(normed, of["mlp.up_proj"])
        return x + linear(inner, of["mlp.down_proj"]), (k, v)

    def _logits(self, hidden: Tensor) -> Tensor:
        normed, head = self._normed(hidden, self._tensors["norm"]), self._tensors.get("lm_head")
        return self.decoder.logits(normed) if head is None else linear(normed, head)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self._config.rms_norm_eps)

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        """Rotate x [T, heads, D] by its positions, from `start` on."""
        rows = slice(start, start + len(x))
        cos, sin = (table[rows, None].to(x.dtype) for table in (self._rotary.cos, self._rotary.sin))
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def has_head(folder: Path, model: str) -> bool:
    """Whether a folder holds an EAGLE-3 head, or is the model's own and holds an MTP layer."""
    if not (folder / "config.json").is_file():
        return False
    fields = read_json(folder / "config.json")
    is_own = Path(model).is_dir() and folder.resolve() == Path(model).resolve()
    return _EAGLE in (fields.get("architectures") or ()) or (is_own and bool(fields.get("num_nextn_predict_layers")))


def load_head(folder: Path, decoder: Decoder) -> DraftHead:
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
    needed, optional = _shapes(config, target, found.get("d2t"), is_eagle=is_eagle)
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
    return DraftHead(found, config, decoder)


def _layers_read(num_layers: int, *, is_eagle: bool) -> tuple[int, ...]:
    """The layers before which a head reads the hidden states. EAGLE-3: early, in the middle, late; MTP: the end."""
    return (2, num_layers // 2, num_layers - 3) if is_eagle else (num_layers,)


def _shapes(
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
