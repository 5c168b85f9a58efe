"""The automaton states of constrained sequences, and their work in a step.

A closed grammar runs on the device: its tables are in the arena, and steps mask, advance and finish its sequences
without the host. All other grammars run on the host, where each of their sequences has a `HostAutomaton`.

Steps use the host's grammars in two methods only, `masks` and `advance`, so that their work can be limited there. In
addition, a text's tokens are walked once when its sequence joins again after a preemption (`arena_states`), and when
max_tokens cuts it off (`why_incomplete`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ramet.kernels.grammar.arena import FREE_STATE, GrammarArena
from ramet.runtime.constraints.device_grammars import DeviceGrammars
from ramet.runtime.constraints.host_automaton import HostAutomaton
from ramet.runtime.constraints.incomplete import state_after
from ramet.runtime.types import Batch, RowOutput, ScheduledSequence, Sequence

# Whether a row's known tokens are better computed in one step: (their number, rows of the step, the row's KV length).
ComputesRun = Callable[[int, int, int], bool]
# The log-probability of a token that was not sampled: (the row among those that sample, the token).
LogprobOf = Callable[[int, int], float]


@dataclass(slots=True)
class HostMasks:
    """Masks computed by the host. words: int32 [R, W], one row for each sampling item. rows: the rows with a mask."""

    rows: list[int]
    words: NDArray[np.int32]


class GrammarStates:
    """The grammar states of one engine's sequences. Called on the engine's thread.

    An error of a grammar ends only its own request; `take_failures` returns it.
    """

    def __init__(self, vocab_size: int, computes_run: ComputesRun, device: DeviceGrammars | None = None) -> None:
        """`device` None: the host masks all grammars."""
        self.device = device
        self._computes_run = computes_run
        self._num_words = -(-vocab_size // 32)
        self._on_host: dict[Sequence, HostAutomaton] = {}
        self._on_device: dict[Sequence, int] = {}  # to the arena's number of their grammar's state 0
        self._failures: dict[Sequence, Exception] = {}

    def add(self, sequence: Sequence) -> None:
        """Add a new sequence: on the device if its grammar is closed and there is room, else on the host."""
        grammar = sequence.request.grammar
        if grammar is None:
            return
        base = None if self.device is None else self.device.acquire(grammar)
        if base is None:
            self._on_host[sequence] = HostAutomaton(sequence, grammar)
        else:
            self._on_device[sequence] = base

    def release(self, sequence: Sequence) -> None:
        """Remove an ended sequence. Do nothing if it is unknown."""
        self._on_host.pop(sequence, None)
        if self._on_device.pop(sequence, None) is not None:
            assert self.device is not None
            assert sequence.request.grammar is not None
            self.device.release(sequence.request.grammar)

    def is_on_host(self, sequence: Sequence) -> bool:
        """Return whether the host masks the sequence, so that it must know each token before the next step."""
        return sequence in self._on_host

    def take_failures(self) -> dict[Sequence, Exception]:
        """Return the errors of grammars since the last call. The caller must end their sequences."""
        failures, self._failures = self._failures, {}
        return failures

    # --- a step

    def masks(self, batch: Batch) -> HostMasks | None:
        """Return the masks of the sampling rows; None if the host masks none of them."""
        if not self._on_host:
            return None
        sampled = [item.sequence for item in batch.items if item.samples]
        rows = [row for row, sequence in enumerate(sampled) if sequence in self._on_host]
        if not rows:
            return None
        words = np.full((len(sampled), self._num_words), -1, dtype=np.int32)
        for row in rows:
            try:
                self._on_host[sampled[row]].fill_mask(words[row])
            except Exception as error:
                words[row] = -1
                self._failures[sampled[row]] = error
        return HostMasks(rows, words)

    def arena_states(self, items: Iterable[ScheduledSequence]) -> list[int] | None:
        """Return the arena's state of each joining row, after its text so far. None if no row is constrained."""
        if self.device is None or not (self._on_device or self._on_host):
            return None
        return [self._arena_state(self.device.arena, item.sequence) for item in items]

    def advance(
        self, batch: Batch, outputs: list[RowOutput], logprob_of: LogprobOf
    ) -> tuple[list[RowOutput], list[tuple[int, int]]]:
        """Advance the host's automata by a step's tokens.

        Returns the outputs, and (slot, token) of the replaced tokens, which the device must know. In the outputs, some
        tokens are replaced so that their texts can be finished, and some are followed by forced ones.
        """
        if not self._on_host:
            return outputs, []
        result, replaced = list(outputs), []
        num_sampled = 0
        for i, (item, output) in enumerate(zip(batch.items, outputs, strict=True)):
            sequence, row = item.sequence, num_sampled
            num_sampled += item.samples
            automaton = self._on_host.get(sequence)
            if automaton is None or not output.token_ids or sequence.is_finished:
                continue
            (sampled,) = output.token_ids
            try:
                token, *run = self._advance(automaton, sampled, len(outputs))
            except Exception as error:
                self._failures[sequence] = error
                continue
            if token != sampled:
                logprobs = None if output.logprobs is None else (logprob_of(row, token),)
                result[i] = replace(output, token_ids=(token,), logprobs=logprobs)
                assert sequence.slot is not None
                replaced.append((sequence.slot, token))
            if run:
                result[i] = RowOutput((token, *run))
        return result, replaced

    def _advance(self, automaton: HostAutomaton, sampled: int, num_rows: int) -> list[int]:
        """Return the token taken, and the forced tokens that are appended to it.

        A forced run without a gain in a step of `num_rows` rows is left to decoding, which gives the same tokens.
        """
        token = automaton.take(sampled)
        run = automaton.forced_run(token)
        if not run or not self._computes_run(len(run), num_rows, automaton.sequence.num_tokens + 1):
            return [token]
        automaton.append(run)
        return [token, *run]

    def _arena_state(self, arena: GrammarArena, sequence: Sequence) -> int:
        if sequence in self._on_host:
            assert sequence.slot is not None
            return arena.host_state(sequence.slot)
        base, grammar = self._on_device.get(sequence), sequence.request.grammar
        if base is None or grammar is None:
            return FREE_STATE
        state = state_after(grammar, sequence.output_ids)  # after a preemption there are some
        return arena.final_state if state is None else base + state
