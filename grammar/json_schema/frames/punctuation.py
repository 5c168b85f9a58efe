"""Tables of what stands between the values of objects and arrays."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.json_schema.frames.tables import VALUE_STARTS
from ramet.grammar.machine.automaton import REFUSE, leave

GO_ON, CLOSE = 0, 1  # exits: a key or an item follows; the object or array ends


@cache
def open_object_rows(may_go_on: bool, may_close: bool) -> NDArray[np.int32]:
    rows = np.full((1, 256), REFUSE, dtype=np.int32)
    if may_go_on:
        rows[0, ord('"')] = leave(GO_ON)
    if may_close:
        rows[0, ord("}")] = leave(CLOSE)
    return rows


@cache
def next_key_rows(spaced: bool, may_go_on: bool, may_close: bool) -> NDArray[np.int32]:
    rows = np.full((3, 256), REFUSE, dtype=np.int32)
    if may_close:
        rows[0, ord("}")] = leave(CLOSE)
    if may_go_on:
        rows[0, ord(",")] = 1
        rows[1:, ord('"')] = leave(GO_ON)
        if spaced:
            rows[1, ord(" ")] = 2
    return rows


@cache
def open_array_rows(may_go_on: bool, may_close: bool) -> NDArray[np.int32]:
    rows = np.full((1, 256), REFUSE, dtype=np.int32)
    if may_go_on:
        for byte in VALUE_STARTS:
            rows[0, byte] = leave(GO_ON, again=True)
    if may_close:
        rows[0, ord("]")] = leave(CLOSE)
    return rows


@cache
def next_item_rows(may_go_on: bool, may_close: bool) -> NDArray[np.int32]:
    rows = np.full((1, 256), REFUSE, dtype=np.int32)
    if may_go_on:
        rows[0, ord(",")] = leave(GO_ON)
    if may_close:
        rows[0, ord("]")] = leave(CLOSE)
    return rows
