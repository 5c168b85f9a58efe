"""The decoder against transformers: the same tiny random weights, the same logits, however the prompt is cut up."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ramet.errors import UnsupportedArchitecture
from ramet.kernels.layers.kv_fp8 import FP8
from ramet.runtime.models.adapters import Adapters
from ramet.runtime.models.build import apply_fp8_cache, build_decoder
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.families import family_named
from ramet.runtime.models.linear_fp8 import Fp8Linear
from ramet.runtime.models.load import open_weights
from ramet.runtime.models.weights import Weights
from ramet.runtime.testing.bare_cache import BareCache
from ramet.runtime.testing.dummy import dummy_decoder, write_dummy_adapter

TOLERANCE = 1e-4
NUM_TOKENS = 41

_TINY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough that every part of the model shows in the logits
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
_GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

# name: (transformers configuration class, fields beside _TINY)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False}),
    "llama_biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": (
        "LlamaConfig",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "tie_word_embeddings": True},
    ),
    "linear_rope": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "yarn": (
        "Qwen3Config",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 10000.0,
            },
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": 11, "head_dim": 16}),
    "mistral_full": ("MistralConfig", {"sliding_window": None, "num_key_value_heads": 1, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2_sliding": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 20, "tie_word_embeddings": False}),
    "qwen3_tied": ("Qwen3Config", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 13,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 13, "layer_types": _GEMMA_LAYERS, "head_dim": 16, "query_pre_attn_scalar": 24},
    ),
    "gemma3_untied": (
        "Gemma3TextConfig",
        {
            "sliding_window": 5,
            "layer_types": _GEMMA_LAYERS,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "phi3_sliding": ("Phi3Config", {"pad_token_id": 0, "sliding_window": 11}),
    "granite": (
        "GraniteConfig",
        {"attention_multiplier": 0.3, "embedding_multiplier": 4.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "smollm3": ("SmolLM3Config", {"pad_token_id": 0, "no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16, "attention_bias": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
}


class Oracle:
    """transformers' model, our decoder from the files it saved, and logits of one prompt."""

    def __init__(self, name: str, directory: Path) -> None:
        class_name, fields = MODELS[name]
        torch.manual_seed(list(MODELS).index(name))
        config = getattr(transformers, class_name)(**(_TINY | fields))
        config._attn_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(("norm.weight", "bias")):  # ones and zeros would hide a missing one
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(directory)
        self.prompt = torch.randint(0, config.vocab_size, (NUM_TOKENS,)).tolist()
        with torch.no_grad():
            self.expected: Tensor = model(torch.tensor([self.prompt])).logits[0]
        self.directory = directory
        self.weights = open_weights(directory)[1]
        self.decoder = load(directory)


