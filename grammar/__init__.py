"""Constraints compiled to token masks."""

from ramet.grammar.compiler import CompiledGrammar, DeviceTables, Limits, compile_grammar
from ramet.grammar.matcher import Matcher
from ramet.grammar.sources import compile_constraint
from ramet.grammar.vocabulary import Vocabulary

__all__ = [
    "CompiledGrammar",
    "DeviceTables",
    "Limits",
    "Matcher",
    "Vocabulary",
    "compile_constraint",
    "compile_grammar",
]
