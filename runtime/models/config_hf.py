"""Read a `ModelConfig` from a Hugging Face `config.json`, in the layouts of transformers 4.x and 5.x.

Source for meanings: transformers' configuration classes of each model. Not here: a family's defaults (`families.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ramet.errors import BrokenModelFile, UnsupportedArchitecture
from ramet.runtime.models.config import (
    Activation,
    Fields,
    ModelConfig,
    Rope,
    RopeScaling,
    check_size,
    token_ids,
)
from ramet.runtime.models.families import Family, family_of_hf

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}


def config_from_hf(config: Fields) -> ModelConfig:
    """Read a parsed `config.json` in the layout of transformers 4.x or 5.x. Of multimodal Gemma 3, read the text part.

    Raises: UnsupportedArchitecture; BrokenModelFile naming a missing or wrong field.
    """
    family = family_of_hf(config)
    architecture = family.name
    fields: dict[str, Any] = dict(family.defaults)
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
    for name, value in (("num_layers", num_layers), ("num_heads", num_heads), ("hidden_size", hidden_size)):
        check_size(name, value)
    head_dim = fields.get("head_dim") or hidden_size // num_heads
    rope, local_rope = _hf_ropes(fields, family)
    window, sliding_layers = _hf_windows(fields, family, num_layers)
    is_gemma = family.is_gemma
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
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=bias if family.o_bias is None else family.o_bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        activation=_ACTIVATIONS[activation],
        embedding_scale=math.sqrt(hidden_size) if is_gemma else 1.0,
        norm_offset=1.0 if is_gemma else 0.0,
        feed_forward_norms=is_gemma,
        logit_softcap=fields.get("final_logit_softcapping"),
        bos_id=fields.get("bos_token_id"),
        eos_ids=token_ids(fields.get("eos_token_id")),
        pad_id=fields.get("pad_token_id"),
    )


def _hf_ropes(fields: Fields, family: Family) -> tuple[Rope, Rope]:
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
    if family.is_gemma:  # long-context scaling applies only to the global layers
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


def _hf_windows(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """(window, for each layer whether it slides)."""
    window = fields.get("sliding_window")
    if window is None or family.sliding == "none":
        return None, ()
    if family.sliding == "optional" and not fields.get("use_sliding_window"):
        return None, ()
    if family.sliding == "all":  # transformers' Mistral ignores layer_types, too
        return window, (True,) * num_layers
    layer_types = fields.get("layer_types")
    if layer_types:
        unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
        if unknown:
            raise UnsupportedArchitecture(f"layer types {', '.join(unknown)} are not supported")
        return window, tuple(kind == "sliding_attention" for kind in layer_types)
    if family.sliding == "pattern":
        pattern = int(fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern") or 6)
        return window, tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    first = int(fields.get("max_window_layers", 28))
    return window, tuple(layer >= first for layer in range(num_layers))
