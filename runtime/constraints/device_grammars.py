"""The grammars that run on the device, and their tables.

Only a closed automaton can run there: one whose states are all known. `close` visits the states, up to a limit.
`prepare` finds each state's path to the end of the text, and the states that share a mask. The compiler's caller calls
`close` on a separate thread. If nobody called it, `prepare` runs in turns with the steps (turns.py). So the engine's
thread only copies the tables (`acquire`). The host masks all other grammars.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ramet.errors import GrammarTooLarge
from ramet.kernels.grammar.arena import GrammarArena
from ramet.kernels.grammar.closing import TokenTrie, closing_table, state_after
from ramet.kernels.grammar.mask import AutomatonTables, mask_classes
from ramet.runtime.types import Grammar

if TYPE_CHECKING:
    from ramet.grammar import CompiledGrammar

logger = logging.getLogger(__name__)

MAX_STATES = 60_000
MAX_TRANSITIONS = 4_000_000


class DeviceGrammars:
    """The grammars of one vocabulary for one arena. Keeps tables as long as their grammar.

    `close` and `prepare` may be called on any thread. The arena, and with it `acquire` and `release`, belongs to the
    engine's thread.
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

    def close(self, grammar: CompiledGrammar) -> bool:
        """Try to close a grammar within the limits, and prepare it. Return whether it can run on the device."""
        if grammar in self._open:
            return False
        start_s = time.monotonic()
        grammar.close(MAX_STATES)
        tables = self.prepare(grammar)
        if tables is None:
            self._open.add(grammar)
        logger.debug("closing a grammar: %s, %.3f s", tables is not None, time.monotonic() - start_s)
        return tables is not None

    def acquire(self, grammar: Grammar, tables: AutomatonTables) -> int | None:
        """Copy a grammar to the device, or find it there, for one more sequence. Each call needs a `release`.

        tables: those of `prepare`. Returns the arena's number of the grammar's state 0; None if there is no room.
        """
        try:
            return self.arena.acquire(grammar, tables)
        except GrammarTooLarge as error:
            logger.info("the host computes the masks of a grammar: %s", error)
            return None

    def release(self, grammar: Grammar) -> None:
        """Note that a sequence no longer needs the grammar."""
        self.arena.release(grammar)

    def prepare(self, grammar: Grammar) -> AutomatonTables | None:
        """Return a closed grammar's tables, with paths to the end and mask classes; None if it is open or too large."""
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
        if tables is None or tables.transitions.size > MAX_TRANSITIONS or len(tables.transitions) > MAX_STATES:
            return None
        with self._making_trie:
            if self._trie is None:
                self._trie = TokenTrie.create(self._token_bytes, self._never)
        return AutomatonTables(
            tables.byte_class,
            tables.transitions,
            tables.accepting,
            closing_table(tables.byte_class, tables.transitions, tables.accepting, self._trie),
            mask_classes(tables.transitions, tables.accepting, self._longest, tables.refused),
            tables.refused,
        )

    def state_after(self, tables: AutomatonTables, tokens: list[int]) -> int | None:
        """Return the state of `prepare`d tables after a text; None past an end token, which a request may ignore."""
        if not self._never.isdisjoint(tokens):
            return None
        text = b"".join([self._token_bytes[token] for token in tokens])
        state = state_after(tables.byte_class, tables.transitions, text)
        return None if state < 0 else state
