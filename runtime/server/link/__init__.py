"""The engine in its own process, and how the HTTP process talks to it."""
