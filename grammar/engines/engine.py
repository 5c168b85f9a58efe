"""Grammar engines by name: Ramet's own, and others to choose from and to compare with."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ramet.errors import ConfigError, GrammarError
from ramet.grammar.machine.grammar import Grammar
from ramet.grammar.machine.vocabulary import Vocabulary
from ramet.grammar.service.sources import compile_constraint


@dataclass(frozen=True, slots=True)
class GrammarBackend:
    """An engine. kinds: the kinds of constraints that it compiles."""

    name: str
    kinds: frozenset[str]
    _compile: Callable[[str, Any, Vocabulary], Grammar]

    def compile(self, kind: str, source: Any, vocabulary: Vocabulary) -> Grammar:
        """Compile a constraint. JSON is written without white space.

        Raises: GrammarError with the engine's own message.
        """
        if kind not in self.kinds:
            raise GrammarError(f"{self.name} does not compile constraints of kind {kind!r}")
        return self._compile(kind, source, vocabulary)


BACKENDS: Mapping[str, tuple[str, str, frozenset[str]]] = {
    "ramet": (__name__, "ramet", frozenset(("json_schema", "regex", "cfg", "choice", "substring", "tools"))),
    "llguidance": (
        "ramet.grammar.engines.llguidance",
        "llguidance",
        frozenset(("json_schema", "regex", "cfg", "choice", "substring")),
    ),
    "xgrammar": ("ramet.grammar.engines.xgrammar", "xgrammar", frozenset(("json_schema", "regex", "choice"))),
    "outlines": ("ramet.grammar.engines.outlines_core", "outlines-core", frozenset(("json_schema", "regex", "choice"))),
}
"""By name: the module with the engine's `compiler`, the package to install, the kinds of constraints."""


def load_backend(name: str) -> GrammarBackend:
    """Return the engine with this name.

    Raises: ConfigError for an unknown name, or a package that is not installed.
    """
    if name not in BACKENDS:
        raise ConfigError(f"grammar_backend is {name!r} but must be one of {', '.join(BACKENDS)}")
    module, package, kinds = BACKENDS[name]
    try:
        return GrammarBackend(name, kinds, importlib.import_module(module).compiler())
    except ImportError as error:
        raise ConfigError(
            f"grammar_backend {name!r} needs a package that is not installed ({error}): pip install {package}"
        ) from error


def compiler() -> Callable[[str, Any, Vocabulary], Grammar]:
    """Return Ramet's own compiler."""

    def compile_source(kind: str, source: Any, vocabulary: Vocabulary) -> Grammar:
        if kind == "json_schema":
            return compile_constraint(kind, source, vocabulary, whitespace="compact")
        return compile_constraint(kind, source, vocabulary)

    return compile_source
