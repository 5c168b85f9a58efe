"""Whole engines of the families that are more than Llama's layers: tokens of `generate`, however their steps run."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ramet.errors import BrokenModelFile, ConfigError, UnsupportedArchitecture
from ramet.lang.program.function import function
from ramet.lang.recording.primitives import gen
from ramet.lang.recording.state import State
from ramet.runtime.engine.engine import Engine
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.description import GenerationDefaults
from ramet.runtime.models.families import family_named
from ramet.runtime.models.layers import DecoderLayer, SparseFeedForward
from ramet.runtime.models.load import LoadedModel, is_for_transformers, open_weights
from ramet.runtime.models.weights import Weights
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer
from ramet.runtime.types import SamplingParams

TOKENIZER = ByteTokenizer()
SIZES: dict[str, Any] = {
    "vocab_size": TOKENIZER.vocab_size,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
QWEN_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("Olmo2Config", {}),
    "phi3": ("Phi3Config", {}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", {**QWEN_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3MoeConfig", {**QWEN_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
}
# The architecture in GGUF files.
GGUF = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmo2": "olmo2",
    "granite": "granite",
    "smollm3": "smollm3",
    "seed_oss": "seed_oss",
    "phi3": "phi3",
}
INTERLEAVED = ("mixtral", "granite", "smollm3")  # rotary halves, by llama.cpp's converter
NUM_NEW = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)


def write_model(name: str, folder: Path, **changes: Any) -> Any:
    class_name, fields = MODELS[name]
    fields = fields | changes
    torch.manual_seed(list(MODELS).index(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about its own defaults
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**(SIZES | fields)))
    model.eval().save_pretrained(folder)
    return model


def loaded(folder: Path, quantization: str | None = None) -> LoadedModel:
    config, weights = open_weights(folder)
    decoder = build_decoder(config, weights, device="cpu", quantization=quantization)
    return LoadedModel(folder.name, decoder, TOKENIZER, config, GenerationDefaults())


def experts_of(model: LoadedModel) -> SparseFeedForward:
    layer = model.decoder.layers[0]
    assert isinstance(layer, DecoderLayer)
    assert isinstance(layer.feed_forward, SparseFeedForward)
    return layer.feed_forward


class Served:
    """A family in an engine, and what `generate` makes of some prompts."""

    def __init__(self, name: str, folder: Path) -> None:
        model = write_model(name, folder)
        self.folder = folder
        self.prompts = [torch.randint(0, 256, (length,)).tolist() for length in (40, 1, 17, 64)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.expected = [
                tuple(
                    model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_NEW)[
                        0, len(prompt) :
                    ].tolist()
                )
                for prompt in self.prompts
            ]
        self.engine = Engine(loaded(folder), num_kv_tokens=2048, max_running_requests=8)


@pytest.fixture(scope="module", params=list(MODELS))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(request.param, tmp_path_factory.mktemp(request.param))
    with served.engine:
        yield served


def test_tokens_are_those_of_generate_together_alone_and_from_the_cache(served: Served) -> None:
    engine = served.engine
    together = [engine.submit(prompt, GREEDY) for prompt in served.prompts]
    assert [handle.result(timeout_s=60).token_ids for handle in together] == served.expected
    alone = [engine.submit(prompt, GREEDY).result(timeout_s=60) for prompt in served.prompts]
    assert [result.token_ids for result in alone] == served.expected
    assert [result.usage.cached_tokens for result in alone] == [len(prompt) - 1 for prompt in served.prompts]


@function(temperature=0)
def forked(s: State) -> None:
    s += "What all branches share."
    for branch, letter in zip(s.fork(3), "abc", strict=True):
        branch += letter + gen("said", max_tokens=6, ignore_eos=True)
    s += gen("number", regex="[1-9][0-9]{2}")


def test_forks_and_constraints_work(served: Served) -> None:
    state = forked.run(backend=served.engine)
    assert re.fullmatch("[1-9][0-9]{2}", state["number"])


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_experts_in_blocks_are_close_to_the_exact_ones(tmp_path: Path, name: str, quantization: str) -> None:
    all_experts = MODELS[name][1].get("num_experts", 4)  # of which none is chosen by a small difference
    write_model(name, tmp_path, num_experts_per_tok=all_experts)
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    exact, rounded = (experts_of(loaded(tmp_path, kind))(x) for kind in (None, quantization))
    error = (exact - rounded).abs().mean() / exact.abs().mean()
    assert 0 < float(error) < (0.03 if quantization == "int8" else 0.3), error


def test_a_tokens_experts_do_not_depend_on_the_tokens_beside_it(tmp_path: Path) -> None:
    write_model("qwen3_moe", tmp_path)
    experts = experts_of(loaded(tmp_path))
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    together = experts(x)
    for rows in (slice(0, 1), slice(7, 20), slice(49, 50)):
        torch.testing.assert_close(experts(x[rows]), together[rows], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["mixtral", "gemma2"])
def test_what_has_no_gpu_kernels_is_left_to_transformers_there(tmp_path: Path, name: str) -> None:
    write_model(name, tmp_path)
    assert is_for_transformers(tmp_path, "auto", "cuda")
    assert not is_for_transformers(tmp_path, "auto", "cpu")
    assert not is_for_transformers(tmp_path, "ramet", "cuda")
    config, weights = open_weights(tmp_path)
    with pytest.raises(ConfigError, match="on cuda, transformers runs them: --model-impl transformers"):
        build_decoder(config, weights, device="cuda")


def write_gguf(
    path: Path,
    name: str,
    config: ModelConfig,
    weights: Weights,
    kind: gguf.GGMLQuantizationType,
    extra: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> None:
    """Write a model as llama.cpp's converter does, with the names of the gguf package."""
    architecture = GGUF[name]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.per_token)
        if name != "mixtral":
            writer.add_expert_feed_forward_length(config.experts.size)
    if name == "granite":
        writer.add_attention_scale(config.attention_scale)
        writer.add_embedding_scale(config.embedding_scale)
        writer.add_residual_scale(config.residual_scale)
        writer.add_logit_scale(1 / config.logit_scale)
    stacked: dict[str, list[np.ndarray[Any, Any]]] = {}
    tensors = dict(weights.items())
    for whole, parts in family_named(config.architecture).fused.items():
        for layer in range(config.num_layers):
            start = f"model.layers.{layer}."
            tensors[f"{start}{whole}.weight"] = torch.cat([tensors.pop(f"{start}{part}.weight") for part in parts])
    for key, tensor in tensors.items():
        stem, end = key.rsplit(".", 1)
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(stem.split(".")[-1])
        if name in INTERLEAVED and heads is not None:
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if ".experts." in stem:
            block, _, part = stem.partition(".experts.")
            stem = f"{block}.experts.{part.split('.')[1]}"
            stacked.setdefault(f"{names.get_name(stem)}.{end}", []).append(values)
            continue
        values = np.ascontiguousarray(values.squeeze())
        if values.ndim == 2 and not stem.endswith("mlp.gate"):
            writer.add_tensor(f"{names.get_name(stem)}.{end}", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{end}", values)
    for key, matrices in stacked.items():
        writer.add_tensor(key, gguf.quantize(np.stack(matrices), kind), raw_dtype=kind)
    for key, values in (extra or {}).items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q4_1])
