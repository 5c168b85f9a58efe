"""Grammars that people write: regular expressions, Lark, GBNF, choices, substrings."""
