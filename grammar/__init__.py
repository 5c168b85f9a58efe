"""Constraints compiled to token masks. The names below are loaded when they are first used: compiling needs numba."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ramet.grammar.machine.automaton import Limits as Limits
    from ramet.grammar.machine.compiled_grammar import CompiledGrammar as CompiledGrammar
    from ramet.grammar.machine.compiled_grammar import DeviceTables as DeviceTables
    from ramet.grammar.machine.compiled_grammar import Matcher as Matcher
    from ramet.grammar.machine.vocabulary import Vocabulary as Vocabulary
    from ramet.grammar.service.sources import compile_constraint as compile_constraint
    from ramet.grammar.service.sources import compile_grammar as compile_grammar

_HOMES = {
    "CompiledGrammar": "ramet.grammar.machine.compiled_grammar",
    "DeviceTables": "ramet.grammar.machine.compiled_grammar",
    "Limits": "ramet.grammar.machine.automaton",
    "Matcher": "ramet.grammar.machine.compiled_grammar",
    "Vocabulary": "ramet.grammar.machine.vocabulary",
    "compile_constraint": "ramet.grammar.service.sources",
    "compile_grammar": "ramet.grammar.service.sources",
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
