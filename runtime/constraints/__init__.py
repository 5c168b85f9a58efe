"""Which automaton state every constrained sequence is in, on the host or on the device."""
