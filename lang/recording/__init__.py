"""What a running program writes down: its state, values that do not exist yet, forks, roles, generations and tools."""
