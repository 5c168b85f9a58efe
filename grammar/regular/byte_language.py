"""A whole language as one deterministic byte automaton. Regular sources (regex, choices, substrings) compile to this.

The automaton is one frame of the machine, so all states are known from the start and no Python runs per state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarTooLarge
from ramet.grammar import ir
from ramet.grammar.machine.automaton import Limits, Machine
from ramet.grammar.machine.compiled_grammar import CompiledGrammar
from ramet.grammar.machine.frame import DEAD, OneWayFrame, compress_rows, target
from ramet.grammar.machine.vocabulary import Vocabulary

MAX_BYTES = 1 << 29


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """A deterministic automaton over bytes. State 0 is the start, and every state leads to an accepting one.

    rows: int32 [num_states, num_classes], -1 refused. byte_class: uint8 [256]. accepting: bool [num_states].
    """

    rows: NDArray[np.int32]
    byte_class: NDArray[np.uint8]
    accepting: NDArray[np.bool_]

    @property
    def num_states(self) -> int:
        return len(self.rows)

    @staticmethod
    def of_table(table: ir.Table) -> ByteAutomaton:
        rows, byte_class = compress_rows(table.transitions)
        return ByteAutomaton(rows, byte_class, table.accepting)

    @staticmethod
    def of_edges(edges: list[dict[int, int]], accepting: list[bool], name: str) -> ByteAutomaton:
        """Build the automaton from the edges of each state, byte -> state.

        Raises: GrammarTooLarge naming `name` if the table would take more than 512 MiB.
        """
        used = sorted({byte for row in edges for byte in row})
        byte_class = np.zeros(256, dtype=np.uint8)
        num_classes = len(used) + (len(used) < 256)  # class 0: all bytes that are on no edge
        byte_class[used] = np.arange(num_classes - len(used), num_classes)
        if 4 * len(edges) * num_classes > MAX_BYTES:
            raise GrammarTooLarge(
                f"{name} needs {len(edges):,} states of {num_classes} byte classes; the limit is {MAX_BYTES >> 20} MiB"
            )
        rows = np.full((len(edges), num_classes), -1, dtype=np.int32)
        source = np.repeat(np.arange(len(edges)), [len(row) for row in edges])
        read = np.fromiter((b for row in edges for b in row), dtype=np.int64, count=len(source))
        rows[source, byte_class[read]] = np.fromiter(
            (t for row in edges for t in row.values()), dtype=np.int32, count=len(source)
        )
        return ByteAutomaton(rows, byte_class, np.asarray(accepting, dtype=np.bool_))

    @cached_property
    def table(self) -> ir.Table:
        """Return the automaton as a node, for use inside a larger grammar."""
        return ir.Table(np.ascontiguousarray(self.rows[:, self.byte_class]), self.accepting)

    def accepts(self, text: bytes) -> bool:
        state = 0
        for byte in text:
            state = int(self.rows[state, self.byte_class[byte]])
            if state < 0:
                return False
        return bool(self.accepting[state])


def compile_automaton(automaton: ByteAutomaton, vocabulary: Vocabulary, limits: Limits) -> CompiledGrammar:
    """Return the automaton as a compiled grammar. Raises: GrammarError if no text matches."""
    machine = Machine(vocabulary, limits)
    ends = np.where(automaton.accepting, 0, -1).astype(np.int32)
    frame = OneWayFrame(machine.table(automaton.rows, automaton.byte_class, 1, ends), target(machine.done))
    return CompiledGrammar(machine, target(machine.add(frame)) if automaton.accepting.any() else DEAD)
