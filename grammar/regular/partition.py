"""Finds the equivalent states of a deterministic automaton: Hopcroft's algorithm, compiled.

Source: J. E. Hopcroft, "An n log n algorithm for minimizing states in a finite automaton" (1971); the partition is kept
as in A. Valmari, "Fast brief practical DFA minimization" (2012).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


def equivalence(targets: NDArray[np.int64], kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the block of each state, numbered from 0. The states of a block accept the same texts.

    targets: int64 [n, k], complete: a refusal leads to a sink state. kinds: states of different kinds are never
    equivalent. O(n k log n).
    """
    n, k = targets.shape
    block = np.unique(kinds, return_inverse=True)[1].reshape(-1).astype(np.int64)
    # sources by (class, target), as slices of one array
    flat = (targets + np.arange(k) * n).T.reshape(-1)
    sources = np.argsort(flat, kind="stable")
    begins = np.searchsorted(flat[sources], np.arange(k * n + 1))
    return _refine(block, np.argsort(block), sources % n, begins, k)  # type: ignore[no-any-return]


# Sorting and slice copies stay outside, or are written as loops: with them numba took 6 s to compile this, not 1.
@njit(cache=True)
def _refine(block, elements, sources, begins, num_classes):  # type: ignore[no-untyped-def]
    """Split the blocks until the states of each are equivalent.

    elements: the states, ordered by block. elements[first[b]:end[b]] are the states of block b, marked ones first.
    """
    n = len(block)
    num_blocks = block[elements[n - 1]] + 1
    place = np.empty(n, dtype=np.int64)
    first = np.zeros(n + 1, dtype=np.int64)
    end = np.zeros(n + 1, dtype=np.int64)
    marked = np.zeros(n + 1, dtype=np.int64)
    for i in range(n):
        b = block[elements[i]]
        place[elements[i]] = i
        if i == 0 or block[elements[i - 1]] != b:
            first[b] = i
        end[b] = i + 1
    stack = np.empty(n + 1, dtype=np.int64)
    for b in range(num_blocks):
        stack[b] = b
    height = num_blocks
    touched = np.empty(n + 1, dtype=np.int64)
    splitter = np.empty(n, dtype=np.int64)
    while height:
        height -= 1
        b = stack[height]
        size = end[b] - first[b]
        for i in range(size):
            splitter[i] = elements[first[b] + i]
        for c in range(num_classes):
            num_touched = 0
            for i in range(size):
                at = c * n + splitter[i]
                for j in range(begins[at], begins[at + 1]):
                    s = sources[j]
                    o = block[s]
                    to = first[o] + marked[o]
                    if place[s] >= to:  # not marked yet
                        if marked[o] == 0:
                            touched[num_touched] = o
                            num_touched += 1
                        other = elements[to]
                        elements[place[s]] = other
                        place[other] = place[s]
                        elements[to] = s
                        place[s] = to
                        marked[o] += 1
            for i in range(num_touched):
                o = touched[i]
                m = marked[o]
                marked[o] = 0
                if m == end[o] - first[o]:
                    continue
                # the smaller part becomes a new block
                new = num_blocks
                num_blocks += 1
                if 2 * m <= end[o] - first[o]:
                    first[new] = first[o]
                    end[new] = first[o] + m
                    first[o] = end[new]
                else:
                    first[new] = first[o] + m
                    end[new] = end[o]
                    end[o] = first[new]
                for j in range(first[new], end[new]):
                    block[elements[j]] = new
                stack[height] = new
                height += 1
    return block
