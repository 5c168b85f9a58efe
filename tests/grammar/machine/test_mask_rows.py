"""Mask rows are kept once a content and within their budget; what was given up is computed again."""

from __future__ import annotations

import numpy as np

from ramet.grammar import CompiledGrammar, Limits, Vocabulary, compile_constraint, compile_grammar, ir
from ramet.grammar.machine.mask_rows import MaskRows

BYTES = Vocabulary([*(bytes((i,)) for i in range(256)), b"<eos>"], [256], [256])


def test_equal_rows_are_one_object() -> None:
    rows = MaskRows(1 << 20)
    first = rows.intern(np.arange(9, dtype=np.int32))
    assert rows.intern(np.arange(9, dtype=np.int32)) is first
    assert rows.intern(np.arange(1, 10, dtype=np.int32)) is not first
    assert rows.num_rows == 2
    assert rows.num_bytes == 2 * 36
    assert not first.flags.writeable


def test_rows_stay_within_the_budget_and_those_in_use_stay() -> None:
    rows = MaskRows(40 * 100)
    for state in range(1000):
        rows.add_state()
        rows.keep(state, np.full(10, state, dtype=np.int32))
        used = rows.of_state[0]
        if used is None:
            used = rows.again(0)
        assert used is not None, state  # asked for all the time
        assert used[0] == 0
        assert rows.num_bytes <= rows.max_bytes + 2 * 40
    assert rows.num_rows <= 102
    assert rows.num_evicted > 800
    assert rows.of_state[1] is None
    assert rows.again(1) is None


def test_a_grammar_with_a_small_budget_gives_the_same_masks() -> None:
    schema = {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}}}
    limits = Limits(max_mask_bytes=12 * 4 * BYTES.num_words)
    small = compile_grammar(ir.JsonSchema(schema), BYTES, limits=limits)
    large = compile_grammar(ir.JsonSchema(schema), BYTES)
    text = b'{"some": [1, 22, 333], "other": [], "third": [-4, 0]}'
    for _ in range(2):
        a = b = 0
        for byte in text:
            assert np.array_equal(small.mask(a), large.mask(b)), byte
            a, b = _after(small, a, byte), _after(large, b, byte)
    assert small.rows.num_bytes <= limits.max_mask_bytes + 2 * 4 * BYTES.num_words
    assert small.rows.num_evicted > 0
    assert large.rows.num_evicted == 0


def _after(grammar: CompiledGrammar, state: int, token: int) -> int:
    following = grammar.advance(state, token)
    assert following is not None
    return following


def test_many_masks_at_once_are_the_masks_one_by_one() -> None:
    grammar = compile_constraint("regex", "[a-z]+[0-9]{2,5}", BYTES)
    states = [0]
    for byte in b"abc123":
        states.append(_after(grammar, states[-1], byte))
    rows = np.full((len(states), BYTES.num_words), -1, dtype=np.int32)
    grammar.fill_masks(states, rows)
    for row, state in zip(rows, states, strict=True):
        assert np.array_equal(row, grammar.mask(state))
