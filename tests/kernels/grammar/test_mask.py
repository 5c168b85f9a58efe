"""Masks of closed automata and the walk of sampled tokens: against brute force, and kernel against reference."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, cast

import numpy as np
import pytest
import torch

from ramet.errors import GrammarTooLarge
from ramet.kernels.grammar import closing as loops_of_closing
from ramet.kernels.grammar import mask as loops_of_masks
from ramet.kernels.grammar.arena import FREE_STATE, GrammarArena
from ramet.kernels.grammar.closing import TokenTrie, closing_table, state_after
from ramet.kernels.grammar.mask import (
    AutomatonTables,
    Budgets,
    TokenTable,
    advance_states_reference,
    build_masks_reference,
    mask_classes,
    pack_mask,
)
from ramet.kernels.grammar.mask_triton import advance_states_triton, build_masks_triton
from ramet.kernels.sampling.sample import SamplingTables, sample_reference, unpack_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = [b"a", b"b", b"ab", b"ba", b"aab", b"", b"", b"abababababababababab", b"\xff", b"c", b"bb"]
END, SPECIAL = 5, 6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def token_table(vocab_size: int = 40) -> TokenTable:
    return TokenTable.create(TOKENS, [END], [SPECIAL], vocab_size, DEVICE)


def ab_star() -> AutomatonTables:
    """(ab)*: state 0 accepting, state 1 after an `a`."""
    byte_class = np.zeros(256, dtype=np.uint8)
    byte_class[ord("a")], byte_class[ord("b")] = 1, 2
    return AutomatonTables(byte_class, np.array([[-1, 1, -1], [-1, -1, 0]], dtype=np.int32), np.array([1, 0], np.uint8))


def random_automaton(seed: int, num_states: int = 12) -> AutomatonTables:
    random = np.random.default_rng(seed)
    byte_class = np.zeros(256, dtype=np.uint8)
    byte_class[[ord("a"), ord("b"), ord("c")]] = [1, 2, 3]
    transitions = random.integers(0, num_states, size=(num_states, 4)).astype(np.int32)
    transitions[random.random((num_states, 4)) < 0.4] = -1
    accepting = random.choice(np.array([0, 1, 2], dtype=np.uint8), size=num_states, p=[0.6, 0.25, 0.15])
    return AutomatonTables(byte_class, transitions, accepting)


def walk(tables: AutomatonTables, state: int, token: int) -> int | None:
    """The state after a token, or None; by the definition."""
    if token >= len(TOKENS) or not TOKENS[token]:
        return None
    for byte in TOKENS[token]:
        state = int(tables.transitions[state, tables.byte_class[byte]])
        if state < 0:
            return None
    return state


def ends(tables: AutomatonTables, state: int, token: int) -> bool:
    """Whether a token ends the text, by the definition: it is refused, and no beginning of it is a whole value."""
    if token >= len(TOKENS) or not TOKENS[token] or not tables.accepting[state]:
        return False
    for byte in TOKENS[token]:
        state = int(tables.transitions[state, tables.byte_class[byte]])
        if state < 0:
            return True
        if tables.accepting[state] == 1:
            return False
    return False


def expected_mask(tables: AutomatonTables, state: int, vocab_size: int) -> list[bool]:
    return [
        bool(tables.accepting[state])
        if token == END
        else walk(tables, state, token) is not None or (tables.has_ends and ends(tables, state, token))
        for token in range(vocab_size)
    ]


@pytest.mark.parametrize("has_ends", [False, True])
@pytest.mark.parametrize("vocab_size", [40, 1100])
@pytest.mark.parametrize("kind", ["reference", "triton"])
def test_masks_equal_brute_force(kind: str, vocab_size: int, has_ends: bool) -> None:
    build = build_masks_triton if kind == "triton" else build_masks_reference
    arena = GrammarArena(token_table(vocab_size), num_slots=3)
    for seed in range(4):
        tables = dataclasses.replace(ab_star() if seed == 0 else random_automaton(seed), has_ends=has_ends)
        base = arena.acquire(seed, tables)
        states = torch.arange(base, base + tables.num_states, dtype=torch.int32, device=DEVICE)
        out = torch.full((len(states), -(-vocab_size // 32)), 0x55555555, dtype=torch.int32, device=DEVICE)
        build(states, arena.automata, arena.tokens, out, has_ends=has_ends)
        for state in range(tables.num_states):
            mask = unpack_mask(out[state : state + 1], vocab_size)[0]
            assert mask.tolist() == expected_mask(tables, state, vocab_size)
            assert torch.equal(arena.mask_rows[arena.mask_index[base + state].long()], out[state])


@pytest.mark.parametrize("vocab_size", [40, 1100])
def test_refused_tokens_are_in_no_mask_of_their_states(vocab_size: int) -> None:
    arena = GrammarArena(token_table(vocab_size), num_slots=3)
    for seed in range(1, 6):
        tables = random_automaton(seed)
        allowed = [expected_mask(tables, state, vocab_size) for state in range(tables.num_states)]
        random = np.random.default_rng(seed)
        every = [(state, token) for state in range(tables.num_states) for token in range(11) if allowed[state][token]]
        refused = [pair for pair in every if pair[1] != END and random.random() < 0.3]
        for state, token in refused:
            allowed[state][token] = False
        given = np.array(refused, dtype=np.int32).reshape(-1, 2)
        classes = mask_classes(tables.transitions, tables.accepting, 20, given)
        for whole in (None, classes):
            tables = dataclasses.replace(tables, refused=given, mask_classes=whole)
            base = arena.acquire((seed, whole is None), tables)
            rows = arena.mask_rows[arena.mask_index[base : base + tables.num_states].long()]
            assert unpack_mask(rows, vocab_size).tolist() == allowed


@pytest.mark.parametrize("kind", ["reference", "triton"])
def test_a_refused_token_where_the_text_may_end_becomes_the_end_token(kind: str) -> None:
    """(ab)*, in the state where it may end and in the one where it may not."""
    advance = advance_states_triton if kind == "triton" else advance_states_reference
    arena = GrammarArena(token_table(), num_slots=6)
    base = arena.acquire("ab", dataclasses.replace(ab_star(), has_ends=True))
    a, b, c = (TOKENS.index(text) for text in (b"a", b"b", b"c"))
    # slot: state, end_token + 1, sampled -> token, state
    rows = [
        (base, END + 1, c, END, arena.final_state),
        (base, END + 1, a, a, base + 1),
        (base, END + 1, END, END, arena.final_state),
        (base, 0, c, c, arena.final_state),  # there is no end token
        (base + 1, END + 1, c, c, arena.final_state),  # never sampled: the mask refuses it
        (base + 1, END + 1, b, b, base),
    ]
    columns = [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in zip(*rows, strict=True)]
    state = torch.cat((columns[0], torch.zeros(1, dtype=torch.int32, device=DEVICE)))
    order = torch.arange(len(rows), dtype=torch.int32, device=DEVICE)
    sampled = columns[2].clone()
    advance(order, sampled, state, arena.automata, arena.tokens, Budgets(order, order * 0, columns[1]))
    assert sampled.tolist() == columns[3].tolist()
    assert state.tolist()[: len(rows)] == columns[4].tolist()


@pytest.mark.parametrize("kind", ["reference", "triton"])
def test_sampled_tokens_move_the_states_of_their_slots_only(kind: str) -> None:
    advance = advance_states_triton if kind == "triton" else advance_states_reference
    arena = GrammarArena(token_table(), num_slots=8)
    first, second = ab_star(), random_automaton(7)
    base, other = arena.acquire("first", first), arena.acquire("second", second)
    state = torch.tensor(
        [FREE_STATE, base, base + 1, base, other + 3, arena.host_state(5), arena.final_state, base, FREE_STATE],
        dtype=torch.int32,
        device=DEVICE,
    )
    column = torch.stack((state * 0 - 7, state), 1)[:, 1]  # strided, as a column of the slot arena
    rows = torch.tensor([3, 0, 8, 1, 2, 4, 5, 6, 8], dtype=torch.int32, device=DEVICE)
    sampled = torch.tensor([END, 0, 0, 2, 1, 9, 4, END, 3], device=DEVICE)
    advance(rows, sampled, column, arena.automata, arena.tokens)
    after = walk(second, 3, 9)
    expected = [
        FREE_STATE,
        base,
        base,
        arena.final_state,
        arena.final_state if after is None else other + after,
        arena.host_state(5),
        arena.final_state,
        base,
        FREE_STATE,
    ]
    assert column.tolist() == expected


def test_a_constrained_row_writes_only_the_language() -> None:
    arena = GrammarArena(token_table(), num_slots=2)
    base = arena.acquire("ab", ab_star())
    tables = SamplingTables.create(2, DEVICE)
    tables.temperature[:2] = 1.0
    tables.seed_low[:2] = 99
    state = torch.tensor([base, FREE_STATE, 0], dtype=torch.int32, device=DEVICE)
    masked = dataclasses.replace(tables, grammar=arena.masks(state))
    rows = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    text = b""
    for step in range(60):
        logits = torch.zeros(2, 40, device=DEVICE)
        logits[0, END] = step * 0.2 - 4.0
        position = torch.full((2,), step, dtype=torch.int32, device=DEVICE)
        token = sample_reference(logits, masked, rows, position)
        advance_states_reference(rows, token, state, arena.automata, arena.tokens)
        if token[0] == END:
            break
        text += TOKENS[int(token[0])]
    assert len(text) > 4
    assert text.replace(b"ab", b"") == b""
    assert state[0] == arena.final_state
    assert state[1] == FREE_STATE
    assert sample_reference(logits, masked, rows, position)[0] == END


def test_states_of_one_class_have_equal_masks_and_few_classes_are_kept() -> None:
    # A counter: a{0,30} then b. Only the last states differ for tokens of at most 3 bytes.
    num_states = 33
    byte_class = np.zeros(256, dtype=np.uint8)
    byte_class[ord("a")], byte_class[ord("b")] = 1, 2
    transitions = np.full((num_states, 3), -1, dtype=np.int32)
    for state in range(31):
        transitions[state, 1] = state + 1 if state < 30 else -1
        transitions[state, 2] = 31
    accepting = np.zeros(num_states, dtype=bool)
    accepting[31] = True
    class_of, representative = mask_classes(transitions, accepting, 3)
    # depth 3: states 0..27 alike, then 28, 29, 30, the accepting 31 and the dead 32.
    assert len(representative) == 6
    assert len(set(class_of[:28].tolist())) == 1
    for state in range(num_states):
        assert class_of[representative[class_of[state]]] == class_of[state]


@pytest.mark.parametrize("has_ends", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_classes_are_exactly_the_states_that_no_short_string_tells_apart(seed: int, has_ends: bool) -> None:
    tables = random_automaton(seed, 8)
    depth = 3

    def language(state: int, left: int) -> tuple[object, ...]:
        following = tables.transitions[state] if left else ()
        branches = tuple(None if target < 0 else language(int(target), left - 1) for target in following)
        return (bool(tables.accepting[state] == 1), branches) if has_ends else branches

    class_of, _ = mask_classes(tables.transitions, tables.accepting, depth, has_ends=has_ends)
    keys = [(bool(tables.accepting[state]), language(state, depth)) for state in range(8)]
    for first in range(8):
        for second in range(8):
            assert (class_of[first] == class_of[second]) == (keys[first] == keys[second])


def test_grammars_share_rows_leave_when_unused_and_never_move_the_tensors() -> None:
    arena = GrammarArena(
        token_table(), num_slots=2, max_states=20, max_transitions=100, max_mask_rows=14, max_grammars=3
    )
    pointers = [tensor.data_ptr() for tensor in (arena.mask_rows, arena.mask_index, arena.automata.transitions)]
    base = arena.acquire("a", ab_star())
    free = arena.num_free_mask_rows
    assert arena.acquire("copy", ab_star()) != base
    assert arena.num_free_mask_rows == free
    assert arena.acquire("a", ab_star()) == base
    big = random_automaton(3)
    arena.release("copy")
    arena.acquire("big", big)
    assert arena.is_resident("copy")
    with pytest.raises(GrammarTooLarge, match="12 states"):
        arena.acquire("second", random_automaton(4))
    assert not arena.is_resident("copy")
    arena.release("big")
    base = arena.acquire("second", random_automaton(4))
    assert not arena.is_resident("big")
    assert arena.is_resident("a")
    states = torch.arange(base, base + 12, device=DEVICE)
    expected = [expected_mask(random_automaton(4), state, 40) for state in range(12)]
    assert unpack_mask(arena.mask_rows[arena.mask_index[states].long()], 40).tolist() == expected
    assert pointers == [tensor.data_ptr() for tensor in (arena.mask_rows, arena.mask_index, arena.automata.transitions)]


def test_too_many_masks_are_refused_and_leave_nothing_behind() -> None:
    arena = GrammarArena(token_table(), num_slots=1, max_states=50, max_mask_rows=3)
    with pytest.raises(GrammarTooLarge, match="mask rows"):
        arena.acquire("big", random_automaton(3))
    assert arena.num_free_mask_rows == 3
    arena.acquire("small", ab_star())


def test_host_masks_and_the_final_state_are_rows_like_the_others() -> None:
    arena = GrammarArena(token_table(), num_slots=2)
    allowed = torch.zeros(1, 40, dtype=torch.bool)
    allowed[0, 9] = True
    arena.set_host_masks(torch.tensor([1], dtype=torch.int32), pack_mask(allowed))
    row = arena.mask_rows[arena.mask_index[arena.host_state(1)].long()]
    assert unpack_mask(row.unsqueeze(0), 40)[0].nonzero().flatten().tolist() == [9]
    final = arena.mask_rows[arena.mask_index[arena.final_state].long()]
    assert unpack_mask(final.unsqueeze(0), 40)[0].nonzero().flatten().tolist() == [END]
    assert bool((arena.mask_rows[arena.mask_index[FREE_STATE].long()] == -1).all())


def test_a_warmed_up_arena_is_as_empty_as_a_new_one() -> None:
    arena = GrammarArena(token_table(), num_slots=2, max_states=4, max_mask_rows=2, max_grammars=1)
    before = arena.num_free_mask_rows
    arena.warm_up()
    assert arena.num_free_mask_rows == before
    assert arena.acquire("ab", ab_star()) == 4


def test_a_warmed_up_arena_compiles_no_loop_for_the_first_grammar() -> None:
    pytest.importorskip("numba")
    arena = GrammarArena(token_table(), num_slots=2)
    arena.warm_up()
    loops: list[Any] = [*loops_of_closing._compiled(), loops_of_masks._refine()]
    before = [len(loop.signatures) for loop in loops]
    tables = random_automaton(3)
    closing = closing_table(tables.byte_class, tables.transitions, tables.accepting, TokenTrie.create(TOKENS))
    state_after(tables.byte_class, tables.transitions, b"ab")
    arena.acquire("new", dataclasses.replace(tables, closing=closing))
    assert [len(loop.signatures) for loop in loops] == before
    assert all(before)


class Stream:
    """Notes what is asked of a stream."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def wait_stream(self, other: object) -> None:
        self.asked.append("wait")

    def synchronize(self) -> None:
        self.asked.append("synchronize")


