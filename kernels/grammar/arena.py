"""One block of device memory for several grammars at once, so captured graphs need no new addresses.

The states of all grammars have global numbers:

    0                    free: everything is allowed, no token leaves it
    1 .. S               host mask of slot state - 1: the host writes its row before each step; no token leaves it
    S + 1                final: only end tokens are allowed; no token leaves it
    S + 2 ..             the states of resident grammars, each a contiguous range

Equal mask rows are stored once for all grammars; rows 0 .. S + 1 belong to the special states. All sequences of a
grammar share its device copy, which counts its users. If space is short, grammars without users are evicted, the least
recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ramet.errors import GrammarTooLarge
from ramet.kernels.grammar.closing import IMPOSSIBLE, TokenTrie, closing_table, state_after
from ramet.kernels.grammar.mask import (
    END,
    AutomatonTables,
    Budgets,
    ResidentAutomata,
    TokenTable,
    advance_states_reference,
    build_masks_reference,
    mask_classes,
    pack_mask,
    refuse_tokens,
)
from ramet.kernels.grammar.mask_triton import advance_states_triton, build_masks_triton
from ramet.kernels.sampling.sample import GrammarTables

FREE_STATE = 0
CLASSES_OF_A_STATE = 64  # of bytes, which many grammars stay below: a transition each
STATE_BYTES = 25 + 4 * CLASSES_OF_A_STATE  # of a state in all of the arena's tables
# Masks that are built at once: steps wait for a launch that is before them, and finding equal rows takes five times the
# memory of the rows for a moment.
_ROWS_PER_LAUNCH = 256


def arena_sizes(total_bytes: int, vocab_size: int) -> dict[str, int]:
    """Sizes of the arena on a GPU with this memory: a 256th of it for automata, as much for their mask rows.

    A grammar may take all of it, so the GPU's memory and the time for compiling are what limits a grammar.
    """
    share = total_bytes // 256
    max_states = max(share // STATE_BYTES, 240_000)
    return {
        "max_states": max_states,
        "max_transitions": max_states * CLASSES_OF_A_STATE,
        "max_mask_rows": max(share // (4 * -(-vocab_size // 32)), 8192),
    }


@dataclass(slots=True)
class ResidentGrammar:
    """A grammar in the arena. Owner: the arena. Local state s is global state `base + s`. forced: as of `forced`."""

    base: int
    num_states: int
    transition_start: int
    num_transitions: int
    grammar_row: int
    mask_rows: list[int]
    forced: NDArray[np.int32]
    num_users: int = 1


class GrammarArena:
    """Fixed tensors for masks and transitions of many grammars.

    One thread at a time may call `acquire` and `release`, beside the thread that runs the steps: it writes only what no
    step reads, on a stream of its own.
    """

    def __init__(
        self,
        tokens: TokenTable,
        num_slots: int,
        *,
        max_states: int = 65_536,
        max_transitions: int = 4_194_304,
        max_mask_rows: int = 8_192,
        max_grammars: int = 256,
    ) -> None:
        self.tokens = tokens
        self.num_slots = num_slots
        self.max_states, self.max_transitions = max_states, max_transitions
        self.final_state = num_slots + 1
        num_special = num_slots + 2
        device = tokens.lengths.device
        num_words = -(-tokens.vocab_size // 32)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        total_states = num_special + max_states
        self.automata = ResidentAutomata(
            transitions=zeros(max_transitions),
            state_row=zeros(total_states, dtype=torch.int64),
            state_grammar=zeros(total_states).fill_(-1),
            byte_class=zeros(max_grammars, 256, dtype=torch.uint8),
            accepting=zeros(total_states, dtype=torch.uint8),
            need=zeros(total_states).fill_(IMPOSSIBLE),
            closing_token=zeros(total_states).fill_(-1),
            final_state=self.final_state,
        )
        self.mask_index = zeros(total_states)
        self.mask_index[:num_special] = torch.arange(num_special, dtype=torch.int32, device=device)
        self.mask_rows = zeros(num_special + max_mask_rows, num_words)
        self.mask_rows[:num_special] = -1
        self.mask_rows[self.final_state] = pack_mask((tokens.lengths == END).unsqueeze(0))[0]
        self._states = _RangeAllocator(num_special, max_states)
        self._transitions = _RangeAllocator(0, max_transitions)
        self._free_grammar_rows = list(range(max_grammars - 1, -1, -1))
        self._rows = _RowTable(num_special, max_mask_rows)
        self._token_bytes = tuple(part.cpu().numpy() for part in (tokens.flat, tokens.offsets, tokens.lengths))
        self._resident: OrderedDict[Hashable, ResidentGrammar] = OrderedDict()  # least recently used first
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._wait_for_steps()  # which fill the tensors

    def advance(self, rows: Tensor, sampled: Tensor, state: Tensor, budgets: Budgets | None = None) -> None:
        """Run `advance_states_reference` for the slots `rows`. May be part of a CUDA graph."""
        run = advance_states_triton if rows.is_cuda else advance_states_reference
        run(rows, sampled, state, self.automata, self.tokens, budgets)

    def warm_up(self) -> None:
        """Compile the kernels and the loops that the first grammars need, by loading and removing minimal grammars."""
        byte_class, accepting = np.zeros(256, dtype=np.uint8), np.ones(1, dtype=np.uint8)
        transitions = np.full((1, 1), -1, dtype=np.int32)
        closing = closing_table(byte_class, transitions, accepting, TokenTrie.create([b"a"]))
        state_after(byte_class, transitions, b"a")
        refused = np.zeros((1, 2), dtype=np.int32)
        for has_ends in (False, True):
            nothing = AutomatonTables(byte_class, transitions, accepting, closing, refused=refused, has_ends=has_ends)
            key = object()
            self.acquire(key, nothing)
            self._free(self._resident.pop(key))

    def masks(self, state: Tensor) -> GrammarTables:
        """Return the sampler's tables for the slots' states, int32 [S + 1]."""
        return GrammarTables(state, self.mask_index, self.mask_rows)

    def host_state(self, slot: int) -> int:
        """Return the state that makes the sampler use the slot's host-written mask row."""
        return 1 + slot

    def set_host_masks(self, slots: Tensor, masks: Tensor) -> None:
        """Write the mask rows, int32 [n, W], that `host_state` selects for these slots, int32 [n]."""
        self.mask_rows.index_copy_(0, slots.long() + 1, masks)

    def acquire(self, key: Hashable, tables: AutomatonTables) -> int:
        """Make a grammar resident, unless it is, and count a user. Returns the global number of its local state 0.

        `key` identifies (grammar, vocabulary). Cost when new: an upload, one kernel for each 256 distinct masks, and
        synchronisations to intern them and at the end. It waits for launched steps only if it takes the place of
        another grammar. Steps that are launched after it may use the grammar.

        Raises:
            GrammarTooLarge: the grammar does not fit beside the grammars in use.
        """
        resident = self._resident.get(key)
        if resident is not None:
            resident.num_users += 1
            self._resident.move_to_end(key)
            return resident.base
        resident = self._reserve(tables)
        with self._own_stream():
            try:
                self._upload(resident, tables)
                self._build(resident, tables)
            except BaseException:  # also where the device has no memory left for a moment
                self._free(resident)
                raise
        self._resident[key] = resident
        return resident.base

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Work on another stream than the steps, so that they do not wait, and wait for its end."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()

    def _wait_for_steps(self) -> None:
        """Let what follows on the arena's stream begin after the launched steps."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self.mask_rows.device))

    def release(self, key: Hashable) -> None:
        """Count a user less. The grammar stays resident until its space is needed."""
        resident = self._resident[key]
        assert resident.num_users > 0, key
        resident.num_users -= 1

    def forced(self, key: Hashable) -> NDArray[np.int32]:
        """Return what must follow each state of a resident grammar, int32 [num_states, 2], in local numbers.

        That is the only token that the state's mask allows, and the state after it; -1 where several may follow, or the
        end.
        """
        return self._resident[key].forced

    def is_resident(self, key: Hashable) -> bool:
        return key in self._resident

    @property
    def num_free_mask_rows(self) -> int:
        return self._rows.num_free

    def _reserve(self, tables: AutomatonTables) -> ResidentGrammar:
        num_states, num_columns = tables.transitions.shape
        while True:
            base = self._states.allocate(num_states)
            start = self._transitions.allocate(num_states * num_columns)
            if base is not None and start is not None and self._free_grammar_rows:
                row = self._free_grammar_rows.pop()
                forced = np.full((num_states, 2), -1, dtype=np.int32)
                return ResidentGrammar(base, num_states, start, num_states * num_columns, row, [], forced)
            if base is not None:
                self._states.free(base, num_states)
            if start is not None:
                self._transitions.free(start, num_states * num_columns)
            if not self._evict_one():
                raise GrammarTooLarge(
                    f"an automaton of {num_states:,} states and {num_columns} byte classes does not fit the device's "
                    "grammar memory beside the grammars in use; raise its limits or let the host compute the masks"
                )

    def _evict_one(self) -> bool:
        key = next((key for key, resident in self._resident.items() if resident.num_users == 0), None)
        if key is None:
            return False
        self._free(self._resident.pop(key))
        self._wait_for_steps()  # some may still read it
        return True

    def _free(self, resident: ResidentGrammar) -> None:
        self._states.free(resident.base, resident.num_states)
        self._transitions.free(resident.transition_start, resident.num_transitions)
        self._free_grammar_rows.append(resident.grammar_row)
        for row in resident.mask_rows:
            self._rows.release(row)

    def _upload(self, resident: ResidentGrammar, tables: AutomatonTables) -> None:
        automata, device = self.automata, self.mask_rows.device
        states = slice(resident.base, resident.base + resident.num_states)
        shifted = np.where(tables.transitions >= 0, tables.transitions + resident.base, -1).astype(np.int32)
        stop = resident.transition_start + resident.num_transitions
        automata.transitions[resident.transition_start : stop] = torch.from_numpy(shifted.ravel()).to(device)
        num_columns = tables.transitions.shape[1]
        automata.state_row[states] = torch.arange(
            resident.transition_start, stop, num_columns, dtype=torch.int64, device=device
        )
        automata.state_grammar[states] = resident.grammar_row
        automata.byte_class[resident.grammar_row] = torch.from_numpy(tables.byte_class.astype(np.uint8)).to(device)
        automata.accepting[states] = torch.from_numpy(tables.accepting.astype(np.uint8)).to(device)
        closing = tables.closing
        automata.need[states] = IMPOSSIBLE if closing is None else torch.from_numpy(closing.need).to(device)
        automata.closing_token[states] = -1 if closing is None else torch.from_numpy(closing.token).to(device)

    def _build(self, resident: ResidentGrammar, tables: AutomatonTables) -> None:
        device, num_words = self.mask_rows.device, self.mask_rows.shape[1]
        class_of, representative = (
            mask_classes(
                tables.transitions,
                tables.accepting,
                self.tokens.longest,
                tables.refused,
                has_ends=tables.has_ends,
            )
            if tables.mask_classes is None
            else tables.mask_classes
        )
        row_of_class, only_token = np.empty((2, len(representative)), dtype=np.int32)
        weights = _hash_weights(num_words, device)
        for start in range(0, len(representative), _ROWS_PER_LAUNCH):
            local = representative[start : start + _ROWS_PER_LAUNCH].astype(np.int32)
            part = local + np.int32(resident.base)
            built = torch.empty((len(part), num_words), dtype=torch.int32, device=device)
            states = torch.from_numpy(part).to(device)
            build_masks = build_masks_triton if states.is_cuda else build_masks_reference
            build_masks(states, self.automata, self.tokens, built, has_ends=tables.has_ends)
            if tables.refused is not None:
                refuse_tokens(local, tables.refused, built)
            row_of_class[start : start + len(part)] = self._intern(resident, built, weights)
            only_token[start : start + len(part)] = _only_tokens(built)
        self._note_forced(resident, tables, only_token[class_of])
        rows = torch.from_numpy(row_of_class[class_of]).to(device)
        self.mask_index[resident.base : resident.base + resident.num_states] = rows

    def _note_forced(self, resident: ResidentGrammar, tables: AutomatonTables, only_token: NDArray[np.int32]) -> None:
        """Fill a grammar's `forced`. only_token: int32 [num_states], -1 where the mask allows several."""
        flat, offsets, lengths = self._token_bytes
        only_token[np.isin(only_token, self.tokens.end_ids)] = -1
        states = np.flatnonzero(only_token >= 0)
        tokens = only_token[states]
        after = states.astype(np.int32)
        for position in range(int(lengths[tokens].max(initial=0))):
            going = np.flatnonzero((lengths[tokens] > position) & (after >= 0))
            column = tables.byte_class[flat[offsets[tokens[going]] + position]]
            after[going] = tables.transitions[after[going], column]
        is_text = after >= 0  # else the model would mean the end
        resident.forced[states[is_text]] = np.stack([tokens, after], axis=1)[is_text]

    def _intern(self, resident: ResidentGrammar, built: Tensor, weights: Tensor) -> NDArray[np.int32]:
        """Intern rows by content and return their row numbers. Only new rows are copied."""
        digests = (built.long().unsqueeze(1) * weights).sum(-1).tolist()
        numbers = np.empty(len(digests), dtype=np.int32)
        sources: list[int] = []
        targets: list[int] = []
        for index, digest in enumerate(map(tuple, digests)):
            number, is_new = self._rows.acquire(digest)
            while number is None:
                if not self._evict_one():
                    raise GrammarTooLarge(
                        f"the device's grammar memory has no room for another of {self._rows.capacity:,} mask rows "
                        "beside the grammars in use; raise its limit or let the host compute the masks"
                    )
                number, is_new = self._rows.acquire(digest)
            resident.mask_rows.append(number)
            numbers[index] = number
            if is_new:
                sources.append(index)
                targets.append(number)
        if sources:
            device = built.device
            self.mask_rows[torch.tensor(targets, device=device)] = built[torch.tensor(sources, device=device)]
        return numbers


