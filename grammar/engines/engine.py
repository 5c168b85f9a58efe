"""The interface of a grammar engine, and a function that loads an engine by its name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from ramet.errors import ConfigError
from ramet.grammar.machine.grammar import Grammar
from ramet.grammar.machine.vocabulary import Vocabulary
from ramet.grammar.service.sources import compile_constraint


class GrammarBackend(Protocol):
    """One engine. kinds: the kinds of constraints that it compiles."""

    name: str
    kinds: frozenset[str]

    def compile(self, kind: str, source: Any, vocabulary: Vocabulary) -> Grammar:
        """Compile a constraint. JSON is written without white space.

        Raises: GrammarError with the engine's own message.
        """


class RametBackend:
    """Ramet's own engine."""

    name = "ramet"
    kinds = frozenset(("json_schema", "regex", "cfg", "choice", "substring", "tools"))

    def compile(self, kind: str, source: Any, vocabulary: Vocabulary) -> Grammar:
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
