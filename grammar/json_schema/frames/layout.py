"""The white space of a JSON text: where it must stand, and where it may.

    model       {"a": [1, 2]}      one space after each comma and colon, as Python's `json.dumps` writes
    compact     {"a":[1,2]}        none
    indent=2    one property or item per line, as `json.dumps(value, indent=2)` writes; empty brackets stay closed
    any         whatever JSON allows between two tokens, up to one space, or a line end and 20 spaces or tabs

There is none before and after a whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.machine.frame import REFUSE

MAX_BLANKS = 20  # spaces and tabs after a line end, where any white space is allowed


class Space(NamedTuple):
    """The white space that stands in one place, as an automaton with start state 0.

    steps: for each state, (byte, next state). may_end: for each state, whether the white space may end there. shortest:
    the shortest white space.
    """

    steps: tuple[tuple[tuple[int, int], ...], ...]
    may_end: tuple[bool, ...]
    shortest: bytes = b""


def exactly(text: bytes) -> Space:
    """Return the white space that is always this text."""
    steps = tuple([((byte, i + 1),) for i, byte in enumerate(text)])
    return Space((*steps, ()), (*[False] * len(text), True), text)


def _any_space() -> Space:
    blanks = [((0x20, i + 1), (0x09, i + 1)) for i in range(2, 2 + MAX_BLANKS)]
    return Space((((0x20, 1), (0x0A, 2)), (), *blanks, ()), (True,) * (3 + MAX_BLANKS))


NO_SPACE, ONE_SPACE, ANY_SPACE = exactly(b""), exactly(b" "), _any_space()


@dataclass(frozen=True, slots=True)
class Layout:
    """The white space of a layout. `depth` is the number of brackets around a place; see `inside`.

    in_between: before commas and colons, and before a bracket that ends an object or array in its first place.
    after_comma, after_colon: where there are no lines. indent: the spaces of a level; None: there are no lines.
    """

    in_between: Space
    after_comma_on_line: Space
    after_colon: Space
    indent: int | None = None

    @property
    def is_tight(self) -> bool:
        """Tell whether no white space may stand before a closing bracket."""
        return self.in_between == NO_SPACE and self.indent is None

    def inside(self, depth: int) -> int:
        """Return the depth between the brackets of a value at `depth`. It stays 0 if the layout is the same everywhere.

        So values in different places share their frames.
        """
        return 0 if self.indent is None else depth + 1

    def after_bracket(self, depth: int) -> Space:
        """Return what stands between an opening bracket and its first item or property, at `depth`."""
        return self.in_between if self.indent is None else _line(self.indent * depth)

    def after_comma(self, depth: int) -> Space:
        return self.after_comma_on_line if self.indent is None else _line(self.indent * depth)

    def before_bracket(self, depth: int) -> Space:
        """Return what stands between the last item or property, at `depth`, and the closing bracket."""
        return self.in_between if self.indent is None else _line(self.indent * (depth - 1))


@cache
def _line(num_spaces: int) -> Space:
    return exactly(b"\n" + b" " * num_spaces)


@cache
def layout_of(whitespace: str) -> Layout:
    """Return the layout of a value of ir.JsonOptions.whitespace."""
    if whitespace == "any":
        return Layout(ANY_SPACE, ANY_SPACE, ANY_SPACE)
    if whitespace == "compact":
        return Layout(NO_SPACE, NO_SPACE, NO_SPACE)
    if whitespace == "model":
        return Layout(NO_SPACE, ONE_SPACE, ONE_SPACE)
    return Layout(NO_SPACE, NO_SPACE, ONE_SPACE, int(whitespace.removeprefix("indent=")))


class Rows:
    """The rows of a table that is being made: int32 entries by byte, as frame.py describes them."""

    def __init__(self, num_states: int) -> None:
        """num_states: the states whose numbers are known from the beginning."""
        self._rows = [_refusing() for _ in range(num_states)]

    def new(self) -> int:
        self._rows.append(_refusing())
        return len(self._rows) - 1

    def read(self, state: int, space: Space, following: NDArray[np.int32]) -> None:
        """Let white space begin in a state. After it, the entries of `following` that are not REFUSE are valid.

        Two may begin in one state if they are equal, or if their first bytes differ.
        """
        places: dict[int, int] = {0: state}
        for i, steps in enumerate(space.steps):
            row = self._rows[places[i]]
            if space.may_end[i]:
                valid = following != REFUSE
                row[valid] = following[valid]
            for byte, to in steps:
                if to not in places:
                    places[to] = int(row[byte]) if row[byte] >= 0 else self.new()
                row[byte] = places[to]

    def done(self) -> NDArray[np.int32]:
        return np.array(self._rows, dtype=np.int32)


def entries(by_bytes: bytes, entry: int) -> NDArray[np.int32]:
    """Return a row in which these bytes have this entry."""
    row = _refusing()
    row[list(by_bytes)] = entry
    return row


def _refusing() -> NDArray[np.int32]:
    return np.full(256, REFUSE, dtype=np.int32)
