"""The machine under every grammar: a lazily determinised pushdown automaton over bytes, made of frames.

A *frame* is a small table of local states, shared by all that look alike (the content of a string, a number, the keys
of an object), plus *exits*: what happens when the table is left. An *instance* is a frame in one context (what follows
it, what was seen before), interned, so that equal configurations are one instance. An exit's target is another
instance's local state; it is found when first needed and never again. So Python works once per frame entered, compiled
code per byte.

A table entry is a next local state (>= 0), REFUSE, or -2 - (2 * exit + again): leave through `exit`, and read the byte
`again` in the target (again = 1) or not. A configuration is packed as instance << 32 | local state.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarTooLarge
from ramet.grammar import deadline
from ramet.grammar.deadline import time_limit
from ramet.grammar.machine import walker
from ramet.grammar.machine.walker import column_digests

REFUSE = -1
DEAD = -1  # target of an exit that must not be taken
UNKNOWN = -2  # target of an exit not yet resolved
CONCRETE = -3  # target depends on text that only a step-by-step run knows
LOCAL_BITS = 32
LOCAL_MASK = (1 << LOCAL_BITS) - 1
MAX_STATES = 2**31 - 1
MAX_POOL = 1 << 28  # table entries of 4 bytes

INSTANCE_FIELDS = 5  # table offset, number of classes, class map offset, exit offset, has memory


def leave(exit_index: int, again: bool = False) -> int:
    """Table entry that leaves through an exit; `again`: the target reads the byte."""
    return -2 - (2 * exit_index + int(again))


def target(instance: int, local: int = 0) -> int:
    """Pack a target."""
    return (instance << LOCAL_BITS) | local


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A frame's local automaton, in one machine's pool.

    rows: int32 [num_states, num_classes] entries as in the module's docstring; byte_class: uint8 [256].
    loop: a state that every plain character leads back to (kind 2, see Vocabulary), -1 where there is none.
    depths: int32 [4, num_states], for the content of strings: plain characters that may follow, see walker.safe_depths.
    end_exits[local]: the exit taken when the text ends here or the next byte is not the frame's own; -1 where it may
    not.
    """

    rows: NDArray[np.int32]
    byte_class: NDArray[np.uint8]
    num_exits: int
    end_exits: NDArray[np.int32] | None
    offset: int = -1
    class_offset: int = -1
    depths: NDArray[np.int32] | None = None
    loop: int = -1
    # shortest way to each exit: exit -> {local: bytes}; filled by `paths_to_exit`
    paths: dict[int, list[bytes | None]] = field(default_factory=dict)

    num_states: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_states", len(self.rows))
        object.__setattr__(self, "width", self.rows.shape[1])


class Frame(Protocol):
    """What an instance needs to know; owned by the machine."""

    table: Table

    def resolve(self, exit_index: int) -> int:
        """Return the target of an exit: target(instance, local), DEAD or CONCRETE."""

    def closing_exit(self, local: int) -> int:
        """Return the exit that leads to the end of the text the shortest way; never a DEAD one."""


class Done:
    """The text is complete: nothing may follow."""

    def __init__(self, machine: Machine) -> None:
        self.table = machine.table(np.full((1, 1), REFUSE, dtype=np.int32), np.zeros(256, dtype=np.uint8), 0, None)

    def resolve(self, exit_index: int) -> int:
        raise AssertionError(exit_index)

    def closing_exit(self, local: int) -> int:
        raise AssertionError(local)


