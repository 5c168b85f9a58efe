"""Frames, the parts that the machine is made of, and their tables.

A frame reads one stretch of a text: a number, the content of a string, the keys of an object. It has a *table* of local
states, which is shared by all frames that read in the same way. It has *exits*, by which the text leaves the frame.
Each exit leads to a *target*: a local state of another frame. The machine that holds the frames and runs texts through
them is in automaton.py.

A table entry is one of
    a local state (>= 0)               the byte is read, and the text stays in the frame
    REFUSE                             the byte is not allowed here
    leave(exit)                        the byte is read, and the text leaves through the exit
    leave(exit, again=True)            the text leaves through the exit, and the target reads the byte

In the frame of a number, for example, a digit leads to a local state, and a comma leaves with again=True: the array or
object around the number reads the comma.

A target is target(instance, local): instance << 32 | local, where `instance` is the machine's number of a frame. The
other targets are negative: DEAD, NEEDS_RUN and (in the machine only) UNKNOWN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ramet.grammar import deadline
from ramet.grammar.machine.walker import column_digests, exit_distances, exit_path, exit_ways

REFUSE = -1
DEAD = -1  # target of an exit that must not be taken: no text can be completed after it
UNKNOWN = -2  # target of an exit that no text has taken yet
NEEDS_RUN = -3  # target of an exit that depends on the text read before: tokens that take it are run one by one
# the order of bytes in which a closing text is chosen: letters, digits, other printable ASCII, the rest
PREFERRED_BYTES = tuple(dict.fromkeys([*range(97, 123), *range(48, 58), *range(32, 127), *range(256)]))
_PREFERRED = np.array(PREFERRED_BYTES)
_MAX_WAYS = 8  # states of a table whose ways to all exits are kept
LOCAL_BITS = 32
LOCAL_MASK = (1 << LOCAL_BITS) - 1


def leave(exit_index: int, again: bool = False) -> int:
    """Return the table entry that leaves through an exit. again: the target reads the byte."""
    return -2 - (2 * exit_index + int(again))


def target(instance: int, local: int = 0) -> int:
    """Pack an instance and a local state into a target."""
    return (instance << LOCAL_BITS) | local


@dataclass(frozen=True, slots=True, eq=False)
class FrameTable:
    """The local states of a frame, in the pool of one machine.

    rows: int32 [num_states, num_classes], entries as in the module's docstring. byte_class: uint8 [256].
    end_exits: for each state, the exit taken if the text ends there, -1 if it may not end. None: it may end in no
    state.
    offset, class_offset: where the rows and the class map begin in the pool.
    depths: int32 [4, num_states], for the content of strings: how many plain characters may follow
    (walker.safe_depths).
    loop: a state that every plain character (kind 2, see Vocabulary) leads back to, -1 if there is none.
    """

    rows: NDArray[np.int32]
    byte_class: NDArray[np.uint8]
    num_exits: int
    end_exits: NDArray[np.int32] | None
    offset: int = -1
    class_offset: int = -1
    depths: NDArray[np.int32] | None = None
    loop: int = -1
    # filled when they are needed: the bytes from each state to an exit; the ways from a state; one byte of each class
    distances: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    ways: dict[int, ExitWays] = field(default_factory=dict)
    order: list[NDArray[np.int32]] = field(default_factory=list)

    num_states: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_states", len(self.rows))
        object.__setattr__(self, "width", self.rows.shape[1])


class Frame(ABC):
    """One stretch of a text in one context: how it is read, and what may follow it.

    This is all that the machine asks of a frame. The machine keeps the answers, so they must never change. A frame
    overrides a method if the default is not enough for it. `local` is a state of the frame's table.

    table: the states, and what each byte does in them.
    has_memory: the targets of the exits depend on the text that was read in the frame. A walk over the vocabulary does
    not know that text and asks `resolve`. A run over committed bytes knows it and asks `resolve_text`.
    text: in a frame with memory, the text that was read before this instance. `remember` gives the instance for a
    longer text.
    is_string: the text is that of a string, which is a value of JSON.
    loop_key: equal for frames, also of different grammars, whose tables have the same mask in the loop state (see
    Vocabulary.loop). None if the mask belongs to this grammar alone.
    """

    table: FrameTable
    has_memory: bool = False
    is_string: bool = False
    text: bytes = b""
    loop_key: Hashable | None = None

    # --- where exits lead

    @abstractmethod
    def resolve(self, exit_index: int) -> int:
        """Return the target of an exit: target(instance, local), DEAD or NEEDS_RUN."""

    def resolve_text(self, exit_index: int, text: bytes, last: bytes) -> int:
        """Return the target of an exit of a frame with memory: target(instance, local) or DEAD.

        text: all that was read in the frame. last: the byte that left it; empty if the target reads that byte.
        """
        raise AssertionError(f"{self} has no memory")

    def remember(self, text: bytes) -> int:
        """Return the instance of this frame with memory in which `text` was read since its beginning."""
        raise AssertionError(f"{self} has no memory")

    # --- how to finish a text

    def closing_exit(self, local: int) -> int:
        """Return the exit on the shortest way to the end of the text, by estimate. Its target is never DEAD.

        A frame that does not override this serves masks alone: no text gets there.
        """
        raise AssertionError(f"{self} closes no text")

    def closing_way(self, local: int, exit_index: int) -> bytes | None:
        """Return a short text from a state to an exit; None if there is none.

        It includes the leaving byte if the frame reads it. Called with the exit that `closing_exit` chose.
        """
        return path_to_exit(self.table, exit_index, local)

    def closing_jump(self, local: int) -> tuple[bytes, int] | None:
        """Return a short text from a state and the target after it, if both are known without the states between.

        None: the way leads through an exit, see `closing_exit`.
        """
        return None

    # --- masks

    def mask_twin(self, local: int) -> int | None:
        """Return the state, target(instance, local), whose mask is used for this state; None if there is no such state.

        The two masks may differ only in tokens that `refused_prefixes` removes and in tokens that need a run. States
        that differ only in earlier text, in the frame or around it, have the same twin. So one walk over the vocabulary
        serves all of them.
        """
        return None

    def refused_prefixes(self, local: int) -> Sequence[bytes]:
        """Return the texts that the twin of this state accepts but that may not follow here."""
        return ()

    def loop_twin(self) -> int | None:
        """Return the state that has the mask of the table's loop state; None if that is the loop state itself."""
        return None

    def characters_left(self, local: int) -> int | None:
        """Return how many more characters of any kind may follow before the text must leave the frame.

        None if that is not known, or if the state is inside a character.
        """
        return None


