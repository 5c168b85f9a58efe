"""The graph of a program: nodes, sampling values, checks, events. A runtime imports no other part of the language."""