def load(directory: Path) -> Decoder:
    config, weights = open_weights(directory)
    return build_decoder(config, weights, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module", params=list(MODELS))
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(request.param, tmp_path_factory.mktemp(request.param))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    difference = (actual.float() - expected.float()).abs()
    assert float(difference.max()) < tolerance, (
        f"max {float(difference.max()):.2e}, mean {float(difference.mean()):.2e}"
    )


def test_logits_of_a_whole_prompt_equal_transformers(oracle: Oracle) -> None:
    cache = BareCache(oracle.decoder, 1, NUM_TOKENS)
    assert float(oracle.expected.std()) > 0.2, "the oracle's logits are too flat to show a mistake"
    assert_close(cache.step([], [(0, oracle.prompt)]), oracle.expected)


def test_logits_of_a_chunked_prompt_equal_transformers(oracle: Oracle) -> None:
    cache = BareCache(oracle.decoder, 1, NUM_TOKENS, page_size=8)
    bounds = [0, 1, 7, 23, 24, NUM_TOKENS]
    chunks = [oracle.prompt[low:high] for low, high in itertools.pairwise(bounds)]
    assert_close(torch.cat([cache.step([], [(0, chunk)]) for chunk in chunks]), oracle.expected)


def test_logits_token_by_token_equal_transformers(oracle: Oracle) -> None:
    cache = BareCache(oracle.decoder, 1, NUM_TOKENS, page_size=8)
    logits = [cache.step([(0, token)], []) for token in oracle.prompt]
    assert_close(torch.cat(logits), oracle.expected)


def test_a_mixed_step_of_decode_and_extend_rows_equals_transformers(oracle: Oracle) -> None:
    prompt = oracle.prompt
    cache = BareCache(oracle.decoder, 4, NUM_TOKENS)
    cache.step([], [(0, prompt[:20]), (1, prompt[:33]), (2, prompt[:9])])
    logits = cache.step([(1, prompt[33]), (0, prompt[20])], [(3, prompt[:5]), (2, prompt[9:30])])
    expected = oracle.expected
    assert_close(logits, torch.cat([expected[33:34], expected[20:21], expected[:5], expected[9:30]]))


def one_by_one(decoder: Decoder, prompt: list[int]) -> Tensor:
    """Logits token by token: so few tokens are multiplied exactly on every CPU."""
    cache = BareCache(decoder, 1, NUM_TOKENS)
    with torch.inference_mode():
        return torch.cat([cache.step([(0, token)], []) for token in prompt])


def test_weights_of_16_bits_give_the_logits_of_the_same_numbers_in_32(oracle: Oracle) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in oracle.weights.items()}
    config = oracle.decoder.config
    held = build_decoder(config, Weights.from_tensors(rounded), device="cpu")
    wide = {name: tensor.float() for name, tensor in rounded.items()}
    exact = build_decoder(config, Weights.from_tensors(wide), device="cpu", dtype=torch.float32)
    assert_close(one_by_one(held, oracle.prompt), one_by_one(exact, oracle.prompt), 2e-4)


def test_fp8_moves_the_logits_a_little(oracle: Oracle) -> None:
    decoder = build_decoder(oracle.decoder.config, oracle.weights, device="cpu", quantization="fp8")
    is_rounded = any(isinstance(linear.method, Fp8Linear) for linear in decoder.linears())
    assert is_rounded == (decoder.config.hidden_size % 16 == 0)
    found = one_by_one(decoder, oracle.prompt)
    agreement = torch.corrcoef(torch.stack((found.flatten(), oracle.expected.flatten())))[0, 1]
    assert float(agreement) > 0.85, agreement  # a token's experts may change


def test_fp8_keys_and_values_move_the_logits_a_little(oracle: Oracle) -> None:
    cache = BareCache(apply_fp8_cache(oracle.decoder), 1, NUM_TOKENS, kv_dtype=FP8)
    with torch.inference_mode():
        found = torch.cat([cache.step([], [(0, oracle.prompt[:9])]), cache.step([], [(0, oracle.prompt[9:-1])])])
        found = torch.cat([found, cache.step([(0, oracle.prompt[-1])], [])])
    assert not torch.equal(found, oracle.expected)
    agreement = torch.corrcoef(torch.stack((found.flatten(), oracle.expected.flatten())))[0, 1]
    assert float(agreement) > 0.95, agreement