class Machine:
    """Tables, instances and the targets of their exits. Not thread-safe: its owner locks.

    pool: int32, all tables and class maps. instances: int64 [capacity, 5]. exits: int64, targets of all instances.
    """

    def __init__(self, max_states: int = MAX_STATES, max_time_s: float = 10.0) -> None:
        self.pool = np.empty(1 << 14, dtype=np.int32)
        self.pool_used = 0
        self.instances = np.empty((1 << 10, INSTANCE_FIELDS), dtype=np.int64)
        self.exits = np.full(1 << 10, UNKNOWN, dtype=np.int64)
        self.exits_used = 0
        self.frames: list[Frame] = []
        self.exit_offsets: list[int] = []
        self.max_states = max_states
        self.max_time_s = max_time_s
        self.is_timed = False
        self.interned: dict[Hashable, int] = {}
        self.class_maps: dict[bytes, int] = {}
        self.unenforced: list[
            tuple[str, str, str]
        ] = []  # (JSON pointer, keyword, reason) that the caller must validate
        # of the vocabulary (see there), whatever it is until it is known
        self.quoted: Container[bytes] | None = None
        self.key_starts = bytes(range(256))
        self.reads_past_values = True
        self._closing_lengths: dict[int, int] = {}
        self._closing_steps: dict[int, tuple[bytes, int]] = {}
        self.done = self.add(Done(self))

    # --- building

    def table(
        self,
        rows: NDArray[np.int32],
        byte_class: NDArray[np.uint8],
        num_exits: int,
        end_exits: NDArray[np.int32] | None,
        depths: NDArray[np.int32] | None = None,
        loop: int = -1,
    ) -> Table:
        """Put a table into the pool."""
        key = byte_class.tobytes()
        class_offset = self.class_maps.get(key)
        if class_offset is None:
            class_offset = self.class_maps[key] = self._put(byte_class.astype(np.int32))
        offset = self._put(rows.reshape(-1))
        return Table(rows, byte_class, num_exits, end_exits, offset, class_offset, depths, loop)

    def _put(self, values: NDArray[np.int32]) -> int:
        begin, end = self.pool_used, self.pool_used + len(values)
        if end > MAX_POOL:
            raise GrammarTooLarge(f"the tables of the automaton need more than {MAX_POOL * 4 >> 20:,} MiB")
        if end > len(self.pool):
            grown = np.empty(max(2 * len(self.pool), end), dtype=np.int32)
            grown[:begin] = self.pool[:begin]
            self.pool = grown
        self.pool[begin:end] = values
        self.pool_used = end
        return begin

    def add(self, frame: Frame) -> int:
        """Add an instance; its exits are unknown. Returns its index."""
        table = frame.table
        index = len(self.frames)
        if index == len(self.instances):
            self.instances = np.concatenate([self.instances, np.empty_like(self.instances)])
        begin = self.exits_used
        end = self.exits_used = begin + table.num_exits
        if end > len(self.exits):
            grown = np.full(max(2 * len(self.exits), end), UNKNOWN, dtype=np.int64)
            grown[:begin] = self.exits[:begin]
            self.exits = grown
        has_memory = 1 if hasattr(frame, "resolve_text") else 0
        self.instances[index] = (table.offset, table.width, table.class_offset, begin, has_memory)
        self.frames.append(frame)
        self.exit_offsets.append(begin)
        if index >= self.max_states:
            raise GrammarTooLarge(f"the automaton has more than {self.max_states:,} configurations; raise the limit")
        return index

    def intern(self, key: Hashable, make: Callable[[], Frame]) -> int:
        """Return the instance of this key, made when first asked for."""
        found = self.interned.get(key)
        if found is None:
            found = self.interned[key] = self.add(make())
        return found

    def mask_twin(self, packed: int) -> int:
        """Return the state whose mask this one has but for what `refused_prefixes` and step-by-step runs decide.

        A frame says which (its method `mask_twin`) where it differs only in texts remembered, its own or those of a
        context: masks do not see that far, so that what is alike is resolved and walked once.
        """
        frame = self.frames[packed >> LOCAL_BITS]
        return frame.mask_twin(packed & LOCAL_MASK) if hasattr(frame, "mask_twin") else packed

    # --- states

    def exit_target(self, instance: int, exit_index: int) -> int:
        """Return the target of an exit, resolved now if it was not."""
        at = self.exit_offsets[instance] + exit_index
        found = int(self.exits[at])
        if found == UNKNOWN:
            found = self._resolve(instance, exit_index)
            assert found != UNKNOWN
            self.exits[at] = found
        return found

    def _resolve(self, instance: int, exit_index: int) -> int:
        """Raises: GrammarTooLarge where that takes too long or nests too deeply."""
        try:
            if self.is_timed:  # by the mask that is being made: 1.6 µs less an exit
                return self.frames[instance].resolve(exit_index)
            with time_limit(self.max_time_s):
                return self.frames[instance].resolve(exit_index)
        except RecursionError as error:
            raise GrammarTooLarge("parts of the grammar are nested too deeply to be combined") from error

    def step(self, packed: int, byte: int) -> int:
        """Return the target after one byte, DEAD where refused. Exact: memory frames are not seen here (see `run`)."""
        instance, local = packed >> LOCAL_BITS, packed & LOCAL_MASK
        while True:
            table = self.frames[instance].table
            entry = int(table.rows[local, table.byte_class[byte]])
            if entry >= 0:
                return target(instance, entry)
            if entry == REFUSE:
                return DEAD
            code = -2 - entry
            found = self.exit_target(instance, code >> 1)
            if found < 0:
                return found
            if not code & 1:
                return found
            instance, local = found >> LOCAL_BITS, found & LOCAL_MASK

    def run(self, packed: int, text: NDArray[np.uint8], begin: int, end: int, scratch: NDArray[np.int64]) -> int:
        """Return the target after the committed bytes text[begin:end], DEAD where refused. scratch: int64 [>= 4]."""
        scratch[0] = begin
        scratch[1] = packed
        while True:
            status = walker.run(self.pool, self.instances, self.exits, text, end, scratch)
            if status == 0:
                return int(scratch[1])
            if status == 1:
                return DEAD
            if status == 4:
                packed = int(scratch[1])
                frame = cast("MemoryFrame", self.frames[packed >> LOCAL_BITS])
                return target(frame.remember(frame.text), packed & LOCAL_MASK)
            if status == 2:
                instance, exit_index = int(scratch[2]), int(scratch[3])
                if self.exit_target(instance, exit_index) < 0:
                    return DEAD
            else:
                position = int(scratch[0])
                packed, length = self._run_memory(int(scratch[1]), text[position:end].tobytes())
                if packed < 0:
                    return DEAD
                scratch[0] = position + length
                scratch[1] = packed
                if position + length == end:
                    return packed

    def run_bytes(self, packed: int, text: bytes) -> int:
        """`run` over a text of its own."""
        return self.run(packed, np.frombuffer(text, dtype=np.uint8), 0, len(text), np.zeros(4, dtype=np.int64))

    def _run_memory(self, packed: int, text: bytes) -> tuple[int, int]:
        """Run a frame with memory until it is left or the text ends; returns (target, bytes read)."""
        instance, local = packed >> LOCAL_BITS, packed & LOCAL_MASK
        frame = cast("MemoryFrame", self.frames[instance])
        rows, byte_class = frame.table.rows, frame.table.byte_class
        position = 0
        while position < len(text):
            entry = int(rows[local, byte_class[text[position]]])
            if entry == REFUSE:
                return DEAD, position
            if entry < REFUSE:
                code = -2 - entry
                read = position + 1 - (code & 1)
                goes_on = hasattr(frame, "goes_on") and frame.goes_on(code >> 1)
                return frame.resolve_text(code >> 1, frame.text + text[: read if goes_on else position]), read
            local = entry
            position += 1
        return target(frame.remember(frame.text + text[:position]), local), position

    def accepts(self, packed: int) -> bool:
        """May the text end here?"""
        while True:
            instance, local = packed >> LOCAL_BITS, packed & LOCAL_MASK
            if instance == self.done:
                return True
            ends = self.frames[instance].table.end_exits
            if ends is None or ends[local] < 0:
                return False
            packed = self.exit_target(instance, int(ends[local]))
            if packed < 0:
                return False

    # --- closing a text

    def closing_bytes(self, packed: int, limit: int = 1 << 20) -> bytes:
        """A short text that leads from here to the end.

        Raises: GrammarTooLarge past `limit` bytes.
        """
        out = bytearray()
        with time_limit(self.max_time_s):
            while not self.accepts(packed):
                way, packed = self._closing_step(packed)
                out += way
                if len(out) > limit:
                    raise GrammarTooLarge(f"the shortest completion is longer than {limit:,} bytes")
        return bytes(out)

    def closing_length(self, packed: int, limit: int = 1 << 20) -> int:
        """Bytes of `closing_bytes`. Cheap after the first call: what follows a frame is remembered with it.

        Raises: GrammarTooLarge past `limit` bytes.
        """
        lengths = self._closing_lengths
        if packed in lengths:
            return lengths[packed]
        steps: list[tuple[int, int]] = []
        total = 0
        with time_limit(self.max_time_s):
            while packed not in lengths and not self.accepts(packed):
                way, following = self._closing_step(packed)
                steps.append((packed, len(way)))
                total += len(way)
                if total > limit:
                    raise GrammarTooLarge(f"the shortest completion is longer than {limit:,} bytes")
                packed = following
        length = lengths.get(packed, 0)
        for earlier, size in reversed(steps):
            length += size
            lengths[earlier] = length
        return length

    def known_closing_length(self, packed: int) -> int | None:
        """`closing_length` where it was asked before. May be called without the owner's lock."""
        return self._closing_lengths.get(packed)

    def _closing_step(self, packed: int) -> tuple[bytes, int]:
        """The shortest way out of the frame on top, and the state behind it; remembered, as texts end alike."""
        found = self._closing_steps.get(packed)
        if found is None:
            found = self._closing_steps[packed] = self._find_closing_step(packed)
        return found

    def _find_closing_step(self, packed: int) -> tuple[bytes, int]:
        deadline.check()
        instance, local = packed >> LOCAL_BITS, packed & LOCAL_MASK
        frame = self.frames[instance]
        exit_index = frame.closing_exit(local)
        find = frame.closing_way if hasattr(frame, "closing_way") else partial(path_to_exit, frame.table)
        way: bytes | None = find(exit_index=exit_index, local=local)
        assert way is not None, (frame, local, exit_index)
        if way:
            packed = self.run_bytes(packed, way)
            assert packed >= 0, (frame, local, exit_index, way)
        reached = self.frames[packed >> LOCAL_BITS]
        if reached.table is frame.table and leaves_unread(frame.table, packed & LOCAL_MASK, exit_index):
            if hasattr(reached, "resolve_text"):
                memory = cast("MemoryFrame", reached)
                packed = memory.resolve_text(exit_index, memory.text)
            else:
                packed = self.exit_target(packed >> LOCAL_BITS, exit_index)
            assert packed >= 0, (frame, local, exit_index)
        return way, packed


