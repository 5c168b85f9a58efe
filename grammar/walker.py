"""The compiled loops: token masks by one walk of the vocabulary's trie, and runs over bytes.

Each loop is written once, in the subset of Python that numba compiles; `use_numba=False` runs the same source slowly, for
tests. The caches lie beside this file (numba's `cache=True`), so only the first import in a fresh environment compiles.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

DONE = -1
_MASK = 0xFFFFFFFF

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


def _walk(
    pool: Int32,
    instances: Int64,
    exits: Int64,
    nodes: Int32,
    values: Int32,
    row: Int32,
    scratch: Int64,
    unsure: Int32,
) -> int:
    """Set in `row` the bit of each value whose text is accepted from a state; resumable.

    scratch: int64 [3 + max_depth + 1]: next node, instance and exit that must be resolved, then the stack of packed states
    (stack[0] is the state to start from). unsure: int32; element 0 counts values that need a step-by-step run, which follow.
    Returns -1 when finished, else the index in `exits` to resolve before calling again.
    """
    num_nodes = nodes.shape[0] - 1
    i = scratch[0]
    while i < num_nodes:
        depth = nodes[i, 3]
        packed = scratch[2 + depth]
        byte = nodes[i, 0]
        instance = packed >> 32
        local = packed & 0xFFFFFFFF
        result = -1
        while True:
            width = instances[instance, 1]
            entry = pool[instances[instance, 0] + local * width + pool[instances[instance, 2] + byte]]
            if entry >= 0:
                result = (instance << 32) | entry
                break
            if entry == -1:
                break
            code = -2 - entry
            at = instances[instance, 3] + (code >> 1)
            found = exits[at]
            if found == -2:
                scratch[0] = i
                scratch[1] = instance
                scratch[2] = code >> 1
                return at
            if found < 0 or code & 1 == 0:
                result = found
                break
            instance = found >> 32
            local = found & 0xFFFFFFFF
        if result >= 0:
            scratch[3 + depth] = result
            for e in range(nodes[i, 2], nodes[i + 1, 2]):
                v = values[e]
                row[v >> 5] |= np.int32(1) << np.int32(v & 31)
            i += 1
        elif result == -3:
            end = nodes[i, 1]
            for e in range(nodes[i, 2], nodes[end, 2]):
                unsure[0] += 1
                unsure[unsure[0]] = values[e]
            i = end
        else:
            i = nodes[i, 1]
    scratch[0] = i
    return -1


def _run(pool: Int32, instances: Int64, exits: Int64, text: NDArray[np.uint8], end: int, scratch: Int64) -> int:
    """Run a state over bytes; resumable. scratch: position, packed state, instance and exit to resolve.

    Returns 0 when the text is read (the state is in scratch[1]), 1 when refused, 2 when an exit must be resolved, 3 when a
    byte is to be read in a frame with memory.
    """
    i = scratch[0]
    packed = scratch[1]
    while i < end:
        byte = text[i]
        instance = packed >> 32
        local = packed & 0xFFFFFFFF
        if instances[instance, 4] != 0:
            scratch[0] = i
            scratch[1] = packed
            return 3
        while True:
            width = instances[instance, 1]
            entry = pool[instances[instance, 0] + local * width + pool[instances[instance, 2] + byte]]
            if entry >= 0:
                packed = (instance << 32) | entry
                break
            if entry == -1:
                return 1
            code = -2 - entry
            found = exits[instances[instance, 3] + (code >> 1)]
            if found == -2 or found == -3:
                scratch[0] = i
                scratch[1] = packed
                scratch[2] = instance
                scratch[3] = code >> 1
                return 2
            if found < 0:
                return 1
            if code & 1 == 0:
                packed = found
                break
            instance = found >> 32
            local = found & 0xFFFFFFFF
            if instances[instance, 4] != 0:
                scratch[0] = i
                scratch[1] = found
                return 3
        i += 1
    scratch[0] = i
    scratch[1] = packed
    return 0


walk_python = _walk
run_python = _run
walk = njit(cache=True, nogil=True)(_walk)
run = njit(cache=True, nogil=True)(_run)
