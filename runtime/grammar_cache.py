"""Where programs get their grammars: the grammar engine's compile service, for one tokenizer."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from ramet.lang.ir import Constraint

if TYPE_CHECKING:
    from ramet.grammar import CompiledGrammar, Vocabulary
    from ramet.grammar.service import CompileService


class VocabularySource(Protocol):
    @property
    def token_bytes(self) -> list[bytes]: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...


class GrammarCache:
    """Compiled constraints of one tokenizer's vocabulary. Thread-safe.

    The grammar engine is loaded, and its compile service started, at the first constraint. The service keeps what it
    compiled, and limits time and memory.
    """

    def __init__(self, tokenizer: VocabularySource) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._service: CompileService | None = None
        self._vocabulary: Vocabulary | None = None

    def get(self, constraint: Constraint) -> Future[CompiledGrammar]:
        """Return the grammar's future at once. It raises GrammarError and its subclasses."""
        with self._lock:
            if self._service is None or self._vocabulary is None:
                from ramet.grammar import Vocabulary
                from ramet.grammar.service import CompileService

                source = self._tokenizer
                self._vocabulary = Vocabulary(source.token_bytes, source.eos_ids, source.special_ids, source.vocab_size)
                self._service = CompileService()
                weakref.finalize(self, self._service.close).atexit = False
            options = {"mode": "declared_order"} if constraint.in_order else {}
            return self._service.submit(constraint.kind, constraint.source, self._vocabulary, **options)

    def close(self) -> None:
        """Give up what is being compiled, and end the service's threads."""
        with self._lock:
            if self._service is not None:
                self._service.close()
