"""The engine: its loop, its thread, the interface for callers, and its construction."""
