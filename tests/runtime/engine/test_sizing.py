"""What fits on which cards: by the known sizes of models, and by the rules that a starting engine has."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ramet.errors import BrokenModelFile, ConfigError, OutOfMemory, UnsupportedArchitecture
from ramet.kernels.grammar.arena import GrammarArena, arena_sizes
from ramet.kernels.grammar.mask import TokenTable
from ramet.kernels.sampling.logit_edits import EditTables
from ramet.runtime.engine.config import EngineConfig
from ramet.runtime.engine.sizing import (
    CARDS,
    fitting,
    nearest,
    num_params,
    read_config,
    size,
    smallest,
    tables_bytes,
    why_not_on_gpus,
)
from ramet.runtime.models.config import ModelConfig
from ramet.runtime.models.layers import RotaryTable
from ramet.runtime.steps.kv_cache import bytes_per_token

CONFIGS = Path(__file__).parents[3] / "benchmarks" / "model_configs"
# Published numbers of weights.
PARAMETERS = {
    "Llama-2-7b": 6_738_415_616,
    "Llama-2-13b": 13_015_864_320,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.3-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Qwen2.5-32B": 32_763_876_352,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen3-235B-A22B": 235_093_634_560,
}


def fields(name: str) -> dict[str, Any]:  # Any: JSON
    return dict(json.loads((CONFIGS / f"{name}.json").read_text()))


def shape(name: str) -> ModelConfig:
    return read_config(name, fields(name))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_configuration_alone_tells_the_number_of_weights(name: str) -> None:
    assert sum(num_params(shape(name))) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "card", "tp", "quantization"),
    [
        ("Llama-2-7b", "rtx4090", 1, None),
        ("Llama-2-13b", "a100-40gb", 1, None),
        ("Llama-3.3-70B", "h100", 1, "fp8"),
        ("Llama-3.3-70B", "h100", 2, None),
        ("Llama-3.1-405B", "h100-nvl", 8, "fp8"),
    ],
)
def test_the_rows_of_deployment_guides_fit(name: str, card: str, tp: int, quantization: str | None) -> None:
    found = fitting(shape(name), CARDS[card], EngineConfig(tp=tp, quantization=quantization))
    assert found is not None
    assert found.num_kv_tokens >= 4096
    plan = found.plan
    used = plan.weights + plan.kv + plan.graphs + plan.workspace + plan.others
    assert used <= found.engine.mem_fraction_static * plan.total + 16 * found.kv_bytes_per_token  # the dummy page
    again = size(shape(name), found.card, found.engine)
    assert again == found
    wanted = [f"--tp {tp}"] * (tp > 1) + [f"--quantization {quantization}"] * (quantization is not None)
    assert found.flags()[: len(wanted)] == wanted


def test_what_does_not_fit_says_what_does() -> None:
    setup = CARDS["rtx4090"], EngineConfig()
    with pytest.raises(OutOfMemory, match="weights take 131"):
        size(shape("Llama-3.3-70B"), *setup)
    assert fitting(shape("Llama-3.3-70B"), *setup) is None
    others = nearest(shape("Llama-3.3-70B"), *setup)
    assert [(one.card.name, one.engine.tp) for one in others] == [
        ("rtx4090", 8),
        ("rtx4090", 4),  # FP8
        ("rtx4090", 2),  # 4 bits
        ("a100-40gb", 4),
    ]
    assert smallest(shape("Llama-3.1-405B"), *setup) is None


def test_a_context_that_does_not_fit_is_shortened() -> None:
    setup = CARDS["h100"], EngineConfig(context_length=32_768, quantization="fp8")
    assert fitting(shape("Llama-3.3-70B"), *setup) is None
    lengths = [one.engine.context_length for one in nearest(shape("Llama-3.3-70B"), *setup, max_tp=1)]
    assert any(length is not None and 2048 <= length < 32_768 for length in lengths)


def test_flags_that_leave_more_room_are_taken_only_where_needed() -> None:
    engine = EngineConfig(context_length=16_384, quantization="fp8")
    found = fitting(shape("Llama-3.3-70B"), CARDS["h100"], engine)
    assert found is not None
    assert "--mem-fraction-static 0.95" in found.flags()
    assert found.num_kv_tokens >= 16_384
    small = fitting(shape("Llama-3.1-8B"), CARDS["h100"], EngineConfig())
    assert small is not None
    assert small.flags() == []


def test_kv_and_floors_are_the_known_ones() -> None:
    found = size(shape("Llama-3.1-8B"), CARDS["h100"], EngineConfig())
    assert found.kv_bytes_per_token == bytes_per_token(shape("Llama-3.1-8B"), torch.bfloat16) == 131_072
    assert math.isclose(found.decode_floor_s, 15.0e9 / 3.35e12, rel_tol=0.01)  # without the token table
    assert 14e-6 < found.prefill_floor_s < 22.2e-6  # measured: 22.2 us
    assert found.num_sequences(2048) == min(256, found.num_kv_tokens // 2048)


def test_kv_heads_are_repeated_where_there_are_fewer_than_cards() -> None:
    four, eight = (size(shape("Qwen3-235B-A22B"), CARDS["b200"], EngineConfig(tp=tp)) for tp in (4, 8))
    assert four.kv_bytes_per_token == eight.kv_bytes_per_token
    assert four.plan.weights > 1.9 * eight.plan.weights


def test_a_token_uses_its_experts_alone() -> None:
    mixture = shape("Mixtral-8x7B")
    assert 12.8e9 < sum(num_params(mixture, is_active=True)) < 13e9
    assert why_not_on_gpus(mixture) == "on a GPU, only transformers runs experts (--model-impl transformers)"
    assert why_not_on_gpus(shape("Llama-3.1-8B")) is None


def test_wrong_configurations_say_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="--tp may be 1, 2, 4, 8"):
        size(shape("Llama-3.1-8B"), CARDS["h100"], EngineConfig(tp=3))
    with pytest.raises(ConfigError, match="trained for 4,096"):
        size(shape("Llama-2-7b"), CARDS["h100"], EngineConfig(context_length=8192))
    with pytest.raises(UnsupportedArchitecture, match="MambaForCausalLM"):
        read_config("mamba", {"architectures": ["MambaForCausalLM"]})
    lacking = fields("Qwen3-235B-A22B")
    del lacking["num_experts"]
    with pytest.raises(BrokenModelFile, match="lacks 'num_local_experts'"):
        read_config("x", lacking)


def test_tables_beside_the_weights_are_those_that_an_engine_makes() -> None:
    config = shape("Llama-3.1-8B")
    engine, card = EngineConfig(max_running_requests=8), CARDS["rtx4090"]
    tokens = TokenTable.create([b"a"] * 100, [99], [], config.vocab_size, "cpu")
    arena = GrammarArena(tokens, 8, **arena_sizes(card.total, config.vocab_size))
    edits = EditTables.create(8, config.vocab_size)
    rotary = RotaryTable.build(
        config.layer_rope(0), config.head_dim, config.max_position_embeddings, torch.device("cpu")
    )
    parts = [arena.mask_index, arena.mask_rows, *vars_of(arena.automata), *vars_of(edits), rotary.cos, rotary.sin]
    made = sum(tensor.nbytes for tensor in parts if isinstance(tensor, torch.Tensor))
    assert tables_bytes(config, card, engine) == pytest.approx(made, rel=0.01)


def vars_of(table: Any) -> list[Any]:  # Any: a dataclass of tensors and numbers
    return [getattr(table, field.name) for field in dataclasses.fields(table)]


def test_a_quantised_checkpoint_is_sized_by_the_flag() -> None:
    with_method = fields("Llama-3.1-8B") | {"quantization_config": {"quant_method": "fp8"}}
    assert num_params(read_config("x", with_method)) == num_params(shape("Llama-3.1-8B"))


def test_a_70b_in_fp8_has_room_for_40_000_tokens_of_fp8_keys_and_values_on_one_card() -> None:
    engine = EngineConfig(mem_fraction_static=0.97, chunked_prefill_size=1024, max_running_requests=64)
    tokens = {}
    for kv_cache_dtype in ("auto", "fp8_e4m3"):
        changed = engine.changed({"kv_cache_dtype": kv_cache_dtype, "quantization": "fp8"})
        tokens[kv_cache_dtype] = size(shape("Llama-3.3-70B"), CARDS["h100"], changed).num_kv_tokens
    assert (
        40_000 <= tokens["fp8_e4m3"] <= 1.05 * 45_808
    )  # the second: walked from the start to serving (docs/models.md)
    assert tokens["fp8_e4m3"] / tokens["auto"] == pytest.approx(256 / 129, rel=0.01)
