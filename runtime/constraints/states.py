"""The automaton states of constrained sequences, and their work in a step.

A closed grammar runs on the device: its tables are in the arena, and steps mask, advance and finish its sequences
without the host. The host follows the tokens that it reads, to see where a text is complete, and where several tokens
must follow: these are computed in one step. If the next step of the row runs already, the row skips a step for that,
which more than two tokens are worth. All other grammars run on the host, where each of their sequences has a
`HostAutomaton`.

Nobody knows how long a grammar takes for a token, so the engine's thread never waits for it: a row's token, the tokens
that must follow and the next mask are one work, done in turns with the steps (turns.py). While its work is unfinished,
the row's step counts as running, so the row waits and the others go on. A new sequence is scheduled once its first mask
is made. When a work is done does not change its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ramet.grammar.deadline import OutOfTime, time_limit
from ramet.kernels.grammar.arena import FREE_STATE
from ramet.kernels.grammar.closing import IMPOSSIBLE
from ramet.kernels.grammar.mask import AutomatonTables
from ramet.runtime.constraints.device_grammars import DeviceGrammars
from ramet.runtime.constraints.host_automaton import HostAutomaton, is_watched
from ramet.runtime.constraints.incomplete import cut_off, place_of, strings_ended
from ramet.runtime.constraints.turns import GrammarWork, Turns
from ramet.runtime.types import Batch, FinishReason, Grammar, Request, RowOutput, ScheduledSequence, Sequence

if TYPE_CHECKING:
    from ramet.grammar import DeviceTables

# Whether a row's known tokens are better computed in one step: (their number, rows of the step, the row's KV length).
ComputesRun = Callable[[int, int, int], bool]
_AHEAD_S = 0.001  # for the masks of one draft
_MAX_NAMED = 8  # strings that a message names
# Tokens that must follow and are computed in one step, on a device, and what the run of a row counts at least: more of
# them, or more rows with some, and no CUDA graph holds the step. Other rows decode theirs.
_MOST_RUN_TOKENS, _LEAST_RUN_TOKENS = 256, 4
# The log-probability of a token that was not sampled: (the index among the sampled positions, the token).
LogprobOf = Callable[[int, int], float]


@dataclass(slots=True)
class HostMasks:
    """Masks computed by the host. rows: the step's sampled positions that have one. words: int32 [len(rows), W]."""

    rows: list[int]
    words: NDArray[np.int32]


@dataclass(slots=True)
class TakenRows:
    """Rows of steps whose tokens are taken by their grammars.

    In the outputs, some tokens are replaced because the text ends or must be finished, and some are followed by forced
    ones. replaced: sequences whose last token is not the sampled one, which the device must know.
    """

    items: list[ScheduledSequence] = field(default_factory=list)
    outputs: list[RowOutput] = field(default_factory=list)
    replaced: list[Sequence] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _OnDevice:
    """base: the arena's number of the grammar's state 0. has_ends: the request does not ignore the end of its text.
    whole: the tables of `grammar.device_tables()`. forced: what must follow each state, as `GrammarArena.forced`.
    `state`: after the output tokens that were read; None past an end token. `is_held`: the row's next step is planned
    once this one's is read.
    """

    base: int
    tables: AutomatonTables
    whole: DeviceTables
    forced: NDArray[np.int32]
    has_ends: bool
    state: int | None = 0
    is_held: bool = False

    def note_end(self, output: RowOutput) -> None:
        """Note in an output whether the text ends in this state, and what follows it. Past an end token, nothing."""
        if self.state is None:
            output.num_held = output.num_after = 0
            return
        output.num_held, output.num_after = self.whole.num_after[self.state].tolist()
        is_complete = bool(self.whole.is_complete[self.state])
        output.is_complete = is_complete and (self.has_ends or output.num_after > 0)

    def forced_run(self, request: Request, num_output: int) -> tuple[list[int], int | None]:
        """Return the tokens that must follow, after `num_output` tokens of the text, and the state after them.

        The run ends where the device might replace a token, because the text must end within its budget.
        """
        run, state = list[int](), self.state
        if state is None:
            return run, state
        token, after = self.forced[state].tolist()
        if token < 0 or is_watched(request.sampling):
            return run, state
        need = None if self.tables.closing is None else self.tables.closing.need
        num_left = request.max_tokens - num_output
        while token >= 0 and len(run) < num_left and token not in request.stop_ids:
            left = num_left - len(run) - 1
            if need is not None and need[after] > left and need[state] <= left + 1:
                break
            run.append(token)
            state = after
            token, after = self.forced[state].tolist()
        return run, state