# The order of calls is the same on a GPU, where the stream must be a real one, which notes none.
@pytest.mark.skipif(DEVICE == "cuda", reason="needs a stream that does nothing")
def test_a_new_grammar_waits_for_launched_steps_only_where_it_takes_anothers_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    arena = GrammarArena(token_table(), num_slots=2, max_states=14, max_mask_rows=14)
    stream = Stream()
    arena._stream = cast(Any, stream)
    arena.acquire("a", ab_star())
    arena.acquire("big", random_automaton(3))
    assert stream.asked == ["synchronize"] * 2
    arena.release("big")
    with pytest.raises(GrammarTooLarge):
        arena.acquire("larger", random_automaton(4, 13))
    arena.acquire("other", random_automaton(5))
    assert stream.asked[2:] == ["wait", "synchronize"], "what an attempt that failed has evicted counts, too"
    arena = GrammarArena(token_table(), num_slots=2, max_states=40, max_mask_rows=2)
    stream = Stream()
    arena._stream = cast(Any, stream)
    arena.acquire("a", ab_star())
    arena.release("a")
    one = AutomatonTables(np.zeros(256, np.uint8), np.array([[1], [-1]], dtype=np.int32), np.array([0, 1], np.uint8))
    arena.acquire("rows", one)
    assert stream.asked[1:] == ["wait", "synchronize"], "mask rows have places, too"


