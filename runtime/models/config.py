"""`ModelConfig`: what the decoder needs to know about a model, read from a Hugging Face config or from GGUF metadata.

One flat, frozen description for every supported architecture, so that the decoder has no per-model branches: what
differs between models is a field here. No torch. Not here: weights, tokenizers, sampling defaults.
Source for field meanings and defaults: transformers 4.57 and 5.x model configurations; llama.cpp's GGUF key names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ramet.errors import BrokenModelFile, UnsupportedArchitecture

if TYPE_CHECKING:
    from gguf import GGUFReader

Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["linear", "llama3", "divisors"]
Fields = Mapping[str, Any]  # parsed JSON: values of any type


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are slowed down to reach a longer context.

    linear: every frequency divided by `factor`. llama3: low frequencies divided by `factor`, high ones kept, a ramp
    between (Llama 3.1). divisors: one divisor for each of the D/2 frequencies (GGUF's `rope_freqs.weight`).
    """

    kind: RopeKind
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one kind of layer."""

    theta: float
    scaling: RopeScaling | None = None

    def inverse_frequencies(self, head_dim: int) -> NDArray[np.float64]:
        """Radians per position, float64 [head_dim / 2], scaling applied.

        Source: RoFormer (arXiv:2104.09864); the llama3 ramp as in transformers' `modeling_rope_utils`.
        """
        inverse = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        scaling = self.scaling
        if scaling is None:
            return inverse
        if scaling.kind == "linear":
            return inverse / scaling.factor
        if scaling.kind == "divisors":
            return inverse / np.asarray(scaling.divisors, dtype=np.float64)
        turns = scaling.original_max_position * inverse / (2 * math.pi)  # rotations over the original context
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return (1 - kept) * inverse / scaling.factor + kept * inverse


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family.

    `sliding_layers[i]`: layer i attends only to the last `sliding_window` positions (the current one included).
    `rope` serves layers with full attention, `local_rope` sliding ones (equal except in Gemma 3).
    `attention_scale` multiplies q.k; `embedding_scale` multiplies the token embedding; `norm_offset` is added to every
    norm weight, q/k norms too (1 in Gemma, whose files store w - 1). `feed_forward_norms`: two more norms per layer
    (Gemma 3's `pre_feedforward_layernorm` and `post_feedforward_layernorm`), where `post_attention_layernorm`
    normalises the attention output before it is added to the residual. `logit_softcap` c: logits become
    c * tanh(logits / c). `eos_ids` may be empty.
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
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    feed_forward_norms: bool = False
    logit_softcap: float | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        sizes = (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
        )
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise BrokenModelFile(f"the model's {name} is {value!r} but must be an integer >= 1")
        if self.num_heads % self.num_kv_heads:
            raise BrokenModelFile(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise BrokenModelFile(f"head_dim is {self.head_dim} but rotary embeddings need an even one")
        if len(self.sliding_layers) not in (0, self.num_layers):
            raise BrokenModelFile(f"{len(self.sliding_layers)} layer types for {self.num_layers} layers")
        if any(self.sliding_layers) and self.sliding_window is None:
            raise BrokenModelFile("the model has sliding-window layers but no sliding_window")

    def window(self, layer: int) -> int | None:
        """Window of a layer in positions; None for full attention."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else None

    def layer_rope(self, layer: int) -> Rope:
        return self.local_rope if self.window(layer) is not None else self.rope

    @property
    def kv_bytes_per_token_bf16(self) -> int:
        """Bytes of K and V of one token over all layers at two bytes a value."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Fields) -> ModelConfig:
        """Read a parsed `config.json` (transformers 4.x and 5.x layouts; of a multimodal Gemma 3 the text part).

        Raises: UnsupportedArchitecture; BrokenModelFile naming a missing or wrong field.
        """
        return _from_hf(config)

    @classmethod
    def from_gguf(cls, reader: GGUFReader) -> ModelConfig:
        """Read GGUF metadata; what it leaves out (biases, tied embeddings, vocabulary size) is read off the tensors.

        Raises: UnsupportedArchitecture; BrokenModelFile naming a missing key.
        """
        return _from_gguf(reader)


# ---- Hugging Face ----

# Values that config.json may leave out. Source: the defaults of transformers' configuration classes.
_LLAMA_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "bos_token_id": 1}
_LLAMA_DEFAULTS |= {"eos_token_id": 2, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False}
_QWEN_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_QWEN_DEFAULTS |= {"hidden_act": "silu", "tie_word_embeddings": False}
_GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_DEFAULTS,
    "mistral": _LLAMA_DEFAULTS | {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": _QWEN_DEFAULTS | {"head_dim": 128},
    "gemma3": _GEMMA3_DEFAULTS,
}
_HF_MODEL_TYPES = {name: name for name in _DEFAULTS} | {"gemma3_text": "gemma3"}
_HF_CLASSES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
}
_GGUF_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
SUPPORTED_ARCHITECTURES: tuple[str, ...] = tuple(_HF_CLASSES)


def _unsupported(found: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"the architecture {found} is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)} "
        f"(GGUF: {', '.join(_GGUF_ARCHITECTURES)})"
    )


def _architecture(config: Fields) -> str:
    classes = config.get("architectures") or []
    if classes:
        for name in classes:
            if name in _HF_CLASSES:
                return _HF_CLASSES[name]
        raise _unsupported(repr(", ".join(map(str, classes))))
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _HF_MODEL_TYPES:
        return _HF_MODEL_TYPES[model_type]
    raise _unsupported(repr(model_type))


def _from_hf(config: Fields) -> ModelConfig:
    architecture = _architecture(config)
    fields: dict[str, Any] = dict(_DEFAULTS[architecture])
    fields |= {key: value for key, value in config.items() if value is not None and key != "text_config"}
    fields |= {key: value for key, value in (config.get("text_config") or {}).items() if value is not None}
    # An explicit null means "no window" (Mistral), so it must win over the default.
    if "sliding_window" in config and config["sliding_window"] is None:
        fields["sliding_window"] = None

    def need(name: str) -> Any:  # JSON value
        if name not in fields:
            raise BrokenModelFile(f"config.json of a {architecture} model lacks {name!r}")
        return fields[name]

    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        raise UnsupportedArchitecture(
            f"weights quantised with {method!r} are not supported; use a bf16, fp16 or fp32 checkpoint, or a GGUF file"
        )
    if fields.get("use_bidirectional_attention"):
        raise UnsupportedArchitecture("use_bidirectional_attention: an encoder cannot generate text")
    if fields.get("attn_logit_softcapping"):
        raise UnsupportedArchitecture("attn_logit_softcapping is not supported (Gemma 2); use a Gemma 3 model")
    num_layers, num_heads, hidden_size = need("num_hidden_layers"), need("num_attention_heads"), need("hidden_size")
    head_dim = fields.get("head_dim") or hidden_size // num_heads
    rope, local_rope = _hf_ropes(fields, architecture)
    window, sliding_layers = _hf_windows(fields, architecture, num_layers)
    is_gemma = architecture == "gemma3"
    bias = bool(fields.get("attention_bias", False))
    activation = fields.get("hidden_activation") or need("hidden_act")
    if activation not in _ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"activation {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=need("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads", num_heads),
        head_dim=head_dim,
        vocab_size=need("vocab_size"),
        rms_norm_eps=float(need("rms_norm_eps")),
        max_position_embeddings=need("max_position_embeddings"),
        rope=rope,
        local_rope=local_rope,
        attention_scale=float(need("query_pre_attn_scalar") if is_gemma else head_dim) ** -0.5,
        sliding_window=window,
        sliding_layers=sliding_layers,
        tie_word_embeddings=bool(need("tie_word_embeddings")),
        qkv_bias=True if architecture == "qwen2" else bias,
        o_bias=False if architecture == "qwen2" else bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
        qk_norm=architecture in ("qwen3", "gemma3"),
        activation=_ACTIVATIONS[activation],
        embedding_scale=math.sqrt(hidden_size) if is_gemma else 1.0,
        norm_offset=1.0 if is_gemma else 0.0,
        feed_forward_norms=is_gemma,
        logit_softcap=fields.get("final_logit_softcapping"),
        bos_id=fields.get("bos_token_id"),
        eos_ids=token_ids(fields.get("eos_token_id")),
        pad_id=fields.get("pad_token_id"),
    )


def token_ids(value: object) -> tuple[int, ...]:
    """Normalise an id, a list of ids or None (as in `eos_token_id`) to a tuple."""
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list | tuple) else (int(str(value)),)


def _hf_ropes(fields: Fields, architecture: str) -> tuple[Rope, Rope]:
    """(rope of full-attention layers, rope of sliding layers)."""
    theta = float(fields["rope_theta"])
    # transformers 5 writes `rope_parameters`, either flat or one dictionary for each kind of layer.
    parameters = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    per_kind = {kind: parameters.get(kind) for kind in ("full_attention", "sliding_attention")}
    if any(isinstance(value, Mapping) for value in per_kind.values()):
        local_theta = float(fields.get("rope_local_base_freq", theta))
        return _rope(per_kind["full_attention"] or {}, theta, fields), _rope(
            per_kind["sliding_attention"] or {}, local_theta, fields
        )
    rope = _rope(parameters, theta, fields)
    if architecture == "gemma3":  # long-context scaling is for the global layers alone
        return rope, Rope(float(fields["rope_local_base_freq"]))
    return rope, rope


def _rope(parameters: Fields, default_theta: float, fields: Fields) -> Rope:
    theta = float(parameters.get("rope_theta") or default_theta)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if float(parameters.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) or 1.0) != 1.0:
        raise UnsupportedArchitecture("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return Rope(theta)
    try:
        if kind == "linear":
            return Rope(theta, RopeScaling("linear", factor=float(parameters["factor"])))
        if kind == "llama3":
            scaling = RopeScaling(
                "llama3",
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_max_position=int(parameters["original_max_position_embeddings"]),
            )
            return Rope(theta, scaling)
    except KeyError as error:
        raise BrokenModelFile(f"rope scaling of type {kind!r} lacks {error.args[0]!r} in config.json") from error
    raise UnsupportedArchitecture(f"rope scaling of type {kind!r} is not supported; supported: default, linear, llama3")


def _hf_windows(fields: Fields, architecture: str, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """(window, which layers slide)."""
    window = fields.get("sliding_window")
    if architecture == "llama" or (architecture in ("qwen2", "qwen3") and not fields.get("use_sliding_window")):
        return None, ()
    if window is None:
        return None, ()
    layer_types = fields.get("layer_types")
    if layer_types and architecture != "mistral":  # transformers' Mistral ignores layer_types, too
        unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise UnsupportedArchitecture(f"layer types {', '.join(unknown)} are not supported")
        return window, tuple(kind == "sliding_attention" for kind in layer_types)
    if architecture == "mistral":
        return window, (True,) * num_layers
    if architecture == "gemma3":
        pattern = int(fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern") or 6)
        return window, tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    first = int(fields.get("max_window_layers", 28))
    return window, tuple(layer >= first for layer in range(num_layers))


# ---- GGUF ----


def _from_gguf(reader: GGUFReader) -> ModelConfig:
    read = gguf_metadata(reader)
    architecture = read("general.architecture")
    if architecture not in _GGUF_ARCHITECTURES:
        raise _unsupported(f"{architecture!r} of this GGUF file")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(key: str, default: Any = None) -> Any:  # metadata value
        found = read(f"{architecture}.{key}", default)
        if found is None:
            raise BrokenModelFile(f"the GGUF file lacks the key {architecture}.{key}")
        return found

    if value("expert_count", 0):
        raise UnsupportedArchitecture(f"mixture-of-experts models ({value('expert_count')} experts) are not supported")
    if "token_embd.weight" not in tensors:
        raise BrokenModelFile("the GGUF file lacks the tensor token_embd.weight")
    hidden_size, num_layers, num_heads = value("embedding_length"), value("block_count"), value("attention.head_count")
    head_dim = value("attention.key_length", hidden_size // num_heads)
    is_gemma = architecture == "gemma3"
    window = read(f"{architecture}.attention.sliding_window")
    pattern = _gguf_sliding_layers(read(f"{architecture}.attention.sliding_window_pattern"), num_layers, is_gemma)
    rope = _gguf_rope(value, tensors, 1_000_000.0 if is_gemma else 10_000.0)
    # llama.cpp's rule: only the 27B Gemma 3 scales by hidden / heads; all others by the head dimension.
    scale_dim = hidden_size // num_heads if is_gemma and num_layers == 62 else head_dim
    eos = [read(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=value("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=value("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        rms_norm_eps=float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32: 1e-5 again
        max_position_embeddings=value("context_length"),
        rope=rope,
        local_rope=Rope(float(value("rope.freq_base_swa", 10_000.0))) if is_gemma else rope,
        attention_scale=float(scale_dim) ** -0.5,
        sliding_window=window if window and any(pattern) else None,
        sliding_layers=pattern if window else (),
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        activation="gelu_tanh" if is_gemma else "silu",
        embedding_scale=math.sqrt(hidden_size) if is_gemma else 1.0,
        norm_offset=1.0 if is_gemma else 0.0,
        feed_forward_norms=is_gemma,
        logit_softcap=read(f"{architecture}.final_logit_softcapping"),
        bos_id=read("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(int(token) for token in eos if token is not None)),
        pad_id=read("tokenizer.ggml.padding_token_id"),
    )


def gguf_metadata(reader: GGUFReader) -> Callable[..., Any]:
    """A function `read(key, default=None)` over the file's metadata; values are Python ones (of any GGUF type)."""

    def read(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    return read


def _gguf_sliding_layers(stored: object, num_layers: int, is_gemma: bool) -> tuple[bool, ...]:
    if isinstance(stored, list):
        return tuple(bool(item) for item in stored)
    period = stored if isinstance(stored, int) and not isinstance(stored, bool) else 6
    return tuple((layer + 1) % period != 0 if is_gemma else True for layer in range(num_layers))


def _gguf_rope(value: Callable[..., Any], tensors: Fields, default_theta: float) -> Rope:
    theta = float(value("rope.freq_base", default_theta))
    kind = value("rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors:  # llama.cpp bakes Llama 3's ramp into a tensor of divisors
        divisors = np.asarray(tensors["rope_freqs.weight"].data, dtype=np.float64).reshape(-1)
        return Rope(theta, RopeScaling("divisors", divisors=tuple(map(float, divisors))))
    if kind == "linear":
        return Rope(theta, RopeScaling("linear", factor=float(value("rope.scaling.factor"))))
    if kind != "none":
        raise UnsupportedArchitecture(f"rope scaling of type {kind!r} is not supported; supported: none, linear")
    return Rope(theta)


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
