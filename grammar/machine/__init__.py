"""The machine under every grammar: automaton, vocabulary, token masks, matcher."""
