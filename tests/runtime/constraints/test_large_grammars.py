"""Large schemas run on the device: a grammar's size is limited by the GPU's memory, not by a number of states."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from ramet.grammar import Vocabulary, compile_constraint
from ramet.kernels.grammar.arena import GrammarArena, arena_sizes
from ramet.kernels.grammar.mask import TokenTable
from ramet.runtime.constraints.device_grammars import DeviceGrammars
from ramet.runtime.testing.byte_tokenizer import ByteTokenizer

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "role": {"enum": ["admin", "user", "guest", "operator"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 4},
    },
    "required": ["name", "role", "tags"],
    "additionalProperties": False,
}


def people(num: int) -> str:
    return json.dumps({"type": "array", "items": PERSON, "minItems": num})


def made(num_people: int, **sizes: int) -> tuple[DeviceGrammars, Any]:
    made = ByteTokenizer()
    tokens = TokenTable.create(made.token_bytes, made.eos_ids, made.special_ids, made.vocab_size)
    device = DeviceGrammars(GrammarArena(tokens, 2, **sizes), made.token_bytes, made.eos_ids, made.special_ids)
    vocabulary = Vocabulary(made.token_bytes, made.eos_ids, made.special_ids, made.vocab_size)
    return device, compile_constraint("json_schema", people(num_people), vocabulary)


def test_a_schema_of_more_than_60_000_states_runs_on_the_device() -> None:
    device, grammar = made(9, **arena_sizes(24 << 30, 384))
    assert device.close(grammar)
    assert 60_000 < grammar.num_states < 100_000
    tables = device.prepare(grammar)
    assert tables is not None
    base = device.acquire(grammar, tables, has_ends=True)
    assert base is not None
    arena = device.arena
    for state in np.random.default_rng(0).integers(0, grammar.num_states, 50).tolist():
        row = arena.mask_rows[arena.mask_index[base + state]].numpy()
        assert (row == grammar.mask(state)).all(), state


def test_a_grammar_that_the_arena_has_no_room_for_stays_with_the_host() -> None:
    device, grammar = made(3, max_states=4096, max_transitions=1 << 18)
    assert not device.close(grammar)
    assert device.prepare(grammar) is None
    device, grammar = made(3, max_states=100_000, max_transitions=4096)
    assert not device.close(grammar), "transitions are limited, too"


def test_a_grammar_for_whose_masks_the_device_has_no_memory_stays_with_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, grammar = made(1, max_grammars=1)
    assert device.close(grammar)
    tables = device.prepare(grammar)
    assert tables is not None

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(GrammarArena, "_intern", full)
        assert device.acquire(grammar, tables, has_ends=True) is None
    assert device.acquire(grammar, tables, has_ends=True) is not None, "the attempt took no place"


@pytest.mark.parametrize("vocab_size", [49_152, 128_256, 262_208])
def test_room_for_grammars_grows_with_the_gpu(vocab_size: int) -> None:
    small, large = arena_sizes(8 << 30, vocab_size), arena_sizes(80 << 30, vocab_size)
    assert small["max_states"] >= 240_000
    assert large["max_states"] > 1_000_000
    for sizes, total_bytes in ((small, 8 << 30), (large, 80 << 30)):
        num_bytes = 25 * sizes["max_states"] + 4 * sizes["max_transitions"]
        assert num_bytes < total_bytes / 100
        assert sizes["max_transitions"] * 4 < 2**31, "a kernel's offset within the tables fits 32 bits"
        assert sizes["max_mask_rows"] >= 8192
