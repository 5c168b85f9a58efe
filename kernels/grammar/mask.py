"""Token masks of closed automata, and the transitions of sampled tokens, on the device.

An automaton reads bytes: state' = transitions[state, byte_class[byte]], or -1 if the byte is refused. A token is
allowed in a state if the automaton refuses none of its bytes. An end token is allowed if the state is accepting. A
token without bytes (a special token) is never allowed. A mask depends only on the state, so masks are built once, when
a grammar becomes resident. States that no token distinguishes share one mask (`mask_classes`).

A text ends where the model means it, although the automaton would let it go on: where it may end, masks with *ends*
also allow the refused tokens that no text could begin with, those of which no beginning leads to a state where all of
the text is the value. A sampled one is replaced by the end token.

Not here: the memory for several grammars at once (`arena.py`), the kernels (`mask_triton.py`), and masks of open
automata, which the host computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ramet.kernels.grammar.closing import ClosingTable

NEVER = 0
END = -1
_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class AutomatonTables:
    """A closed automaton as numpy arrays. The start state is 0, and every state can reach an accepting one.

    byte_class: uint8 [256]. transitions: int32 [num_states, num_classes], -1 = refused.
    accepting: uint8 [num_states], 0 if the text may not end. 1: it may, and all of it is the value. 2: it may, but what
    follows the value has begun.
    refused: int32 [n, 2], ascending, the pairs (state, token) that masks refuse although the transitions allow them;
    None: there are none.
    closing: the shortest completions, for texts that must end within a budget; None: texts are not closed.
    mask_classes: the result of the function `mask_classes`; None: the arena computes it. has_ends: the masks have ends.
    """

    byte_class: NDArray[np.uint8]
    transitions: NDArray[np.int32]
    accepting: NDArray[np.uint8]
    closing: ClosingTable | None = None
    mask_classes: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None
    refused: NDArray[np.int32] | None = None
    has_ends: bool = False

    @property
    def num_states(self) -> int:
        return int(self.transitions.shape[0])


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The bytes of every token on the device.

    lengths: int32 [V]; 0 (`NEVER`) for tokens that no grammar may write, -1 (`END`) for end tokens.
    by_position: uint8 [longest, V]; byte i of all tokens is contiguous, for walks of many tokens at once.
    flat: uint8, all bytes in token order; offsets: int32 [V]; a token's bytes are contiguous, for walks of one token.
    """

    lengths: Tensor
    by_position: Tensor
    flat: Tensor
    offsets: Tensor
    end_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        return self.lengths.shape[0]

    @property
    def longest(self) -> int:
        return self.by_position.shape[0]

    @classmethod
    def create(
        cls,
        token_bytes: Sequence[bytes],
        end_ids: Iterable[int],
        special_ids: Iterable[int] = (),
        vocab_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenTable:
        """Make the table. Ids from len(token_bytes) to vocab_size, special ids and empty tokens are never allowed."""
        vocab_size = len(token_bytes) if vocab_size is None else vocab_size
        lengths = np.zeros(vocab_size, dtype=np.int32)
        lengths[: len(token_bytes)] = [len(piece) for piece in token_bytes]
        offsets = np.cumsum(lengths, dtype=np.int32) - lengths
        flat = np.frombuffer(b"".join(token_bytes) or b"\0", dtype=np.uint8).copy()
        by_position = np.zeros((max(int(lengths.max(initial=0)), 1), vocab_size), dtype=np.uint8)
        owner = np.repeat(np.arange(vocab_size), lengths)
        by_position[np.arange(len(owner)) - offsets[owner], owner] = flat[: len(owner)]
        ends = tuple(sorted(set(end_ids)))
        lengths[list(special_ids)] = NEVER
        lengths[list(ends)] = END
        return cls(
            lengths=torch.from_numpy(lengths).to(device),
            by_position=torch.from_numpy(by_position).to(device),
            flat=torch.from_numpy(flat).to(device),
            offsets=torch.from_numpy(offsets).to(device),
            end_ids=ends,
        )


@dataclass(frozen=True, slots=True)
class ResidentAutomata:
    """Tables of all resident automata, with global state numbers. Read by the kernels, written by the arena.

    transitions: int32, flat; the row of state s starts at state_row[s] (int64 [states]) and holds global states or -1.
    state_grammar: int32 [states], the row of byte_class, or -1 for states that no token leaves.
    byte_class: uint8 [grammars, 256]. accepting: uint8 [states], as in AutomatonTables. final_state: the state after an
    end token.
    need, closing_token: int32 [states], as in `closing`; need is IMPOSSIBLE for texts that are not closed.
    """

    transitions: Tensor
    state_row: Tensor
    state_grammar: Tensor
    byte_class: Tensor
    accepting: Tensor
    need: Tensor
    closing_token: Tensor
    final_state: int


@dataclass(frozen=True, slots=True)
class Budgets:
    """The token budgets within which constrained texts must be finished.

    positions: int32 [B], the sampled token's index in its sequence. close_at: int32 [S + 1] by slot, maximum length of
    the sequence in tokens (0: no limit). end_token: int32 [S + 1], 1 + the token that ends a complete text (0: there is
    none).
    """

    positions: Tensor
    close_at: Tensor
    end_token: Tensor


def build_masks_reference(
    states: Tensor, automata: ResidentAutomata, tokens: TokenTable, out: Tensor, *, has_ends: bool = False
) -> None:
    """Write the packed mask of each state, int32 [n], into `out` int32 [n, W]. has_ends: the masks have ends.

    All states belong to automata (none is a state that no token leaves).
    """
    for index, state in enumerate(states.long().tolist()):
        byte_class = automata.byte_class[automata.state_grammar[state].long()].long()
        reached = torch.where(tokens.lengths > 0, state, -1).long()
        may_end = bool(automata.accepting[state])
        is_end = (tokens.lengths > 0) & (may_end and has_ends)
        for position in range(tokens.longest):
            walking = ((tokens.lengths > position) & (reached >= 0)).nonzero().flatten()
            if len(walking) == 0:
                break
            column = byte_class[tokens.by_position[position, walking].long()]
            reached[walking] = automata.transitions[automata.state_row[reached[walking]] + column].long()
            is_end &= ~((reached >= 0) & (automata.accepting[reached] == 1))
        allowed = (reached >= 0) | is_end | ((tokens.lengths == END) & may_end)
        out[index] = pack_mask(allowed.unsqueeze(0))[0]


def refuse_tokens(states: NDArray[np.int32], refused: NDArray[np.int32], masks: Tensor) -> None:
    """Clear the refused tokens of each state, int32 [n], in its packed mask: `masks` int32 [n, W].

    refused: as in AutomatonTables. Called once for each grammar, so it needs no kernel: only the words that change are
    sent to the device.
    """
    begin, end = (np.searchsorted(refused[:, 0], states, side=side) for side in ("left", "right"))
    counts = end - begin
    if not counts.sum():
        return
    index = np.repeat(begin - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    tokens, rows = refused[index, 1].astype(np.int64), np.repeat(np.arange(len(states)), counts)
    words, place = np.unique(rows * masks.shape[1] + (tokens >> 5), return_inverse=True)
    bits = np.zeros(len(words), dtype=np.uint32)
    np.bitwise_or.at(bits, place, (1 << (tokens & 31)).astype(np.uint32))
    flat, at = masks.view(-1), torch.from_numpy(words).to(masks.device)
    flat[at] &= torch.from_numpy(~bits.view(np.int32)).to(masks.device)


def advance_states_reference(
    rows: Tensor,
    sampled: Tensor,
    state: Tensor,
    automata: ResidentAutomata,
    tokens: TokenTable,
    budgets: Budgets | None = None,
) -> None:
    """Advance the state of every slot in `rows` (int32 [B]) by its sampled token (int [B]), in place.

    state: int32 [S + 1]. Slots in states that no token leaves (free, host-masked, final) keep them. After an end token
    or a refused token, the state is `automata.final_state`.
    With `budgets`, tokens are replaced in `sampled`: a refused token where the text may end, by the slot's end token if
    it has one; and a token before which the remaining budget sufficed to finish the text, but no longer after it, by
    the first token of the shortest completion, or the end token if the text may end.
    """
    for index, (row, token) in enumerate(zip(rows.tolist(), sampled.tolist(), strict=True)):
        before = int(state[row])
        if int(automata.state_grammar[before]) < 0:
            continue
        after = _walk(before, token, automata, tokens)
        is_refused = after == automata.final_state and int(tokens.lengths[token]) > 0
        if budgets is not None and is_refused and bool(automata.accepting[before]) and int(budgets.end_token[row]):
            sampled[index] = int(budgets.end_token[row]) - 1
        if budgets is not None and after != automata.final_state and int(budgets.close_at[row]):
            left = int(budgets.close_at[row]) - int(budgets.positions[index]) - 1
            need = int(automata.need[before])
            if int(automata.need[after]) > left and need <= left + 1:
                forced = int(automata.closing_token[before]) if need else int(budgets.end_token[row]) - 1
                if forced >= 0:
                    sampled[index] = forced
                    after = _walk(before, forced, automata, tokens) if need else automata.final_state
        state[row] = after


def _walk(state: int, token: int, automata: ResidentAutomata, tokens: TokenTable) -> int:
    """The state after a token; the final state after an end token or a refused one."""
    length, offset = int(tokens.lengths[token]), int(tokens.offsets[token])
    if length <= 0:
        return automata.final_state
    grammar = int(automata.state_grammar[state])
    for byte in tokens.flat[offset : offset + length].tolist():
        state = int(automata.transitions[int(automata.state_row[state]) + int(automata.byte_class[grammar, byte])])
        if state < 0:
            return automata.final_state
    return state


def pack_mask(allowed: Tensor) -> Tensor:
    """Return packed words, int32 [B, ceil(V / 32)], of bool [B, V]: bit t % 32 of word t // 32."""
    num_rows, vocab_size = allowed.shape
    num_words = -(-vocab_size // 32)
    padded = torch.zeros((num_rows, num_words * 32), dtype=torch.uint8, device=allowed.device)
    padded[:, :vocab_size] = allowed
    weights = (1 << torch.arange(8, device=allowed.device)).to(torch.uint8)
    packed = (padded.view(num_rows, num_words * 4, 8) * weights).sum(-1, dtype=torch.uint8)
    return packed.view(torch.int32)


def mask_classes(
    transitions: NDArray[np.int32],
    accepting: NDArray[np.uint8],
    depth: int,
    refused: NDArray[np.int32] | None = None,
    *,
    has_ends: bool = False,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Group states whose masks must be equal, because no string of at most `depth` bytes distinguishes them.

    Returns (class_of int32 [num_states], representative int32 [num_classes]). Round k splits states by the classes of
    round k - 1 to which their bytes lead. The accepting flag counts only at the state itself, because end tokens have
    no bytes; with `has_ends` it counts after each byte whether it is 1, and the classes also serve masks without ends.
    The refused tokens (see AutomatonTables) also count at the state itself. Compiled, without the interpreter's lock.
    Source: partition refinement, Moore 1956, stopped after `depth` rounds, or where `_ROUNDS` of them split nothing. A
    class is a 64-bit signature.
    """
    num_states, num_columns = transitions.shape
    random = np.random.default_rng(0x52414D4554)
    weights = random.integers(0, 2**64, size=num_columns, dtype=np.uint64) | np.uint64(1)
    marks = random.integers(0, 2**64, size=3, dtype=np.uint64)
    own = np.where(accepting == 1, marks[0], marks[1]) if has_ends else np.full(num_states, marks[1])
    signature = np.append(own, marks[2])  # the last entry stands for "refused"
    num_classes = num_rounds = 0
    while num_rounds < depth:
        count = min(_ROUNDS, depth - num_rounds)
        signature = _refine()(transitions, signature, weights, own, count)
        num_rounds += count
        refined_count = len(np.unique(signature))
        if refined_count == num_classes:
            break
        num_classes = refined_count
    parts = [signature[:-1], (accepting != 0).astype(np.uint64)]
    if refused is not None and len(refused):
        of_token = random.integers(0, 2**64, size=int(refused[:, 1].max()) + 1, dtype=np.uint64)
        parts.append(np.zeros(num_states, dtype=np.uint64))
        np.add.at(parts[-1], refused[:, 0], of_token[refused[:, 1]])
    class_of, representative = np.zeros(num_states, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for part in parts:
        pairs = class_of * num_states + np.unique(part, return_inverse=True)[1]
        _, representative, class_of = np.unique(pairs, return_index=True, return_inverse=True)
    return class_of.astype(np.int32), representative.astype(np.int32)


@cache
def _refine() -> Callable[..., NDArray[np.uint64]]:
    from ramet.loops import loop  # brings numba, as in closing.py

    return loop(_refined)


def _refined(transitions, signature, weights, own, num_rounds):  # type: ignore[no-untyped-def]
    """Return the signatures after some rounds: each is a sum over the signatures of the following states, mixed."""
    before, after = signature.copy(), signature.copy()
    for _ in range(num_rounds):
        for state in range(transitions.shape[0]):
            total = own[state]
            for column in range(transitions.shape[1]):
                total += before[transitions[state, column]] * weights[column]
            total = (total ^ (total >> np.uint64(31))) * np.uint64(0x7FB5D329728EA185)
            after[state] = total ^ (total >> np.uint64(27))
        before, after = after, before
    return before
