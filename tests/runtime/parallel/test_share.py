"""Which part of a model each rank holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ramet.errors import ConfigError
from ramet.runtime.models.config import Experts, ModelConfig, llama_3_1_8b, smollm2_135m
from ramet.runtime.models.weights import Weights, expected_tensors
from ramet.runtime.parallel.share import Share, check_size, fits
from ramet.runtime.steps.kv_cache import bytes_per_token

SMALL = dataclasses.replace(smollm2_135m(), num_layers=1, hidden_size=8, head_dim=4, intermediate_size=24)


def test_heads_that_do_not_divide_are_refused_with_the_numbers_that_work() -> None:
    expected = (
        r"tp is 2, but the model has 9 heads, 3 KV heads and 1,536 inner features, which cannot be divided among 2 "
        r"ranks; --tp may be 1 or 3$"
    )
    with pytest.raises(ConfigError, match=expected):
        check_size(smollm2_135m(), 2)
    check_size(smollm2_135m(), 3)
    with pytest.raises(ConfigError, match=r"--tp may be 1, 2, 4, 8, 16 or 32$"):
        check_size(llama_3_1_8b(), 3)
    with pytest.raises(ConfigError, match=r"--tp may be 1$"):
        check_size(dataclasses.replace(smollm2_135m(), intermediate_size=1001), 3)
    experts = dataclasses.replace(llama_3_1_8b(), experts=Experts(4, 2, 512, shared_size=1001))
    with pytest.raises(ConfigError, match=r"--tp may be 1$"):
        check_size(experts, 2)
    with pytest.raises(ConfigError, match=r"normalises queries and keys over all heads, .* leave out --tp$"):
        check_size(dataclasses.replace(llama_3_1_8b(), qk_norm="all"), 2)


@given(
    heads=st.integers(1, 12),
    group=st.integers(1, 6),
    inner=st.integers(1, 60),
    vocab=st.integers(1, 500),
    size=st.integers(1, 12),
)
def test_parts_together_are_the_whole_model(heads: int, group: int, inner: int, vocab: int, size: int) -> None:
    """Query heads and inner features lie on one rank each, and every query head has its KV head beside it."""
    whole = dataclasses.replace(
        SMALL, num_heads=heads * group, num_kv_heads=heads, intermediate_size=inner, vocab_size=vocab
    )
    if not fits(whole, size):
        return
    sizes = {name: shape[0] for name, shape in expected_tensors(whole).items()}
    parts = [Share(rank, size).parts(whole) for rank in range(size)]
    for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"):
        full = f"model.layers.0.{name}.weight"
        assert [row for part in parts for row in range(part[full].start, part[full].stop)] == [*range(sizes[full])]
    table = [part["model.embed_tokens.weight"] for part in parts]
    assert [row for part in table for row in range(part.start, part.stop)] == [*range(vocab)]
    for rank, part in enumerate(parts):
        own = Share(rank, size).config(whole)
        assert part["model.embed_tokens.weight"].padding + table[rank].stop - table[rank].start == own.vocab_size
        first_head, first_kv = (
            part[f"model.layers.0.self_attn.{name}.weight"].start // whole.head_dim for name in ("q_proj", "k_proj")
        )
        for head in range(own.num_heads):
            own_kv = first_kv + head // (own.num_heads // own.num_kv_heads)
            assert own_kv == (first_head + head) // group


@pytest.mark.parametrize("size", [2, 4])
def test_a_ranks_tensors_have_the_shapes_of_its_own_smaller_model(size: int) -> None:
    whole: ModelConfig = dataclasses.replace(SMALL, num_heads=8, num_kv_heads=2, qkv_bias=True, o_bias=True)
    weights = Weights.from_tensors({name: torch.ones(shape) for name, shape in expected_tensors(whole).items()})
    for rank in range(size):
        share = Share(rank, size)
        own = weights.cut(share.parts(whole))
        for name, shape in expected_tensors(share.config(whole)).items():
            assert tuple(own[name].shape) == shape, name


def test_pages_of_a_rank_hold_its_own_heads_alone() -> None:
    whole = llama_3_1_8b()  # 8 KV heads
    sizes = [bytes_per_token(Share(0, size).config(whole), torch.bfloat16) for size in (1, 2, 8, 16)]
    assert sizes == [131_072, 65_536, 16_384, 16_384]
