"""Read a `ModelConfig` from a Hugging Face `config.json`, or from a GGUF file's metadata.

There is one vocabulary, that of `config.json` in the layouts of transformers 4.x and 5.x. A GGUF file's keys are
translated to it. What only its tensors show, such as biases, is passed beside it. Source for meanings: transformers'
configuration classes; llama.cpp's model loader and converter. Not here: what differs between families (`families.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
from ramet.runtime.models.families import Family, Variations, family_named, family_of_gguf, family_of_hf

if TYPE_CHECKING:
    from ramet.runtime.models.gguf_file import GgufFile

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
SchemeKind = Literal["fp8", "gptq", "awq", "packed"]
# Names in `config.json` of the keys below `{architecture}.` that every GGUF file must have, and of others.
_NEEDED_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OTHER_KEYS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint's matrices are quantised.

    group: columns with the same scale, in 4 bits; 0: a whole row. block: (rows, columns) with the same scale, in FP8.
    zero_offset: is added to stored zero points.
    """

    kind: SchemeKind
    group: int = 0
    block: tuple[int, int] | None = None
    zero_offset: int = 0


def scheme_of(config: Fields) -> Scheme | None:
    """The scheme in a parsed `config.json`; None if nothing is quantised.

    Raises: UnsupportedArchitecture, BrokenModelFile.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method")
    if method == "fp8":
        return Scheme("fp8", block=_block(settings.get("weight_block_size")))
    if method == "modelopt" and settings.get("quant_algo") == "FP8":
        return Scheme("fp8")
    if method == "gptq" and settings.get("bits") == 4:
        layout = settings.get("checkpoint_format") or "gptq"
        if layout in ("gptq", "gptq_v2"):  # the first version stores zero points minus 1
            return Scheme("gptq", _group(settings.get("group_size")), zero_offset=int(layout == "gptq"))
    is_gemm = str(settings.get("version", "gemm")).lower() == "gemm"
    if method == "awq" and settings.get("bits", settings.get("w_bit")) == 4 and is_gemm:
        return Scheme("awq", _group(settings.get("group_size", settings.get("q_group_size"))))
    if method == "compressed-tensors":
        return _compressed_tensors(settings)
    raise UnsupportedArchitecture(
        f"weights quantised with {_shown(settings)} are not supported; supported: fp8, modelopt FP8, 4-bit gptq, 4-bit "
        "awq (gemm), compressed-tensors with FP8 or packed 4-bit weights, GGUF files, and 16 or 32 bits"
    )


def _group(size: object) -> int:
    """A group size in a configuration: -1 or null is a whole row."""
    return 0 if size in (None, -1) else check_size("intermediate_size", size, "group_size")


def _block(size: object) -> tuple[int, int] | None:
    """The (rows, columns) that share a scale."""
    if size is None:
        return None
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise BrokenModelFile(f"the weights' block size is {size!r} but must be two numbers")
    rows, columns = (check_size("intermediate_size", one, "weight_block_size") for one in size)
    return rows, columns


def _shown(settings: Fields) -> str:
    names = ("quant_method", "quant_algo", "format", "bits", "w_bit", "version", "checkpoint_format")
    return ", ".join(f"{name} {str(settings[name])[:40]!r}" for name in names if settings.get(name) is not None)


def _compressed_tensors(settings: Fields) -> Scheme:
    found = set()
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
        if (kind, bits) == ("float", 8) and strategy in ("tensor", "channel", "block"):
            found.add(Scheme("fp8", block=_block(weights.get("block_structure")) if strategy == "block" else None))
        elif (kind, bits) == ("int", 4) and strategy in ("group", "channel"):
            found.add(Scheme("packed", _group(weights.get("group_size")) if strategy == "group" else 0))
        else:
            raise UnsupportedArchitecture(
                f"compressed-tensors weights of {bits} bits ({kind}, {strategy}) are not supported; supported: 8-bit "
                "float by tensor, channel or block, and 4-bit int by group or channel"
            )
    if len(found) != 1:
        raise UnsupportedArchitecture(f"compressed-tensors with {len(found)} kinds of weights is not supported; one is")
    return found.pop()


_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def config_from_hf(config: Fields) -> ModelConfig:
    """Read a parsed `config.json` in the layout of transformers 4.x or 5.x. Of multimodal Gemma 3, read the text part.

    Raises: UnsupportedArchitecture; BrokenModelFile naming a missing or wrong field.
    """
    family = family_of_hf(config)
    fields: dict[str, Any] = dict(family.defaults)
    fields |= {key: value for key, value in config.items() if value is not None and key != "text_config"}
    fields |= {key: value for key, value in (config.get("text_config") or {}).items() if value is not None}
    # An explicit null means "no window" (Mistral), so it must win over the default.
    if any(part.get("sliding_window", 0) is None for part in (config, config.get("text_config") or {})):
        fields["sliding_window"] = None
    scheme_of(config)  # raises for quantised weights that cannot be read
    if fields.get("use_bidirectional_attention"):
        raise UnsupportedArchitecture("use_bidirectional_attention: an encoder cannot generate text")
    return _config(family, fields, {})


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Read GGUF metadata. Missing facts (biases, tied embeddings, vocabulary size) are derived from the tensors.

    Raises: UnsupportedArchitecture; BrokenModelFile naming a missing key.
    """
    read, tensors = file.metadata.get, file.tensors
    family = family_of_gguf(read("general.architecture"))
    prefix = family.gguf
    stored = {key: read(f"{prefix}.{key}") for key in (*_NEEDED_KEYS, *_OTHER_KEYS)}
    has_experts = bool(read(f"{prefix}.expert_count"))
    if has_experts and family.name == "llama":
        family = family_named("mixtral")
    if "token_embd.weight" not in tensors:
        raise BrokenModelFile("the GGUF file lacks the tensor token_embd.weight")
    for key in _NEEDED_KEYS:
        if stored[key] is None:
            raise BrokenModelFile(f"the GGUF file lacks the key {prefix}.{key}")
    names = _NEEDED_KEYS | _OTHER_KEYS
    fields: dict[str, Any] = {**family.defaults, "num_key_value_heads": None, "head_dim": None}
    for key, value in stored.items():
        if value is not None:  # what is stored as float32 is 1e-5 again
            fields[names[key]] = float(f"{value:.7g}") if isinstance(value, float) else value
    fields["vocab_size"] = int(tensors["token_embd.weight"].shape[0])
    fields["tie_word_embeddings"] = "output.weight" not in tensors
    eos = [read(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    fields["eos_token_id"] = list(dict.fromkeys(int(token) for token in eos if token is not None))
    fields["bos_token_id"] = read("tokenizer.ggml.bos_token_id")
    fields["pad_token_id"] = read("tokenizer.ggml.padding_token_id")
    num_layers, num_heads = _check_sizes(fields)
    # llama.cpp's rule: only the Gemmas of 27B scale by hidden / heads; all others by the head dimension.
    each = fields["hidden_size"] // num_heads
    is_27b = num_layers == _LAYERS_OF_27B.get(str(prefix))
    fields["query_pre_attn_scalar"] = each if is_27b else fields["head_dim"] or each
    facts: Variations = {
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "o_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "qk_norm": None,
    }
    if "blk.0.attn_q_norm.weight" in tensors:
        is_head = tensors["blk.0.attn_q_norm.weight"].shape == (fields["head_dim"] or each,)
        facts["qk_norm"] = "head" if is_head else "all"
    if has_experts:
        fields |= _gguf_experts(file, prefix, fields)
        is_dense = tuple(f"blk.{layer}.ffn_gate_inp.weight" not in tensors for layer in range(num_layers))
        facts["dense_layers"] = is_dense if any(is_dense) else ()
    kind = read(f"{prefix}.rope.scaling.type", "none")
    if "rope_factors_long.weight" in tensors:
        kind = "longrope"  # no key says so
    if "rope_freqs.weight" in tensors:  # llama.cpp bakes Llama 3's ramp into a tensor of divisors
        divisors = tensors["rope_freqs.weight"].dequantised().reshape(-1)
        fields["rope_parameters"] = {"rope_type": "divisors", "divisors": divisors}
    elif kind == "linear":
        factor = read(f"{prefix}.rope.scaling.factor")
        if factor is None:
            raise BrokenModelFile(f"the GGUF file lacks the key {prefix}.rope.scaling.factor")
        fields["rope_parameters"] = {"rope_type": kind, "factor": factor}
    elif kind != "none":
        raise UnsupportedArchitecture(f"rope scaling of type {kind!r} is not supported; supported: none, linear")
    window = read(f"{prefix}.attention.sliding_window")
    pattern = _gguf_sliding_layers(
        read(f"{prefix}.attention.sliding_window_pattern"), num_layers, fields.get("sliding_window_pattern")
    )
    facts |= {
        "sliding_window": window if window and any(pattern) else None,
        "sliding_layers": pattern if window else (),
    }
    return _config(family, fields, facts)


def _gguf_experts(file: GgufFile, prefix: str | None, fields: Fields) -> dict[str, Any]:
    """The fields of experts under their names in `config.json`."""
    read = file.metadata.get
    found = {"num_experts": read(f"{prefix}.expert_count"), "num_experts_per_tok": read(f"{prefix}.expert_used_count")}
    found["num_local_experts"] = found["num_experts"]
    found["moe_intermediate_size"] = read(f"{prefix}.expert_feed_forward_length", fields["intermediate_size"])
    found["norm_topk_prob"] = read(f"{prefix}.expert_weights_norm", prefix != "qwen2moe")  # llama.cpp's rule
    shared = [tensor.shape[0] for name, tensor in file.tensors.items() if name.endswith(".ffn_up_shexp.weight")]
    found["shared_expert_intermediate_size"] = shared[0] if shared else 0
    return found


def _config(family: Family, fields: Fields, facts: Variations) -> ModelConfig:
    """The configuration from fields under their names in `config.json`. facts: what is known about the tensors."""

    def need(name: str) -> Any:  # JSON value
        if name not in fields:
            raise BrokenModelFile(f"config.json of a {family.name} model lacks {name!r}")
        return fields[name]

    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        need(name)
    num_layers, num_heads = _check_sizes(fields)
    head_dim = fields.get("head_dim") or fields["hidden_size"] // num_heads
    bias = bool(fields.get("attention_bias", False))
    activation = fields.get("hidden_activation") or need("hidden_act")
    if activation not in _ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"activation {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    known: Variations = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(fields.get("mlp_bias", False))}
    known["attention_scale"] = float(head_dim) ** -0.5
    known["rope"], known["local_rope"] = _ropes(fields)
    if "sliding_window" not in facts:
        known["sliding_window"], known["sliding_layers"] = _windows(fields, family, num_layers)
    try:
        varied = family.variations(fields)
    except KeyError as error:
        raise BrokenModelFile(f"config.json of a {family.name} model lacks {error.args[0]!r}") from error
    return ModelConfig(
        architecture=family.name,
        hidden_size=fields["hidden_size"],
        intermediate_size=need("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if fields.get("num_key_value_heads") is None else fields["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=need("vocab_size"),
        rms_norm_eps=float(need("rms_norm_eps")),
        max_position_embeddings=need("max_position_embeddings"),
        tie_word_embeddings=bool(need("tie_word_embeddings")),
        activation=_ACTIVATIONS[activation],
        attention_softcap=fields.get("attn_logit_softcapping"),
        logit_softcap=fields.get("final_logit_softcapping"),
        bos_id=fields.get("bos_token_id"),
        eos_ids=token_ids(fields.get("eos_token_id")),
        pad_id=fields.get("pad_token_id"),
        **(known | varied | facts),
    )


def _check_sizes(fields: Fields) -> tuple[int, int]:
    """Check the sizes that others are computed from. Returns the numbers of layers and of heads."""
    check_size("hidden_size", fields["hidden_size"])
    num_layers = check_size("num_layers", fields["num_hidden_layers"])
    return num_layers, check_size("num_heads", fields["num_attention_heads"])


def _ropes(fields: Fields) -> tuple[Rope, Rope]:
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
    if "rope_local_base_freq" in fields:  # long-context scaling applies only to the global layers
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
        if kind == "divisors":  # of a GGUF file
            return Rope(theta, RopeScaling("divisors", divisors=tuple(map(float, parameters["divisors"]))))
        if kind == "llama3":
            scaling = RopeScaling(
                "llama3",
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_max_position=int(parameters["original_max_position_embeddings"]),
            )
            return Rope(theta, scaling)
        if kind == "yarn":
            return Rope(theta, _yarn(parameters, fields))
    except KeyError as error:
        raise BrokenModelFile(f"rope scaling of type {kind!r} lacks {error.args[0]!r} in config.json") from error
    raise UnsupportedArchitecture(
        f"rope scaling of type {kind!r} is not supported; supported: default, linear, llama3, yarn"
    )


def _yarn(parameters: Fields, fields: Fields) -> RopeScaling:
    factor = float(parameters["factor"])

    def magnitude_of(share: float) -> float:
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0

    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        part, whole = parameters.get("mscale"), parameters.get("mscale_all_dim")
        magnitude = magnitude_of(float(part)) / magnitude_of(float(whole)) if part and whole else magnitude_of(1.0)
    original = parameters.get("original_max_position_embeddings") or fields["max_position_embeddings"]
    return RopeScaling(
        "yarn",
        factor=factor,
        original_max_position=int(original),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        is_truncated=bool(parameters.get("truncate", True)),
        magnitude=float(magnitude),
    )


def _windows(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
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
        pattern = int(fields.get("_sliding_window_pattern") or fields["sliding_window_pattern"])
        return window, tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
    first = int(fields.get("max_window_layers", 28))
    return window, tuple(layer >= first for layer in range(num_layers))


def _gguf_sliding_layers(stored: object, num_layers: int, own_period: int | None) -> tuple[bool, ...]:
    """For each layer whether it slides. own_period: of the family; None if all its layers slide, or none."""
    if isinstance(stored, list):
        return tuple(bool(item) for item in stored)
    period = stored if isinstance(stored, int) and not isinstance(stored, bool) else own_period or 1
    if period < 1:
        raise BrokenModelFile(f"attention.sliding_window_pattern is {period} but must be at least 1")
    return tuple((layer + 1) % period != 0 if own_period is not None else True for layer in range(num_layers))
