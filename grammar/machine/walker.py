"""The compiled loops: one makes a token mask by a walk over the vocabulary's trie, one runs a state over bytes.

Each loop is written once, in the subset of Python that numba compiles. For tests, `use_numba=False` runs the same
source slowly. numba keeps the compiled code beside this file (`cache=True`), so only the first import in a fresh
environment compiles.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ramet.loops import loop

MANY = 1 << 20  # a depth (see `safe_depths`) larger than any token
UNASKED, REFUSED, GOES_ON, ACCEPTED = range(4)  # what becomes of a text (see `mark_ends`)

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@loop
def walk(
    pool: Int32,
    instances: Int64,
    exits: Int64,
    nodes: Int32,
    values: Int32,
    row: Int32,
    scratch: Int64,
    unsure: Int32,
) -> int:
    """Set the bit in `row` of each value whose text is accepted from a state. Resumable.

    scratch: int64 [3 + max_depth + 1]: the next node, the instance and the exit to resolve, then the stack of packed
    states (stack[0] is the state to start from). unsure: int32; element 0 is the number of values that need a
    step-by-step run, and these values follow. Returns -1 when finished, else the index in `exits` that must be resolved
    before the next call.
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
                return int(at)
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


@loop
def step(pool: Int32, instances: Int64, exits: Int64, packed: int, byte: int, scratch: Int64) -> int:
    """Return the packed state after one byte: -1 if refused, -3 if it needs a run, -2 if an exit must be resolved,
    which is then in scratch[1:3], and -4 if that exit is the state after the byte.
    """
    instance = packed >> 32
    local = packed & 0xFFFFFFFF
    while True:
        width = instances[instance, 1]
        entry = pool[instances[instance, 0] + local * width + pool[instances[instance, 2] + byte]]
        if entry >= 0:
            return int((instance << 32) | int(entry))
        if entry == -1:
            return -1
        code = -2 - entry
        found = exits[instances[instance, 3] + (code >> 1)]
        if found == -2:
            scratch[1] = instance
            scratch[2] = code >> 1
            return -2 if code & 1 else -4
        if found < 0 or code & 1 == 0:
            return int(found)
        instance = found >> 32
        local = found & 0xFFFFFFFF


@loop
def choices(
    pool: Int32, instances: Int64, exits: Int64, packed: int, scratch: Int64, following: Int64, limit: int
) -> int:
    """Find the bytes that may follow a state. Resumable.

    scratch: int64 [4]: the next byte to try, the instance and the exit to resolve, the bytes found so far. following:
    int64 [limit, 2], each byte found and the state after it, -2 where that is the target of an exit that is not
    resolved yet: it may turn out that this byte may not follow. Returns -1 when finished, -2 if an exit must be
    resolved before the next call, and -3 if more than `limit` bytes may follow, or if that depends on earlier text.
    """
    if instances[packed >> 32, 4] != 0:
        return -3
    while scratch[0] < 256:
        after = step(pool, instances, exits, packed, scratch[0], scratch)
        if after == -2:
            return -2
        if after == -3 or (after != -1 and scratch[3] == limit):
            return -3
        if after != -1:
            following[scratch[3], 0] = scratch[0]
            following[scratch[3], 1] = max(after, -2)
            scratch[3] += 1
        scratch[0] += 1
    return -1


