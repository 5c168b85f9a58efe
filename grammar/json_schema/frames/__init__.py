"""JSON values on the machine: the frames that read them and their tables."""
