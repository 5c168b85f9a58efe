"""Weights from both formats: the same tensors, complete, in the same order; damage is an error that names it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ramet.errors import BrokenModelFile, UnsupportedArchitecture
from ramet.runtime.models.config import ModelConfig, Rope, RopeScaling, smollm2_135m
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.description import GenerationDefaults, load_gguf_config, load_hf_config
from ramet.runtime.models.gguf_file import GgufFile
from ramet.runtime.models.loader_gguf import load_gguf
from ramet.runtime.models.loader_safetensors import load_safetensors
from ramet.runtime.models.weights import Part, Weights, expected_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MODELS: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 8}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window": 8}),
}


def tiny(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A random model of transformers and the tensors that a loader must find."""
    config_class, model_class, fields = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **fields))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are constant otherwise
            parameter.normal_()
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return model, tensors


def assert_same(weights: Weights, tensors: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert set(weights) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(weights[name].float(), tensor.float(), rtol=tolerance, atol=tolerance, msg=name)


# ---- safetensors ----


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_folders_written_by_transformers_are_read_whole(tmp_path: Path, name: str, shard_size: str) -> None:
    model, tensors = tiny(name)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard_size == "20KB")
    config = load_hf_config(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_tensors(config)
    assert_same(load_safetensors(tmp_path, config), tensors)


def test_a_second_copy_of_tied_embeddings_is_not_needed_and_not_read(tmp_path: Path) -> None:
    model, tensors = tiny("llama tied")
    model.save_pretrained(tmp_path)
    save_file(tensors | {"lm_head.weight": torch.zeros(64, 64)}, tmp_path / "model.safetensors")
    assert_same(load_safetensors(tmp_path, load_hf_config(tmp_path)), tensors)


def test_text_part_of_a_multimodal_checkpoint_is_found(tmp_path: Path) -> None:
    model, tensors = tiny("gemma3")
    model.save_pretrained(tmp_path)
    config = load_hf_config(tmp_path)
    for prefix in ("language_model.model.", "model.language_model."):  # transformers 4 and 5
        stored = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        stored |= {"vision_tower.encoder.weight": torch.zeros(2), "multi_modal_projector.weight": torch.zeros(2)}
        save_file(stored, tmp_path / "model.safetensors")
        assert_same(load_safetensors(tmp_path, config), tensors)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama")[0].save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: dict[str, Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")


def test_missing_and_unknown_tensors_are_named(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": None, "model.layers.0.mlp.experts.weight": torch.zeros(2)})
    with pytest.raises(BrokenModelFile, match=r"missing: model\.norm\.weight; 1 tensors are unknown.*experts"):
        load_safetensors(folder, load_hf_config(folder))


def test_a_tensor_of_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, {"model.norm.weight": torch.zeros(63)})
    with pytest.raises(BrokenModelFile, match=r"model\.norm\.weight is \[63\] but must be \[64\]"):
        load_safetensors(folder, load_hf_config(folder))


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BrokenModelFile, match=r"model\.safetensors cannot be read"):
        load_safetensors(folder, load_hf_config(folder))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny("llama")[0].save_pretrained(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(BrokenModelFile, match=shard.name):
        load_safetensors(tmp_path, load_hf_config(tmp_path))


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "../secret"}}', '{"weight_map": {}}', "[]", "{"])
def test_a_bad_index_is_refused(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BrokenModelFile, match=r"index\.json"):
        load_safetensors(folder, load_hf_config(folder))


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BrokenModelFile, match="can run code"):
        load_safetensors(folder, load_hf_config(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"architectures": 3}', '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_bad_configuration_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BrokenModelFile, match=r"config\.json"):
        load_hf_config(tmp_path)


def test_generation_defaults_are_read(tmp_path: Path) -> None:
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults()
    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [5, 6], "do_sample": True})
    )
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults(0.6, 20, 0.95, eos_ids=(5, 6))
    path.write_text(json.dumps({"temperature": 0.6, "do_sample": False}))
    assert GenerationDefaults.from_folder(tmp_path).temperature == 0.0
    path.write_text(json.dumps({"temperature": "hot"}))
    with pytest.raises(BrokenModelFile, match="temperature"):
        GenerationDefaults.from_folder(tmp_path)


