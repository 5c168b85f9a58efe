"""One run of a program: what is recorded and sent, what came of it, its tools, and values that may not exist yet."""
