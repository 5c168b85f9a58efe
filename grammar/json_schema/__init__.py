"""Compiles JSON schemas to frames of the machine."""
