"""Configurations of both formats, checked against transformers' own classes where it has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ramet.errors import BrokenModelFile, UnsupportedArchitecture
from ramet.runtime.models.config import ModelConfig, Rope, RopeScaling, llama_3_1_8b, smollm2_135m
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.weights import expected_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama(**fields: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], **SIZES, **fields}


def test_transformers_5_and_4_layouts_of_llama_3_give_the_same_configuration() -> None:
    old = llama(rope_theta=500000.0, rope_scaling=LLAMA3_ROPE)
    new = llama(rope_parameters={"rope_theta": 500000.0, **LLAMA3_ROPE})
    assert config_from_hf(old) == config_from_hf(new)
    assert config_from_hf(old).rope == llama_3_1_8b().rope


def test_transformers_5_and_4_layouts_of_gemma_3_give_the_same_configuration() -> None:
    base = {"architectures": ["Gemma3ForCausalLM"], **SIZES, "head_dim": 16, "sliding_window": 8}
    old = base | {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    }
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    new = base | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": kinds,
    }
    assert config_from_hf(old) == config_from_hf(new)
    config = config_from_hf(new)
    assert config.rope == Rope(1e6, RopeScaling("linear", factor=8.0))
    assert config.local_rope == Rope(1e4)
    assert [config.window(layer) for layer in range(7)] == [8, 8, 8, 8, 8, None, 8]
    assert config.layer_rope(5) == config.rope
    assert config.layer_rope(6) == config.local_rope


@pytest.mark.parametrize(
    ("config_class", "name", "fields"),
    [
        (LlamaConfig, "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        (MistralConfig, "MistralForCausalLM", {"sliding_window": 16}),
        (Qwen2Config, "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
        (Qwen3Config, "Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
        (Gemma3TextConfig, "Gemma3ForCausalLM", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    ],
)
def test_configurations_written_by_transformers_are_read_back(
    config_class: Any, name: str, fields: dict[str, Any]
) -> None:
    theirs = config_class(**SIZES, **fields)
    ours = config_from_hf(theirs.to_dict() | {"architectures": [name]})
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.num_kv_heads == 2
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    layer_types = getattr(theirs, "layer_types", None)
    if layer_types is not None:
        windows = [theirs.sliding_window if kind == "sliding_attention" else None for kind in layer_types]
        assert [ours.window(layer) for layer in range(7)] == windows
    if name == "MistralForCausalLM":
        assert [ours.window(layer) for layer in range(7)] == [16] * 7
    scalar = getattr(theirs, "query_pre_attn_scalar", ours.head_dim)
    assert ours.attention_scale == pytest.approx(scalar**-0.5)
    assert (ours.qkv_bias, ours.o_bias) == {"LlamaForCausalLM": (True, True), "Qwen2ForCausalLM": (True, False)}.get(
        name, (False, False)
    )


def test_text_part_of_a_multimodal_gemma_uses_the_defaults_that_its_config_leaves_out() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = config_from_hf({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    assert (config.sliding_window, config.embedding_scale, config.norm_offset) == (1024, 2560**0.5, 1.0)


def test_a_null_sliding_window_means_full_attention() -> None:
    fields = {"architectures": ["MistralForCausalLM"], **SIZES}
    assert config_from_hf(fields | {"sliding_window": None}).window(0) is None
    assert config_from_hf(fields).window(0) == 4096
    small = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": SIZES | {"sliding_window": None}}
    assert config_from_hf(small).window(0) is None
    assert config_from_hf(small).architecture == "mistral"


@pytest.mark.parametrize("architecture", [["MambaForCausalLM"], ["LlamaForSequenceClassification"], []])
def test_an_unknown_architecture_names_those_supported(architecture: list[str]) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"LlamaForCausalLM.*Qwen3ForCausalLM.*Gemma3ForCausalLM"):
        config_from_hf({"architectures": architecture, "model_type": "mamba"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"hidden_act": "relu"}, "relu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=message):
        config_from_hf(llama(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": 15}, "even"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"hidden_size": "64", "head_dim": 16}, "hidden_size"),
        ({"architectures": ["MixtralForCausalLM"]}, "lacks 'num_local_experts'"),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 1 << 20, "num_experts_per_tok": 2},
            "num_experts is 1048576 but must be an integer from 1 to 4,096",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok is 3 but there are 2 experts",
        ),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, "1 layer types for 7 layers"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ],
)
def test_impossible_values_are_a_broken_file(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BrokenModelFile, match=message):
        config_from_hf(llama(**fields))


def test_a_missing_field_is_named() -> None:
    fields = llama()
    del fields["intermediate_size"]
    with pytest.raises(BrokenModelFile, match="intermediate_size"):
        config_from_hf(fields)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3_ROPE,
        YARN,
        {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        {**YARN, "attention_factor": 1.5},
    ],
)
def test_scaled_frequencies_equal_those_of_transformers(parameters: dict[str, Any]) -> None:
    fields = {"rope_theta": 500000.0, **parameters}
    theirs, magnitude = ROPE_INIT_FUNCTIONS[str(parameters["rope_type"])](
        LlamaConfig(**SIZES, head_dim=128, max_position_embeddings=16384, rope_parameters=fields), torch.device("cpu")
    )
    rope = config_from_hf(llama(head_dim=128, max_position_embeddings=16384, rope_parameters=fields)).rope
    np.testing.assert_allclose(rope.inverse_frequencies(128), theirs.numpy(), rtol=1e-5)
    assert rope.scaling is not None
    assert rope.scaling.magnitude == pytest.approx(magnitude)


@given(st.integers(1, 64).map(lambda half: 2 * half), st.floats(100.0, 1e7))
def test_unscaled_frequencies_fall_from_one(head_dim: int, theta: float) -> None:
    inverse = Rope(theta).inverse_frequencies(head_dim)
    assert inverse.shape == (head_dim // 2,)
    assert inverse[0] == 1.0
    assert np.all(np.diff(inverse) < 0)


def test_well_known_shapes_have_the_published_number_of_parameters() -> None:
    def count(config: ModelConfig) -> int:
        return sum(int(np.prod(shape)) for shape in expected_tensors(config).values())

    assert count(llama_3_1_8b()) == 8_030_261_248
    assert count(smollm2_135m()) == 134_515_008
