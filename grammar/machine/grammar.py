"""The interface of compiled grammars: Ramet's own, bordered ones, and those of other engines. No numba here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTables:
    """All states of a grammar as flat tables, for a device.

    byte_class: uint8 [256]. transitions: int32 [num_states, num_classes], -1 refused. State 0 is the start.
    accepting: uint8 [num_states], 0 if the text may not end. 1: it may, and all of it is the value. 2: it may, but what
    follows the value has begun.
    refused: int32 [n, 2], ascending, the pairs (state, token) that masks refuse although the transitions allow them.
    is_complete: bool [num_states]. num_after: uint8 [num_states, 2], before the last token and after it. See `Grammar`.
    """

    byte_class: NDArray[np.uint8]
    transitions: NDArray[np.int32]
    accepting: NDArray[np.uint8]
    refused: NDArray[np.int32]
    is_complete: NDArray[np.bool_]
    num_after: NDArray[np.uint8]


class Grammar(Protocol):
    """What a compiled grammar does for those who generate text. States are small integers; state 0 is the start.

    A state is a pure function of the tokens committed so far, so preemption and fork keep only an integer.
    """

    @property
    def is_closed(self) -> bool:
        """True if every reachable state is known, so that there may be `device_tables`."""

    @property
    def before(self) -> bytes:
        """The bytes that the model writes before the text: those of the prompt's last token, which it writes again."""

    def fill_mask(self, state: int, row: NDArray[np.int32]) -> None:
        """Write the token mask of `state`: bit `t % 32` of word `t // 32` is 1 if token t is allowed."""

    def advance(self, state: int, token: int) -> int | None:
        """Return the state after `token`, or None if the grammar refuses the token."""

    def is_accepting(self, state: int) -> bool:
        """True if the text may end here."""

    def is_complete(self, state: int) -> bool:
        """True if the text may end here and nothing can follow. Must be cheap: it is called after every token."""

    def is_free(self, state: int) -> bool:
        """True if any token may follow, from this state on."""

    def num_after(self, state: int, *, is_last: bool) -> int:
        """How many bytes at the end follow the value. Before the last token, bytes that may follow it count, too."""

    def ends(self, state: int) -> NDArray[np.int32] | None:
        """The refused tokens with which no allowed text can begin here: a model that wants one of them wants the end.

        Returns a mask row, which is shared; None if the text may not end here, or if there is no such token. A refused
        token of which some beginning leads to an accepting state is not among them: the text would go on first.
        """

    def forced_tokens(self, state: int) -> list[int]:
        """Tokens that must follow, because masks allow no others; else empty."""

    def joined_token(self, state: int, token: int) -> int:
        """The token to take instead of an allowed one: a longer one, if the tokenizer joins it with text that must
        follow.
        """

    def shortest_completion(self, state: int) -> list[int]:
        """The shortest list of tokens that leads to an accepting state."""

    def completion_bound(self, state: int) -> int:
        """An upper bound of the length of `shortest_completion`. Must be cheap: it is called after every token."""

    def closing_tokens(self, state: int) -> list[int]:
        """Allowed tokens after which `completion_bound` is smaller; perhaps not all. Empty if the text may end."""

    def stays_in_string(self, state: int, token: int) -> bool:
        """Whether the text is inside of a string of a JSON value, and stays in it through this token."""

    def __hash__(self) -> int:
        """By identity: the device holds one copy of a grammar, shared by its sequences."""

    def device_tables(self) -> DeviceTables | None:
        """The closed automaton as arrays; None if the grammar is not closed, or too large. May take long at first."""
