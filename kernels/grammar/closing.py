"""The shortest completion of every state of a closed automaton, in tokens. It finishes a text within its budget.

The canonical completion of a state is a shortest text to an accepting state (one fixed choice of bytes), and

    need[s]  = fewest tokens that write it      token[s] = the first of them      (0 and none if s accepts)

need is computed from the accepting states outwards: 1 + the least need of the states after tokens that begin the
completion. Runs on the host once per grammar, compiled and without the interpreter's lock. Used by
`GrammarArena.advance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

IMPOSSIBLE = 1 << 30
_LONGEST_TOKEN = 64

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenTrie:
    """A trie of the tokens that may write a text. Node 0 is the root; keys[i] leads to node i + 1.

    keys: int64, ascending, parent * 256 + byte. token: int32 [nodes], -1 if no token ends there. longest: bytes of the
    longest token.
    """

    keys: Int64
    token: Int32
    longest: int

    @classmethod
    def create(cls, token_bytes: Sequence[bytes], never: Iterable[int] = ()) -> TokenTrie:
        """Make the trie of all tokens, except empty ones, those of more than 64 bytes, and the ids `never`."""
        lengths = np.fromiter((len(piece) for piece in token_bytes), dtype=np.int64, count=len(token_bytes))
        lengths[[token for token in never if token < len(lengths)]] = 0
        lengths[lengths > _LONGEST_TOKEN] = 0
        flat = np.frombuffer(b"".join(token_bytes) + b"\0", dtype=np.uint8).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in token_bytes])])[:-1]
        node = np.zeros(len(token_bytes), dtype=np.int64)
        levels: list[Int64] = []
        ends: list[tuple[Int64, Int64]] = []
        num_nodes = 1
        for level in range(int(lengths.max(initial=0))):
            inside = np.flatnonzero(lengths > level)
            key, place = np.unique(node[inside] * 256 + flat[offsets[inside] + level], return_inverse=True)
            node[inside] = num_nodes + place
            levels.append(key)
            num_nodes += len(key)
            last = inside[lengths[inside] == level + 1]
            ends.append((node[last], last))
        token = np.full(num_nodes, -1, dtype=np.int32)
        for nodes, ids in ends:
            token[nodes] = ids
        keys = np.concatenate(levels) if levels else np.zeros(0, dtype=np.int64)
        return cls(keys, token, len(levels))


@dataclass(frozen=True, slots=True)
class ClosingTable:
    """need, token: int32 [num_states]. If no tokens write a state's completion, need is IMPOSSIBLE and token is -1."""

    need: Int32
    token: Int32


def closing_table(
    byte_class: NDArray[np.uint8], transitions: Int32, accepting: NDArray[np.uint8], trie: TokenTrie
) -> ClosingTable:
    """Find the completion of every state. Arguments as in `mask.AutomatonTables`."""
    num_states, num_columns = transitions.shape
    byte_of = np.zeros(num_columns, dtype=np.int64)
    for byte in [
        *range(127, 256),
        *range(32),
        *range(126, 31, -1),
    ]:  # the last one counts: a printable one if there is one
        byte_of[byte_class[byte]] = byte
    distance = np.full(num_states, IMPOSSIBLE, dtype=np.int32)
    column = np.full(num_states, -1, dtype=np.int32)
    need = np.full(num_states, IMPOSSIBLE, dtype=np.int32)
    token = np.full(num_states, -1, dtype=np.int32)
    find_ways, fill, _ = _compiled()
    order = find_ways(np.ascontiguousarray(transitions), accepting, distance, column)
    fill(transitions, byte_of, distance, column, order, trie.keys, trie.token, trie.longest, need, token)
    return ClosingTable(need, token)


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:  # Any: arrays
    from ramet.loops import loop  # brings numba, which a GPU's process does without until it closes a grammar

    return loop(_find_ways), loop(_fill), loop(_run)


def state_after(byte_class: NDArray[np.uint8], transitions: Int32, text: bytes, start: int = 0) -> int:
    """Return the state of a closed automaton after a text that begins in `start`, -1 if it refuses the text."""
    return int(_compiled()[2](byte_class, transitions, np.frombuffer(text, dtype=np.uint8), start))


def _run(byte_class, transitions, text, state):  # type: ignore[no-untyped-def]
    for i in range(len(text)):
        state = transitions[state, byte_class[text[i]]]
        if state < 0:
            break
    return state


def _find_ways(transitions, accepting, distance, column):  # type: ignore[no-untyped-def]
    """Breadth first from the accepting states, backwards; fills distance and column, returns states by distance."""
    num_states, num_columns = transitions.shape
    first = np.zeros(num_states + 1, dtype=np.int64)
    for state in range(num_states):
        for c in range(num_columns):
            target = transitions[state, c]
            if target >= 0:
                first[target + 1] += 1
    for state in range(num_states):
        first[state + 1] += first[state]
    filled = first.copy()
    sources = np.empty(first[num_states], dtype=np.int64)
    for state in range(num_states):
        for c in range(num_columns):
            target = transitions[state, c]
            if target >= 0:
                sources[filled[target]] = state * num_columns + c
                filled[target] += 1
    order = np.empty(num_states, dtype=np.int64)
    tail = 0
    for state in range(num_states):
        if accepting[state]:
            distance[state] = 0
            order[tail] = state
            tail += 1
    head = 0
    while head < tail:
        target = order[head]
        head += 1
        for i in range(first[target], first[target + 1]):
            state = sources[i] // num_columns
            if column[state] < 0 and distance[state] != 0:
                distance[state] = distance[target] + 1
                column[state] = sources[i] % num_columns
                order[tail] = state
                tail += 1
    return order[:tail]


def _fill(transitions, byte_of, distance, column, order, keys, token_of, longest, need, token):  # type: ignore[no-untyped-def]
    """Fill need and token, nearest states first."""
    for i in range(len(order)):
        state = order[i]
        if distance[state] == 0:
            need[state] = 0
            continue
        node = 0
        current = state
        for _ in range(min(longest, distance[state])):
            key = node * 256 + byte_of[column[current]]
            place = np.searchsorted(keys, key)
            if place == len(keys) or keys[place] != key:
                break
            node = place + 1
            current = transitions[current, column[current]]
            if token_of[node] >= 0 and need[current] + 1 < need[state]:
                need[state] = need[current] + 1
                token[state] = token_of[node]
