"""The engine: its loop, its threads and callers, and how one is made."""