@pytest.mark.parametrize("kind", ["reference", "triton"])
def test_a_token_that_leaves_no_way_out_is_replaced(kind: str) -> None:
    """(ab)*: after `a` one more token is needed, so with one token left an `a` becomes the end, and so on."""
    advance = advance_states_triton if kind == "triton" else advance_states_reference
    arena = GrammarArena(token_table(), num_slots=6)
    tables = ab_star()
    trie = TokenTrie.create([TOKENS[i] if i < len(TOKENS) else b"" for i in range(40)], [END])
    closing = closing_table(tables.byte_class, tables.transitions, tables.accepting, trie)
    base = arena.acquire("ab", dataclasses.replace(tables, closing=closing))
    a, b = TOKENS.index(b"a"), TOKENS.index(b"b")
    # slot: state, position of the sampled token, close_at, end_token + 1, sampled -> token, state
    rows = [
        (base, 9, 10, END + 1, a, END, arena.final_state),  # the last token: `a` could not be followed by `b`
        (base, 8, 10, END + 1, a, a, base + 1),  # one more fits
        (base, 9, 10, 0, a, a, base + 1),  # no end token is wanted: left alone
        (base, 9, 0, END + 1, a, a, base + 1),  # no limit
        (base + 1, 9, 10, END + 1, b, b, base),  # on its way out
    ]
    columns = [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in zip(*rows, strict=True)]
    state = torch.cat((columns[0], torch.zeros(1, dtype=torch.int32, device=DEVICE)))
    budgets = Budgets(columns[1], columns[2], columns[3])
    sampled = columns[4].clone()
    order = torch.arange(len(rows), dtype=torch.int32, device=DEVICE)
    advance(order, sampled, state, arena.automata, arena.tokens, budgets)
    assert sampled.tolist() == columns[5].tolist()
    assert state.tolist()[: len(rows)] == columns[6].tolist()