@loop
def follow(pool: Int32, instances: Int64, exits: Int64, text: NDArray[np.uint8], scratch: Int64, limit: int) -> int:
    """Follow the bytes that must come, one after the other, and write them to `text`. Resumable.

    scratch: int64 [8]: the next byte to try, the instance and the exit to resolve, the packed state, the number of
    bytes written, a state of which is known that the text does not end there, the only byte found so far (-1: none) and
    the state after it. Returns -1 when finished, at a choice or after `limit` bytes, -2 if an exit must be resolved
    before the next call, and -4 if the text may end in this state: the caller must look. Also finished, with -5, in a
    state from which the text may leave its frame, unless it is the first one. Then scratch[6] is the only byte that the
    frame allows there, or -1.
    """
    while scratch[4] < limit:
        packed = scratch[3]
        instance = packed >> 32
        if instances[instance, 4] != 0:
            return -1
        if scratch[4] > 0 and scratch[0] == 0:
            at = instances[instance, 0] + (packed & 0xFFFFFFFF) * instances[instance, 1]
            leaves = False
            for c in range(instances[instance, 1]):
                leaves = leaves or pool[at + c] < -1
            if leaves:
                count = 0
                for byte in range(256):
                    if pool[at + pool[instances[instance, 2] + byte]] != -1:
                        count += 1
                        scratch[6] = byte
                if count != 1:
                    scratch[6] = -1
                return -5
        if instances[instance, 5] != 0 and scratch[5] != packed:
            return -4
        while scratch[0] < 256:
            after = step(pool, instances, exits, packed, scratch[0], scratch)
            if after == -2 or after == -4:
                return -2
            if after == -3 or (after >= 0 and scratch[6] >= 0):
                return -1
            if after >= 0:
                scratch[6] = scratch[0]
                scratch[7] = after
            scratch[0] += 1
        if scratch[6] < 0:
            return -1
        text[scratch[4]] = scratch[6]
        scratch[4] += 1
        scratch[3] = scratch[7]
        scratch[0] = 0
        scratch[6] = -1
    return -1


@loop
def accepted(
    pool: Int32,
    instances: Int64,
    exits: Int64,
    packed: int,
    flat: NDArray[np.uint8],
    ends: Int64,
    tokens: Int64,
    num_read: int,
    scratch: Int64,
    found: Int64,
) -> int:
    """Find the tokens whose bytes after the first `num_read` are accepted from a state. Resumable.

    scratch: int64 [4]: the index in `tokens` to begin with, the instance and the exit to resolve, the number of tokens
    written to `found` so far. ends: where the bytes of each token end in `flat`. found: also has the tokens that need a
    run, each as -1 - token. Returns -1 when finished or when `found` is full, and -2 if an exit must be resolved before
    the next call.
    """
    while scratch[0] < len(tokens) and scratch[3] < len(found):
        token = tokens[scratch[0]]
        state = packed
        for i in range(ends[token - 1] + num_read if token > 0 else num_read, ends[token]):
            if instances[state >> 32, 4] != 0:
                state = -3
            else:
                state = step(pool, instances, exits, state, flat[i], scratch)
            if state < 0:
                break
        if state == -2 or state == -4:
            return -2
        if state != -1:
            found[scratch[3]] = token if state >= 0 else -1 - token
            scratch[3] += 1
        scratch[0] += 1
    return -1


@loop
def leave(
    pool: Int32,
    instances: Int64,
    packed: int,
    flat: NDArray[np.uint8],
    ends: Int64,
    tokens: Int64,
    num_read: int,
    left: Int64,
) -> None:
    """Find where texts leave the frame of a state: the bytes of tokens after the first `num_read`.

    left: int64 [len(tokens), 2], filled: the bytes before the one that leaves (all of them if the text stays), and the
    table entry that leaves. An entry >= 0 is the state in the frame at the end of the text; REFUSE: refused.
    """
    instance = packed >> 32
    width = instances[instance, 1]
    for t in range(len(tokens)):
        token = tokens[t]
        begin = ends[token - 1] + num_read if token > 0 else num_read
        entry = packed & 0xFFFFFFFF
        i = begin
        while i < ends[token]:
            entry = pool[instances[instance, 0] + entry * width + pool[instances[instance, 2] + flat[i]]]
            if entry < 0:
                break
            i += 1
        left[t, 0] = i - begin
        left[t, 1] = entry


