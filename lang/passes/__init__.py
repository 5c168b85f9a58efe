"""Compiler passes, one in each module. A pass maps a graph to a graph, or to annotations."""
