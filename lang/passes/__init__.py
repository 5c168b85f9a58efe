"""Compiler passes, one module each: Graph -> Graph, or Graph -> annotations."""