def test_fused_matrices_of_a_wrong_size_and_rotary_factors_by_length_are_named(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    write_model("phi3", tmp_path)
    config, weights = open_weights(tmp_path)
    path = tmp_path / "m.gguf"
    write_gguf(path, "phi3", dataclasses.replace(config, intermediate_size=64), weights, kind)
    with pytest.raises(BrokenModelFile, match=r"blk\.0\.ffn_up\.weight has 192 rows but .* 128"):
        open_weights(path)
    extra = {"rope_factors_long.weight": np.ones(8, np.float32)}
    write_gguf(path, "phi3", config, weights, kind, extra)
    with pytest.raises(UnsupportedArchitecture, match="'longrope' is not supported"):
        open_weights(path)


@pytest.mark.parametrize("name", GGUF)
def test_models_in_gguf_files_are_those_of_the_folder(tmp_path: Path, name: str) -> None:
    write_model(name, tmp_path, **{"no_rope_layer_interval": 4, "num_hidden_layers": 4} if name == "smollm3" else {})
    config, weights = open_weights(tmp_path)
    kind = gguf.GGMLQuantizationType.F32
    write_gguf(tmp_path / "f32.gguf", name, config, weights, kind)
    theirs, stored = open_weights(tmp_path / "f32.gguf")
    ids: dict[str, Any] = {"bos_id": None, "eos_ids": (), "pad_id": None}
    assert dataclasses.replace(theirs, **ids) == dataclasses.replace(config, **ids)
    assert set(stored) == set(weights)
    for key, tensor in weights.items():
        torch.testing.assert_close(stored[key], tensor.float(), rtol=0, atol=0, msg=key)
    write_gguf(tmp_path / "q8.gguf", name, config, weights, gguf.GGMLQuantizationType.Q8_0)
    key = f"model.layers.1.mlp.{'experts.3.' if config.experts is not None else ''}down_proj.weight"
    _, rounded = open_weights(tmp_path / "q8.gguf")
    blocks = rounded.quantized(key)
    assert blocks is not None
    assert blocks.shape == tuple(weights[key].shape)
    np.testing.assert_array_equal(blocks.by_row(), gguf.quantize(weights[key].numpy(), gguf.GGMLQuantizationType.Q8_0))


@pytest.mark.slow
def test_experts_divided_among_processes_give_the_same_tokens_from_the_cache_and_under_a_constraint(
    tmp_path: Path,
) -> None:
    write_model("qwen3_moe", tmp_path)
    vocabulary = {text: index for index, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="~").save_pretrained(tmp_path)
    found = []
    for tp in (1, 2):
        with Engine(str(tmp_path), tp=tp, num_kv_tokens=512) as engine:
            first = engine.submit("the river runs past the old mill", GREEDY).result(timeout_s=120)
            again = engine.submit("the river runs past the old mill", GREEDY).result(timeout_s=120)
            assert again.token_ids == first.token_ids
            assert again.usage.cached_tokens > 0
            state = forked.run(backend=engine)
            assert re.fullmatch("[1-9][0-9]{2}", state["number"])
            found.append((first.token_ids, state["number"]))
    assert found[0] == found[1]
