"""The automaton states of constrained sequences, on the host or on the device."""
