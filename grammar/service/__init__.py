"""Compiling for others: every kind of source, on worker threads, with limits and caches."""
