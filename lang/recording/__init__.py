"""What a program appends to its state, and how it is written down: forks, roles, generations, tool calls."""
