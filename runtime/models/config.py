"""`ModelConfig`: the decoder's description of a model.

One flat, frozen description serves every supported architecture. Each difference between models is a field, so the
decoder has no per-model branches. No torch. Not here: reading configurations (`config_files.py`), model families
(`families.py`), weights, tokenizers, sampling defaults.
Source for field meanings and defaults: transformers 4.57 and 5.x model configurations; llama.cpp's GGUF key names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ramet.errors import BrokenModelFile

Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["linear", "llama3", "yarn", "divisors"]
Fields = Mapping[str, Any]  # parsed JSON: values of any type
Norms = tuple[str | None, str | None, str | None, str | None]
QkNorm = Literal["head", "all"]

# A size beyond these is damage, or meant to fill the memory: Llama 3.1 405B has 126 layers and an intermediate size of
# 53,248.
LARGEST: Mapping[str, int] = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_layers": 1 << 10,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 30,
    "num_experts": 1 << 12,
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A reduction of the rotary frequencies for a longer context.

    linear: every frequency is divided by `factor`. llama3: low frequencies are divided by `factor`, high ones are kept,
    with a ramp between them (Llama 3.1). yarn: the same, with a ramp over dimensions, from those that make `beta_fast`
    turns in the original context to those that make `beta_slow`; cos and sin are multiplied by `magnitude`. divisors:
    one divisor for each of the D/2 frequencies (GGUF's `rope_freqs.weight`).
    """

    kind: RopeKind
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True  # the ramp begins and ends at whole dimensions
    magnitude: float = 1.0
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        positive = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position", "magnitude")
        for name in (*positive, "beta_fast", "beta_slow"):
            _check_positive(f"rope scaling's {name}", getattr(self, name))
        if self.high_freq_factor == self.low_freq_factor and self.kind == "llama3":
            raise BrokenModelFile(
                f"rope scaling's high_freq_factor and low_freq_factor are both {self.low_freq_factor}"
            )
        for divisor in self.divisors:
            _check_positive("a divisor of rope_freqs.weight", divisor)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one kind of layer."""

    theta: float
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _check_positive("rope_theta", self.theta)
        if self.scaling is not None and self.scaling.kind == "yarn" and self.theta == 1:
            raise BrokenModelFile("the model's rope_theta is 1, with which YaRN has no frequencies")

    def inverse_frequencies(self, head_dim: int) -> NDArray[np.float64]:
        """Radians per position, float64 [head_dim / 2], scaling applied.

        Source: RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071); the llama3 ramp as in transformers'
        `modeling_rope_utils`.
        """
        inverse = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        scaling = self.scaling
        if scaling is None:
            return inverse
        if scaling.kind == "linear":
            return inverse / scaling.factor
        if scaling.kind == "divisors":
            return inverse / np.asarray(scaling.divisors, dtype=np.float64)
        if scaling.kind == "yarn":
            ends = [self._dimension_of(turns, head_dim, scaling) for turns in (scaling.beta_fast, scaling.beta_slow)]
            low, high = (math.floor(ends[0]), math.ceil(ends[1])) if scaling.is_truncated else ends
            low, high = max(low, 0), min(high, head_dim - 1)
            width = high - low if high != low else 0.001
            ramp = np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)
            return np.asarray(inverse * (1 - ramp) + inverse / scaling.factor * ramp, dtype=np.float64)
        turns = scaling.original_max_position * inverse / (2 * math.pi)  # rotations over the original context
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return (1 - kept) * inverse / scaling.factor + kept * inverse

    def _dimension_of(self, turns: float, head_dim: int, scaling: RopeScaling) -> float:
        """The dimension that makes so many turns in the original context."""
        return head_dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of the feed-forward block: `per_token` of `count` experts compute each token.

    size: an expert's inner features; shared_size: those of an expert that computes every token, 0 if there is none.
    is_normalised: the weights of a token's experts are divided by their sum.
    """

    count: int
    per_token: int
    size: int
    shared_size: int = 0
    is_normalised: bool = True

    def __post_init__(self) -> None:
        check_size("num_experts", self.count)
        check_size("num_experts", self.per_token, "num_experts_per_tok")
        check_size("intermediate_size", self.size, "expert's inner size")
        if self.shared_size:
            check_size("intermediate_size", self.shared_size, "shared_expert_intermediate_size")
        if self.per_token > self.count:
            raise BrokenModelFile(f"num_experts_per_tok is {self.per_token} but there are {self.count} experts")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family.

    `sliding_layers[i]`: layer i attends only to the last `sliding_window` positions (the current one included).
    `rope` serves layers with full attention, `local_rope` sliding ones (equal except in Gemma 3), and layers i with
    `unrotated_layers[i]` have no rotary embedding (SmolLM3). `qk_norm`: norms of q and k, in each head or over all
    heads together. `attention_scale` multiplies q.k; an `attention_softcap` c makes such a score c * tanh(score / c)
    (Gemma 2). `embedding_scale` multiplies the token embedding; `norm_offset` is added to every norm weight, q/k norms
    too (1 in Gemma, whose files store w - 1). `norms`: the norms' names in a layer's files: before attention, of its
    output before it is added to the residual, before the feed-forward block, and of that block's output; None where the
    layer has no such norm. `residual_scale` multiplies the output of each block.
    `experts` replace the feed-forward block, but not in layers i with `dense_layers[i]`. `logit_scale` multiplies the
    logits; with a `logit_softcap` c they then become c * tanh(logits / c). `eos_ids` may be empty.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    local_rope: Rope
    attention_scale: float
    attention_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    unrotated_layers: tuple[bool, ...] = ()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm | None = None
    activation: Activation = "silu"
    experts: Experts | None = None
    dense_layers: tuple[bool, ...] = ()
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    norm_offset: float = 0.0
    norms: Norms = ("input_layernorm", None, "post_attention_layernorm", None)
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for name in LARGEST:
            if name != "num_experts":
                check_size(name, getattr(self, name))
        for name in ("rms_norm_eps", "attention_scale", "embedding_scale", "residual_scale", "logit_scale"):
            _check_positive(name, getattr(self, name))
        for name in ("attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if self.sliding_window is not None:
            check_size("max_position_embeddings", self.sliding_window, "sliding_window")
        for token in (self.bos_id, self.pad_id, *self.eos_ids):
            if token is not None and (type(token) is not int or not -1 <= token < LARGEST["vocab_size"]):
                raise BrokenModelFile(f"a special token of the model is {token!r} but must be a token's id")
        if self.num_heads % self.num_kv_heads:
            raise BrokenModelFile(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise BrokenModelFile(f"head_dim is {self.head_dim} but rotary embeddings need an even one")
        for layers in (self.sliding_layers, self.unrotated_layers, self.dense_layers):
            if len(layers) not in (0, self.num_layers):
                raise BrokenModelFile(f"{len(layers)} layer types for {self.num_layers} layers")
        if any(self.sliding_layers) and self.sliding_window is None:
            raise BrokenModelFile("the model has sliding-window layers but no sliding_window")

    def window(self, layer: int) -> int | None:
        """Window of a layer in positions; None for full attention."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else None

    def layer_rope(self, layer: int) -> Rope | None:
        """Rotary embedding of a layer; None if it has none."""
        if self.unrotated_layers and self.unrotated_layers[layer]:
            return None
        return self.local_rope if self.window(layer) is not None else self.rope

    def layer_experts(self, layer: int) -> Experts | None:
        """The experts of a layer; None if it has one feed-forward block."""
        return None if self.dense_layers and self.dense_layers[layer] else self.experts

    @property
    def runs_on_gpus(self) -> bool:
        """Whether our layers have GPU kernels for all of it."""
        return self.experts is None and self.attention_softcap is None


def check_size(name: str, value: object, shown: str | None = None) -> int:
    """Return a size of the model. Raises BrokenModelFile if it is none, or beyond what any model has."""
    if type(value) is not int or not 1 <= value <= LARGEST[name]:
        raise BrokenModelFile(
            f"the model's {shown or name} is {repr(value)[:80]} but must be an integer from 1 to {LARGEST[name]:,}"
        )
    return value


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BrokenModelFile(f"the model's {name} is {repr(value)[:80]} but must be a positive number")


def token_ids(value: object) -> tuple[int, ...]:
    """Normalise an id, a list of ids or None (as in `eos_token_id`) to a tuple."""
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list | tuple) else (int(str(value)),)


# ---- Well-known shapes, for dummy weights in throughput measurements ----


def llama_3_1_8b() -> ModelConfig:
    """Llama 3.1 8B (Instruct's end tokens)."""
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    rope = Rope(500_000.0, scaling)
    return ModelConfig(
        architecture="llama",
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128_256,
        rms_norm_eps=1e-5,
        max_position_embeddings=131_072,
        rope=rope,
        local_rope=rope,
        attention_scale=128**-0.5,
        bos_id=128_000,
        eos_ids=(128_001, 128_008, 128_009),
    )


def smollm2_135m() -> ModelConfig:
    """SmolLM2 135M Instruct."""
    rope = Rope(100_000.0)
    return ModelConfig(
        architecture="llama",
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49_152,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope=rope,
        local_rope=rope,
        attention_scale=64**-0.5,
        tie_word_embeddings=True,
        bos_id=1,
        eos_ids=(2,),
        pad_id=2,
    )
