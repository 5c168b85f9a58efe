"""Recording: how forks, roles, generations and tool calls that a program appends become nodes of its graph."""
