"""Ramet: a language for LLM programs, a compiler that makes them prefix-sharing request graphs, and their runtime."""
