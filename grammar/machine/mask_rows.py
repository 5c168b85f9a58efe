"""The mask rows of one grammar. Each distinct row is stored once, within a budget of bytes.

There are two generations of rows. When the young one fills half the budget, the old one is dropped and the young one
becomes the old. A row that is used again moves to the young generation. This is an approximate LRU that costs nothing
when a row is found. A caller that still holds a dropped row may go on reading it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.machine.walker import row_digest, rows_equal

Row = NDArray[np.int32]
Walked = tuple[Row, list[int]]  # (the tokens that a walk allows, the tokens that must be run)


@dataclass(slots=True)
class _Generation:
    """Rows by digest, by the packed state of a mask twin, and by their own id()."""

    distinct: dict[int, Row]
    of_twin: dict[int, Walked]
    by_id: dict[int, Row]
    num_bytes: int = 0


class MaskRows:
    """Owned by a CompiledGrammar, which locks. Only `of_state` is read without the lock.

    of_state: the row of each state; None if it is not known, or was dropped.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.of_state: list[Row | None] = []
        self.num_evicted = 0
        self._older: list[Row | None] = []
        self._young = _Generation({}, {}, {})
        self._old = _Generation({}, {}, {})

    @property
    def num_rows(self) -> int:
        """Number of distinct rows held."""
        return len(self._young.distinct.keys() | self._old.distinct.keys())

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the rows held: at most `max_bytes` and one row."""
        return self._young.num_bytes + self._old.num_bytes

    def add_state(self) -> None:
        self.of_state.append(None)

    def again(self, state: int) -> Row | None:
        """Return the row of a state from the old generation, and move it to the young one."""
        row = self._older[state] if state < len(self._older) else None
        return None if row is None else self.keep(state, row)

    def keep(self, state: int, row: Row) -> Row:
        """Set the row of a state. `row` comes from `intern` or from the old generation."""
        row = self.intern(row)
        self.of_state[state] = row
        return row

    def twin(self, packed: int) -> Walked | None:
        """Return the result of the walk from a mask twin; None if it is not kept."""
        found = self._young.of_twin.get(packed)
        if found is None:
            found = self._old.of_twin.get(packed)
            if found is not None:
                found = self.keep_twin(packed, *found)
        return found

    def keep_twin(self, packed: int, row: Row, unsure: list[int]) -> Walked:
        row = self.intern(row)
        found = self._young.of_twin[packed] = row, unsure
        return found

    def intern(self, row: Row) -> Row:
        """Return the one stored copy of a row. Do not write to it."""
        young = self._young
        if id(row) in young.by_id:
            return row
        digest = row_digest(row)
        found = young.distinct.get(digest)
        if found is not None and rows_equal(found, row):
            return found
        known = self._old.distinct.get(digest)
        if known is not None and rows_equal(known, row):
            row = known
        row.flags.writeable = False
        young.distinct[digest] = row  # if two contents have one digest, the later one
        young.by_id[id(row)] = row
        young.num_bytes += row.nbytes
        if young.num_bytes > self.max_bytes // 2:
            self._age()
        return row

    def _age(self) -> None:
        """Drop the old generation; the young one becomes the old."""
        self.num_evicted += len(self._old.distinct)
        self._old, self._young = self._young, _Generation({}, {}, {})
        self._older, self.of_state = self.of_state, [None] * len(self.of_state)
