"""Constraints compiled to token masks. The names below are loaded when they are first used: compiling needs numba."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramet.grammar.compiler import CompiledGrammar as CompiledGrammar
    from ramet.grammar.compiler import DeviceTables as DeviceTables
    from ramet.grammar.compiler import Limits as Limits
    from ramet.grammar.compiler import compile_grammar as compile_grammar
    from ramet.grammar.matcher import Matcher as Matcher
    from ramet.grammar.sources import compile_constraint as compile_constraint
    from ramet.grammar.vocabulary import Vocabulary as Vocabulary

_HOMES = {
    "CompiledGrammar": "ramet.grammar.compiler",
    "DeviceTables": "ramet.grammar.compiler",
    "Limits": "ramet.grammar.compiler",
    "Matcher": "ramet.grammar.matcher",
    "Vocabulary": "ramet.grammar.vocabulary",
    "compile_constraint": "ramet.grammar.sources",
    "compile_grammar": "ramet.grammar.compiler",
}

__all__ = [
    "CompiledGrammar",
    "DeviceTables",
    "Limits",
    "Matcher",
    "Vocabulary",
    "compile_constraint",
    "compile_grammar",
]


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for; type checkers see the imports above
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ramet.grammar' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value