# ---- GGUF ----

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str, is_gemma: bool) -> str:
    stem, kind = name.removeprefix("model.").rsplit(".", 1)
    if stem in ("embed_tokens", "norm", "lm_head"):
        return {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem] + "." + kind
    _, layer, part = stem.split(".", 2)
    gemma = {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    names = GGUF_NAMES | (gemma if is_gemma else {"post_attention_layernorm": "ffn_norm"})
    return f"blk.{layer}.{names[part]}.{kind}"


def as_llama_cpp_stores(name: str, tensor: Tensor, architecture: str) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to a tensor: rotary rows interleaved head by head; Gemma's norms plus one."""
    values = tensor.float().numpy()
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if architecture == "llama" and heads is not None:
        rows = [head * 16 + half * 8 + index for head in range(heads) for index in range(8) for half in range(2)]
        return values[rows]
    return values + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else values


def write_gguf(
    path: Path, name: str, kind: gguf.GGMLQuantizationType | None = None, **changes: Any
) -> dict[str, Tensor]:
    """Write the tiny model as llama.cpp would; `kind` quantises the matrices. Returns the tensors it was made of."""
    _, tensors = tiny(name)
    architecture = {"llama tied": "llama", "mistral": "llama"}.get(name, name)
    writer = gguf.GGUFWriter(path, changes.pop("architecture", architecture))
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6 if name == "gemma3" else 1e4)
    if name.startswith("gemma"):
        writer.add_sliding_window(8)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    for tensor_name, tensor in (tensors | changes.pop("tensors", {})).items():
        if tensor is None:
            continue
        values = as_llama_cpp_stores(tensor_name, tensor, architecture)
        stored_name = gguf_name(tensor_name, name.startswith("gemma"))
        if kind is not None and values.ndim == 2:
            writer.add_tensor(stored_name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored_name, values)
    for extra, array in changes.pop("raw", {}).items():
        writer.add_tensor(extra, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def open_weights(path: Path) -> tuple[ModelConfig, Weights]:
    file = GgufFile(path)
    config = load_gguf_config(file)
    return config, load_gguf(file, config)


@pytest.mark.parametrize("name", MODELS)
def test_gguf_tensors_come_back_under_their_first_names_and_order(tmp_path: Path, name: str) -> None:
    tensors = write_gguf(tmp_path / "m.gguf", name)
    config, weights = open_weights(tmp_path / "m.gguf")
    assert_same(weights, tensors, tolerance=1e-6 if name.startswith("gemma") else 0.0)
    theirs = config_from_hf(tiny(name)[0].config.to_dict())
    same = [
        "qkv_bias",
        "o_bias",
        "mlp_bias",
        "qk_norm",
        "tie_word_embeddings",
        "norm_offset",
        "embedding_scale",
        "rope",
    ]
    if name.startswith("gemma"):  # of others, no key says that layers slide
        same += ["sliding_layers", "attention_softcap", "logit_softcap"]
    for field in (*same, "local_rope", "head_dim", "num_kv_heads", "vocab_size", "rms_norm_eps", "activation"):
        assert getattr(config, field) == getattr(theirs, field), field


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0])
def test_quantised_rows_are_given_as_stored_and_in_first_order(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    tensors = write_gguf(tmp_path / "m.gguf", "llama", kind)
    _, weights = open_weights(tmp_path / "m.gguf")
    for name, tensor in tensors.items():
        quantized = weights.quantized(name)
        if tensor.ndim == 1:
            assert quantized is None
            continue
        assert quantized is not None
        assert (quantized.kind, quantized.shape) == (kind, tuple(tensor.shape))
        again = gguf.dequantize(quantized.by_row(), kind)
        np.testing.assert_array_equal(again, weights[name].numpy())
        np.testing.assert_array_equal(again, gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind))


def test_baked_rotary_divisors_are_read(tmp_path: Path) -> None:
    divisors = np.array([1, 1, 1, 2, 4, 8, 8, 8], dtype=np.float32)
    write_gguf(tmp_path / "m.gguf", "llama", raw={"rope_freqs.weight": divisors})
    config, _ = open_weights(tmp_path / "m.gguf")
    assert config.rope == Rope(1e4, RopeScaling("divisors", divisors=tuple(divisors.tolist())))
    np.testing.assert_allclose(config.rope.inverse_frequencies(16), Rope(1e4).inverse_frequencies(16) / divisors)


def test_gguf_reader_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "gemma3", gguf.GGMLQuantizationType.Q8_0)
    ours, theirs = GgufFile(tmp_path / "m.gguf"), gguf.GGUFReader(str(tmp_path / "m.gguf"))
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert {key: theirs.fields[key].contents() for key in keys} == ours.metadata
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        stored = np.frombuffer(tensor.data.tobytes(), dtype=np.uint8)
        np.testing.assert_array_equal(ours.tensors[tensor.name].stored, stored)


