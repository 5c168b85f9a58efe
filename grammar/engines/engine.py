"""The interface of a grammar engine, and a function that loads an engine by its name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ramet.errors import ConfigError
from ramet.grammar.machine.compiled_grammar import DeviceTables
from ramet.grammar.machine.vocabulary import Vocabulary
from ramet.grammar.service.sources import compile_constraint


class BackendGrammar(Protocol):
    """A grammar of any engine: the runtime's `Grammar`."""

    @property
    def is_closed(self) -> bool: ...

    @property
    def before(self) -> bytes: ...

    def fill_mask(self, state: int, row: NDArray[np.int32]) -> None: ...

    def advance(self, state: int, token: int) -> int | None: ...

    def is_accepting(self, state: int) -> bool: ...

    def is_complete(self, state: int) -> bool: ...

    def is_free(self, state: int) -> bool: ...

    def num_after(self, state: int, *, is_last: bool) -> int: ...

    def ends(self, state: int) -> NDArray[np.int32] | None: ...

    def forced_tokens(self, state: int) -> list[int]: ...

    def joined_token(self, state: int, token: int) -> int: ...

    def shortest_completion(self, state: int) -> list[int]: ...

    def completion_bound(self, state: int) -> int: ...

    def closing_tokens(self, state: int) -> list[int]: ...

    def stays_in_string(self, state: int, token: int) -> bool: ...

    def device_tables(self) -> DeviceTables | None: ...


class GrammarBackend(Protocol):
    """One engine. kinds: the kinds of constraints that it compiles."""

    name: str
    kinds: frozenset[str]

    def compile(self, kind: str, source: Any, vocabulary: Vocabulary) -> BackendGrammar:
        """Compile a constraint. JSON is written without white space.

        Raises: GrammarError with the engine's own message.
        """


class RametBackend:
    """Ramet's own engine."""

    name = "ramet"
    kinds = frozenset(("json_schema", "regex", "cfg", "choice", "substring", "tools"))

    def compile(self, kind: str, source: Any, vocabulary: Vocabulary) -> BackendGrammar:
        if kind == "json_schema":
            return compile_constraint(kind, source, vocabulary, whitespace="compact")
        return compile_constraint(kind, source, vocabulary)


# name -> (module, class, package to install)
BACKENDS: Mapping[str, tuple[str, str, str]] = {
    "ramet": ("ramet.grammar.engines.engine", "RametBackend", "ramet"),
    "llguidance": ("ramet.grammar.engines.llguidance", "LlguidanceBackend", "llguidance"),
    "xgrammar": ("ramet.grammar.engines.xgrammar", "XgrammarBackend", "xgrammar"),
    "outlines": ("ramet.grammar.engines.outlines_core", "OutlinesBackend", "outlines-core"),
}


def load_backend(name: str) -> GrammarBackend:
    """Return the engine with this name.

    Raises: ConfigError for an unknown name, or a package that is not installed.
    """
    if name not in BACKENDS:
        raise ConfigError(f"grammar_backend is {name!r} but must be one of {', '.join(BACKENDS)}")
    module, attribute, package = BACKENDS[name]
    try:
        backend: GrammarBackend = getattr(importlib.import_module(module), attribute)()
    except ImportError as error:
        raise ConfigError(
            f"grammar_backend {name!r} needs a package that is not installed ({error}): pip install {package}"
        ) from error
    return backend
