"""The machine under every grammar: a pushdown automaton over bytes that is built while texts run through it.

The machine holds frames (see frame.py) and numbers them. The number of a frame is its *instance*. A configuration of
the machine, called *packed* here, is one integer: instance << 32 | local state. For example, 5 << 32 | 3 is local state
3 of frame 5. There is no stack, because each frame knows its context: when the text leaves a frame by an exit, it
continues at the target of that exit.

The machine asks a frame for the target of an exit once, when a text first takes that exit. So Python runs once for each
frame and exit, and compiled loops run for each byte (walker.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarTooLarge
from ramet.grammar import deadline
from ramet.grammar.deadline import time_limit
from ramet.grammar.machine import walker
from ramet.grammar.machine.frame import (
    DEAD,
    LOCAL_BITS,
    LOCAL_MASK,
    PREFERRED_BYTES,
    REFUSE,
    UNKNOWN,
    Frame,
    FrameTable,
    OneWayFrame,
    leaves_unread,
    target,
)
from ramet.grammar.machine.vocabulary import Vocabulary

MAX_POOL = 1 << 28  # table entries of 4 bytes
INSTANCE_FIELDS = 6  # table offset, number of classes, class map offset, exit offset, has memory, may end

MAX_CLOSING_BYTES = 1 << 20  # of a completion


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the cost of compiling and running a grammar.

    max_time_s: seconds for compiling, and for each answer to a caller who waits for it. (An engine's steps do not wait,
    and have a limit of their own.)
    max_states: configurations of one grammar, visited or looked at. max_regular_states: states of one terminal or
    pattern.
    max_mask_bytes: bytes of the mask rows that one grammar keeps; the least recently used rows are dropped first.
    """

    max_time_s: float = 10.0
    max_states: int = 4_000_000
    max_regular_states: int = 20_000
    max_mask_bytes: int = 1 << 26