def test_an_adapter_gives_the_logits_of_the_merged_weights_to_the_tokens_that_chose_it(
    oracle: Oracle, tmp_path: Path
) -> None:
    file = load_file(oracle.directory / "model.safetensors")
    modules = {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in file.items()
        if tensor.ndim == 2 and re.search(r"self_attn|mlp\.(gate|up|down|gate_up)_proj", name)
    }
    changes = write_dummy_adapter(tmp_path / "adapter", modules, alpha=2.0)
    merged = {name: tensor + changes.get(name.removesuffix(".weight"), 0) for name, tensor in file.items()}
    save_file(merged, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((oracle.directory / "config.json").read_text())
    expected = BareCache(load(tmp_path), 1, NUM_TOKENS).step([], [(0, oracle.prompt)])
    assert float((expected - oracle.expected).abs().max()) > 0.05
    adapters = Adapters(oracle.decoder, 2, 8)
    chosen = adapters.add("one", adapters.read(tmp_path / "adapter"))
    cache = BareCache(adapters.decoder, 2, NUM_TOKENS)
    adapters.choose(np.repeat(np.asarray([0, chosen.index], dtype=np.int32), NUM_TOKENS))
    logits = cache.step([], [(0, oracle.prompt), (1, oracle.prompt)])
    assert_close(logits[:NUM_TOKENS], oracle.expected)
    assert_close(logits[NUM_TOKENS:], expected, 5e-4 if oracle.decoder.config.experts else TOLERANCE)


def test_a_gptq_checkpoint_gives_the_logits_of_its_dequantised_numbers(oracle: Oracle, tmp_path: Path) -> None:
    fields = json.loads((oracle.directory / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    if family_named(oracle.decoder.config.architecture).fused:  # its matrices are several in one, which is refused
        save_file(
            {name: tensor.contiguous() for name, tensor in oracle.weights.items()}, tmp_path / "model.safetensors"
        )
        with pytest.raises(UnsupportedArchitecture, match=r"quantised \w+ checkpoints"):
            open_weights(tmp_path)
        return
    tensors: dict[str, Tensor] = {}
    dequantised: dict[str, Tensor] = {}
    for name, tensor in oracle.weights.items():
        if ".layers." not in name or tensor.ndim == 1 or tensor.shape[0] % 8:
            tensors[name] = dequantised[name] = tensor.contiguous()
            continue
        scale = (tensor.abs().amax(1, keepdim=True) / 7).half().float()
        values = (tensor / scale).round().clamp(-8, 7).long() + 8
        dequantised[name] = ((values - 8) * scale).bfloat16().float()
        base = name.removesuffix("weight")
        shifts = torch.arange(0, 32, 4)
        tensors[base + "qweight"] = (values.t().reshape(-1, 8, tensor.shape[0]) << shifts[:, None]).sum(1).int()
        tensors[base + "qzeros"] = torch.full((1, tensor.shape[0] // 8), 0x77777777, dtype=torch.int32)
        tensors[base + "scales"] = scale.t().contiguous().half()
    save_file(tensors, tmp_path / "model.safetensors")
    config = oracle.decoder.config
    expected = build_decoder(config, Weights.from_tensors(dequantised), device="cpu", dtype=torch.float32)
    found = build_decoder(*open_weights(tmp_path), device="cpu", dtype=torch.float32)
    assert_close(one_by_one(found, oracle.prompt), one_by_one(expected, oracle.prompt))


def test_quantised_checkpoints_of_families_with_fused_matrices_are_refused(tmp_path: Path) -> None:
    fields = _TINY | {"architectures": ["Phi3ForCausalLM"], "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file({"model.norm.weight": torch.zeros(48)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedArchitecture, match="quantised phi3 checkpoints"):
        open_weights(tmp_path)


def test_a_dummy_decoder_keeps_activations_sane(oracle: Oracle) -> None:
    decoder = dummy_decoder(oracle.decoder.config, "cpu", torch.float32, seed=3)
    logits = BareCache(decoder, 1, NUM_TOKENS).step([], [(0, oracle.prompt)])
    assert bool(logits.isfinite().all())
    assert 0.1 < float(logits.std()) < 10
    again = dummy_decoder(oracle.decoder.config, "cpu", torch.float32, seed=3)
    assert torch.equal(BareCache(again, 1, NUM_TOKENS).step([], [(0, oracle.prompt)]), logits)
    other = dummy_decoder(oracle.decoder.config, "cpu", torch.float32, seed=4)
    tokens = torch.tensor(oracle.prompt)
    assert not torch.equal(other.embedding(tokens), decoder.embedding(tokens))
