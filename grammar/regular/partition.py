"""Compiled loops over the states of deterministic automata: their product, and which states are equivalent.

Source of the second, Hopcroft's algorithm: J. E. Hopcroft, "An n log n algorithm for minimizing states in a finite
automaton" (1971); the partition is kept as in A. Valmari, "Fast brief practical DFA minimization" (2012).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ramet.loops import loop


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
@loop
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


def reachable_tuples(
    tables: list[NDArray[np.int64]], classes: NDArray[np.int64], first: NDArray[np.int64], max_states: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Run automata side by side: return (the tuples of states that are reached, their transitions), breadth first.

    tables: for each of n automata int64 [states, classes], -1: refused. classes: int64 [k, n], the class in each
    automaton of each of k classes in common. first: int64 [n]; a state is -1 once its automaton has refused.
    Result: int64 [num, n] and int64 [num, k]. None if there are more than `max_states`.
    """
    sizes = [table.size for table in tables]
    begins = np.cumsum([0, *sizes])[:-1].astype(np.int64)
    widths = np.array([table.shape[1] for table in tables], dtype=np.int64)
    flat = np.concatenate([table.reshape(-1) for table in tables])
    num, tuples, rows = _reach(flat, begins, widths, classes, first, max_states)
    return None if num < 0 else (tuples[:num], rows[:num])


@loop
def _reach(flat, begins, widths, classes, first, max_states):  # type: ignore[no-untyped-def]
    """Search breadth first. `slots` is a hash table with open addressing of the numbers of tuples, -1: free."""
    num_parts = len(first)
    num_classes = len(classes)
    tuples = np.empty((64, num_parts), dtype=np.int64)
    rows = np.empty((64, num_classes), dtype=np.int64)
    slots = np.full(256, -1, dtype=np.int64)
    target = first.copy()
    num = 0
    done = 0
    c = num_classes  # the class whose target is to be entered; the first tuple has none
    while True:
        key = 0
        for i in range(num_parts):
            key = (key ^ (target[i] + 1)) * 0x9E3779B97F4A7C1
        at = (key ^ (key >> 29)) & (len(slots) - 1)
        found = -1
        while slots[at] >= 0:
            is_same = True
            for i in range(num_parts):
                if tuples[slots[at], i] != target[i]:
                    is_same = False
            if is_same:
                found = slots[at]
                break
            at = (at + 1) & (len(slots) - 1)
        if found < 0:
            if num == max_states:
                return -1, tuples, rows
            if num == len(tuples):
                more = np.empty((2 * num, num_parts), dtype=np.int64)
                more_rows = np.empty((2 * num, num_classes), dtype=np.int64)
                for s in range(num):
                    for i in range(num_parts):
                        more[s, i] = tuples[s, i]
                    for k in range(num_classes):
                        more_rows[s, k] = rows[s, k]
                tuples = more
                rows = more_rows
            found = num
            for i in range(num_parts):
                tuples[num, i] = target[i]
            slots[at] = num
            num += 1
            if 4 * num > len(slots):
                size = 4 * len(slots)
                slots = np.full(size, -1, dtype=np.int64)
                for s in range(num):
                    key = 0
                    for i in range(num_parts):
                        key = (key ^ (tuples[s, i] + 1)) * 0x9E3779B97F4A7C1
                    at = (key ^ (key >> 29)) & (size - 1)
                    while slots[at] >= 0:
                        at = (at + 1) & (size - 1)
                    slots[at] = s
        if c < num_classes:
            rows[done, c] = found
            c += 1
            if c == num_classes:
                done += 1
                c = 0
        else:
            c = 0
        if done == num:
            return num, tuples, rows
        for i in range(num_parts):
            state = tuples[done, i]
            target[i] = -1 if state < 0 else flat[begins[i] + state * widths[i] + classes[c, i]]
