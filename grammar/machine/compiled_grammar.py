"""A grammar compiled for one vocabulary, and a cursor over it. The runtime asks it for masks and states."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from ramet.errors import GrammarError
from ramet.grammar.deadline import check, time_limit
from ramet.grammar.machine import bitmask
from ramet.grammar.machine.automaton import Machine
from ramet.grammar.machine.canonical import CanonicalTokens
from ramet.grammar.machine.ends import end_tokens
from ramet.grammar.machine.frame import DEAD, LOCAL_BITS, LOCAL_MASK, target
from ramet.grammar.machine.grammar import DeviceTables, Grammar
from ramet.grammar.machine.mask_rows import MaskRows
from ramet.grammar.machine.masks import MaskMaker
from ramet.grammar.machine.walker import ACCEPTED, GOES_ON, REFUSED

_QUOTE = ord('"')
_MAX_KEPT = 1 << 15  # number of answers of each kind that a grammar keeps
_MAX_DERIVED = 16  # grammars made of one that it keeps
_MAX_ANSWERS_ON = 1 << 10  # prefixes for which `goes_on` keeps its answer
_MAX_KEPT_ENDS = 64  # number of distinct rows of end tokens that a grammar keeps
_MAX_CLOSING = 16  # bytes of a closing text, some of which a token may hold
_MAX_CLOSERS = 256  # tokens that are tried to come nearer to the end
_MAX_KEPT_RUN = 16  # states of a forced run whose answer is kept; each keeps the rest of the run

Problem = tuple[str, str, str]
"""(JSON pointer, keyword, reason) of what masks do not ensure."""


class CompiledGrammar:
    """A machine and the state in which texts begin. Implements `Grammar`. Thread-safe.

    A state is an integer, and 0 is the start. A state gets its number when it is first reached, and keeps it. Masks are
    computed once per state; states with equal masks share one row.

    Raises: GrammarError if `start` is DEAD, so that no text matches.
    """

    before = b""  # see Bordered

    def __init__(self, machine: Machine, start: int, unenforced: Sequence[Problem] = ()) -> None:
        if start == DEAD:
            raise GrammarError("the grammar is contradictory: no text matches it")
        self.machine = machine
        self.vocabulary = machine.vocabulary
        self.unenforced = list(unenforced)
        """What masks do not ensure; empty unless `on_unsupported` is "validate"."""
        self._packed: list[int] = [start]
        self._state_of: dict[int, int] = {start: 0}
        self.rows = MaskRows(machine.limits.max_mask_bytes)
        self.rows.add_state()
        # Answers to earlier questions, read without the lock. A decode step evicts the CPU's caches, and a lookup here
        # touches far less memory than computing the answer again.
        self._after: dict[tuple[int, int], int] = {}
        self._joined: dict[tuple[int, int], int] = {}
        self._forced: dict[int, tuple[int, ...]] = {}
        self._completions: dict[int, list[int]] = {}
        self._num_completed = 0  # number of tokens in the completions kept
        self._derived: OrderedDict[Hashable, Grammar] = OrderedDict()
        self._derived_lock = threading.Lock()  # held for a moment only
        self._goes_on: dict[bytes, bool] = {}
        self._complete: dict[int, bool] = {}
        self._ends: dict[int, NDArray[np.int32] | None] = {}
        self._end_rows: dict[bytes, NDArray[np.int32]] = {}
        self._lock = threading.RLock()
        self._masks = MaskMaker(machine, self.rows)
        splits = machine.vocabulary.splits
        self._canonical = None if splits is None else CanonicalTokens(machine, splits)
        self._scratch = np.zeros(4, dtype=np.int64)
        self._device_tables: DeviceTables | None = None

    # --- states

    @property
    def is_closed(self) -> bool:
        return self._device_tables is not None

    @property
    def num_states(self) -> int:
        """Number of states reached so far."""
        return len(self._packed)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the tables and of the masks kept."""
        return self.machine.num_bytes + self.rows.num_bytes

    def packed(self, state: int) -> int:
        """Return the machine's configuration of a state."""
        return self._packed[state]

    def state_number(self, packed: int) -> int:
        """Return the state of a configuration of the machine."""
        found = self._state_of.get(packed)
        if found is None:
            with self._lock:
                found = self._state_of.get(packed)
                if found is None:
                    found = len(self._packed)
                    self._packed.append(packed)
                    self.rows.add_state()
                    self._state_of[packed] = found
        return found

    def advance(self, state: int, token: int) -> int | None:
        """Return the state after `token`; None if it is refused.

        End tokens are not part of the text: the answer is always None.
        """
        found = self._after.get((state, token))
        if found is not None:
            return found
        vocabulary = self.vocabulary
        if token < 0 or token >= len(vocabulary.token_bytes) or token in vocabulary.special_ids:
            return None
        begin, end = vocabulary.offsets[token], vocabulary.offsets[token + 1]
        if begin == end:
            return None
        with self._lock:
            packed = self.machine.run(self._packed[state], vocabulary.flat, begin, end, self._scratch)
        if packed < 0:
            return None
        if len(self._after) >= _MAX_KEPT:
            self._after = {}
        found = self._after[state, token] = self.state_number(packed)
        return found

    def advance_bytes(self, state: int, text: bytes) -> int | None:
        """Return the state after a text; None if it is refused."""
        with self._lock:
            packed = self.machine.run_bytes(self._packed[state], text)
        return None if packed < 0 else self.state_number(packed)

    def is_accepting(self, state: int) -> bool:
        with self._lock:
            return self.machine.accepts(self._packed[state])

    def is_complete(self, state: int) -> bool:
        """Tell whether the text may end here and no byte may follow."""
        found = self._complete.get(state)
        if found is None:
            if len(self._complete) >= _MAX_KEPT:
                self._complete = {}
            with self._lock:
                found = self._complete[state] = self.machine.is_complete(self._packed[state])
        return found

    def is_free(self, state: int) -> bool:
        """Return False: no state allows all tokens."""
        return False

    def num_after(self, state: int, *, is_last: bool) -> int:
        """Return 0: all of the text is the value."""
        return 0

    # --- masks

    def fill_mask(self, state: int, row: NDArray[np.int32]) -> None:
        row[:] = self.mask(state)

    def fill_masks(self, states: list[int], rows: NDArray[np.int32]) -> None:
        """Write the masks of many states: rows int32 [len(states), W]."""
        for i, state in enumerate(states):
            rows[i] = self.mask(state)

    def mask(self, state: int) -> NDArray[np.int32]:
        """Return the mask row of a state, int32 [W]. The row is shared: do not write to it."""
        row = self.rows.of_state[state]
        if row is None:
            with self._lock:
                row = self.rows.again(state)
                if row is None:
                    with time_limit(self.machine.limits.max_time_s):
                        packed = self._packed[state]
                        row = self._masks.make(packed)
                        row = row if self._canonical is None else self._canonical.narrow(packed, row)
                        row = self.rows.keep(state, row)
        return row

    def mask_after(self, state: int, prefix: bytes) -> NDArray[np.int32]:
        """Return the row, int32 [W], of the tokens that begin with `prefix` and go on with what `state` allows.

        A token that is the prefix alone is among them. The row is not kept.
        """
        with self._lock, time_limit(self.machine.limits.max_time_s):
            packed = self._packed[state]
            row = self._masks.after(packed, prefix)
            return row if self._canonical is None else self._canonical.narrow(packed, row, prefix)

    def ends(self, state: int) -> NDArray[np.int32] | None:
        """Return the mask row of the tokens that end the text here (see ends.py). It is shared: do not write to it."""
        return self.unlike(state) if self.is_accepting(state) else None

    def unlike(self, state: int) -> NDArray[np.int32] | None:
        """Return the row of the tokens with which no allowed text begins here, whether or not a text may end here."""
        kept = self._ends
        if state in kept:
            return kept[state]
        with self._lock:
            row = self._find_ends(state)
            if row is not None:
                if len(self._end_rows) >= _MAX_KEPT_ENDS:
                    self._ends, self._end_rows = {}, {}
                row = self._end_rows.setdefault(row.tobytes(), row)
            if len(self._ends) >= _MAX_KEPT:
                self._ends = {}
            self._ends[state] = row
        return row

    def _find_ends(self, state: int) -> NDArray[np.int32] | None:
        machine, packed = self.machine, self._packed[state]

        def read(text: bytes) -> int:
            found = machine.run_bytes(packed, text)
            if found < 0:
                return REFUSED
            return ACCEPTED if machine.accepts(found) else GOES_ON

        allowed = self.mask(state) if self._canonical is None else self._masks.make(packed)  # also odd splits
        with time_limit(machine.limits.max_time_s):
            return end_tokens(self.vocabulary, allowed, read)

    # --- other grammars that are made of this one

    def derived(self, key: Hashable, make: Callable[[], Grammar]) -> Grammar:
        """Return the grammar that was made of this one under a key, or make it. The last 16 used are kept."""
        with self._derived_lock:
            found = self._derived.get(key)
            if found is None:
                found = self._derived[key] = make()
                if len(self._derived) > _MAX_DERIVED:
                    self._derived.popitem(last=False)
            self._derived.move_to_end(key)
        return found

    def known_to_go_on(self, before: bytes) -> bool | None:
        """Return the answer of `goes_on` if it is known, else None. Never waits."""
        return self._goes_on.get(before)

    def refused_after(self, prefix: bytes) -> list[int]:
        """Return the tokens that `mask_after(0, prefix)` refuses, although the grammar allows them, and perhaps others
        that end inside of the prefix.
        """
        with self._lock, time_limit(self.machine.limits.max_time_s):
            return [] if self._canonical is None else self._canonical.refused(self._packed[0], prefix)

    def goes_on(self, before: bytes) -> bool:
        """Return whether tokens begin with `before` and go on as texts begin, for half of all first bytes or more.

        A space before a number is an example of less: there are tokens such as ` -`, but none that hold a digit.
        """
        found = self._goes_on.get(before)
        if found is None:
            row = self.mask_after(0, before)
            tokens = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
            longer = {self.vocabulary.token_bytes[t][len(before) : len(before) + 1] for t in tokens} - {b""}
            firsts = [byte for byte in range(256) if self.advance_bytes(0, bytes((byte,))) is not None]
            found = bool(longer) and 2 * len(longer) >= len(firsts)
            if len(self._goes_on) >= _MAX_ANSWERS_ON:
                self._goes_on = {}
            self._goes_on[before] = found
        return found

    # --- what must follow

    def allowed_tokens(self, state: int) -> NDArray[np.int64]:
        """Return the ids of the allowed tokens, ascending."""
        return np.flatnonzero(np.unpackbits(self.mask(state).view(np.uint8), bitorder="little"))

    def forced_tokens(self, state: int) -> list[int]:
        """Return the tokens that must follow, because no other token is allowed. Stops before the end tokens."""
        found = self._forced.get(state)
        if found is not None:
            return list(found)
        run: list[int] = []
        states: list[int] = []
        while len(run) < 4096:
            states.append(state)
            token = self._only_token(state)
            if token is None:
                break
            following = self.advance(state, token)
            assert following is not None
            run.append(token)
            state = following
        for i, earlier in enumerate(states[:_MAX_KEPT_RUN]):
            if len(self._forced) >= _MAX_KEPT:
                self._forced = {}
            self._forced[earlier] = tuple(run[i:])
        return run

    def _only_token(self, state: int) -> int | None:
        """Return the only token that is allowed; None if several are allowed, or if it is an end token."""
        row = self.mask(state)
        words = np.flatnonzero(row)
        word = int(row[words[0]]) & 0xFFFFFFFF if len(words) == 1 else 0
        if not word or word & (word - 1):
            return None
        token = 32 * int(words[0]) + word.bit_length() - 1
        return None if token in self.vocabulary.eos_ids else token

    def joined_token(self, state: int, token: int) -> int:
        """Return the token to take instead of a sampled one: a longer one if the tokenizer joins it with forced bytes.

        `token` is allowed in `state`. For example, `",` instead of `"` where a comma must follow.
        """
        canonical = self._canonical
        if canonical is None:
            return token
        found = self._joined.get((state, token))
        if found is None:
            after = self.advance(state, token)
            assert after is not None
            if len(self._joined) >= _MAX_KEPT:
                self._joined = {}
            with self._lock, time_limit(self.machine.limits.max_time_s):
                found = canonical.joined(self._packed[state], token, self._packed[after])
            self._joined[state, token] = found
        return found

    def shortest_completion(self, state: int) -> list[int]:
        """Return the tokens of a shortest text that leads to an accepting state, as few tokens as can write it.

        Raises: GrammarError if the vocabulary cannot write the text.
        """
        found = self._completions.get(state)
        if found is not None:
            return list(found)
        with self._lock:
            text = self.machine.closing_bytes(self._packed[state])
        tokens = self.vocabulary.fewest_tokens(text)
        if tokens is None:
            raise GrammarError(f"the vocabulary cannot write the completion {text!r}")
        with self._lock:
            self._num_completed += 1 + len(tokens)
            if self._num_completed > _MAX_KEPT:
                self._completions, self._num_completed = {}, 1 + len(tokens)
            self._completions[state] = tokens
        return list(tokens)

    def completion_bound(self, state: int) -> int:
        """Return an upper bound of len(shortest_completion(state)): its number of bytes. Much cheaper."""
        packed = self._packed[state]
        found = self.machine.known_closing_length(packed)
        if found is not None:
            return found
        with self._lock:
            return self.machine.closing_length(packed)

    def closing_tokens(self, state: int) -> list[int]:
        """Return allowed tokens after which the text is nearer to its end; none where it may end.

        Where many tokens are allowed, only those are tried that end with the beginning of the shortest closing text.
        In a string, for example, these are `"`, `."`, `",` and so on.
        """
        with self._lock:
            text = self.machine.closing_bytes(self._packed[state])
        row, tokens = self.mask(state), list[int]()
        for size in range(1, min(len(text), _MAX_CLOSING) + 1):
            tokens += self.vocabulary.tokens_with_suffix(text[:size])
        found = [token for token in dict.fromkeys(tokens) if bitmask.is_allowed(row, token)]
        if text:
            few = self.allowed_tokens(state)
            found += [token for token in few.tolist() if token not in found] if len(few) <= _MAX_CLOSERS else []
        nearer = []
        for token in found[:_MAX_CLOSERS]:
            after = self.advance(state, token)
            if after is not None and self.completion_bound(after) < len(text):
                nearer.append(token)
        return nearer

    def stays_in_string(self, state: int, token: int) -> bool:
        """Return whether the text is inside of a string of a JSON value, and stays in it through this token."""
        after = self.advance(state, token)
        if after is None or not (self._is_in_string(self._packed[state]) and self._is_in_string(self._packed[after])):
            return False
        text = self.vocabulary.token_bytes[token]
        quotes = [i for i, byte in enumerate(text) if byte == _QUOTE]
        with self._lock:  # a quote that does not end the string is escaped
            return all(self._is_in_string(self.machine.run_bytes(self._packed[state], text[: i + 1])) for i in quotes)

    def _is_in_string(self, packed: int) -> bool:
        return self.machine.frames[packed >> LOCAL_BITS].is_string

    # --- closing

    def close(self, limit: int = 100_000) -> bool:
        """Visit every reachable state, up to `limit`; return True if all were visited. `device_tables` needs that.

        Raises: OutOfTime past the thread's limit, if it has one.
        """
        if self._device_tables is None:
            with self._lock:
                self._device_tables = self._visit_all(limit)
        return self.is_closed

    def device_tables(self) -> DeviceTables | None:
        """Return the automaton as flat tables, with the same state numbers; None if it is not closed (see `close`)."""
        return self._device_tables

    def _visit_all(self, limit: int) -> DeviceTables | None:
        """Visit all states breadth first; return None past the limit or if a frame has memory."""
        machine = self.machine
        wide: list[NDArray[np.int32]] = []
        state = 0
        while state < self.num_states:
            if self.num_states > limit:
                return None
            check()
            packed = self._packed[state]
            instance, local = packed >> LOCAL_BITS, packed & LOCAL_MASK
            if machine.frames[instance].has_memory:
                return None
            table = machine.frames[instance].table
            targets = np.full(table.rows.shape[1], DEAD, dtype=np.int64)
            row = np.full(256, -1, dtype=np.int32)
            again: list[int] = []
            for c, entry in enumerate(table.rows[local].tolist()):
                if entry >= 0:
                    targets[c] = self.state_number(target(instance, entry))
                elif entry < -1:
                    code = -2 - entry
                    if code & 1:
                        again.append(c)
                        continue
                    found = machine.exit_target(instance, code >> 1)
                    targets[c] = self.state_number(found) if found >= 0 else DEAD
            row[:] = targets[table.byte_class]
            for c in again:
                for byte in np.flatnonzero(table.byte_class == c).tolist():
                    found = machine.step(packed, byte)
                    row[byte] = self.state_number(found) if found >= 0 else DEAD
            wide.append(row)
            state += 1
        columns = np.ascontiguousarray(np.stack(wide).T)
        classes: dict[bytes, int] = {}
        byte_class = np.array(
            [classes.setdefault(column.tobytes(), len(classes)) for column in columns], dtype=np.uint8
        )
        first = [byte_class.tolist().index(number) for number in range(len(classes))]
        accepting = np.array([machine.accepts(p) for p in self._packed])
        return DeviceTables(
            byte_class=byte_class,
            transitions=np.ascontiguousarray(columns[first].T),
            accepting=accepting.astype(np.uint8),
            refused=self._all_refused(),
            is_complete=accepting & (columns < 0).all(axis=0),
            num_after=np.zeros((len(wide), 2), dtype=np.uint8),
        )

    def _all_refused(self) -> NDArray[np.int32]:
        """Return the pairs (state, token) of all states, as `DeviceTables` has them."""
        pairs: list[tuple[int, int]] = []
        if self._canonical is not None:
            for state, packed in enumerate(self._packed):
                with time_limit(self.machine.limits.max_time_s):
                    pairs += [(state, token) for token in sorted(self._canonical.refused(packed))]
        return np.array(pairs, dtype=np.int32).reshape(-1, 2)


