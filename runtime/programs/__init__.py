"""Runs the graph of a program inside an engine."""
