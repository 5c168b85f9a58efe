"""The table of model families: what each one's files omit or name differently, and how its layers vary.

A new family is one more row, if the decoder has all parts of its layers. Both readers of configurations
(`config_files.py`) and both loaders of weights use the same row. Not here: tokenizers, chat templates.
Source for the defaults: transformers' configuration classes of each model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ramet.errors import UnsupportedArchitecture
from ramet.runtime.models.config import Experts, Fields

# The layers that attend only to a window: those that `config.json` lists; all, if it has a window; or none. "optional":
# those from `max_window_layers` on, if `use_sliding_window` is true. "pattern": all but every n-th.
Sliding = Literal["none", "all", "optional", "pattern"]
Variations = dict[str, Any]  # fields of ModelConfig


@dataclass(frozen=True, slots=True)
class Family:
    """A model family. `name`: its `model_type`.

    hf_classes: the names under `architectures` in `config.json`. model_types: other values of `model_type`. defaults:
    values that `config.json` may leave out. variations: returns the fields of ModelConfig that differ from Llama's,
    made from those of `config.json`. renames: parts of tensors' names in safetensors files and what Ramet calls them.
    fused: matrices whose rows are those of several of ours. gguf: its architecture in GGUF files; None if they are not
    read. interleaves_heads: llama.cpp's converter interleaves the rotary halves of q and k.
    """

    name: str
    hf_classes: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    defaults: Fields = field(default_factory=dict)
    variations: Callable[[Fields], Variations] = lambda fields: {}
    sliding: Sliding = "none"
    renames: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gguf: str | None = None
    interleaves_heads: bool = False


_LLAMA: Fields = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_MISTRAL: Fields = {
    **_LLAMA,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_QWEN: Fields = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_GEMMA3: Fields = {
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
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


_GEMMA2: Fields = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_theta": 10_000.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _gemma(fields: Fields) -> Variations:
    return {
        "attention_scale": float(fields["query_pre_attn_scalar"]) ** -0.5,
        "embedding_scale": math.sqrt(fields["hidden_size"]),
        "norm_offset": 1.0,
        "norms": (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    }


def _smollm3(fields: Fields) -> Variations:
    interval = int(fields["no_rope_layer_interval"])
    rotated = fields.get("no_rope_layers")  # in spite of its name, 1 where there is a rotary embedding
    if rotated is None:
        rotated = [(layer + 1) % interval != 0 for layer in range(fields["num_hidden_layers"])]
    return {"unrotated_layers": tuple(not one for one in rotated)}


def _granite(fields: Fields) -> Variations:
    return {
        "attention_scale": float(fields["attention_multiplier"]),
        "embedding_scale": float(fields["embedding_multiplier"]),
        "residual_scale": float(fields["residual_multiplier"]),
        "logit_scale": 1.0 / float(fields["logits_scaling"]),
    }


def _mixtral(fields: Fields) -> Variations:
    count, per_token = fields["num_local_experts"], fields["num_experts_per_tok"]
    return {"experts": Experts(count, per_token, fields["intermediate_size"]), "mlp_bias": False}


def _qwen_experts(fields: Fields) -> Variations:
    count = fields["num_experts"] if "num_experts" in fields else fields["num_local_experts"]
    dense, step = set(fields.get("mlp_only_layers") or ()), int(fields["decoder_sparse_step"])
    is_dense = [layer in dense or (layer + 1) % step != 0 for layer in range(fields["num_hidden_layers"])]
    experts = Experts(
        count,
        fields["num_experts_per_tok"],
        fields["moe_intermediate_size"],
        fields.get("shared_expert_intermediate_size", 0),
        bool(fields["norm_topk_prob"]),
    )
    return {"experts": experts, "dense_layers": tuple(is_dense) if any(is_dense) else (), "mlp_bias": False}


_QWEN_EXPERTS: Fields = {**_QWEN, "decoder_sparse_step": 1, "norm_topk_prob": False}
FAMILIES = (
    Family("llama", ("LlamaForCausalLM",), defaults=_LLAMA, gguf="llama", interleaves_heads=True),
    Family(
        "mistral",
        ("MistralForCausalLM", "Mistral3ForConditionalGeneration"),
        ("mistral3",),
        defaults=_MISTRAL,
        sliding="all",
        gguf="mistral",
        interleaves_heads=True,
    ),
    Family(
        "qwen2",
        ("Qwen2ForCausalLM",),
        defaults=_QWEN,
        variations=lambda fields: {"qkv_bias": True, "o_bias": False},
        sliding="optional",
        gguf="qwen2",
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        defaults={**_QWEN, "head_dim": 128},
        variations=lambda fields: {"qk_norm": "head"},
        sliding="optional",
        gguf="qwen3",
    ),
    Family("gemma2", ("Gemma2ForCausalLM",), defaults=_GEMMA2, variations=_gemma, sliding="pattern", gguf="gemma2"),
    Family(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        ("gemma3_text",),
        defaults=_GEMMA3,
        variations=lambda fields: _gemma(fields) | {"qk_norm": "head"},
        sliding="pattern",
        gguf="gemma3",
    ),
    Family(
        "olmo2",
        ("Olmo2ForCausalLM",),
        defaults={**_LLAMA, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279},
        variations=lambda fields: {
            "qk_norm": "all",
            "norms": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
        },
        gguf="olmo2",
    ),
    Family(
        "phi3",
        ("Phi3ForCausalLM",),
        defaults={**_LLAMA, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000},
        sliding="all",
        fused={
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        },
        gguf="phi3",
    ),
    Family(
        "granite",
        ("GraniteForCausalLM",),
        defaults={
            **_LLAMA,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        variations=_granite,
        gguf="granite",
        interleaves_heads=True,
    ),
    Family(
        "smollm3",
        ("SmolLM3ForCausalLM",),
        defaults={
            **_QWEN,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 128_000,
            "eos_token_id": 128_001,
            "no_rope_layer_interval": 4,
        },
        variations=_smollm3,
        sliding="optional",
        gguf="smollm3",  # its files do not say which layers have no rotary embedding: every fourth
        interleaves_heads=True,
    ),
    Family(
        "seed_oss",
        ("SeedOssForCausalLM",),
        defaults={**_LLAMA, "attention_bias": True, "attention_out_bias": False, "head_dim": 128},
        variations=lambda fields: {"o_bias": bool(fields["attention_out_bias"])},
        gguf="seed_oss",
    ),
    Family(
        "mixtral",
        ("MixtralForCausalLM",),
        defaults={
            **_LLAMA,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "num_key_value_heads": 8,
        },
        variations=_mixtral,
        sliding="all",
        interleaves_heads=True,  # its GGUF files have the architecture llama, and experts
        renames={
            ".block_sparse_moe.": ".mlp.",
            ".w1.": ".gate_proj.",
            ".w3.": ".up_proj.",
            ".w2.": ".down_proj.",
        },
    ),
    Family(
        "qwen2_moe",
        ("Qwen2MoeForCausalLM",),
        defaults=_QWEN_EXPERTS,
        variations=lambda fields: (
            {"qkv_bias": bool(fields.get("qkv_bias", True)), "o_bias": False} | _qwen_experts(fields)
        ),
        sliding="optional",
        gguf="qwen2moe",
    ),
    Family(
        "qwen3_moe",
        ("Qwen3MoeForCausalLM",),
        defaults={**_QWEN_EXPERTS, "head_dim": 128},
        variations=lambda fields: {"qk_norm": "head"} | _qwen_experts(fields),
        sliding="optional",
        gguf="qwen3moe",
    ),
)
_BY_NAME = {family.name: family for family in FAMILIES}
_IN_GGUF = {family.gguf: family for family in FAMILIES if family.gguf is not None}
_BY_CLASS = {name: family for family in FAMILIES for name in family.hf_classes}
_BY_MODEL_TYPE = {name: family for family in FAMILIES for name in (family.name, *family.model_types)}


def family_of_hf(config: Mapping[str, Any]) -> Family:
    """The family of a parsed `config.json`. Raises: UnsupportedArchitecture."""
    classes = config.get("architectures") or []
    if classes:
        for name in classes:
            if name in _BY_CLASS:
                return _BY_CLASS[name]
        raise _unsupported(repr(", ".join(map(str, classes))))
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    raise _unsupported(repr(model_type))


def family_of_gguf(architecture: object) -> Family:
    """The family of a GGUF file, by its `general.architecture`. Raises: UnsupportedArchitecture."""
    if isinstance(architecture, str) and architecture in _IN_GGUF:
        return _IN_GGUF[architecture]
    raise _unsupported(f"{architecture!r} of this GGUF file")


def family_named(name: str) -> Family:
    """The family whose name is `ModelConfig.architecture`."""
    return _BY_NAME[name]


def _unsupported(found: str) -> UnsupportedArchitecture:
    """The error for an architecture that the decoder does not implement."""
    return UnsupportedArchitecture(
        f"the architecture {found} is not supported; supported are {', '.join(_BY_CLASS)} (GGUF: {', '.join(_IN_GGUF)})"
    )
