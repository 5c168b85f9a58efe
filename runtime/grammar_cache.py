"""Compiled constraints of one vocabulary: each compiled once, off the step loop, by one background thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from ramet.lang.ir import Constraint
from ramet.runtime.types import Grammar

if TYPE_CHECKING:
    from ramet.grammar import Vocabulary


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
    """Constraint -> Grammar. A constraint that does not compile keeps its error, so it is not tried again."""

    def __init__(self, compile_one: Callable[[Constraint], Grammar]) -> None:
        self._compile = compile_one
        self._futures: dict[Constraint, Future[Grammar]] = {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def get(self, constraint: Constraint) -> Future[Grammar]:
        """Return the grammar's future at once."""
        with self._lock:
            future = self._futures.get(constraint)
            if future is None:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(1, thread_name_prefix="ramet-grammar")
                future = self._futures[constraint] = self._pool.submit(self._compile, constraint)
            return future


def compiler(tokenizer: VocabularySource) -> Callable[[Constraint], Grammar]:
    """Return what compiles a constraint for this tokenizer's vocabulary; it loads the grammar engine at first use."""
    vocabulary: list[Vocabulary] = []

    def compile_one(constraint: Constraint) -> Grammar:
        from ramet.grammar import Vocabulary
        from ramet.grammar.sources import compile_constraint

        if not vocabulary:
            ids = (tokenizer.token_bytes, tokenizer.eos_ids, tokenizer.special_ids, tokenizer.vocab_size)
            vocabulary.append(Vocabulary(*ids))
        return compile_constraint(constraint.kind, constraint.source, vocabulary[0])

    return compile_one