class GrammarStates:
    """The grammar states of one engine's sequences. Called on the engine's thread.

    An error of a grammar ends only its own request; `take_failures` returns it.
    """

    def __init__(
        self,
        vocab_size: int,
        computes_run: ComputesRun,
        device: DeviceGrammars | None = None,
        token_bytes: list[bytes] | tuple[bytes, ...] = (),
    ) -> None:
        """`device` None: the host masks all grammars. `token_bytes`: of each token, to name fields in messages."""
        self.device = device
        self._token_bytes = token_bytes
        self._computes_run = computes_run
        self._num_words = -(-vocab_size // 32)
        self._on_host: dict[Sequence, HostAutomaton] = {}
        self._on_device: dict[Sequence, _OnDevice] = {}
        self._failures: dict[Sequence, Exception] = {}
        self._turns = Turns()
        self._works: dict[Sequence, GrammarWork] = {}
        self._joined: list[Sequence] = []
        self._rows = TakenRows()
        self._run_tokens = 0  # of the step that is taken
        self._held: list[Sequence] = []
        self._freed: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Begin to add a new sequence with a grammar: on the device if the grammar is closed and there is room, else on
        the host. `take_joined` returns it once it has joined.
        """
        grammar = sequence.request.grammar
        assert grammar is not None
        device, request = self.device, sequence.request
        params = request.sampling
        has_ends = not params.ignore_eos
        # The device's masks are fixed: texts that may end from some length on, or without an end token, or some of
        # whose strings must, are not for it.
        is_fixed = params.string_tokens is None and not (has_ends and (params.min_tokens or request.end_token is None))
        if device is None or not is_fixed:
            self._add_on_host(sequence, grammar)
            return
        acquired: list[_OnDevice] = []

        def do() -> None:
            tables = device.prepare(grammar)
            base = None if tables is None else device.acquire(grammar, tables, has_ends=has_ends)
            if tables is not None and base is not None:
                whole = grammar.device_tables()
                assert whole is not None
                forced = device.forced(grammar, tables, has_ends=has_ends)
                acquired.append(_OnDevice(base, tables, whole, forced, has_ends))

        def finish() -> None:
            if acquired:
                self._on_device[sequence] = acquired[0]
                self._joined.append(sequence)
            else:
                self._add_on_host(sequence, grammar)

        def drop() -> None:
            for found in acquired:
                device.release(grammar, found.tables, has_ends=has_ends)

        self._begin(sequence, do, finish, drop)

    def _add_on_host(self, sequence: Sequence, grammar: Grammar) -> None:
        automaton = HostAutomaton(sequence, grammar)

        def finish() -> None:
            self._on_host[sequence] = automaton
            self._joined.append(sequence)

        self._begin(sequence, lambda: automaton.begin(self._num_words), finish)

    def release(self, sequence: Sequence) -> None:
        """Remove an ended sequence. Do nothing if it is unknown."""
        work = self._works.pop(sequence, None)
        if work is not None:
            work.cancel()
        self._on_host.pop(sequence, None)
        found = self._on_device.pop(sequence, None)
        if found is not None:
            assert self.device is not None
            assert sequence.request.grammar is not None
            self.device.release(sequence.request.grammar, found.tables, has_ends=found.has_ends)

    def close(self) -> None:
        """End the threads. Unfinished works are dropped."""
        self._turns.close()

    def is_on_host(self, sequence: Sequence) -> bool:
        """Return whether the host masks the sequence, so that it must know each token before the next step."""
        return sequence in self._on_host

    def take_held(self) -> list[Sequence]:
        """Return the sequences whose next tokens the host knows once their running step is read, since the last call.

        No other step of theirs should be launched before; afterwards, `take_freed` returns them.
        """
        held, self._held = self._held, []
        return held

    def take_freed(self) -> list[Sequence]:
        """Return the sequences whose tokens the host need not know before each step any more, since the last call."""
        freed, self._freed = self._freed, []
        return freed

    def take_failures(self) -> dict[Sequence, Exception]:
        """Return the errors of grammars since the last call. The caller must end their sequences."""
        failures, self._failures = self._failures, {}
        return failures

    def why_incomplete(self, sequence: Sequence) -> str | None:
        """Return why a text that `max_tokens` ended does not match its grammar, or which of a text's strings
        `string_tokens` ended; None if nothing is missing.
        """
        is_cut, automaton = sequence.finish_reason is FinishReason.LENGTH, self._on_host.get(sequence)
        if automaton is not None:
            return automaton.incomplete if is_cut and automaton.incomplete else self._strings_ended(automaton)
        found = self._on_device.get(sequence)
        if not is_cut or found is None or self.device is None:
            return None
        tables = found.tables
        state = self.device.state_after(tables, sequence.output_ids)
        if state is None or tables.accepting[state]:
            return None
        shortest = 0 if tables.closing is None else int(tables.closing.need[0])
        return cut_off(sequence.request.max_tokens, 0 if shortest >= IMPOSSIBLE else shortest)

    def was_closed(self, sequence: Sequence) -> bool:
        """Return whether `max_tokens` made a text end that matches its grammar: the model may have wanted more of it.

        The device does not tell which tokens it replaces. There, a text was closed if it took all of `max_tokens`.
        """
        if sequence in self._on_host:
            return self._on_host[sequence].was_closed
        return sequence in self._on_device and len(sequence.output_ids) >= sequence.request.max_tokens

    def _strings_ended(self, automaton: HostAutomaton) -> str | None:
        sequence, limit = automaton.sequence, automaton.sequence.request.sampling.string_tokens
        if limit is None or not automaton.ended_strings:
            return None
        pieces = [self._token_bytes[token] for token in sequence.output_ids] if self._token_bytes else []
        texts = [b"".join(pieces[:end]).decode("utf-8", "replace") for end in automaton.ended_strings[:_MAX_NAMED]]
        return strings_ended(limit, [place_of(text) for text in texts])

    # --- works

    @property
    def has_work(self) -> bool:
        return self._turns.has_work or bool(self._joined or self._rows.items)

    @property
    def num_waiting(self) -> int:
        """Number of sequences that wait for their grammar."""
        return len(self._works)

    def work(self, seconds: float, *, new_only: bool = False) -> None:
        """Let the works of grammars go on for about `seconds`. new_only: only those that have not begun yet."""
        for work in self._turns.give(seconds, to_unfinished=not new_only):
            work.finish(work)

    def take_joined(self) -> list[Sequence]:
        """Return the new sequences that may be scheduled from now on."""
        joined, self._joined = self._joined, []
        return [sequence for sequence in joined if not sequence.is_finished]

    def take_rows(self) -> TakenRows:
        """Return the rows whose works are done since the last call."""
        rows, self._rows = self._rows, TakenRows()
        return rows

    def _begin(
        self,
        sequence: Sequence,
        do: Callable[[], None],
        finish: Callable[[], None],
        drop: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin a work of a sequence. drop: is called instead of `finish` if the sequence has ended meanwhile."""

        def go_on(work: GrammarWork) -> None:
            if sequence.is_finished:
                drop()
                return
            del self._works[sequence]
            if work.error is not None:
                self._failures[sequence] = work.error
            else:
                finish()

        work = self._works[sequence] = GrammarWork(sequence.request.grammar, do, go_on)
        self._turns.add(work)

    # --- a step

    def masks(self, batch: Batch) -> HostMasks | None:
        """Return the masks of the sampled positions; None if the host masks none of them."""
        if not self._on_host:
            return None
        masks: dict[int, NDArray[np.int32] | None] = {}
        num_sampled = 0
        for item in batch.items:
            automaton = self._on_host.get(item.sequence)
            if automaton is not None and item.num_samples:
                ahead = automaton.ahead[: item.num_samples - 1]
                assert len(ahead) == item.num_samples - 1, "drafted tokens without masks"
                masks |= dict(enumerate([automaton.mask, *ahead], num_sampled))
            num_sampled += item.num_samples
        if not masks:
            return None
        words = np.full((len(masks), self._num_words), -1, dtype=np.int32)
        for row, mask in zip(words, masks.values(), strict=True):
            if mask is not None:
                row[:] = mask
        return HostMasks(list(masks), words)

    def look_ahead(self, sequence: Sequence, draft: Seq[int]) -> int:
        """Make masks for a draft of a sequence's next tokens. Return how many of these may be verified.

        An automaton on the device needs none: it is advanced between the positions. There are none where another
        sequence's work has the grammar. The time is limited: a draft is shorter where masks take long.
        """
        automaton = self._on_host.get(sequence)
        if automaton is None:
            return len(draft)
        if self._turns.is_busy(sequence.request.grammar):
            return 0
        try:
            with time_limit(_AHEAD_S, "masks of a draft"), suppress(OutOfTime):
                automaton.look_ahead(draft)
        except Exception as error:  # as where a token is followed, it ends only this request
            self._failures[sequence] = error
            return 0
        return len(automaton.ahead)

    def arena_states(self, items: Iterable[ScheduledSequence]) -> list[int] | None:
        """Return the arena's state of each row after its text so far. None if no row is constrained."""
        device = self.device
        if device is None or not (self._on_device or self._on_host):
            return None
        # Rows that verify drafts have joined long ago.
        return [FREE_STATE if i.num_samples > 1 else self._arena_state(device, i.sequence) for i in items]

    def take(
        self, items: tuple[ScheduledSequence, ...], outputs: list[RowOutput], logprob_of: LogprobOf
    ) -> tuple[list[ScheduledSequence], list[RowOutput]]:
        """Begin to advance the host's automata by a step's tokens. Return the rows that the host does not mask.

        In these rows, texts are marked that are complete, because nothing can follow.
        `take_rows` returns the others once their works are done.
        """
        if not self._on_host and not self._on_device:
            return list(items), outputs
        other_items, other_outputs = [], []
        num_sampled = self._run_tokens = 0
        for item, output in zip(items, outputs, strict=True):
            row = num_sampled
            num_sampled += item.num_samples
            automaton = self._on_host.get(item.sequence)
            if automaton is None or not output.token_ids or item.sequence.is_finished:
                self._read(item, output, len(outputs))
                other_items.append(item)
                other_outputs.append(output)
            else:
                self._follow(automaton, item, output, len(outputs), row, logprob_of)
        return other_items, other_outputs

    def _read(self, item: ScheduledSequence, output: RowOutput, num_rows: int) -> None:
        """Note in the output of a row on the device where its text ends, and what follows it, after its new tokens.

        The token after which the text is complete is the last one. num_rows: of the step.
        """
        sequence = item.sequence
        found = self._on_device.get(sequence)
        if found is None or self.device is None or not output.token_ids or sequence.is_finished:
            return
        was_held, found.is_held = found.is_held, False
        is_end = False
        for count, token in enumerate(output.token_ids, 1):
            is_end = token in sequence.request.stop_ids
            if is_end:  # it is no part of the text
                found.note_end(output)
            if found.state is not None:
                found.state = self.device.state_after(found.tables, [token], found.state)
            if not is_end:
                found.note_end(output)
                if output.is_complete:
                    _cut(output, count)
                    break
        if not is_end and not output.is_complete:
            self._append_forced(found, sequence, output, num_rows, was_held=was_held)
        if found.is_held != was_held:
            (self._held if found.is_held else self._freed).append(sequence)

    def _append_forced(
        self, found: _OnDevice, sequence: Sequence, output: RowOutput, num_rows: int, *, was_held: bool
    ) -> None:
        """Append the tokens that must follow. If a later step of the row is launched, hold the row instead if it pays:
        the row then misses one step.
        """
        num_new = len(output.token_ids)
        run, state = found.forced_run(sequence.request, len(sequence.output_ids) + num_new)
        is_launched = sequence.num_in_flight > 1
        if len(run) <= (0 if not is_launched else 1 if num_rows == 1 else 2):
            return
        if not was_held:
            self._run_tokens += max(len(run) + 1, _LEAST_RUN_TOKENS)
            if self._run_tokens > _MOST_RUN_TOKENS:
                return
        if not self._computes_run(len(run), num_rows, sequence.num_tokens + num_new):
            return
        if is_launched:
            found.is_held = True
            return
        output.token_ids += tuple(run)
        found.state = state
        found.note_end(output)

    def _follow(
        self,
        automaton: HostAutomaton,
        item: ScheduledSequence,
        output: RowOutput,
        num_rows: int,
        row: int,
        logprob_of: LogprobOf,
    ) -> None:
        """Begin the work for a row's sampled token.

        A forced run without a gain in a step of `num_rows` rows is left to decoding, which gives the same tokens.
        """
        sequence = item.sequence
        sampled = output.token_ids
        taken: list[int] = []
        was_free = automaton.is_free

        def is_better(num_forced: int) -> bool:
            return self._computes_run(num_forced, num_rows, sequence.num_tokens + 1)

        def finish() -> None:
            result = _taken(output, tuple(taken), row, logprob_of)
            if taken and taken[-1] != sampled[-1]:
                self._rows.replaced.append(sequence)
            if automaton.num_held or automaton.is_complete:
                result = replace(
                    result,
                    is_complete=automaton.is_complete,
                    num_held=automaton.num_held,
                    num_after=automaton.num_after,
                )
            self._rows.items.append(item)
            self._rows.outputs.append(result)
            if automaton.is_free and (was_free or self.device is None):
                # A device keeps a slot's last mask, so the host writes one that allows everything before it leaves.
                self._on_host.pop(sequence, None)
                self._freed.append(sequence)

        self._begin(sequence, lambda: taken.extend(automaton.follow(sampled, is_better)), finish)

    def _arena_state(self, device: DeviceGrammars, sequence: Sequence) -> int:
        if sequence in self._on_host:
            assert sequence.slot is not None
            return device.arena.host_state(sequence.slot)
        found = self._on_device.get(sequence)
        if found is None:
            return FREE_STATE
        return device.arena.final_state if found.state is None else found.base + found.state


def _cut(output: RowOutput, count: int) -> None:
    """Keep the first `count` tokens of an output."""
    output.token_ids = output.token_ids[:count]
    if output.logprobs is not None and output.top_logprobs is not None:
        output.logprobs, output.top_logprobs = output.logprobs[:count], output.top_logprobs[:count]


def _taken(output: RowOutput, taken: tuple[int, ...], row: int, logprob_of: LogprobOf) -> RowOutput:
    """Return the output of a row whose grammar has taken these tokens. row: of its first sampled position."""
    if taken == output.token_ids:
        return output
    if output.logprobs is None or output.top_logprobs is None or not taken:
        return RowOutput(taken)
    # Requests for log-probabilities have no forced tokens, so there are no more tokens than were sampled.
    pairs = enumerate(zip(taken, output.token_ids, output.logprobs, strict=False), row)
    logprobs = tuple(known if token == own else logprob_of(place, token) for place, (token, own, known) in pairs)
    return replace(output, token_ids=taken, logprobs=logprobs, top_logprobs=output.top_logprobs[: len(taken)])