def test_missing_and_unknown_gguf_tensors_are_named(tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "m.gguf",
        "llama",
        tensors={"model.layers.1.mlp.up_proj.weight": None},
        raw={"blk.0.ssm.weight": np.zeros(4, np.float32)},
    )
    with pytest.raises(BrokenModelFile, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight.*blk\.0\.ssm\.weight"):
        open_weights(tmp_path / "m.gguf")


def test_one_part_of_a_split_file_says_how_to_join(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BrokenModelFile, match="one of 2 parts"):
        open_weights(tmp_path / "m-00001-of-00002.gguf")


def test_an_unknown_gguf_architecture_names_those_supported(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", architecture="mamba")
    with pytest.raises(UnsupportedArchitecture, match=r"'mamba'.*GGUF: llama, mistral, qwen2, qwen3, gemma2, gemma3"):
        open_weights(tmp_path / "m.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04" + bytes(40), b"GGUF", b"GGUF" + bytes(20)])
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(BrokenModelFile, match=r"m\.gguf"):
        GgufFile(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama")
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in [*range(4, 400, 7), len(whole) // 2, len(whole) - 1000]:
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        with pytest.raises(BrokenModelFile, match=r"cut\.gguf"):
            open_weights(path)


def test_a_length_beyond_the_file_does_not_allocate(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    path.write_bytes(header + struct.pack("<IIQ", 9, 4, 1 << 60) + bytes(64))  # an array of 2^60 numbers
    with pytest.raises(BrokenModelFile, match="passes the end"):
        GgufFile(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 50) + bytes(64))
    with pytest.raises(BrokenModelFile, match="passes the end"):
        GgufFile(path)


# ---- parts of tensors ----


def parts_of(tensor: Tensor, heads: int) -> list[Part]:
    """Halves and thirds, of rows in whole heads, and of columns at block limits and inside blocks."""
    rows = tensor.shape[0]
    unit = rows // heads if heads else 1
    parts = [Part(0, 0, rows), Part(0, 0, unit), Part(0, rows - unit, rows, padding=5), Part(0, rows, rows, padding=2)]
    if tensor.ndim == 2:
        columns = tensor.shape[1]
        parts += [Part(1, 0, columns // 2), Part(1, columns // 2, columns), Part(1, 3, columns - 1)]
    return parts


def assert_parts(config: ModelConfig, weights: Weights, block_size: int = 1) -> None:
    for name, whole in weights.items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2], 0)
        for part in parts_of(whole, heads):
            cut = weights.cut({name: part})
            expected = part.of(whole)
            zeros = torch.zeros(part.padding, *expected.shape[1:], dtype=whole.dtype)
            expected = torch.cat((expected, zeros))
            torch.testing.assert_close(cut[name], expected, rtol=0, atol=0, msg=f"{name} {part}")
            if weights.quantized(name) is None:
                assert cut.quantized(name) is None
                continue
            stored = cut.quantized(name)
            if part.axis == 1 and (part.start % block_size or part.stop % block_size):
                assert stored is None
                continue
            assert stored is not None
            assert stored.shape == tuple(expected.shape)
            if len(expected):
                np.testing.assert_array_equal(gguf.dequantize(stored.by_row(), stored.kind), expected.numpy())


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_safetensors_are_parts_of_the_tensors(tmp_path: Path, name: str) -> None:
    tiny(name)[0].save_pretrained(tmp_path)
    config = load_hf_config(tmp_path)
    assert_parts(config, load_safetensors(tmp_path, config))


@pytest.mark.parametrize("kind", [None, gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0])
def test_parts_of_gguf_tensors_are_parts_of_the_tensors(tmp_path: Path, kind: gguf.GGMLQuantizationType | None) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", *([] if kind is None else [kind]))
    config, weights = open_weights(tmp_path / "m.gguf")
    assert_parts(config, weights, block_size=32)


def test_nothing_but_the_part_is_read_from_a_safetensors_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, str]] = []

    class Noted:
        """A file that notes what is read of it."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._file: Any = safe_open(*arguments, **options)

        def __enter__(self) -> Noted:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> Any:
                if arguments:
                    read.append((name, arguments[0]))
                return getattr(self._file, name)(*arguments)

            return call

    config = load_hf_config(folder)
    weights = load_safetensors(folder, config)
    monkeypatch.setattr("ramet.runtime.models.loader_safetensors.safe_open", Noted)
    cut = weights.cut({"model.layers.0.mlp.up_proj.weight": Part(0, 0, 3)})
    assert len(cut["model.layers.0.mlp.up_proj.weight"]) == 3
    assert len(cut["model.layers.0.mlp.gate_proj.weight"]) == config.intermediate_size
    assert read == [
        ("get_slice", "model.layers.0.mlp.up_proj.weight"),
        ("get_tensor", "model.layers.0.mlp.gate_proj.weight"),
    ]


@pytest.mark.model
def test_smollm2_tensors_interleaved_again_equal_the_file(smollm2_path: Path) -> None:
    config, weights = open_weights(smollm2_path)
    assert config == smollm2_135m()
    stored = GgufFile(smollm2_path).tensors
    assert len(weights) == len(stored) == 272
    for name, tensor in weights.items():
        values = tensor.numpy()
        heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        if heads is not None:
            rows = [head * 64 + half * 32 + index for head in range(heads) for index in range(32) for half in range(2)]
            values = values[rows]
        np.testing.assert_array_equal(values, stored[gguf_name(name, is_gemma=False)].dequantised(), err_msg=name)
