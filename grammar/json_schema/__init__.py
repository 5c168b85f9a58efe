"""JSON schema -> intermediate grammar."""