def _only_tokens(masks: Tensor) -> NDArray[np.int32]:
    """Return the only token that each packed mask allows, int32 [n, W] -> [n]; -1 where it allows none or several."""
    is_used = masks != 0
    places = is_used.int().argmax(1)
    found = torch.stack([is_used.sum(1), places, masks.gather(1, places.unsqueeze(1)).squeeze(1).long()])
    counts, word_of, words = found.cpu().numpy()
    words &= 0xFFFFFFFF
    is_only = (counts == 1) & (words & (words - 1) == 0)
    bits = np.log2(np.where(is_only, words, 1)).astype(np.int64)
    return np.where(is_only, 32 * word_of + bits, -1).astype(np.int32)


def _hash_weights(num_words: int, device: torch.device) -> Tensor:
    """Odd 64-bit weights [2, W]: two independent sums make a 128-bit digest of a mask row."""
    weights = np.random.default_rng(20_26).integers(-(2**63), 2**63, size=(2, num_words), dtype=np.int64) | 1
    return torch.from_numpy(weights).to(device)


@dataclass(slots=True)
class _RowTable:
    """Mask rows by digest, each with a count of its users. Owner: the arena."""

    first: int
    capacity: int
    _by_digest: dict[tuple[int, ...], int] = field(default_factory=dict)
    _digest_of: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _users: dict[int, int] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = list(range(self.first + self.capacity - 1, self.first - 1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self, digest: tuple[int, ...]) -> tuple[int | None, bool]:
        """Return (row, whether it is new), or (None, False) if no row is free."""
        row = self._by_digest.get(digest)
        if row is not None:
            self._users[row] += 1
            return row, False
        if not self._free:
            return None, False
        row = self._free.pop()
        self._by_digest[digest], self._digest_of[row], self._users[row] = row, digest, 1
        return row, True

    def release(self, row: int) -> None:
        self._users[row] -= 1
        if self._users[row] == 0:
            del self._by_digest[self._digest_of.pop(row)], self._users[row]
            self._free.append(row)


class _RangeAllocator:
    """A first-fit allocator over [start, start + size). Free ranges are kept sorted and merged."""

    def __init__(self, start: int, size: int) -> None:
        self._free: list[tuple[int, int]] = [(start, start + size)]

    def allocate(self, size: int) -> int | None:
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._free[index : index + 1] = [(start + size, stop)] if stop - start > size else []
                return start
        return None

    def free(self, start: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for low, high in sorted([*self._free, (start, start + size)]):
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self._free = merged