class MemoryFrame(Frame, Protocol):
    """A frame whose exits depend on the text read in it (an unnamed key, an item that must not come twice).

    While a mask is computed its exits lead to a context that does not know the text; a run over committed bytes asks
    here. `text`: what was read in the frame before this instance.
    """

    text: bytes

    def resolve_text(self, exit_index: int, text: bytes) -> int:
        """Return the exit's target, given the frame's whole text, without the byte that leaves it: unless the frame has
        a method `goes_on` that says of the exit that the text goes on in the next frame."""

    def remember(self, text: bytes) -> int:
        """Return the instance of the same frame with `text` read in it."""


def leaves_unread(table: Table, local: int, exit_index: int) -> bool:
    """Can an exit be taken in this state without reading a byte?"""
    if table.end_exits is not None and int(table.end_exits[local]) == exit_index:
        return True
    return bool((table.rows[local] == leave(exit_index, again=True)).any())


def path_to_exit(table: Table, exit_index: int, local: int) -> bytes | None:
    """A shortest byte string from `local` to an exit, the leaving byte included if the frame reads it; None if there is
    none.
    """
    found = table.paths.get(exit_index)
    if found is None:
        found = table.paths[exit_index] = _paths_to_exit(table, exit_index)
    return found[local]


def _paths_to_exit(table: Table, exit_index: int) -> list[bytes | None]:
    """Breadth first, backwards from the exit; printable ASCII is preferred."""
    n = table.num_states
    sample = sample_bytes(table.byte_class, table.rows.shape[1])
    out: list[bytes | None] = [None] * n
    own = leave(exit_index)
    frontier: list[int] = []
    if table.end_exits is not None:
        frontier.extend(np.flatnonzero(table.end_exits == exit_index).tolist())
    frontier.extend(np.flatnonzero((table.rows == leave(exit_index, again=True)).any(axis=1)).tolist())
    for s in frontier:
        out[s] = b""
    direct_rows, direct_classes = np.nonzero(table.rows == own)
    direct: list[int] = []
    for s, c in zip(direct_rows.tolist(), direct_classes.tolist(), strict=True):
        if out[s] is None and sample[c] is not None:
            out[s] = bytes((sample[c],))  # type: ignore[arg-type]
            direct.append(s)
    sources, classes = np.nonzero(table.rows >= 0)
    before: dict[int, list[tuple[int, int]]] = {}
    for s, c in zip(sources.tolist(), classes.tolist(), strict=True):
        before.setdefault(int(table.rows[s, c]), []).append((s, c))
    pending = [frontier, direct]
    while pending:
        level = pending.pop(0)
        following: list[int] = []
        deadline.check()
        for t in level:
            for s, c in before.get(t, ()):
                if out[s] is None and sample[c] is not None:
                    out[s] = bytes((sample[c],)) + (out[t] or b"")  # type: ignore[arg-type]
                    following.append(s)
        if following or pending:
            if pending:
                pending[0] = following + pending[0]
            else:
                pending.append(following)
    return out


def sample_bytes(byte_class: NDArray[np.uint8], num_classes: int) -> list[int | None]:
    """One byte of each class, letters before digits before the rest."""
    order = [*range(97, 123), *range(48, 58), *range(32, 127), *range(256)]
    out: list[int | None] = [None] * num_classes
    for b in order:
        c = int(byte_class[b])
        if out[c] is None:
            out[c] = b
    return out


def compress_rows(wide: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Turn int32 [n, 256] into rows over byte classes and the class map."""
    weights = _WEIGHTS[: len(wide)] if len(wide) <= len(_WEIGHTS) else _weights(len(wide))
    digest = column_digests(wide, weights)  # equal columns have equal digests; the sums wrap, which is harmless
    _, first, inverse = np.unique(digest, return_index=True, return_inverse=True)
    return np.ascontiguousarray(wide[:, first]), inverse.reshape(-1).astype(np.uint8)


def _weights(n: int) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(-(2**62), 2**62, size=n, dtype=np.int64)


_WEIGHTS = _weights(4096)