@loop
def clear(row: Int32, tokens: Int64) -> None:
    """Clear the bits of tokens in a row."""
    for i in range(len(tokens)):
        row[tokens[i] >> 5] &= ~(np.int32(1) << np.int32(tokens[i] & 31))


@loop
def mark(row: Int32, tokens: Int64) -> None:
    """Set the bits of tokens in a row."""
    for i in range(len(tokens)):
        row[tokens[i] >> 5] |= np.int32(1) << np.int32(tokens[i] & 31)


@loop
def walk_difference(
    pool: Int32,
    instances: Int64,
    exits: Int64,
    nodes: Int32,
    values: Int32,
    row: Int32,
    scratch: Int64,
    other: Int64,
    unsure: Int32,
) -> int:
    """Change `row` from the mask of one state to the mask of another. Resumable, as `walk`.

    scratch: as for `walk`; its stack is for the state whose mask is wanted. other: int64 [max_depth + 1], the stack of
    the state whose mask `row` holds. Subtrees in which both states become the same are skipped.
    """
    num_nodes = nodes.shape[0] - 1
    i = scratch[0]
    while i < num_nodes:
        depth = nodes[i, 3]
        byte = nodes[i, 0]
        new = step(pool, instances, exits, scratch[2 + depth], byte, scratch)
        if new == -2 or new == -4:
            scratch[0] = i
            return 0
        old = other[depth - 1]
        if old >= 0:
            old = step(pool, instances, exits, old, byte, scratch)
            if old == -2 or old == -4:
                scratch[0] = i
                return 0
        if new == old:
            i = nodes[i, 1]
            continue
        end = i + 1 if new >= 0 else nodes[i, 1]
        for e in range(nodes[i, 2], nodes[end, 2]):
            v = values[e]
            if new >= 0:
                row[v >> 5] |= np.int32(1) << np.int32(v & 31)
            else:
                row[v >> 5] &= ~(np.int32(1) << np.int32(v & 31))
                if new == -3:
                    unsure[0] += 1
                    unsure[unsure[0]] = v
        scratch[3 + depth] = new
        other[depth] = old
        i = end
    scratch[0] = i
    return -1


@loop
def expand(bits: Int32, starts: Int32, tokens: Int32, row: Int32) -> None:
    """Set the bit in `row` of each token of the groups in `bits`. Group g is tokens[starts[g] : starts[g + 1]]."""
    num_groups = len(starts) - 1
    for w in range(len(bits)):
        if bits[w] == 0:
            continue
        for g in range(32 * w, min(32 * w + 32, num_groups)):
            if (bits[w] >> (g & 31)) & 1:
                for e in range(starts[g], starts[g + 1]):
                    t = tokens[e]
                    row[t >> 5] |= np.int32(1) << np.int32(t & 31)


@loop
def mark_ends(nodes: Int32, values: Int32, allowed: Int32, ends: Int32, answer: int, start: int) -> int:
    """Set the bit in `ends` of each value that ends a text (see ends.py). Resumable.

    allowed: the mask of the state; its bit of a value is set if the value's text is accepted. start: the next node; a
    node >= 0 that is returned must be looked at by the caller, who calls again with it and an answer. Returns -1 when
    finished. answer, for the text of node `start`: REFUSED, GOES_ON, ACCEPTED, or UNASKED for another node.
    """
    num_nodes = nodes.shape[0] - 1
    i = start
    while i < num_nodes:
        after = nodes[i, 1]
        first = nodes[i, 2]
        last = nodes[after, 2]
        if answer == UNASKED:
            v = values[first]
            is_allowed = (allowed[v >> 5] >> np.int32(v & 31)) & 1 != 0
            if first < nodes[i + 1, 2] and not is_allowed:
                answer = REFUSED  # the text of this node is a token itself
            else:
                answer = ACCEPTED
                for e in range(first, last):
                    v = values[e]
                    if (allowed[v >> 5] >> np.int32(v & 31)) & 1 == 0:
                        return int(i)
        if answer == REFUSED:
            for e in range(first, last):
                v = values[e]
                ends[v >> 5] |= np.int32(1) << np.int32(v & 31)
        i = i + 1 if answer == GOES_ON else after
        answer = UNASKED
    return -1


