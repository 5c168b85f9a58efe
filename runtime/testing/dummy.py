"""`dummy_decoder`: a decoder of a given shape with random weights, made on the device in seconds.

For throughput measurements and tests in which only shapes matter. Its output is meaningless.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ramet.kernels.ops import Ops
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.catalog import TINY_CONTEXT, TINY_MODEL
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.decoder import Decoder
from ramet.runtime.models.description import GenerationDefaults, ModelDescription
from ramet.runtime.models.load import LoadedModel
from ramet.runtime.models.weights import Part, Weights, expected_tensors
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer


def dummy_decoder(
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Decoder:
    """Make a decoder with random weights on `device`. The same seed and device give the same weights."""
    weights = dummy_weights(config, torch.device(device), dtype, seed)
    return build_decoder(config, weights, device=device, dtype=dtype)


def dummy_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Weights:
    """Random tensors under the names that `build_decoder` reads. Each tensor is drawn on access.

    Matrices are normal with standard deviation 1 / sqrt(in_features), so a product keeps its input's magnitude.
    Matrices that write to the residual are smaller by sqrt(2 L), so the residual does not grow with depth. Norms are 1,
    biases 0.
    """
    indices = {name: index for index, name in enumerate(expected_tensors(config))}
    residual_scale = 1 / math.sqrt(2 * config.num_layers)

    def read(name: str, shape: tuple[int, ...], part: Part | None) -> Tensor:
        return draw(name, shape) if part is None else part.of(draw(name, shape))

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.full(shape, 1.0 - config.norm_offset, device=device, dtype=dtype)
        if len(shape) == 1:
            return torch.zeros(shape, device=device, dtype=dtype)
        deviation = 1 / math.sqrt(shape[1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation *= residual_scale
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + indices[name])
        return torch.empty(shape, device=device, dtype=dtype).normal_(0.0, deviation, generator=generator)

    return Weights({name: partial(read, name, shape) for name, shape in expected_tensors(config).items()})


# Fields of `config.json` of small models, one for each way of computing a layer on a CPU.
_SMALL: dict[str, Any] = {  # Any: JSON
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "qwen2": _SMALL | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": _SMALL | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False},
    "gemma3": _SMALL
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}


def small_weights(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Weights:
    """As `dummy_weights` on the CPU, with biases that are not 0."""
    drawn = dummy_weights(config, torch.device("cpu"), dtype, seed=1)
    shapes = expected_tensors(config)
    biases = {key: torch.linspace(-0.5, 0.5, *shape, dtype=dtype) for key, shape in shapes.items() if "bias" in key}
    return Weights.from_tensors({key: biases.get(key, drawn[key]) for key in shapes})


def write_dummy_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rank: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Write a random adapter (LoRA) as PEFT does. shapes: [N, K] of the modules that it changes.

    Returns what it adds to each module's weight: fp32 [N, K].
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for module, (rows, columns) in shapes.items():
        a = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        b = torch.randn(rows, rank, generator=generator) / math.sqrt(rank)
        name = f"base_model.model.{module}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        changes[module] = b @ a * (alpha / rank)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(shapes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return changes


def llama_of_transformers(config: ModelConfig, weights: Weights) -> Any:  # Any: a model of transformers
    """The same Llama as a model of transformers in fp32, to compare with."""
    import transformers

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope.theta,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    assert not unexpected, unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else []), missing
    model.tie_weights()
    return model.float().eval()


def tiny_model(ops: Ops | None = None) -> LoadedModel:
    """Make a two-layer model over bytes with random weights and a context of 2,048. For tests; takes milliseconds.

    Its model name is `tiny-random`. ops: None takes the CPU's ops.
    """
    tiny = describe_tiny()
    decoder = build_decoder(tiny.config, tiny_weights(tiny.config), device="cpu", dtype=torch.float32, ops=ops)
    return LoadedModel(TINY_MODEL, decoder, tiny.tokenizer, tiny.config, tiny.generation)


def tiny_weights(config: ModelConfig) -> Weights:
    """The weights of `tiny_model`."""
    return dummy_weights(config, torch.device("cpu"), torch.float32, seed=3)


def describe_tiny() -> ModelDescription:
    """`tiny_model` without its weights."""
    tokenizer = ByteTokenizer()
    config = config_from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": TINY_CONTEXT,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        }
    )
    return ModelDescription(config, tokenizer, GenerationDefaults())
