"""Constraints: JSON schema, regex, CFG -> automaton -> token masks."""
