"""Automata over bytes and their algebra: numbers, strings, tries, and the pushdown for context-free grammars."""