class Matcher:
    """Follows one text. The state is an integer, so `fork` costs nothing."""

    __slots__ = ("_history", "grammar", "state")

    def __init__(self, grammar: CompiledGrammar, state: int = 0) -> None:
        self.grammar = grammar
        self.state = state
        self._history: list[int] = []

    def mask(self) -> NDArray[np.int32]:
        """Return the mask of the current state, int32 [W]. It is shared: do not write to it."""
        return self.grammar.mask(self.state)

    def advance(self, token: int) -> bool:
        """Take a token; return False and change nothing if it is refused."""
        following = self.grammar.advance(self.state, token)
        if following is None:
            return False
        self._history.append(self.state)
        self.state = following
        return True

    def rollback(self, num_tokens: int) -> None:
        """Undo the last tokens.

        Raises: ValueError if fewer were taken.
        """
        if num_tokens < 0 or num_tokens > len(self._history):
            raise ValueError(f"cannot undo {num_tokens} tokens: {len(self._history)} were taken")
        if num_tokens:
            self.state = self._history[-num_tokens]
            del self._history[-num_tokens:]

    def reset(self) -> None:
        """Return to the state before the first token."""
        self.rollback(len(self._history))

    def fork(self) -> Matcher:
        """Return a second cursor in the same state, without history."""
        return Matcher(self.grammar, self.state)

    @property
    def is_accepting(self) -> bool:
        return self.grammar.is_accepting(self.state)

    def forced_tokens(self) -> list[int]:
        return self.grammar.forced_tokens(self.state)
