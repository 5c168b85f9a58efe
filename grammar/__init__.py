"""Constraints compiled to token masks. The names below are loaded when they are first used: compiling needs numba."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramet.grammar.machine.compiler import CompiledGrammar as CompiledGrammar
    from ramet.grammar.machine.compiler import DeviceTables as DeviceTables
    from ramet.grammar.machine.compiler import Limits as Limits
    from ramet.grammar.machine.compiler import compile_grammar as compile_grammar
    from ramet.grammar.machine.matcher import Matcher as Matcher
    from ramet.grammar.machine.vocabulary import Vocabulary as Vocabulary
    from ramet.grammar.service.sources import compile_constraint as compile_constraint

_HOMES = {
    "CompiledGrammar": "ramet.grammar.machine.compiler",
    "DeviceTables": "ramet.grammar.machine.compiler",
    "Limits": "ramet.grammar.machine.compiler",
    "Matcher": "ramet.grammar.machine.matcher",
    "Vocabulary": "ramet.grammar.machine.vocabulary",
    "compile_constraint": "ramet.grammar.service.sources",
    "compile_grammar": "ramet.grammar.machine.compiler",
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
