"""The grammars that run on the device, and their tables.

Only a closed automaton can run there: one whose states are all known. `close` visits the states, as many as the arena
has room for.
`prepare` finds each state's path to the end of the text, and the states that share a mask. The compiler's caller calls
`close` on a separate thread. If nobody called it, `prepare` runs in turns with the steps (turns.py). So does `acquire`,
which copies the tables and waits for the device. The host masks all other grammars.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ramet.errors import GrammarTooLarge
from ramet.kernels.grammar.arena import GrammarArena
from ramet.kernels.grammar.closing import IMPOSSIBLE, TokenTrie, closing_table, state_after
from ramet.kernels.grammar.mask import AutomatonTables, mask_classes
from ramet.runtime.types import Grammar

if TYPE_CHECKING:
    from ramet.grammar import CompiledGrammar

logger = logging.getLogger(__name__)


class DeviceGrammars:
    """The grammars of one vocabulary for one arena. Keeps tables as long as their grammar.

    `close`, `prepare` and `acquire` may be called on any thread; `release` waits for nothing.
    """

    def __init__(
        self, arena: GrammarArena, token_bytes: Sequence[bytes], end_ids: Iterable[int], special_ids: Iterable[int]
    ) -> None:
        self.arena = arena
        self._token_bytes = token_bytes
        self._never = frozenset(end_ids) | frozenset(special_ids)
        self._longest = max(map(len, token_bytes), default=1)
        self._trie: TokenTrie | None = None
        self._prepared: weakref.WeakKeyDictionary[Grammar, AutomatonTables] = weakref.WeakKeyDictionary()
        self._open: weakref.WeakSet[Grammar] = weakref.WeakSet()  # could not be closed, and are not tried again
        self._lock = threading.Lock()  # held for a moment only
        self._preparing: weakref.WeakKeyDictionary[Grammar, threading.Lock] = weakref.WeakKeyDictionary()
        self._making_trie = threading.Lock()
        self._changing = threading.Lock()  # held by the thread that changes the arena's tables
        self._released: deque[Hashable] = deque()  # keys of the arena that have lost a user, since it was changed

    def close(self, grammar: CompiledGrammar) -> bool:
        """Try to close a grammar that fits the arena, and prepare it. Return whether it can run on the device."""
        if grammar in self._open:
            return False
        start_s = time.monotonic()
        grammar.close(self.arena.max_states)
        tables = self.prepare(grammar)
        if tables is None:
            self._open.add(grammar)
        logger.debug("closing a grammar: %s, %.3f s", tables is not None, time.monotonic() - start_s)
        return tables is not None

    def acquire(self, grammar: Grammar, tables: AutomatonTables, *, has_ends: bool) -> int | None:
        """Copy a grammar to the device, or find it there, for one more sequence. Each call needs a `release`.

        tables: those of `prepare`. has_ends: the masks have ends (see `kernels.grammar.mask`), if the tables have.
        Returns the arena's number of the grammar's state 0; None if there is no room, also where the device has no
        memory for making the masks. Waits for the device, and for other calls, so the engine's thread must not call it.
        """
        if not has_ends:
            tables = replace(tables, has_ends=False)
        with self._changing:
            while self._released:
                self.arena.release(self._released.popleft())
            try:
                return self.arena.acquire((grammar, tables.has_ends), tables)
            except (GrammarTooLarge, torch.OutOfMemoryError) as error:
                logger.info("the host computes the masks of a grammar: %s", error)
                return None

    def forced(self, grammar: Grammar, tables: AutomatonTables, *, has_ends: bool) -> NDArray[np.int32]:
        """Return the arena's `forced` of an acquired grammar. The arguments are those of `acquire`."""
        return self.arena.forced((grammar, has_ends and tables.has_ends))

    def release(self, grammar: Grammar, tables: AutomatonTables, *, has_ends: bool) -> None:
        """Note that a sequence no longer needs the grammar. The arguments are those of `acquire`."""
        self._released.append((grammar, has_ends and tables.has_ends))

    def prepare(self, grammar: Grammar) -> AutomatonTables | None:
        """Return a closed grammar's tables, with paths to the end and mask classes; None if it is open or too large.

        The tables have ends if that makes a difference: if a text may end in some state and also go on.
        """
        with self._lock:
            found = self._prepared.get(grammar)
            if found is not None or not grammar.is_closed:
                return found
            preparing = self._preparing.setdefault(grammar, threading.Lock())
        with preparing:
            with self._lock:
                found = self._prepared.get(grammar)
            if found is None:
                found = self._prepare(grammar)
            if found is not None:
                with self._lock:
                    self._prepared[grammar] = found
            return found

    def _prepare(self, grammar: Grammar) -> AutomatonTables | None:
        tables = grammar.device_tables()
        arena = self.arena
        if tables is None or len(tables.transitions) > arena.max_states:
            return None
        if tables.transitions.size > arena.max_transitions:
            return None
        with self._making_trie:
            if self._trie is None:
                self._trie = TokenTrie.create(self._token_bytes, self._never)
        has_ends = bool((tables.accepting[(tables.transitions >= 0).any(axis=1)] != 0).any())
        closing = closing_table(tables.byte_class, tables.transitions, tables.accepting, self._trie)
        if grammar.before:  # written as it is, by the token that was given back
            closing.token[0] = self._token_bytes.index(grammar.before)
            after = state_after(tables.byte_class, tables.transitions, grammar.before)
            closing.need[0] = min(int(closing.need[after]) + 1, IMPOSSIBLE)
        return AutomatonTables(
            tables.byte_class,
            tables.transitions,
            tables.accepting,
            closing,
            mask_classes(tables.transitions, tables.accepting, self._longest, tables.refused, has_ends=has_ends),
            tables.refused,
            has_ends,
        )

    def state_after(self, tables: AutomatonTables, tokens: list[int], start: int = 0) -> int | None:
        """Return the state of `prepare`d tables after a text that begins in the state `start`.

        Return None past an end token, which a request may ignore.
        """
        if not self._never.isdisjoint(tokens):
            return None
        text = b"".join([self._token_bytes[token] for token in tokens])
        state = state_after(tables.byte_class, tables.transitions, text, start)
        return None if state < 0 else state
