# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The Triton kernels of `mask`.

`_build_kernel`, grid (states, blocks of 1,024 tokens): all tokens of a block advance together, one byte per iteration,
until each is refused or complete. A tile is [32 words, 32 bits].
`_advance_kernel`, grid (B): one program advances by one sampled token, or by its replacement if the sampled token means
the end or would leave too small a budget.
"""

from __future__ import annotations

from torch import Tensor

from ramet.kernels.grammar.mask import Budgets, ResidentAutomata, TokenTable
from ramet.kernels.triton_support import cdiv, jit, tl

_WORDS = 32


def build_masks_triton(
    states: Tensor, automata: ResidentAutomata, tokens: TokenTable, out: Tensor, *, has_ends: bool = False
) -> None:
    """Launch the kernel of `build_masks_reference`."""
    if len(states) == 0:
        return
    _build_kernel[(len(states), cdiv(tokens.vocab_size, 32 * _WORDS))](
        states,
        automata.transitions,
        automata.state_row,
        automata.state_grammar,
        automata.byte_class,
        automata.accepting,
        tokens.lengths,
        tokens.by_position,
        out,
        out.stride(0),
        tokens.vocab_size,
        HAS_ENDS=has_ends,
        WORDS=_WORDS,
        num_warps=4,
    )


def advance_states_triton(
    rows: Tensor,
    sampled: Tensor,
    state: Tensor,
    automata: ResidentAutomata,
    tokens: TokenTable,
    budgets: Budgets | None = None,
) -> None:
    """Launch the kernel of `advance_states_reference`. May be part of a CUDA graph."""
    if len(rows) == 0:
        return
    _advance_kernel[(len(rows),)](
        rows,
        sampled,
        state,
        state.stride(0),
        automata.transitions,
        automata.state_row,
        automata.state_grammar,
        automata.byte_class,
        automata.accepting,
        tokens.lengths,
        tokens.flat,
        tokens.offsets,
        automata.final_state,
        automata.need,
        automata.closing_token,
        rows if budgets is None else budgets.positions,
        rows if budgets is None else budgets.close_at,
        rows if budgets is None else budgets.end_token,
        0 if budgets is None else budgets.close_at.stride(0),
        HAS_BUDGETS=budgets is not None,
        num_warps=1,
    )


@jit
def _build_kernel(
    states_ptr, transitions_ptr, state_row_ptr, state_grammar_ptr, byte_class_ptr, accepting_ptr, lengths_ptr,
    bytes_ptr, out_ptr, out_stride, vocab_size, HAS_ENDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)[None, :]
    token = word[:, None] * 32 + bit
    state = tl.load(states_ptr + index)
    class_ptr = byte_class_ptr + tl.load(state_grammar_ptr + state) * 256
    is_accepting = (tl.load(accepting_ptr + state) != 0).to(tl.int32)
    length = tl.load(lengths_ptr + token, mask=token < vocab_size, other=0)
    reached = tl.where(length > 0, state, -1)
    is_end = tl.where(length > 0, is_accepting, 0)
    position_ptr = bytes_ptr + token
    position = state * 0
    walking = length > 0
    is_walking = tl.max(tl.max(walking.to(tl.int32), axis=1), axis=0)
    while is_walking != 0:
        byte = tl.load(position_ptr, mask=walking, other=0).to(tl.int32)
        column = tl.load(class_ptr + byte, mask=walking, other=0).to(tl.int32)
        start = tl.load(state_row_ptr + reached, mask=walking, other=0)
        following = tl.load(transitions_ptr + start + column, mask=walking, other=-1)
        reached = tl.where(walking, following, reached)
        if HAS_ENDS:
            accepting = tl.load(accepting_ptr + reached, mask=reached >= 0, other=0).to(tl.int32)
            is_end = tl.where(accepting == 1, 0, is_end)
        position += 1
        position_ptr += vocab_size
        walking = (length > position) & (reached >= 0)
        is_walking = tl.max(tl.max(walking.to(tl.int32), axis=1), axis=0)
    allowed = tl.where(length == -1, is_accepting, (reached >= 0).to(tl.int32))
    if HAS_ENDS:
        allowed = allowed | is_end
    words = tl.sum(allowed << bit, axis=1)
    tl.store(out_ptr + index * out_stride + word, words, mask=word * 32 < vocab_size)


@jit
def _advance_kernel(
    rows_ptr, sampled_ptr, state_ptr, state_stride, transitions_ptr, state_row_ptr, state_grammar_ptr, byte_class_ptr,
    accepting_ptr, lengths_ptr, flat_ptr, offsets_ptr, final_state, need_ptr, closing_ptr, positions_ptr, close_at_ptr,
    end_token_ptr, column_stride, HAS_BUDGETS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    slot = tl.load(rows_ptr + index).to(tl.int64)
    token = tl.load(sampled_ptr + index)
    before = tl.load(state_ptr + slot * state_stride)
    grammar = tl.load(state_grammar_ptr + before)
    if grammar >= 0:
        class_ptr = byte_class_ptr + grammar * 256
        after = walk(before, token, class_ptr, transitions_ptr, state_row_ptr, lengths_ptr, flat_ptr, offsets_ptr)
        if HAS_BUDGETS:
            end_token = tl.load(end_token_ptr + slot * column_stride) - 1
            if after < 0:
                is_refused = (tl.load(lengths_ptr + token) > 0) & (tl.load(accepting_ptr + before) != 0)
                tl.store(sampled_ptr + index, end_token, mask=is_refused & (end_token >= 0))
            close_at = tl.load(close_at_ptr + slot * column_stride)
            if (close_at > 0) & (after >= 0):
                left = close_at - tl.load(positions_ptr + index) - 1
                need = tl.load(need_ptr + before)
                if (tl.load(need_ptr + after) > left) & (need <= left + 1):
                    forced = tl.where(need > 0, tl.load(closing_ptr + before), end_token)
                    if forced >= 0:
                        tl.store(sampled_ptr + index, forced)
                        after = after * 0 - 1
                        if need > 0:
                            after = walk(
                                before, forced, class_ptr, transitions_ptr, state_row_ptr, lengths_ptr, flat_ptr,
                                offsets_ptr,
                            )  # fmt: skip
        tl.store(state_ptr + slot * state_stride, tl.where(after >= 0, after, final_state))


@jit
def walk(state, token, class_ptr, transitions_ptr, state_row_ptr, lengths_ptr, flat_ptr, offsets_ptr):
    """Return the state after a token; -1 after an end token or a refused one."""
    length = tl.load(lengths_ptr + token)
    byte_ptr = flat_ptr + tl.load(offsets_ptr + token)
    state = tl.where(length > 0, state, -1)
    position = length * 0
    while (position < length) & (state >= 0):
        column = tl.load(class_ptr + tl.load(byte_ptr + position).to(tl.int32)).to(tl.int32)
        state = tl.load(transitions_ptr + tl.load(state_row_ptr + state) + column)
        position += 1
    return state
