"""Quantised checkpoints, written here by each format's own rules: their numbers, their parts, and what is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ramet.errors import BrokenModelFile, UnsupportedArchitecture
from ramet.runtime.models.build import build_decoder
from ramet.runtime.models.config_files import config_from_hf
from ramet.runtime.models.linear_cpu import BlockLinear
from ramet.runtime.models.linear_fp8 import Fp8Linear
from ramet.runtime.models.load import open_weights
from ramet.runtime.models.weights import Part
from ramet.runtime.testing.bare_cache import BareCache

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
GROUP = 32
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ: nibble i of a word holds column ORDER[i] of its 8
Parts = dict[str, Tensor]


def drawn(shape: tuple[int, int], generator: torch.Generator, *, is_symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """4-bit values [rows, columns], zero points and fp16 scales [rows, groups]."""
    rows, columns = shape
    values = torch.randint(0, 16, shape, generator=generator)
    zeros = torch.randint(1, 16, (rows, columns // GROUP), generator=generator)
    scales = (0.005 + 0.02 * torch.rand(rows, columns // GROUP, generator=generator)).half()
    return values, torch.full_like(zeros, 8) if is_symmetric else zeros, scales


def words(nibbles: Tensor) -> Tensor:
    """Pack int [n, 8 m] into int32 [n, m], the first column lowest."""
    grouped = nibbles.long().reshape(nibbles.shape[0], -1, 8)
    packed = (grouped << torch.arange(0, 32, 4)).sum(2)
    return torch.from_numpy(packed.numpy().astype(np.uint32).view(np.int32))


def gptq(shape: tuple[int, int], generator: torch.Generator, *, offset: int = 1, act_order: bool = False) -> Any:
    values, zeros, scales = drawn(shape, generator, is_symmetric=False)
    group_of = torch.arange(shape[1]) // GROUP
    if act_order:
        group_of = group_of[torch.randperm(shape[1], generator=generator)]
    weight = (values - zeros[:, group_of]) * scales[:, group_of].float()
    parts = {
        "qweight": words(values).t().contiguous(),
        "qzeros": words((zeros - offset).t() & 15),
        "scales": scales.t().contiguous(),
        "g_idx": group_of.int(),
    }
    return weight, parts


def awq(shape: tuple[int, int], generator: torch.Generator) -> Any:
    values, zeros, scales = drawn(shape, generator, is_symmetric=False)
    weight = (values - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)

    def packed(x: Tensor) -> Tensor:
        columns = x.t().reshape(x.shape[1], -1, 8)[:, :, ORDER]
        return words(columns.reshape(x.shape[1], -1))

    return weight, {"qweight": packed(values), "qzeros": packed(zeros), "scales": scales.t().contiguous()}


def packed(shape: tuple[int, int], generator: torch.Generator, *, is_symmetric: bool) -> Any:
    values, zeros, scales = drawn(shape, generator, is_symmetric=is_symmetric)
    weight = (values - zeros.repeat_interleave(GROUP, 1)) * scales.float().repeat_interleave(GROUP, 1)
    parts = {"weight_packed": words(values), "weight_scale": scales, "weight_shape": torch.tensor(shape)}
    if not is_symmetric:  # packed along rows
        parts["weight_zero_point"] = words(zeros.t()).t().contiguous()
    return weight, parts


def fp8(shape: tuple[int, int], generator: torch.Generator, *, strategy: str) -> Any:
    values = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    if strategy == "block":
        scales = 0.001 + 0.001 * torch.rand(-(-shape[0] // 48), -(-shape[1] // 64), generator=generator)
        wide = scales.repeat_interleave(48, 0)[: shape[0]].repeat_interleave(64, 1)[:, : shape[1]]
        return values.float() * wide, {"weight": values, "weight_scale_inv": scales}
    scales = 0.001 + 0.001 * torch.rand(shape[0] if strategy == "channel" else 1, 1, generator=generator)
    stored = scales if strategy == "channel" else scales[0, 0]
    return values.float() * scales, {"weight": values, "weight_scale": stored, "input_scale": torch.ones(1)}


def compressed(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}


# name: (quantization_config, how a matrix is written)
FORMATS: dict[str, tuple[dict[str, Any], Any]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq),
    "gptq act order": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
        lambda *at: gptq(*at, act_order=True),
    ),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
        lambda *at: gptq(*at, offset=0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq),
    "packed": (
        compressed(num_bits=4, type="int", strategy="group", group_size=GROUP),
        lambda *at: packed(*at, is_symmetric=True),
    ),
    "packed asymmetric": (
        compressed(num_bits=4, type="int", strategy="group", group_size=GROUP, symmetric=False),
        lambda *at: packed(*at, is_symmetric=False),
    ),
    "fp8 block": (
        {"quant_method": "fp8", "weight_block_size": [48, 64], "activation_scheme": "dynamic"},
        lambda *at: fp8(*at, strategy="block"),
    ),
    "fp8 channel": (
        compressed(num_bits=8, type="float", strategy="channel"),
        lambda *at: fp8(*at, strategy="channel"),
    ),
    "fp8 tensor": ({"quant_method": "modelopt", "quant_algo": "FP8"}, lambda *at: fp8(*at, strategy="tensor")),
}


def write(folder: Path, name: str) -> Any:
    """Write a tiny Llama with quantised layers. Returns transformers' model with the weights dequantised to bf16."""
    settings, make = FORMATS[name]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    tensors: Parts = {}
    for key, tensor in model.state_dict().items():
        if ".layers." not in key or tensor.ndim == 1:
            tensors[key] = tensor
            continue
        weight, parts = make(tuple(tensor.shape), generator)
        tensor.copy_(weight.bfloat16())
        tensors |= {f"{key.removesuffix('weight')}{end}": part for end, part in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    fields = model.config.to_dict() | {"quantization_config": settings, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(fields))
    return model


@pytest.fixture(params=list(FORMATS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_logits_are_those_of_the_dequantised_matrices(tmp_path: Path, name: str) -> None:
    model = write(tmp_path, name)
    ids = torch.randint(0, 96, (20,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
        config, weights = open_weights(tmp_path)
        decoder = build_decoder(config, weights, device="cpu", dtype=torch.float32)
        found = BareCache(decoder, 1, 32).step([], [(0, ids.tolist())])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        fastest = BareCache(build_decoder(config, weights, device="cpu"), 1, 32).step([], [(0, ids.tolist())])
    assert float((fastest - expected).abs().mean()) < 0.1 * float(expected.abs().mean())


def test_matrices_are_held_in_few_bits_where_they_can_be(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    config, weights = open_weights(tmp_path)
    first = next(build_decoder(config, weights, device="cpu").linears()).method
    assert isinstance(first, BlockLinear)
    assert first.block_format == ("BF16" if name.startswith("fp8") or "act order" in name else "Q4_1")
    key = "model.layers.1.mlp.down_proj.weight"
    dense, blocks = weights[key], weights.quantized(key)
    assert (blocks is None) == (first.block_format == "BF16")
    if blocks is not None:
        part = weights.cut({key: Part(1, 32, 96)}).quantized(key)
        assert part is not None
        assert part.shape == (64, 64)
        np.testing.assert_array_equal(part.by_row(), blocks.by_row()[:, 20:60])
        assert weights.cut({key: Part(1, 3, 96)}).quantized(key) is None
    cut = weights.cut({key: Part(0, 5, 9)})[key]
    torch.testing.assert_close(cut, dense[5:9], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fp8 channel", "fp8 tensor"], indirect=True)
def test_fp8_by_rows_is_computed_as_stored(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    config, weights = open_weights(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    method = list(build_decoder(config, weights, device="cpu", quantization="fp8").linears())[1].method
    assert isinstance(method, Fp8Linear)
    assert torch.equal(method.weight.float(), stored["model.layers.0.self_attn.o_proj.weight"].float())
    scale = stored["model.layers.0.self_attn.o_proj.weight_scale"].reshape(-1).expand(64)
    torch.testing.assert_close(method.scale, scale, rtol=0, atol=0)
    part = weights.cut({"model.layers.0.self_attn.o_proj.weight": Part(0, 16, 32)})
    found = part.scaled("model.layers.0.self_attn.o_proj.weight")
    assert found is not None
    assert torch.equal(found[0].float(), method.weight[16:32].float())
    assert torch.equal(found[1], method.scale[16:32])


def test_fp8_in_blocks_is_computed_as_stored(tmp_path: Path) -> None:
    write(tmp_path, "fp8 block")
    config, weights = open_weights(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    methods = [linear.method for linear in build_decoder(config, weights, device="cpu", quantization="fp8").linears()]
    for method, names in ((methods[0], ("q", "k", "v")), (methods[1], ("o",))):
        assert isinstance(method, Fp8Linear)
        keys = [f"model.layers.0.self_attn.{name}_proj.weight" for name in names]
        assert torch.equal(method.weight.float(), torch.cat([stored[key].float() for key in keys]))
        dense = torch.cat(
            [stored[k].float() * stored[f"{k}_scale_inv"].repeat_interleave(48, 0)[: len(stored[k])] for k in keys]
        )
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(method(x, None), x @ dense.T, rtol=1e-5, atol=1e-5)
    key = "model.layers.0.mlp.down_proj.weight"
    whole, part = weights.scaled(key), weights.cut({key: Part(1, 64, 128)}).scaled(key)
    assert whole is not None
    assert part is not None
    assert whole[1].shape == (64, 2)
    assert torch.equal(part[0].float(), whole[0][:, 64:].float())
    assert torch.equal(part[1], whole[1][:, 1:])
    assert weights.cut({key: Part(1, 32, 96)}).scaled(key) is None
    rows = weights.cut({key: Part(0, 16, 32)}).scaled(key)
    assert rows is not None
    assert torch.equal(rows[1], whole[1][16:32])


def test_blocks_lose_less_than_a_hundredth_of_a_step(tmp_path: Path) -> None:
    for name in ("packed", "packed asymmetric"):
        write(tmp_path, name)
        stored = load_file(tmp_path / "model.safetensors")
        key = "model.layers.0.mlp.up_proj."
        weights = open_weights(tmp_path)[1]
        blocks = weights.quantized(key + "weight")
        assert blocks is not None
        found = torch.from_numpy(gguf.dequantize(blocks.by_row(), blocks.kind))
        scales = stored[key + "weight_scale"].float().repeat_interleave(GROUP, 1)
        values = (stored[key + "weight_packed"].unsqueeze(2) >> torch.arange(0, 32, 4)) & 15
        zeros = torch.full_like(scales, 8.0)
        if name != "packed":
            rows = (stored[key + "weight_zero_point"].unsqueeze(1) >> torch.arange(0, 32, 4)[:, None]) & 15
            zeros = rows.reshape(128, -1).float().repeat_interleave(GROUP, 1)
        exact = (values.reshape(128, -1).float() - zeros) * scales
        step = float(((found - exact).abs() / scales).max())
        assert step < 0.01
        assert (step == 0.0) == (name == "packed")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq", {"qzeros": None}, r"the quantised model\.layers\.0\.mlp\.up_proj\.weight lacks qzeros"),
        ("gptq", {"scales": torch.ones(3, 128)}, r"up_proj\.weight's scales is \[3, 128\] but must be \[2, 128\]"),
        ("gptq", {"qweight": torch.zeros(4, 128, dtype=torch.int32)}, r"scales is \[2, 128\] but must be \[1, 128\]"),
        ("awq", {"qweight": torch.zeros(64, dtype=torch.int32)}, "qweight has 1 axes but must have 2"),
        ("packed", {"weight_scale": torch.ones(128, 1)}, r"weight_scale is \[128, 1\] but must be \[128, 2\]"),
        ("fp8 block", {"weight_scale_inv": torch.ones(2, 2)}, r"weight_scale_inv is \[2, 2\] but must be \[3, 1\]"),
        ("gptq", {"qweight": torch.zeros(8, 128)}, "qweight is F32 but must be I32"),
        ("gptq", {"scales": torch.zeros(2, 128, dtype=torch.int32)}, "scales is I32 but must be F32 or F16 or BF16"),
        ("gptq", {"g_idx": torch.zeros(64)}, "g_idx is F32 but must be I32 or I64"),
        ("fp8 channel", {"weight": torch.zeros(128, 64).to(torch.float8_e5m2)}, "lacks weight"),
        ("fp8 channel", {"weight_scale": None}, "lacks weight_scale"),
        ("fp8 channel", {"weight_scale": torch.ones(5, 1)}, r"is \[5, 1\] but must be \[128, 1\] or"),
    ],
    indirect=["name"],
)
def test_missing_and_misshapen_tensors_are_named(tmp_path: Path, name: str, change: Any, message: str) -> None:
    write(tmp_path, name)
    key = "model.layers.0.mlp.up_proj."
    tensors: dict[str, Tensor | None] = load_file(tmp_path / "model.safetensors") | {
        key + end: part for end, part in change.items()
    }
    save_file({key: part for key, part in tensors.items() if part is not None}, tmp_path / "model.safetensors")
    with pytest.raises(BrokenModelFile, match=message):
        open_weights(tmp_path)


def test_a_group_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.g_idx"][3] = 7
    save_file(tensors, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)[1]
    with pytest.raises(BrokenModelFile, match="outside of its 2 groups"):
        _ = weights["model.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 3}, "quant_method 'gptq', bits '3' are not supported; supported: fp8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        (compressed(num_bits=8, type="int", strategy="channel"), r"of 8 bits \(int, channel\)"),
        ({"quant_method": "compressed-tensors"}, "0 kinds"),
    ],
)
def test_schemes_that_cannot_be_read_are_refused_before_a_weight_is(settings: Any, message: str) -> None:
    fields = {**SIZES, "architectures": ["LlamaForCausalLM"], "quantization_config": settings}
    with pytest.raises(UnsupportedArchitecture, match=message):
        config_from_hf(fields)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": -7},
        {"quant_method": "gptq", "bits": 4, "group_size": "many"},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": 128},
    ],
)
def test_impossible_sizes_are_a_broken_file(settings: Any) -> None:
    with pytest.raises(BrokenModelFile):
        config_from_hf({**SIZES, "architectures": ["LlamaForCausalLM"], "quantization_config": settings})
