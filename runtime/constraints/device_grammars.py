"""Which grammars run on the device: closed automata, with all that the host can prepare of them off the step loop.

`close` visits every state of a grammar (bounded), `prepare` finds its ways out and which states share a mask. Both are
called by whoever compiles; the engine then only copies. Grammars that stay open, or are too large, keep host masks.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from ramet.kernels.grammar.closing import TokenTrie, closing_table
from ramet.kernels.grammar.mask import AutomatonTables, mask_classes
from ramet.runtime.types import Grammar

logger = logging.getLogger(__name__)

MAX_STATES = 60_000
MAX_TRANSITIONS = 4_000_000


@runtime_checkable
class Closable(Protocol):
    """A grammar whose states can all be visited."""

    def close(self, limit: int = ...) -> bool: ...


class DeviceGrammars:
    """Prepares grammars of one vocabulary for an arena. Thread-safe; keeps what it prepared as long as the grammar."""

    def __init__(self, token_bytes: Sequence[bytes], end_ids: Iterable[int], special_ids: Iterable[int]) -> None:
        self._token_bytes = token_bytes
        self._never = frozenset(end_ids) | frozenset(special_ids)
        self._longest = max(map(len, token_bytes), default=1)
        self._trie: TokenTrie | None = None
        self._prepared: weakref.WeakKeyDictionary[Grammar, AutomatonTables] = weakref.WeakKeyDictionary()
        self._open: weakref.WeakSet[Grammar] = weakref.WeakSet()  # those that could not be closed: not tried again
        self._lock = threading.Lock()

    def close(self, grammar: Grammar) -> bool:
        """Try to close a grammar within the limits, and prepare it; True where it can run on the device."""
        if grammar in self._open:
            return False
        start_s = time.monotonic()
        if not grammar.is_closed and isinstance(grammar, Closable):
            grammar.close(MAX_STATES)
        tables = self.prepare(grammar)
        if tables is None:
            self._open.add(grammar)
        logger.debug("closing a grammar: %s, %.3f s", tables is not None, time.monotonic() - start_s)
        return tables is not None

    def prepare(self, grammar: Grammar) -> AutomatonTables | None:
        """The tables of a closed grammar with its ways out and classes of masks; None where it is open or too large."""
        with self._lock:
            found = self._prepared.get(grammar)
            if found is not None:
                return found
            tables = grammar.device_tables() if grammar.is_closed else None
            if tables is None or tables.transitions.size > MAX_TRANSITIONS or len(tables.transitions) > MAX_STATES:
                return None
            if self._trie is None:
                self._trie = TokenTrie.create(self._token_bytes, self._never)
            prepared = AutomatonTables(
                tables.byte_class,
                tables.transitions,
                tables.accepting,
                closing_table(tables.byte_class, tables.transitions, tables.accepting, self._trie),
                mask_classes(tables.transitions, tables.accepting, self._longest),
            )
            self._prepared[grammar] = prepared
            return prepared
