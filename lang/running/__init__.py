"""One run of a program: its recorded nodes, their outcomes, its tools, and values that may not exist yet."""
