"""Token masks packed into bits: bit t % 32 of int32 word t // 32 is 1 if token t is allowed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def num_words(vocab_size: int) -> int:
    """Return the number of words of one mask row."""
    return (vocab_size + 31) // 32


def is_allowed(row: NDArray[np.int32], token: int) -> bool:
    return bool((int(row[token >> 5]) >> (token & 31)) & 1)


def pack(tokens: Iterable[int], vocab_size: int) -> NDArray[np.int32]:
    """Return the mask row, int32 [W], that allows these tokens."""
    flags = np.zeros(num_words(vocab_size) * 32, dtype=np.uint8)
    flags[np.fromiter(tokens, dtype=np.int64)] = 1
    return np.packbits(flags, bitorder="little").view("<i4").astype(np.int32, copy=False)


def unpack(row: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the ids of the allowed tokens, ascending."""
    return np.flatnonzero(np.unpackbits(row.astype("<i4", copy=False).view(np.uint8), bitorder="little"))
