"""Everything that is compiled for the CPU."""
