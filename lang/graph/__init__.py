"""The graph of a program: nodes, sampling values, checks, events. Of the language, a runtime imports this alone."""