class Machine:
    """All tables, all instances, and the targets of their exits. Not thread-safe: the owner locks.

    pool: int32, all tables and class maps. instances: int64 [capacity, 6]. exits: int64, targets of all instances.
    """

    def __init__(self, vocabulary: Vocabulary, limits: Limits) -> None:
        self.vocabulary = vocabulary
        self.limits = limits
        self.pool = np.empty(1 << 14, dtype=np.int32)
        self.pool_used = 0
        self.instances = np.empty((1 << 10, INSTANCE_FIELDS), dtype=np.int64)
        self.exits = np.full(1 << 10, UNKNOWN, dtype=np.int64)
        self.exits_used = 0
        self.frames: list[Frame] = []
        self.exit_offsets: list[int] = []
        self.class_maps: dict[bytes, int] = {}
        self._closing_lengths: dict[int, int] = {}
        self._closing_steps: dict[int, tuple[bytes, int]] = {}
        nothing = self.table(np.full((1, 1), REFUSE, dtype=np.int32), np.zeros(256, dtype=np.uint8), 0, None)
        self.done = self.add(OneWayFrame(nothing, DEAD))
        """The instance where the text is complete, and nothing may follow."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tables, instances and exits."""
        return self.pool.nbytes + self.instances.nbytes + self.exits.nbytes

    # --- building

    def table(
        self,
        rows: NDArray[np.int32],
        byte_class: NDArray[np.uint8],
        num_exits: int,
        end_exits: NDArray[np.int32] | None,
        depths: NDArray[np.int32] | None = None,
        loop: int = -1,
    ) -> FrameTable:
        """Copy a table into the pool and return it."""
        key = byte_class.tobytes()
        class_offset = self.class_maps.get(key)
        if class_offset is None:
            class_offset = self.class_maps[key] = self._put(byte_class.astype(np.int32))
        offset = self._put(rows.reshape(-1))
        return FrameTable(rows, byte_class, num_exits, end_exits, offset, class_offset, depths, loop)

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
        """Add a frame and return its instance. Its exits are resolved later."""
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
        may_end = table.end_exits is not None or index == 0  # 0: Done
        self.instances[index] = (table.offset, table.width, table.class_offset, begin, frame.has_memory, may_end)
        self.frames.append(frame)
        self.exit_offsets.append(begin)
        if index >= self.limits.max_states:
            raise GrammarTooLarge(
                f"the automaton has more than {self.limits.max_states:,} configurations; raise the limit"
            )
        return index

    def mask_twin(self, packed: int) -> int:
        """Return the state whose mask is used for this state: see Frame.mask_twin."""
        found = self.frames[packed >> LOCAL_BITS].mask_twin(packed & LOCAL_MASK)
        return packed if found is None else found

    # --- states

    def exit_target(self, instance: int, exit_index: int) -> int:
        """Return the target of an exit; resolve it first if no text has taken it yet."""
        at = self.exit_offsets[instance] + exit_index
        found = int(self.exits[at])
        if found == UNKNOWN:
            found = self._resolve(instance, exit_index)
            assert found != UNKNOWN
            self.exits[at] = found
        return found

    def _resolve(self, instance: int, exit_index: int) -> int:
        """Ask the frame for the target of an exit, and keep it.

        Raises: GrammarTooLarge if that takes too long or nests too deeply.
        """
        try:
            if deadline.is_set():  # by the mask that is being made: 1.6 µs less an exit
                deadline.check()
                return self.frames[instance].resolve(exit_index)
            with time_limit(self.limits.max_time_s):
                return self.frames[instance].resolve(exit_index)
        except RecursionError as error:
            raise GrammarTooLarge("parts of the grammar are nested too deeply to be combined") from error

    def step(self, packed: int, byte: int) -> int:
        """Return the target after one byte, DEAD if the byte is refused. Not for frames with memory (see `run`)."""
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
        """Return the target after the committed bytes text[begin:end], DEAD if they are refused.

        scratch: int64 [>= 4].
        """
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
                frame = self.frames[packed >> LOCAL_BITS]
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

    def accepted(
        self, packed: int, tokens: NDArray[np.int64], num_read: int = 0, limit: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return those of the tokens whose bytes after the first `num_read` a walk accepts, and those that need a run.

        limit: stop after so many tokens.
        """
        vocabulary, scratch = self.vocabulary, np.zeros(4, dtype=np.int64)
        found = np.empty(len(tokens) if limit is None else limit, dtype=np.int64)
        flat, ends = vocabulary.flat, vocabulary.token_ends
        while True:
            status = walker.accepted(
                self.pool, self.instances, self.exits, packed, flat, ends, tokens, num_read, scratch, found
            )
            if status != -2:
                found = found[: int(scratch[3])]
                return found[found >= 0], -1 - found[found < 0]
            self.exit_target(int(scratch[1]), int(scratch[2]))

    def run_all(self, packed: int, tokens: NDArray[np.int64], num_read: int = 0) -> NDArray[np.int64]:
        """Return those of the tokens whose bytes after the first `num_read` `run` accepts.

        Tokens that leave a frame with memory after the same text are run together from there on.
        """
        frame = self.frames[packed >> LOCAL_BITS]
        if not frame.has_memory:
            sure, unsure = self.accepted(packed, tokens, num_read)
            kept = [
                t for t in unsure.tolist() if self.run_bytes(packed, self.vocabulary.token_bytes[t][num_read:]) >= 0
            ]
            return np.concatenate([sure, np.array(kept, dtype=np.int64)])
        left = np.empty((len(tokens), 2), dtype=np.int64)
        vocabulary = self.vocabulary
        walker.leave(self.pool, self.instances, packed, vocabulary.flat, vocabulary.token_ends, tokens, num_read, left)
        out = [tokens[left[:, 1] >= 0]]
        for group, text, entry in self._groups(tokens, left, num_read):
            code = -2 - entry
            last = b"" if code & 1 else text[-1:]
            after = frame.resolve_text(code >> 1, frame.text + text[: len(text) - len(last)], last)
            if after >= 0:
                out.append(self.run_all(after, group, num_read + len(text)))
        return np.concatenate(out)

    def _groups(
        self, tokens: NDArray[np.int64], left: NDArray[np.int64], num_read: int
    ) -> Iterator[tuple[NDArray[np.int64], bytes, int]]:
        """Yield the tokens that leave a frame by the same text and entry, with both. left: see walker.leave."""
        leaves = left[:, 1] < REFUSE
        is_read = ((-2 - left[:, 1]) & 1) == 0  # the frame reads the byte that leaves
        at_once = leaves & (left[:, 0] == 0) & ~is_read
        for entry in np.unique(left[at_once, 1]).tolist():
            yield tokens[at_once & (left[:, 1] == entry)], b"", entry
        groups: dict[tuple[bytes, int], list[int]] = {}
        for i in np.flatnonzero(leaves & ~at_once).tolist():
            size, entry = left[i].tolist()
            text = self.vocabulary.token_bytes[tokens[i]][num_read : num_read + size + int(is_read[i])]
            groups.setdefault((text, entry), []).append(int(tokens[i]))
        for (text, entry), group in groups.items():
            yield np.array(group, dtype=np.int64), text, entry

    def run_bytes(self, packed: int, text: bytes) -> int:
        """Do as `run`, for a whole text."""
        return self.run(packed, np.frombuffer(text, dtype=np.uint8), 0, len(text), np.zeros(4, dtype=np.int64))

    def _run_memory(self, packed: int, text: bytes) -> tuple[int, int]:
        """Run a frame with memory until the text leaves it or ends; return (target, number of bytes read)."""
        instance, local = packed >> LOCAL_BITS, packed & LOCAL_MASK
        frame = self.frames[instance]
        rows, byte_class = frame.table.rows, frame.table.byte_class
        position = 0
        while position < len(text):
            entry = int(rows[local, byte_class[text[position]]])
            if entry == REFUSE:
                return DEAD, position
            if entry < REFUSE:
                code = -2 - entry
                read = position + 1 - (code & 1)
                return frame.resolve_text(code >> 1, frame.text + text[:position], text[position:read]), read
            local = entry
            position += 1
        return target(frame.remember(frame.text + text[:position]), local), position

    def accepts(self, packed: int) -> bool:
        """Tell whether the text may end here."""
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

    def is_complete(self, packed: int) -> bool:
        """Tell whether the text may end here and no byte may follow."""
        if packed >> LOCAL_BITS == self.done:
            return True
        return self.accepts(packed) and all(self.run_bytes(packed, bytes((b,))) < 0 for b in PREFERRED_BYTES)

    # --- closing a text

    def closing_bytes(self, packed: int) -> bytes:
        """Return a short text that completes the text from here.

        Raises: GrammarTooLarge for one above MAX_CLOSING_BYTES.
        """
        out = bytearray()
        with time_limit(self.limits.max_time_s):
            while not self.accepts(packed):
                way, packed = self._closing_step(packed)
                out += way
                if len(out) > MAX_CLOSING_BYTES:
                    raise _too_long()
        return bytes(out)

    def closing_length(self, packed: int) -> int:
        """Return the number of bytes of `closing_bytes`. Cheap after the first call: each frame's answer is kept.

        Raises: as `closing_bytes`.
        """
        lengths = self._closing_lengths
        if packed in lengths:
            return lengths[packed]
        steps: list[tuple[int, int]] = []
        total = 0
        with time_limit(self.limits.max_time_s):
            while packed not in lengths and not self.accepts(packed):
                way, following = self._closing_step(packed)
                steps.append((packed, len(way)))
                total += len(way)
                if total > MAX_CLOSING_BYTES:
                    raise _too_long()
                packed = following
        length = lengths.get(packed, 0)
        for earlier, size in reversed(steps):
            length += size
            lengths[earlier] = length
        return length

    def known_closing_length(self, packed: int) -> int | None:
        """Return `closing_length` if it was asked for before, else None. May be called without the owner's lock."""
        return self._closing_lengths.get(packed)

    def _closing_step(self, packed: int) -> tuple[bytes, int]:
        """Return the shortest way out of a state's frame, and the state after it. The answer is kept."""
        found = self._closing_steps.get(packed)
        if found is None:
            found = self._closing_steps[packed] = self._find_closing_step(packed)
        return found

    def _find_closing_step(self, packed: int) -> tuple[bytes, int]:
        deadline.check()
        instance, local = packed >> LOCAL_BITS, packed & LOCAL_MASK
        frame = self.frames[instance]
        jump = frame.closing_jump(local)
        if jump is not None:
            return jump
        exit_index = frame.closing_exit(local)
        way = frame.closing_way(local, exit_index)
        assert way is not None, (frame, local, exit_index)
        if way:
            packed = self.run_bytes(packed, way)
            assert packed >= 0, (frame, local, exit_index, way)
        reached = self.frames[packed >> LOCAL_BITS]
        if reached.table is frame.table and leaves_unread(frame.table, packed & LOCAL_MASK, exit_index):
            if reached.has_memory:
                packed = reached.resolve_text(exit_index, reached.text, b"")
            else:
                packed = self.exit_target(packed >> LOCAL_BITS, exit_index)
            assert packed >= 0, (frame, local, exit_index)
        return way, packed


def _too_long() -> GrammarTooLarge:
    return GrammarTooLarge(f"the shortest completion is longer than {MAX_CLOSING_BYTES:,} bytes")