class OneWayFrame(Frame):
    """A stretch of text that leads to the target `to`, however it is left."""

    def __init__(self, table: FrameTable, to: int) -> None:
        self.table = table
        self.to = to

    def resolve(self, exit_index: int) -> int:
        return self.to

    def closing_exit(self, local: int) -> int:
        return 0


def leaves_unread(table: FrameTable, local: int, exit_index: int) -> bool:
    """Tell whether an exit can be taken in this state without reading a byte."""
    if table.end_exits is not None and int(table.end_exits[local]) == exit_index:
        return True
    return bool((table.rows[local] == leave(exit_index, again=True)).any())


def length_to_exit(table: FrameTable, exit_index: int, local: int) -> int | None:
    """Return the length of `path_to_exit`; None if there is no way."""
    found = table.distances.get(exit_index)
    if found is None:
        found = table.distances[exit_index] = np.empty(table.num_states, dtype=np.int32)
        exit_distances(table.rows, _ends(table), exit_index, found)
        deadline.check()
    length = int(found[local])
    return None if length < 0 else length


def path_to_exit(table: FrameTable, exit_index: int, local: int) -> bytes | None:
    """Return a shortest byte string from `local` to an exit; None if there is none. Prefers printable ASCII.

    It includes the leaving byte if the frame reads it.
    """
    length = length_to_exit(table, exit_index, local)
    if length is None:
        return None
    order, samples = _byte_order(table)
    out = np.empty(length, dtype=np.uint8)
    exit_path(table.rows, table.distances[exit_index], order, samples, exit_index, local, out)
    return out.tobytes()


class ExitWays:
    """The shortest ways from one state of a table to all of its exits.

    lengths: int32 [num_exits], -1: there is no way.
    """

    def __init__(self, table: FrameTable, local: int) -> None:
        order, samples = _byte_order(table)
        self._samples = dict(zip(order.tolist(), samples.tolist(), strict=True))
        self._ways = np.empty((table.num_exits, 3), dtype=np.int32)
        self._before = np.empty((table.num_states, 2), dtype=np.int32)
        exit_ways(table.rows, _ends(table), order, local, self._ways, self._before)
        self.lengths = self._ways[:, 0]

    def way(self, exit_index: int) -> bytes:
        """Return the way to an exit that can be reached, with the leaving byte if the frame reads it."""
        _, state, last = self._ways[exit_index].tolist()
        classes = [] if last < 0 else [last]
        state, byte_class = self._before[state].tolist()
        while state >= 0:
            classes.append(byte_class)
            state, byte_class = self._before[state].tolist()
        return bytes([self._samples[c] for c in reversed(classes)])


def ways_to_exits(table: FrameTable, local: int) -> ExitWays:
    """Return the ways from a state. Those of the last few states are kept."""
    found = table.ways.get(local)
    if found is None:
        if len(table.ways) >= _MAX_WAYS:
            table.ways.clear()
        found = table.ways[local] = ExitWays(table, local)
        deadline.check()
    return found


def _ends(table: FrameTable) -> NDArray[np.int32]:
    return np.empty(0, dtype=np.int32) if table.end_exits is None else table.end_exits


def _byte_order(table: FrameTable) -> list[NDArray[np.int32]]:
    """Return the classes of bytes, those with the preferred bytes first, and one byte of each class."""
    if not table.order:
        classes = table.byte_class[_PREFERRED]
        first = np.sort(np.unique(classes, return_index=True)[1])
        table.order.extend(a[first].astype(np.int32) for a in (classes, _PREFERRED))
    return table.order


def sample_bytes(byte_class: NDArray[np.uint8], num_classes: int) -> list[int | None]:
    """Return one byte of each class, the preferred one."""
    out: list[int | None] = [None] * num_classes
    for b in PREFERRED_BYTES:
        c = int(byte_class[b])
        if out[c] is None:
            out[c] = b
    return out


def compress_rows(wide: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Turn int32 [n, 256] into rows over byte classes, and return them with the class map."""
    weights = _WEIGHTS[: len(wide)] if len(wide) <= len(_WEIGHTS) else _weights(len(wide))
    digest = column_digests(wide, weights)  # equal columns have equal digests; the sums wrap, which is harmless
    _, first, inverse = np.unique(digest, return_index=True, return_inverse=True)
    return np.ascontiguousarray(wide[:, first]), inverse.reshape(-1).astype(np.uint8)


def _weights(n: int) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(-(2**62), 2**62, size=n, dtype=np.int64)


_WEIGHTS = _weights(4096)