@loop
def row_digest(row: Int32) -> int:
    """Return a number that is equal for equal rows, and very likely different for others.

    It has four lanes, so that the products overlap in time.
    """
    a, b, c, d = 1, 2, 3, 4
    n = len(row) & ~3
    for i in range(0, n, 4):
        a = (a ^ int(row[i])) * 0x9E3779B97F4A7C1
        b = (b ^ int(row[i + 1])) * 0x9E3779B97F4A7C1
        c = (c ^ int(row[i + 2])) * 0x9E3779B97F4A7C1
        d = (d ^ int(row[i + 3])) * 0x9E3779B97F4A7C1
    for i in range(n, len(row)):
        a = (a ^ int(row[i])) * 0x9E3779B97F4A7C1
    return a ^ (b << 1) ^ (b >> 31) ^ (c << 7) ^ (c >> 29) ^ (d << 13) ^ (d >> 23)


@loop
def rows_equal(a: Int32, b: Int32) -> bool:
    for i in range(len(a)):  # noqa: SIM110 - numba compiles no generators
        if a[i] != b[i]:
            return False
    return True


@loop
def run(pool: Int32, instances: Int64, exits: Int64, text: NDArray[np.uint8], end: int, scratch: Int64) -> int:
    """Run a state over bytes. Resumable. scratch: position, packed state, instance and exit to resolve.

    Returns 0: the text is read, and the state is in scratch[1]. 1: refused. 2: an exit must be resolved. 3: the next
    byte is in a frame with memory. 4: as 0, but the state is at the start of a frame with memory.
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
    return 4 if instances[packed >> 32, 4] != 0 else 0


@loop
def next_not_deeper(nodes: Int32) -> None:
    """Fill column 1: for each node of a depth-first trie, the next node that is not deeper."""
    n = nodes.shape[0] - 1
    nearest = np.full(4096, n, dtype=np.int64)
    used = 1
    for i in range(n - 1, -1, -1):
        depth = min(nodes[i, 3], 4095)
        best = n
        for d in range(1, min(depth, used) + 1):
            if nearest[d] < best:
                best = nearest[d]
        nodes[i, 1] = best
        nearest[depth] = i
        if depth > used:
            used = depth


@loop
def count_plain_chars(flat: NDArray[np.uint8], begins: Int64, lengths: Int64) -> Int32:
    """Return int32 [4, n]. Rows 0-2: the number of characters of a text that is plain of that kind, else 0. Row 3: the
    number of bytes before the first character that is not plain.

    Plain of kind 0: ASCII letters and digits. Kind 1: printable ASCII except `"` and the backslash. Kind 2: also
    characters beyond ASCII.
    """
    n = begins.shape[0]
    out = np.zeros((4, n), dtype=np.int32)
    for t in range(n):
        i = begins[t]
        end = i + lengths[t]
        chars = 0
        is_ascii = True
        is_word = True
        good = True
        while i < end and good:
            b = flat[i]
            size = 1
            if b < 0x80:
                good = 0x20 <= b < 0x7F and b != 0x22 and b != 0x5C
                if not (0x30 <= b <= 0x39 or 0x41 <= b <= 0x5A or 0x61 <= b <= 0x7A):
                    is_word = False
            else:
                is_ascii = False
                low = 0x80
                high = 0xBF
                if 0xC2 <= b <= 0xDF:
                    size = 2
                elif 0xE0 <= b <= 0xEF:
                    size = 3
                    if b == 0xE0:
                        low = 0xA0
                    elif b == 0xED:
                        high = 0x9F
                elif 0xF0 <= b <= 0xF4:
                    size = 4
                    if b == 0xF0:
                        low = 0x90
                    elif b == 0xF4:
                        high = 0x8F
                else:
                    good = False
                if i + size > end:
                    good = False
                else:
                    for k in range(1, size):
                        c = flat[i + k]
                        if k == 1 and (c < low or c > high):
                            good = False
                        if c < 0x80 or c > 0xBF:
                            good = False
            if good:
                i += size
                chars += 1
        out[3, t] = i - begins[t]
        if good:
            out[2, t] = chars
            if is_ascii:
                out[1, t] = chars
                if is_word:
                    out[0, t] = chars
    return out


@loop
def safe_depths(rows: Int32, num_content: int, safe: Int64, word: Int64, beyond: Int64, depths: Int32) -> None:
    """Fill depths, int32 [4, num_rows]: how many plain characters a state accepts, whatever they are.

    Rows 0-2: for plain characters of kinds 0-2 (see Vocabulary). Row 3: the most characters of kind 2 that any text can
    have from there, MANY if there is no bound. States from num_content on are inside a character and get 0.

    rows: entries over byte classes. safe, word: the classes of plain ASCII, and of letters and digits. beyond[q]: the
    state after any other character, -1 if refused, -2 if not known.
    """
    many = MANY
    for kind in range(3):
        classes = word if kind == 0 else safe
        for q in range(num_content):
            depths[kind, q] = many
        changed = True
        while changed:
            changed = False
            for q in range(num_content - 1, -1, -1):
                best = depths[kind, q]
                if best == 0:
                    continue
                for k in range(classes.shape[0]):
                    to = rows[q, classes[k]]
                    d = 1
                    if to == -1:
                        d = 0
                    elif to >= 0:
                        d = min(depths[kind, to] + 1, many)
                    if d < best:
                        best = d
                if kind == 2:
                    to = beyond[q]
                    d = 0 if to < 0 else min(depths[kind, to] + 1, many)
                    if d < best:
                        best = d
                if best < depths[kind, q]:
                    depths[kind, q] = best
                    changed = True
    for q in range(num_content):
        for k in range(safe.shape[0]):
            if rows[q, safe[k]] == q or rows[q, safe[k]] < -1:
                depths[3, q] = many
        if beyond[q] == q or beyond[q] == -2:
            depths[3, q] = many
    changed = True
    rounds = 0
    while changed and rounds < 100:
        changed = False
        rounds += 1
        for q in range(num_content - 1, -1, -1):
            best = depths[3, q]
            if best >= many:
                continue
            for k in range(safe.shape[0]):
                to = rows[q, safe[k]]
                if to >= 0 and depths[3, to] + 1 > best:
                    best = depths[3, to] + 1
            if beyond[q] >= 0 and depths[3, beyond[q]] + 1 > best:
                best = depths[3, beyond[q]] + 1
            best = min(best, many)
            if best > depths[3, q]:
                depths[3, q] = best
                changed = True
    if changed:  # a longer cycle, or very long texts: not bounded
        depths[3, :num_content] = many


@loop
def exit_distances(rows: Int32, ends: Int32, exit_index: int, out: Int32) -> None:
    """Fill out, int32 [num_states]: the bytes of a shortest text from each state to an exit, -1 if there is none.

    ends: the exit of each state where the text may end, or empty. Searches breadth first, backwards from the exit.
    """
    n, width = rows.shape
    first = np.zeros(n + 1, dtype=np.int32)
    for s in range(n):
        for c in range(width):
            if rows[s, c] >= 0:
                first[rows[s, c] + 1] += 1
    for s in range(n):
        first[s + 1] += first[s]
    filled = first.copy()
    sources = np.empty(first[n], dtype=np.int32)
    for s in range(n):
        for c in range(width):
            if rows[s, c] >= 0:
                sources[filled[rows[s, c]]] = s
                filled[rows[s, c]] += 1
    queue = np.empty(n, dtype=np.int32)
    tail = 0
    own = -2 - 2 * exit_index
    for unread in (True, False):
        for s in range(n):
            out[s] = out[s] if not unread else -1
            found = unread and len(ends) > 0 and ends[s] == exit_index
            for c in range(width):
                found = found or rows[s, c] == (own - 1 if unread else own)
            if found and out[s] < 0:
                out[s] = 0 if unread else 1
                queue[tail] = s
                tail += 1
    # the states one byte away by the exit itself stand behind those with nothing to read, and before all others
    num_direct = tail
    head = 0
    late = np.empty(n, dtype=np.int32)
    num_late = 0
    while head < num_direct and out[queue[head]] == 0:
        for i in range(first[queue[head]], first[queue[head] + 1]):
            s = sources[i]
            if out[s] < 0:
                out[s] = 1
                late[num_late] = s
                num_late += 1
        head += 1
    for i in range(num_late):
        queue[tail] = late[i]
        tail += 1
    while head < tail:
        t = queue[head]
        head += 1
        for i in range(first[t], first[t + 1]):
            s = sources[i]
            if out[s] < 0:
                out[s] = out[t] + 1
                queue[tail] = s
                tail += 1


@loop
def exit_path(
    rows: Int32, distances: Int32, order: Int32, samples: Int32, exit_index: int, local: int, out: NDArray[np.uint8]
) -> None:
    """Fill out, uint8 [distances[local]]: the bytes of a shortest text from a state to an exit.

    distances: as filled by `exit_distances`. order: the classes of bytes, the preferred ones first. samples: a byte of
    each of them.
    """
    for i in range(len(out)):
        left = len(out) - 1 - i
        for k in range(len(order)):
            entry = rows[local, order[k]]
            if (entry >= 0 and distances[entry] == left) or (left == 0 and entry == -2 - 2 * exit_index):
                out[i] = samples[k]
                local = entry
                break


@loop
def exit_ways(rows: Int32, ends: Int32, order: Int32, start: int, ways: Int32, before: Int32) -> None:
    """Search the shortest ways from a state to all exits, breadth first.

    ends: as for `exit_distances`. order: the classes of bytes, the preferred ones first. ways: int32 [num_exits, 3]:
    bytes of the way (-1: none), its last state, the class of the byte that leaves (-1: it leaves unread). before: int32
    [num_states, 2]: the state and the class before each state that was reached, -1 for the others.
    """
    ways[:] = -1
    before[:] = -1
    n = rows.shape[0]
    queue = np.empty(n, dtype=np.int32)
    lengths = np.empty(n, dtype=np.int32)
    queue[0] = start
    lengths[0] = 0
    head, tail = 0, 1
    while head < tail:
        s, length = queue[head], lengths[head]
        head += 1
        if len(ends) > 0 and ends[s] >= 0 and (ways[ends[s], 0] < 0 or length < ways[ends[s], 0]):
            ways[ends[s], 0] = length
            ways[ends[s], 1] = s
            ways[ends[s], 2] = -1
        for c in order:
            entry = rows[s, c]
            if entry >= 0:
                if before[entry, 0] < 0 and entry != start:
                    before[entry, 0] = s
                    before[entry, 1] = c
                    queue[tail] = entry
                    lengths[tail] = length + 1
                    tail += 1
            elif entry < -1:
                code = -2 - entry
                size = length + 1 - (code & 1)
                e = code >> 1
                if ways[e, 0] < 0 or size < ways[e, 0]:
                    ways[e, 0] = size
                    ways[e, 1] = s
                    ways[e, 2] = -1 if code & 1 else c


@loop
def column_digests(wide: Int32, weights: Int64) -> Int64:
    """Return, for each column, the weighted sum of its entries."""
    out = np.zeros(wide.shape[1], dtype=np.int64)
    for i in range(wide.shape[0]):
        w = weights[i]
        for c in range(wide.shape[1]):
            out[c] += w * wide[i, c]
    return out
