"""JSON schema -> a place on the machine."""
